//! What a handler does under test is what it does in a worker.

use tasklane_common::backoff::{Delays, Retry};
use tasklane_common::ledger;
use tasklane_common::state::State;
use tasklane_common::task::ErrorKind;

use super::*;
use crate::handler::{Options, Outcome};

struct Obey(Guarantee);

impl Handler for Obey {
    const KIND: &'static str = "obey";
    type Args = String;

    fn options(&self) -> Options {
        Options { guarantee: self.0, ..Options::default() }
    }

    async fn handle(&self, word: String, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        match word.as_str() {
            "complete" => Outcome::complete(cx.attempt),
            "panic" => panic!("as told"),
            "sleep" => {
                cx.cancellation.cancelled().await;
                Err(HandlerError::retry("woken"))
            }
            _ => Err(HandlerError::retry("what?")),
        }
    }
}

#[tokio::test]
async fn a_run_goes_the_workers_way() {
    let mut task = TestTask::new(Obey(Guarantee::AtLeastOnce));
    assert_eq!(task.run("complete").await.result(), Some("1"));
    assert_eq!(task.run("panic").await.error(), Some("the handler panicked: as told"));
    let misfit = task.run(&7).await;
    assert!(misfit.error().is_some_and(|error| error.starts_with("the args do not fit kind obey")), "{misfit:?}");
    assert!(!misfit.has_next());
    task.timeout = Duration::from_millis(50);
    let late = task.run("sleep").await;
    assert_eq!(late.error(), Some("the run took longer than its 50 ms"));
    assert!(late.has_next());
}

#[tokio::test]
async fn attempts_and_guarantees_count() {
    let mut last = TestTask::new(Obey(Guarantee::AtLeastOnce));
    last.context.attempt = last.context.max_attempts;
    assert!(!last.run("fail").await.has_next());
    let mut once = TestTask::new(Obey(Guarantee::AtMostOnce));
    once.timeout = Duration::from_millis(50);
    assert!(!once.run("sleep").await.has_next());
}

/// What a Rust handler says of its retries.
struct Strict;

impl Handler for Strict {
    const KIND: &'static str = "strict";
    type Args = String;

    fn options(&self) -> Options {
        let delays = Delays::Fixed([7, 9].map(Duration::from_millis).to_vec());
        Options {
            retry: Retry { delays: Some(delays), max_age: Some(Duration::from_secs(1)) },
            discard_errors: vec![ErrorKind::Panic],
            ..Options::default()
        }
    }

    async fn handle(&self, word: String, _cx: &TaskContext) -> Result<Outcome, HandlerError> {
        match word.as_str() {
            "panic" => panic!("as told"),
            "wait" => Err(HandlerError::retry_after("later", Duration::from_secs(2))),
            _ => Err(HandlerError::retry("what?")),
        }
    }
}

#[tokio::test]
async fn a_handlers_options_say_what_follows_a_failure() {
    let mut task = TestTask::new(Strict);
    for (attempt, ms) in [(1, 7), (2, 9), (3, 9)] {
        task.context.attempt = attempt;
        let run = task.run("fail").await;
        let delay = Duration::from_millis(ms);
        assert!(matches!(run.transition, Transition::Retry { delay: found, .. } if found == delay), "{run:?}");
    }
    for (word, expected) in [("panic", "final_error"), ("wait", "too_old")] {
        let run = task.run(word).await;
        assert!(matches!(&run.transition, Transition::Discard { reason, .. } if reason == expected), "{run:?}");
    }
}

/// Counts in the ledger's database, and then does as it was told.
struct Count;

impl Handler for Count {
    const KIND: &'static str = "count";
    type Args = String;

    async fn handle(&self, word: String, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let told = word.clone();
        let committed = cx
            .complete_in_sqlite(move |db| {
                db.execute("UPDATE counter SET n = n + 1", [])?;
                // What is forbidden stays so, whatever the work makes of the error.
                let _ = match told.as_str() {
                    "fail" => return Err(HandlerError::discard("as told")),
                    "panic" => panic!("as told"),
                    "begin" => db.execute_batch("COMMIT"),
                    "release" => {
                        db.prepare_cached("RELEASE tasklane_work").and_then(|mut end| end.execute([])).map(|_| ())
                    }
                    "pragma" => db.pragma_update(None, "synchronous", "OFF"),
                    "steal" => db.execute_batch("UPDATE tasks SET state = 5"),
                    "loop" => db.query_row(ENDLESS, [], |_| Ok(())),
                    "loop and write" => db.execute(ENDLESS_WRITE, []).map(|_| ()),
                    _ => Ok(()),
                };
                Ok(db.query_row("SELECT sum(n) FROM counter", [], |row| row.get::<_, i64>(0))?)
            })
            .await?;
        match word.as_str() {
            "complete and fail" => Err(HandlerError::discard("too late")),
            "complete and panic" => panic!("too late"),
            "complete twice" => cx.complete_in_sqlite(|_| Ok(0)).await,
            _ => Ok(committed),
        }
    }
}

const ENDLESS: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n";
const ENDLESS_WRITE: &str =
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO counter SELECT i FROM n";

struct OnPostgres;

impl Handler for OnPostgres {
    const KIND: &'static str = "count";
    type Args = ();

    async fn handle(&self, _args: (), cx: &TaskContext) -> Result<Outcome, HandlerError> {
        cx.complete_in_postgres(async |connection| {
            let n: i64 = crate::sqlx::query_scalar("SELECT 1::bigint").fetch_one(connection).await?;
            Ok(n)
        })
        .await
    }
}

#[tokio::test]
async fn a_transaction_counts_and_nothing_that_comes_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let ledger = ledger::open(&format!("sqlite://{}", path.display())).await.unwrap();
    let db = crate::rusqlite::Connection::open(&path).unwrap();
    db.execute_batch("CREATE TABLE counter (n INTEGER NOT NULL); INSERT INTO counter VALUES (0)").unwrap();
    let counted = || db.query_row("SELECT sum(n) FROM counter", [], |row| row.get::<_, i64>(0)).unwrap();
    let task = TestTask::new(Count).with_ledger(ledger.clone());
    for (n, word) in (1..).zip(["complete", "complete and fail", "complete and panic", "complete twice"]) {
        let run = task.run(word).await;
        assert_eq!((run.result(), counted()), (Some(n.to_string().as_str()), n), "{word}: {run:?}");
    }
    for (word, message) in [
        ("fail", "as told"),
        ("panic", "the handler panicked: as told"),
        ("begin", "a work must not begin or end a transaction: it is in one"),
        ("release", "this savepoint is the ledger's"),
        ("pragma", "a work must not use pragmas: they would stay set for the ledger"),
        ("steal", "a work must not write to the ledger's own tables"),
        ("loop", "the work took longer than its 1 s, for which nobody else could write"),
        ("loop and write", "the work took longer than its 1 s, for which nobody else could write"),
    ] {
        let run = task.run(word).await;
        assert_eq!((run.error(), counted()), (Some(message), 4), "{word}: {run:?}");
    }
    let query = || ledger::ListQuery { limit: 100, state: Some(State::Completed), ..Default::default() };
    assert_eq!(ledger.list(query()).await.unwrap().tasks.len(), 4);

    let wrong = TestTask::new(OnPostgres).with_ledger(ledger.clone()).run(&()).await;
    assert_eq!(
        wrong.error(),
        Some(
            "complete_in_postgres needs a ledger on PostgreSQL, and this worker's is on SQLite: use complete_in_sqlite"
        )
    );
    let none = TestTask::new(OnPostgres).run(&()).await;
    assert_eq!(none.error(), Some("this test has no ledger: give it one with TestTask::with_ledger"));
    assert!(!wrong.has_next() && !none.has_next());
}
