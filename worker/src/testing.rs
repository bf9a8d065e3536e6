//! For tests of handlers: one run through the worker's own pipeline, without broker and ledger.
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
use tasklane_common::clock::since_boot;
use tasklane_common::ledger::Transition;
use tasklane_common::task::{Fence, Json, Kind, TaskId, WorkerId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::decide::{Attempted, Policy, decide};
use crate::handler::{Handler, HandlerError, TaskContext};
use crate::lease::Lease;
use crate::registry::DynHandler;
use crate::run::{Run, run};

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
            attempt: 1,
            max_attempts: 20,
            fence: Fence(1),
            deadline: Instant::now() + timeout,
            cancellation: CancellationToken::new(),
            traceparent: None,
        };
        Self { handler, context, timeout }
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
            backoff: options.backoff.unwrap_or_default(),
            guarantee: options.guarantee,
        };
        TestRun { transition: decide(attempted.clone(), &policy, 1.0), attempted }
    }

    async fn attempt(&self, args: Json) -> Attempted {
        let cx = TaskContext { deadline: Instant::now() + self.timeout, ..self.context.clone() };
        let lease = Lease::new(WorkerId::new(), LEASE_TTL, since_boot());
        let interrupt = CancellationToken::new();
        let limits = Run { lease: &lease, interrupt: &interrupt, custody_after: LEASE_TTL, cx, limit: self.timeout };
        // Nothing ends this lease.
        run(limits, Arc::clone(&self.handler), args, &mut None).await.unwrap_or(Attempted::Interrupted)
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
    use tasklane_common::task::Guarantee;

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
}
