//! For tests of handlers: one run through the worker's own pipeline, without a broker, and without a ledger unless the
//! handler writes in its transactions.
//!
//! ```
//! use tasklane_worker::testing::TestTask;
//! use tasklane_worker::{Handler, HandlerError, Outcome, TaskContext};
//!
//! struct Halve;
//!
//! impl Handler for Halve {
//!     const KIND: &'static str = "halve";
//!     type Args = u32;
//!
//!     async fn handle(&self, n: u32, _cx: &TaskContext) -> Result<Outcome, HandlerError> {
//!         if n % 2 == 1 { Err(HandlerError::discard("it is odd")) } else { Outcome::complete(n / 2) }
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let run = TestTask::new(Halve).run(&4).await;
//! assert_eq!(run.result(), Some("2"));
//!
//! let run = TestTask::new(Halve).run(&5).await;
//! assert_eq!(run.error(), Some("it is odd"));
//! assert!(!run.has_next());
//! # }
//! ```

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tasklane_common::backoff::Backoff;
use tasklane_common::clock::since_boot;
use tasklane_common::ledger::{Claim, ClaimRequest, SharedLedger, Submission, Transition, WorkerRecord};
use tasklane_common::task::{Fence, Guarantee, Json, Kind, NewTask, QueueName, TaskId, WorkerId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::decide::{Attempted, Policy, RESULT_BYTES_MAX, decide};
use crate::handler::{Handler, HandlerError, TaskContext};
use crate::lease::Lease;
use crate::registry::DynHandler;
use crate::run::{Run, run};
use crate::transaction::Transaction;

/// A lease that no test outlives.
const LEASE_TTL: Duration = Duration::from_secs(86_400);

/// A task for one handler, at its first of 20 attempts.
#[derive(Clone)]
pub struct TestTask {
    handler: Arc<dyn DynHandler>,
    /// What the handler is told; change what matters to the test.
    pub context: TaskContext,
    /// How long the run may take. Defaults to the handler's own timeout, or a minute.
    pub timeout: Duration,
    ledger: Option<SharedLedger>,
}

/// How a run ended, and what it means.
#[derive(Debug, Clone, PartialEq)]
pub struct TestRun {
    /// What the handler did.
    pub attempted: Attempted,
    /// Where the task would go.
    pub transition: Transition,
}

impl TestTask {
    /// A task for this handler.
    ///
    /// # Panics
    /// When the handler's kind is no kind: a registry would refuse it too.
    #[must_use]
    #[expect(clippy::panic, reason = "a test that declares a wrong kind has failed")]
    pub fn new<H: Handler>(handler: H) -> Self {
        match Kind::parse(H::KIND) {
            Ok(kind) => Self::named(kind, Arc::new(handler)),
            Err(error) => panic!("kind {:?} {error}", H::KIND),
        }
    }

    /// A task for a handler whose kind is known only now.
    #[must_use]
    pub fn named(kind: Kind, handler: Arc<dyn DynHandler>) -> Self {
        let timeout = handler.options().timeout.unwrap_or(Duration::from_secs(60));
        let context = TaskContext {
            id: TaskId::new(),
            kind,
            queue: QueueName::default(),
            attempt: 1,
            max_attempts: 20,
            fence: Fence(1),
            deadline: Instant::now() + timeout,
            cancellation: CancellationToken::new(),
            traceparent: None,
            result_bytes_max: RESULT_BYTES_MAX,
            transaction: Transaction::default(),
        };
        Self { handler, context, timeout, ledger: None }
    }

    /// Gives the handler a ledger for its transactions, such as that of `ledger::open("sqlite:///tmp/test.db")`, with the
    /// tables that it writes to.
    ///
    /// Every run is then of a task of its own, recorded and claimed there; whatever the handler commits is committed.
    #[must_use]
    pub fn with_ledger(self, ledger: SharedLedger) -> Self {
        Self { ledger: Some(ledger), ..self }
    }

    /// Runs the handler once, as a worker does: within its time, its panics caught, its end decided. Backoff has no
    /// jitter.
    pub async fn run(&self, args: &(impl Serialize + ?Sized)) -> TestRun {
        let attempted = match Json::of(args) {
            Ok(args) => self.attempt(args).await,
            Err(error) => Attempted::Answered(Err(HandlerError::args(&format!("the args have no JSON form: {error}")))),
        };
        let options = self.handler.options();
        let policy = Policy {
            attempt: self.context.attempt,
            max_attempts: self.context.max_attempts,
            delays: options.retry.delays.unwrap_or_else(|| Backoff::default().into()),
            age: Duration::ZERO,
            max_age: options.retry.max_age,
            result_bytes_max: self.context.result_bytes_max,
            discard_errors: options.discard_errors,
            guarantee: options.guarantee,
        };
        TestRun { transition: decide(attempted.clone(), &policy, 1.0), attempted }
    }

    async fn attempt(&self, args: Json) -> Attempted {
        let mut cx = TaskContext {
            deadline: Instant::now() + self.timeout,
            transaction: Transaction::default(),
            ..self.context.clone()
        };
        if let Some(ledger) = &self.ledger {
            match claimed(ledger, &cx.kind, &args).await {
                Ok((id, fence)) => (cx.id, cx.fence, cx.transaction) = (id, fence, Transaction::new(ledger.clone())),
                Err(error) => return Attempted::Answered(Err(error)),
            }
        }
        let lease = Lease::new(WorkerId::new(), LEASE_TTL, since_boot());
        let interrupt = CancellationToken::new();
        let limits = Run {
            lease: &lease,
            interrupt: &interrupt,
            unwanted: CancellationToken::new(),
            cancel_grace: self.timeout,
            custody_after: LEASE_TTL,
            cx,
            limit: self.timeout,
        };
        // Nothing ends this lease.
        run(limits, Arc::clone(&self.handler), args, &mut None).await.unwrap_or(Attempted::Interrupted)
    }
}

/// Records a task and claims it, as producer and worker do.
async fn claimed(ledger: &SharedLedger, kind: &Kind, args: &Json) -> Result<(TaskId, Fence), HandlerError> {
    let task = NewTask::new(kind.clone(), args.clone());
    let (id, worker) = (task.id, WorkerId::new());
    let record = WorkerRecord {
        id: worker,
        host: "test".to_owned(),
        queues: Vec::new(),
        kinds: vec![kind.clone()],
        concurrency: 1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    ledger.record(Submission { tasks: vec![task], idempotency: None, reserve: LEASE_TTL, group: None }).await?;
    ledger.register(record, LEASE_TTL).await?;
    let request = ClaimRequest {
        id,
        worker,
        guarantee: Guarantee::Transactional,
        published: Some(Fence(0)),
        crashes_below: i32::MAX,
    };
    match ledger.claim(request).await? {
        Claim::Granted(granted) => Ok((id, granted.fence)),
        Claim::Refused(reason) => Err(HandlerError::discard(format!("the claim was refused: {}", reason.as_str()))),
    }
}

impl TestRun {
    /// The result's JSON, if the task would be completed.
    #[must_use]
    pub fn result(&self) -> Option<&str> {
        match &self.transition {
            Transition::Complete { result } => Some(result.as_str()),
            _ => None,
        }
    }

    /// The error's message, if the attempt failed.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        match &self.transition {
            Transition::Retry { error, .. } | Transition::Discard { error, .. } => Some(&error.message),
            _ => None,
        }
    }

    /// Whether the task would start again.
    #[must_use]
    pub fn has_next(&self) -> bool {
        matches!(self.transition, Transition::Retry { .. } | Transition::Snooze { .. } | Transition::Interrupt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::{Options, Outcome};
    use tasklane_common::backoff::{Delays, Retry};
    use tasklane_common::ledger;
    use tasklane_common::state::State;
    use tasklane_common::task::ErrorKind;

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
}
