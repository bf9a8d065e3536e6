//! The suite on PostgreSQL, and what only a server can do to a ledger.

mod cost;
mod layout;
mod server;
mod sessions;

use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use futures::join;
use sqlx::{AssertSqlSafe, Connection, Row};
use tokio::net::TcpListener;

use self::server::Database;
use super::PostgresLedger;
use super::prune::{EXPIRE_RESULTS, NEXT_QUEUE, PRUNE_MEMBERS, PRUNE_QUEUE};
use crate::ledger::conformance::{
    HOUR, Store, claim, complete, get, granted, mark_queued, new_task, one, put_back, recorded, refused, request,
    settle, submission, until, worker,
};
use crate::ledger::{
    CALL_TIMEOUT, Claim, Ledger, LedgerError, Recorded, Refusal, Renewal, Renewed, SCHEMA_VERSION, Settled, Settlement,
    open,
};
use crate::state::State;
use crate::task::Fence;

async fn store() -> Store {
    let database = Database::create().await;
    let handles = [open(&database.url()).await.unwrap(), open(&database.url()).await.unwrap()];
    Store::new(handles, database)
}

mod promises {
    use super::store;

    crate::ledger::conformance::suite!(store);
}

async fn ledger() -> (PostgresLedger, Database) {
    let database = Database::create().await;
    (PostgresLedger::connect(&database.url()).await.unwrap(), database)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_processes_may_start_at_once() {
    let database = Database::create().await;
    let url = database.url();
    try_join_all((0..12).map(|_| PostgresLedger::connect(&url))).await.unwrap();
    let sql = "SELECT count(*), max(version) FROM schema_version";
    let (rows, version): (i64, i64) = sqlx::query_as(sql).fetch_one(&mut database.connect().await).await.unwrap();
    assert_eq!((rows, version), (1, SCHEMA_VERSION));
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let (_, database) = ledger().await;
    let mut connection = database.connect().await;
    let newer = SCHEMA_VERSION + 1;
    sqlx::query("INSERT INTO schema_version VALUES ($1)").bind(newer).execute(&mut connection).await.unwrap();
    let error = PostgresLedger::connect(&database.url()).await.unwrap_err();
    assert!(matches!(error, LedgerError::NewerSchema { found, known: SCHEMA_VERSION } if found == newer), "{error}");
}

#[tokio::test]
async fn what_is_wrong_with_an_address_is_told_without_its_password() {
    let database = Database::create().await;
    let unknown_database = database.url().replace("/test_", "/none_");
    let error = PostgresLedger::connect(&unknown_database).await.unwrap_err();
    assert!(matches!(error, LedgerError::Unsuitable(_)) && error.to_string().contains("none_"), "{error}");
    for url in ["postgres://u:secret@127.0.0.1:1/db", "postgres://u:secret@none.invalid/db"] {
        let error = PostgresLedger::connect(url).await.unwrap_err();
        assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}

#[tokio::test]
async fn a_silent_server_is_unavailable_in_time() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://u@{}/db", silent.local_addr().unwrap());
    let began = Instant::now();
    let error = PostgresLedger::connect(&url).await.unwrap_err();
    assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
    assert!(began.elapsed() <= CALL_TIMEOUT + Duration::from_secs(1), "{:?}", began.elapsed());
}

/// Every kind of connection is cut while it rests; the next call of each finds a new one.
#[tokio::test(flavor = "multi_thread")]
async fn cut_connections_are_replaced() {
    let (ledger, database) = ledger().await;
    let holder = worker(&ledger).await;
    for round in 0..3 {
        let ids = recorded(&ledger, 2, |_| {}).await;
        mark_queued(&ledger, vec![(ids[0], Fence(0))]).await.unwrap();
        let fence = granted(&ledger, ids[0], holder).await.fence;
        assert_eq!(settle(&ledger, ids[0], fence, complete()).await, Settled::Applied);
        put_back(&ledger, ids[1], HOUR).await.unwrap();
        assert_eq!(get(&ledger, ids[0]).await.state, State::Completed);
        let asked = request(&ledger, ids[0], holder).await;
        database.disconnect_all().await;
        // Each connection may break one call before it is replaced, and answers that it did.
        until("every lane to come back", async || {
            let renewal = Renewal { worker: holder, ttl: HOUR, running: round, heads: Vec::new() };
            let again = submission(vec![new_task()]);
            let all = join!(
                ledger.record(again),
                mark_queued(&ledger, vec![(ids[0], Fence(0))]),
                ledger.claim(asked.clone()),
                ledger.put_back(ids[0], asked.belief.clone(), HOUR),
                ledger.renew(renewal),
                ledger.ping(),
            );
            let errors = [all.0.err(), all.1.err(), all.2.err(), all.3.err(), all.4.err(), all.5.err()];
            assert!(errors.iter().flatten().all(LedgerError::is_retryable), "{errors:?}");
            errors.iter().all(Option::is_none).then_some(())
        })
        .await;
        let _ = ledger.settle(Settlement { id: ids[0], fence, transition: complete() }).await;
    }
}

/// Where nearly everything has finished and is young, as in a ledger of its age, the pruner reads what it deletes.
#[tokio::test]
async fn pruning_reads_no_more_than_its_indexes() {
    let (_ledger, database) = ledger().await;
    let mut connection = database.connect().await;
    let fill = "
        INSERT INTO tasks (id, kind, queue, state, args, max_attempts, created_at, run_at, finished_at, result,
                           result_ttl_ms)
        SELECT gen_random_uuid(), 'test.work', 'q' || n % 3, 5, '{}', 1, n, n, n, '1', CASE WHEN n % 5 = 0 THEN n END
        FROM generate_series(1, 30000) n";
    for sql in [fill, "INSERT INTO queue_retention VALUES ('q1', 5)", "ANALYZE tasks", "ANALYZE queue_retention"] {
        sqlx::query(sql).execute(&mut connection).await.unwrap();
    }
    for (sql, index) in [
        (NEXT_QUEUE.replace("$1", "''"), "tasks_ended"),
        (
            PRUNE_QUEUE.replace("$1", "'q1'").replace("$2", "1000").replace("$3", "256").replace("$4", "30000"),
            "tasks_ended",
        ),
        (EXPIRE_RESULTS.replace("$1", "256").replace("$2", "30000"), "tasks_expiring"),
        (
            PRUNE_MEMBERS
                .replace("$1", "'00000000-0000-0000-0000-000000000000'")
                .replace("$2", "0::smallint")
                .replace("$3", "'00000000-0000-0000-0000-000000000000'")
                .replace("$4", "256")
                .replace("$5", "1000::bigint")
                .replace("$6", "30000"),
            "tasks_group",
        ),
    ] {
        let plan: Vec<String> =
            sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN {sql}"))).fetch_all(&mut connection).await.unwrap();
        let plan = plan.join("\n");
        assert!(plan.contains(index) && !plan.contains("Seq Scan on tasks"), "{plan}");
    }
}

/// While the server takes nobody, calls fail at once; when it does again, they succeed.
#[tokio::test(flavor = "multi_thread")]
async fn an_absent_server_is_told_at_once_and_found_again() {
    let (ledger, database) = ledger().await;
    one(&ledger).await;
    database.allow_connections(false).await;
    database.disconnect_all().await;
    let began = Instant::now();
    for _ in 0..10 {
        let error = ledger.record(submission(vec![new_task()])).await.unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert!(ledger.ping().await.unwrap_err().is_retryable());
    }
    assert!(began.elapsed() < CALL_TIMEOUT, "{:?}", began.elapsed());
    database.allow_connections(true).await;
    assert!(matches!(ledger.record(submission(vec![new_task()])).await, Ok(Recorded::New { .. })));
    ledger.ping().await.unwrap();
}

/// Bulk writes that hang do not keep a lease from being renewed, and end within their limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_table_ends_calls_in_time_and_no_lease() {
    let (ledger, database) = ledger().await;
    let (holder, id) = (worker(&ledger).await, one(&ledger).await);
    let mut connection = database.connect().await;
    let mut blocker = connection.begin().await.unwrap();
    sqlx::query("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE").execute(&mut *blocker).await.unwrap();
    let began = Instant::now();
    let writes = join_all((0..300).map(|_| ledger.record(submission(vec![new_task()]))));
    let renewals = async {
        for _ in 0..20 {
            let before = Instant::now();
            let renewal = Renewal { worker: holder, ttl: HOUR, running: 0, heads: Vec::new() };
            assert_eq!(ledger.renew(renewal).await.unwrap(), Renewed::Held);
            assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
        }
    };
    let (writes, ()) = join!(writes, renewals);
    assert!(writes.iter().all(|written| matches!(written, Err(LedgerError::Unavailable(_)))));
    assert!(began.elapsed() < CALL_TIMEOUT + Duration::from_secs(1), "{:?}", began.elapsed());
    blocker.rollback().await.unwrap();
    until("the lane to come back", async || ledger.record(submission(vec![new_task()])).await.ok()).await;
    assert!(matches!(claim(&ledger, id, holder).await, Claim::Granted(_)));
}

/// A message that comes before its time, by a clock that was set back: the refused task is published again.
#[tokio::test]
async fn a_queued_task_refused_for_its_time_becomes_due() {
    let (ledger, database) = ledger().await;
    let (holder, id) = (worker(&ledger).await, one(&ledger).await);
    mark_queued(&ledger, vec![(id, Fence(0))]).await.unwrap();
    let sql = "UPDATE tasks SET run_at = run_at + 3600000";
    sqlx::query(sql).execute(&mut database.connect().await).await.unwrap();
    assert_eq!(refused(&ledger, id, holder).await, Refusal::NotDue);
    assert_eq!(get(&ledger, id).await.state, State::Accepted);
    assert!(ledger.next_due().await.unwrap().is_some());
}

/// A lease that was ended for good stays so, even if the server's clock then goes back before its end.
#[tokio::test]
async fn a_dead_worker_stays_dead_whatever_the_clock_says() {
    let (ledger, database) = ledger().await;
    let (holder, ids) = (worker(&ledger).await, recorded(&ledger, 2, |_| {}).await);
    granted(&ledger, ids[0], holder).await;
    sqlx::query("UPDATE workers SET dead = true").execute(&mut database.connect().await).await.unwrap();
    let renewal = Renewal { worker: holder, ttl: HOUR, running: 0, heads: Vec::new() };
    assert_eq!(ledger.renew(renewal).await.unwrap(), Renewed::Lost);
    assert_eq!(refused(&ledger, ids[1], holder).await, Refusal::LeaseLost);
    assert_eq!(ledger.workers().await.unwrap(), []);
    assert_eq!(ledger.abandoned(10).await.unwrap().len(), 1);
}

/// A row of a release that never was, or of a careless hand, is told and not guessed at.
#[tokio::test]
async fn an_unreadable_row_is_told() {
    let (ledger, database) = ledger().await;
    let id = one(&ledger).await;
    sqlx::query("UPDATE tasks SET state = 99").execute(&mut database.connect().await).await.unwrap();
    let error = ledger.get(vec![id]).await.unwrap_err();
    assert!(matches!(error, LedgerError::Corrupt(_)), "{error}");
}

/// A relay and a reconciler that find nothing to do look at nothing: their bounds are bounds of the index scan, and
/// not a filter over a million tasks that wait.
#[tokio::test]
async fn looking_for_little_reads_little() {
    let (_ledger, database) = ledger().await;
    let mut connection = database.session().await;
    let plans = [
        (super::publish::FETCH_DUE, "NULL, NULL, NULL", "Index Cond: (due_at <= "),
        (super::publish::STRAND, "NULL, NULL, NULL, NULL, NULL, NULL", "(queued_at < "),
        (super::lease::CANCELLING, "NULL", "worker_id = "),
    ];
    // What lists an unfinished state reads an index that has no other, whole or to its bound.
    for (sql, index) in [
        (super::list::DUE, "tasks_due"),
        (super::list::HELD, "tasks_held"),
        (super::list::QUEUED, "tasks_queued"),
        (super::list::RUNNING, "tasks_running"),
    ] {
        let sql = AssertSqlSafe(format!("EXPLAIN {}", sql.replace("$1", "50001")));
        let plan: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut connection).await.unwrap();
        assert!(plan.iter().any(|line| line.contains(index)), "{plan:#?}");
    }
    for (sql, parameters, condition) in plans {
        let steps = format!("DEALLOCATE ALL; PREPARE statement AS {sql}; EXPLAIN EXECUTE statement({parameters})");
        let rows = sqlx::raw_sql(AssertSqlSafe(steps)).fetch_all(&mut connection).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let bounds_the_scan = plan.iter().any(|line| line.contains("Index Cond: ") && line.contains(condition));
        let wide = plan.iter().any(|line| line.contains("Seq Scan") || line.contains("tasks_running"));
        assert!(bounds_the_scan && !wide, "{plan:#?}");
    }
}

/// A process needs no more connections than the documentation says.
#[tokio::test(flavor = "multi_thread")]
async fn connections_are_few() {
    let (ledger, database) = ledger().await;
    let holder = worker(&ledger).await;
    let ids = recorded(&ledger, 100, |_| {}).await;
    join_all(ids.iter().map(async |&id| {
        mark_queued(&ledger, vec![(id, Fence(0))]).await.unwrap();
        put_back(&ledger, id, HOUR).await.unwrap();
        let fence = granted(&ledger, id, holder).await.fence;
        ledger.get(vec![id]).await.unwrap();
        assert_eq!(settle(&ledger, id, fence, complete()).await, Settled::Applied);
    }))
    .await;
    let open = database.connections().await;
    assert!((3..=10).contains(&open), "{open} connections");
}
