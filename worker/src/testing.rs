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
use tasklane_common::ledger::{Belief, Claim, ClaimRequest, SharedLedger, Submission, Transition, WorkerRecord};
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
            span: tracing::Span::current(),
        };
        // Nothing ends this lease.
        run(limits, Arc::clone(&self.handler), args, &mut None).await.unwrap_or(Attempted::Interrupted)
    }
}

/// Records a task and claims it, as producer and worker do.
async fn claimed(ledger: &SharedLedger, kind: &Kind, args: &Json) -> Result<(TaskId, Fence), HandlerError> {
    let task = NewTask::new(kind.clone(), args.clone());
    let (id, worker) = (task.id, WorkerId::new());
    let belief = Belief { kind: kind.clone(), published: Some(Fence(0)), args: args.digest() };
    let record = WorkerRecord {
        id: worker,
        name: None,
        host: "test".to_owned(),
        pid: 7,
        queues: Vec::new(),
        kinds: vec![kind.clone()],
        concurrency: 1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    ledger.record(Submission { tasks: vec![task], idempotency: None, reserve: LEASE_TTL, group: None }).await?;
    ledger.register(record, LEASE_TTL).await?;
    let request = ClaimRequest { id, worker, guarantee: Guarantee::Transactional, belief, crashes_below: i32::MAX };
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
mod tests;
