//! The conformance suite over SQLite, and what only SQLite promises.

mod cost;

use super::*;
use crate::ledger::conformance::{Store, cancelled, get, granted, one, retry, suite, worker};
use crate::ledger::{SCHEMA_VERSION, Transacted, open};
use crate::state::{Event, TRANSITIONS, next};
use crate::task::Json;

async fn store() -> Store {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("sqlite://{}", folder.path().join("ledger.db").display());
    Store::new([open(&address).await.unwrap(), open(&address).await.unwrap()], folder)
}

suite!(store);

#[tokio::test]
async fn a_newer_schema_is_refused_in_clear_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    drop(SqliteLedger::open(&path).await.unwrap());
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
    let error = SqliteLedger::open(&path).await.unwrap_err();
    let told = error.to_string();
    assert!(matches!(error, LedgerError::NewerSchema { .. }), "{told}");
    let versions = format!("schema version {}, but this release knows only up to {SCHEMA_VERSION}", SCHEMA_VERSION + 1);
    assert!(told.contains(&versions), "{told}");
}

/// A version is no proof, and a file that is another application's is left as it is.
#[tokio::test]
async fn a_file_of_another_application_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (name, sql, table) in [
        ("versioned.db", "CREATE TABLE people (name); PRAGMA user_version = 10", "tasks"),
        ("tasks.db", "CREATE TABLE tasks (title)", "tasks"),
        ("both.db", "CREATE TABLE tasks (title, fence); PRAGMA user_version = 3", "task_args"),
    ] {
        let path = folder.path().join(name);
        rusqlite::Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = SqliteLedger::open(&path).await.unwrap_err();
        assert!(matches!(&error, LedgerError::Unsuitable(told) if told.contains(&format!("table {table}"))), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before, "{name}");
    }
    let path = folder.path().join("people.db");
    rusqlite::Connection::open(&path).unwrap().execute_batch("CREATE TABLE people (name)").unwrap();
    SqliteLedger::open(&path).await.unwrap();
}

/// What an earlier release has recorded goes on under this one.
#[tokio::test]
async fn an_older_schema_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch(include_str!("../migrations/sqlite/0001_ledger.sql")).unwrap();
    raw.pragma_update(None, "user_version", 1).unwrap();
    let id = TaskId::new();
    let insert = "INSERT INTO tasks (id, kind, queue, state, max_attempts, created_at, run_at, due_at)
                  VALUES (?1, 'test.work', 'default', 2, 3, 1, 1, NULL)";
    raw.execute(insert, [id.0.as_bytes().as_slice()]).unwrap();
    raw.execute("INSERT INTO task_args (id, args) VALUES (?1, '{}')", [id.0.as_bytes().as_slice()]).unwrap();
    drop(raw);
    let ledger = SqliteLedger::open(&path).await.unwrap();
    assert_eq!(get(&ledger, id).await.cancel_requested_at, None);
    assert_eq!(cancelled(&ledger, id, "old").await, State::Queued);
    assert_eq!(get(&ledger, id).await.state, State::Cancelled);
}

/// A table that a migration adds is one that no handler's work writes to.
#[tokio::test]
async fn every_table_of_the_ledger_is_kept_from_works() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    drop(SqliteLedger::open(&path).await.unwrap());
    let raw = rusqlite::Connection::open(&path).unwrap();
    let mut tables = raw.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").unwrap();
    let tables: Vec<String> = tables.query_map([], |row| row.get(0)).unwrap().collect::<rusqlite::Result<_>>().unwrap();
    assert_eq!(tables, super::transact::TABLES);
}

/// Producers and workers are often started by one command, on a file that is not there yet.
#[test]
fn processes_that_start_at_once_on_a_new_file_all_open_it() {
    const AT_ONCE: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    for round in 0..100 {
        let path = folder.path().join(format!("{round}.db"));
        let ready = std::sync::Barrier::new(AT_ONCE);
        std::thread::scope(|scope| {
            let open = || {
                ready.wait();
                schema::open_writer(&path)
            };
            let opening: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(open)).collect();
            for one in opening {
                one.join().unwrap().unwrap();
            }
        });
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_named() {
    let error = open("sqlite:///nowhere/at/all/ledger.db").await.unwrap_err().to_string();
    assert!(error.contains("/nowhere/at/all/ledger.db"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no.db");
    std::fs::write(&path, "this is no database, and long enough to have been one").unwrap();
    let error = SqliteLedger::open(&path).await.unwrap_err().to_string();
    assert!(error.contains("no.db") && error.contains("not a database"), "{error}");
}

#[tokio::test]
async fn commits_are_synced_and_the_log_is_write_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let connection = schema::open_writer(&path).unwrap();
    let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0));
    assert_eq!(pragma("journal_mode").unwrap(), rusqlite::types::Value::Text("wal".to_owned()));
    assert_eq!(pragma("synchronous").unwrap(), rusqlite::types::Value::Integer(2), "2 is FULL");
}

/// The SQL of this module holds the codes of states; they must be those of the state machine.
#[test]
fn the_codes_in_the_sql_are_those_of_the_machine() {
    let from = |event| {
        let mut codes: Vec<_> =
            TRANSITIONS.iter().filter(|(_, by, _)| *by == event).map(|(from, ..)| from.code()).collect();
        codes.sort_unstable();
        codes
    };
    assert_eq!(from(Event::Claim), [0, 1, 2, 4]);
    assert_eq!(from(Event::PutBack), [0, 1, 2, 4]);
    assert_eq!(from(Event::MarkQueued), [0, 1, 4]);
    assert_eq!(from(Event::Move), [0, 1, 2, 4]);
    assert_eq!(next(State::Queued, Event::Move), Some(State::Accepted));
    assert_eq!(from(Event::Strand), [2]);
    assert_eq!(from(Event::Cancel), [0, 1, 2, 3, 4]);
    assert_eq!(State::Cancelled.code(), 6);
    assert_eq!(from(Event::Replay), [1, 4, 6, 7]);
    assert_eq!(from(Event::Complete), [3]);
    assert_eq!(State::ALL.into_iter().filter(|state| state.is_final()).map(State::code).min(), Some(5));
}

#[tokio::test]
async fn a_write_that_fails_takes_nobody_along() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let connection = schema::open_writer(&path).unwrap();
    let writer = Writer::spawn(connection, Arc::new(super::guard::Guard::of(&path))).unwrap();
    let good = |name: &'static str| {
        writer.write(1, move |db| db.execute("INSERT INTO queues (name, head_at) VALUES (?1, 0)", [name]))
    };
    let bad = writer.write(1, |db| db.execute("INSERT INTO nowhere VALUES (1)", []));
    let (before, failed, after) = tokio::join!(good("before"), bad, good("after"));
    assert_eq!((before.unwrap(), after.unwrap()), (1, 1));
    assert!(failed.unwrap_err().to_string().contains("nowhere"));
}

/// Its caller has given up while the work was under way: the settlement passes behind it, and finds what it did.
#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_waits_behind_a_transaction_of_unknown_end() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = SqliteLedger::open(&folder.path().join("ledger.db")).await.unwrap();
    let (id, worker) = (one(&ledger).await, worker(&ledger).await);
    let fence = granted(&ledger, id, worker).await.fence;
    let (finish, told) = std::sync::mpsc::channel::<()>();
    let transacted = ledger
        .transact(id, fence, move |_| {
            told.recv().unwrap();
            Ok::<_, ()>(Json::of(&"late").unwrap())
        })
        .await;
    assert!(matches!(transacted, Transacted::Unknown(_)), "{transacted:?}");
    let settlement = Settlement { id, fence, transition: retry(Duration::ZERO, "no answer") };
    let (settled, ()) = tokio::join!(ledger.settle(settlement), async { finish.send(()).unwrap() });
    let task = get(&ledger, id).await;
    assert_eq!((settled.unwrap(), task.state, task.fence), (Settled::Fenced, State::Completed, fence));
    assert_eq!(task.result.unwrap().as_str(), "\"late\"");
}

/// Works that take their time share a transaction only until others have waited long enough.
#[tokio::test(flavor = "multi_thread")]
async fn slow_transactions_let_a_renewal_pass() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = SqliteLedger::open(&folder.path().join("ledger.db")).await.unwrap();
    let holder = worker(&ledger).await;
    let slow = |_: &rusqlite::Connection| {
        std::thread::sleep(Duration::from_millis(150));
        Err::<Json, _>(())
    };
    let works = futures::future::join_all((0..16).map(|_| ledger.transact(TaskId::new(), Fence(0), slow)));
    let renewals = async {
        for _ in 0..4 {
            let began = std::time::Instant::now();
            let renewal = Renewal { worker: holder, ttl: Duration::from_secs(60), running: 0, heads: Vec::new() };
            assert_eq!(ledger.renew(renewal).await.unwrap(), Renewed::Held);
            assert!(began.elapsed() < Duration::from_millis(750), "a renewal took {:?}", began.elapsed());
        }
    };
    let (ended, ()) = tokio::join!(works, renewals);
    assert!(ended.iter().all(|it| matches!(it, Transacted::Failed(()))), "{ended:?}");
}

fn plan(db: &rusqlite::Connection, sql: &str) -> String {
    let mut statement = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
    let numbers = statement.parameter_count();
    for number in 1..=numbers {
        statement.raw_bind_parameter(number, 1).unwrap();
    }
    let (mut rows, mut steps) = (statement.raw_query(), Vec::new());
    while let Some(row) = rows.next().unwrap() {
        steps.push(row.get::<_, String>(3).unwrap());
    }
    steps.join("\n")
}

/// A list of unfinished tasks never comes to a finished one, and a filter never to the args of what it leaves out.
#[tokio::test]
async fn listing_reads_no_more_than_it_must() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    drop(SqliteLedger::open(&path).await.unwrap());
    let db = rusqlite::Connection::open(&path).unwrap();
    for (sql, index) in [
        (list::DUE, "tasks_due"),
        (list::HELD, "tasks_held"),
        (list::QUEUED, "tasks_queued"),
        (list::RUNNING, "tasks_running"),
    ] {
        let plan = plan(&db, sql);
        assert!(plan.contains(&format!("INDEX {index}")), "{plan}");
    }
    let all = ListQuery {
        tags: vec![("a".to_owned(), "b".to_owned()), ("c".to_owned(), "d".to_owned())],
        error: Some("no".to_owned()),
        ..ListQuery::default()
    };
    let states = [None, Some(State::Completed), Some(State::Discarded)];
    for state in states {
        let plan = plan(&db, &list::scan(&ListQuery { state, ..all.clone() }));
        assert!(!plan.contains("task_args") && !plan.contains("TEMP B-TREE"), "{plan}");
    }
}

/// A page is given no more than its time: it ends where it has come to, and the next goes on from there.
#[tokio::test]
async fn all_pages_together_are_all_tasks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let ledger = SqliteLedger::open(&path).await.unwrap();
    for _ in 0..3 {
        one(&ledger).await;
    }
    let db = rusqlite::Connection::open(&path).unwrap();
    let query = ListQuery { limit: 10, ..ListQuery::default() };
    let (mut before, mut found) = (None, 0);
    for _ in 0..4 {
        let page = list::list_within(&db, &ListQuery { before, ..query.clone() }, Duration::ZERO).unwrap();
        assert!(page.tasks.len() <= 1, "{page:?}");
        (found, before) = (found + page.tasks.len(), page.next);
        if before.is_none() {
            break;
        }
    }
    assert_eq!((found, before), (3, None));
}

/// However long those wait who ask for much, what keeps the whole going has readers of its own.
#[tokio::test(flavor = "multi_thread")]
async fn slow_reads_hold_up_no_upkeep() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = Arc::new(SqliteLedger::open(&folder.path().join("ledger.db")).await.unwrap());
    one(&*ledger).await;
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let slow: Vec<_> = (0..8)
        .map(|_| {
            let (ledger, held, begun) = (Arc::clone(&ledger), Arc::clone(&held), begun.clone());
            tokio::spawn(async move {
                let wait = move |_: &rusqlite::Connection| {
                    let _ = begun.send(());
                    let _ = held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv();
                    Ok(())
                };
                ledger.readers.read(wait).await
            })
        })
        .collect();
    begins.recv().await.unwrap();
    begins.recv().await.unwrap();
    ledger.ping().await.unwrap();
    assert!(ledger.next_due().await.unwrap().is_some());
    assert_eq!(ledger.abandoned(1).await.unwrap(), []);
    assert_eq!(ledger.due_schedules(1).await.unwrap().due.len(), 0);
    drop(release);
    for one in slow {
        let _ = one.await.unwrap();
    }
}

#[tokio::test]
async fn a_file_that_is_replaced_or_deleted_takes_nothing_more() {
    for suffix in ["", "-wal", "-shm"] {
        let folder = tempfile::tempdir().unwrap();
        let (path, aside) = (folder.path().join("ledger.db"), folder.path().join("aside"));
        let ledger = SqliteLedger::open(&path).await.unwrap();
        ledger.ping().await.unwrap();
        let file = super::guard::with_suffix(&path, suffix);
        std::fs::rename(&file, &aside).unwrap();
        let broken = async || {
            let written = ledger.believe_clock(jiff::Timestamp::now()).await.unwrap_err();
            assert!(matches!(&written, LedgerError::Replaced(which) if *which == file), "{written}");
            assert!(!written.is_retryable() && written.is_broken());
            assert!(matches!(ledger.clock().await, Err(LedgerError::Replaced(_))));
            assert!(matches!(ledger.ping().await, Err(LedgerError::Replaced(_))));
        };
        broken().await;
        std::fs::copy(&aside, &file).unwrap();
        broken().await;
        std::fs::rename(&aside, &file).unwrap();
        ledger.ping().await.expect("put back");
        ledger.believe_clock(jiff::Timestamp::now()).await.unwrap();
    }
}

#[tokio::test]
async fn damage_is_told_from_what_passes_and_makes_unready() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    drop(SqliteLedger::open(&path).await.unwrap());
    let other = rusqlite::Connection::open(&path).unwrap();
    let root = "SELECT (rootpage - 1) * page_size, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'queue_retention'";
    let (at, size): (i64, u16) = other.query_row(root, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    other.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(other);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xff; size.into()], at.unsigned_abs()).unwrap();
    let ledger = SqliteLedger::open(&path).await.unwrap();
    ledger.ping().await.unwrap();
    let retention = [(crate::task::QueueName::default(), std::time::Duration::from_secs(9))];
    let error = ledger.set_retention(retention.into()).await.unwrap_err();
    assert!(matches!(error, LedgerError::Damaged(_)), "{error}");
    assert!(error.to_string().contains("restore a backup") && !error.is_retryable(), "{error}");
    assert!(matches!(ledger.ping().await, Err(LedgerError::Damaged(_))));
    drop(ledger);
    std::fs::write(folder.path().join("no.db"), "this is no database, and long enough to have been one").unwrap();
    let error = SqliteLedger::open(&folder.path().join("no.db")).await.unwrap_err();
    assert!(matches!(&error, LedgerError::Damaged(what) if what.contains("not a database")), "{error}");
}

#[tokio::test]
async fn readiness_follows_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let ledger = SqliteLedger::open(&path).await.unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = ledger.ping().await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    other.execute_batch("ROLLBACK").unwrap();
    ledger.ping().await.unwrap();
}

#[tokio::test]
async fn the_three_files_are_their_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let ledger = SqliteLedger::open(&path).await.unwrap();
    let mode = |suffix| super::guard::with_suffix(&path, suffix).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(["", "-wal", "-shm"].map(mode), [0o600; 3]);
    // Somebody may share it on purpose.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).unwrap();
    drop(ledger);
    SqliteLedger::open(&path).await.unwrap();
    assert_eq!(mode(""), 0o660);
}
