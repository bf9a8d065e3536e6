//! One run of a handler: started under the lease, watched, and stopped when it must.

use std::panic;
use std::time::Duration;

use std::sync::Arc;

use tasklane_common::task::Json;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use crate::decide::Attempted;
use crate::delivery::Delivery;
use crate::handler::{HandlerError, Outcome, TaskContext};
use crate::lease::Lease;
use crate::registry::DynHandler;

/// How long a handler has to end by itself once its cancellation token is cancelled: a command's SIGTERM, its 5 s, and
/// its SIGKILL fit in.
const STOP_GRACE: Duration = Duration::from_secs(6);

/// A run about to start.
pub(crate) struct Run<'a> {
    pub(crate) lease: &'a Lease,
    pub(crate) interrupt: &'a CancellationToken,
    /// Is cancelled when somebody wants the run cancelled.
    pub(crate) unwanted: CancellationToken,
    pub(crate) cancel_grace: Duration,
    pub(crate) custody_after: Duration,
    pub(crate) cx: TaskContext,
    pub(crate) limit: Duration,
    /// What is traced within the handler belongs to it.
    pub(crate) span: Span,
}

type Answer = Result<Outcome, HandlerError>;

/// Runs to the end; `None` when the lease was lost before anything was committed, and the outcome is nobody's here.
///
/// What ends a run goes before its own answer: a command that was killed, or a handler that was told to stop, may
/// answer before it is noticed here why. And the clock decides whether the lease was lost, in whatever order its end
/// and the handler's were heard of.
///
/// The delivery in `held` is acked early when the run takes long: from then on the ledger alone has custody, and no
/// ack timeout of the broker can hit.
pub(crate) async fn run(
    run: Run<'_>,
    handler: Arc<dyn DynHandler>,
    args: Json,
    held: &mut Option<Delivery>,
) -> Option<Attempted> {
    let guard = run.lease.start_run()?;
    let began = Instant::now();
    let (cx, deadline) = (run.cx.clone(), run.cx.deadline);
    let custody = sleep_until(began + run.custody_after);
    tokio::pin!(custody);
    // A task of its own: a panic ends it alone, and it can be dropped when it must stop.
    let handled = async move {
        let _guard = guard;
        handler.handle_json(args, &cx).await
    };
    let mut running = tokio::spawn(handled.instrument(run.span.clone()));
    let attempted = loop {
        tokio::select! {
            biased;
            () = run.lease.lost().cancelled() => break drop_now(&run, running).await,
            () = sleep_until(deadline) => break stop(&run, running, Attempted::TimedOut(run.limit), STOP_GRACE).await,
            () = run.interrupt.cancelled() => break stop(&run, running, Attempted::Interrupted, STOP_GRACE).await,
            () = run.unwanted.cancelled() => break stop(&run, running, Attempted::Cancelled, run.cancel_grace).await,
            answer = &mut running => break Some(ended(answer)),
            () = &mut custody, if held.is_some() => {
                if let Some(delivery) = held.take() {
                    delivery.ack();
                }
            }
        }
    };
    run.cx.transaction.judge(attempted.filter(|_| run.lease.is_held()))
}

fn ended(answer: Result<Answer, JoinError>) -> Attempted {
    match answer {
        Ok(answer) => Attempted::Answered(answer),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => Attempted::Panicked(panic_message(panic.as_ref())),
            // Only a runtime that is shutting down drops a task unasked.
            Err(_) => Attempted::Interrupted,
        },
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the handler panicked: {}", text.unwrap_or("no message"))
}

/// Asks the handler to stop, and drops it when it does not. What it completes nevertheless counts.
async fn stop(run: &Run<'_>, mut running: JoinHandle<Answer>, reason: Attempted, grace: Duration) -> Option<Attempted> {
    run.cx.cancellation.cancel();
    tokio::select! {
        answer = timeout(grace, &mut running) => match answer {
            Ok(Ok(Ok(outcome))) => return Some(Attempted::Answered(Ok(outcome))),
            Ok(_) => return Some(reason),
            Err(_) => {}
        },
        () = run.lease.lost().cancelled() => return drop_now(run, running).await,
    }
    running.abort();
    loop {
        // A handler that blocks its thread goes on running: until it has really ended nobody else may have the task.
        match timeout(Duration::from_secs(60), &mut running).await {
            Ok(Ok(Ok(outcome))) => return Some(Attempted::Answered(Ok(outcome))),
            Ok(_) => return Some(reason),
            Err(_) => tracing::error!(
                task.id = %run.cx.id, task.kind = %run.cx.kind,
                "a handler blocks its thread and cannot be stopped; its task stays running until it ends"
            ),
        }
    }
}

/// Drops the handler at once. If it blocks its thread the lease's watchdog ends the process.
async fn drop_now(run: &Run<'_>, running: JoinHandle<Answer>) -> Option<Attempted> {
    // For threads that the handler has started: they outlive its future, and only this reaches them.
    run.cx.cancellation.cancel();
    running.abort();
    // Its answer is nobody's any more, but its end is awaited.
    let _ = running.await;
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builtin::tests::context;
    use crate::handler::Options;
    use async_trait::async_trait;
    use futures::future::BoxFuture;
    use tasklane_common::clock::since_boot;
    use tasklane_common::task::WorkerId;

    /// Answers that it failed when something has happened.
    struct Fails<W>(W);

    #[async_trait]
    impl<W: Fn(&TaskContext) -> BoxFuture<'static, ()> + Send + Sync + 'static> DynHandler for Fails<W> {
        fn options(&self) -> Options {
            Options::default()
        }

        async fn handle_json(&self, _args: Json, cx: &TaskContext) -> Answer {
            (self.0)(cx).await;
            Err(HandlerError::retry("killed by signal 9"))
        }
    }

    async fn end_of(
        lease: &Lease,
        interrupt: &CancellationToken,
        when: impl Fn(&TaskContext) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Option<Attempted> {
        let limit = Duration::from_secs(60);
        let cx = TaskContext { cancellation: interrupt.child_token(), deadline: Instant::now() + limit, ..context() };
        let unwanted = CancellationToken::new();
        let custody_after = limit;
        let run = Run { lease, interrupt, unwanted, cancel_grace: limit, custody_after, cx, limit, span: Span::none() };
        super::run(run, Arc::new(Fails(when)), Json::null(), &mut None).await
    }

    fn lease(ttl: Duration) -> Lease {
        Lease::new(WorkerId::new(), ttl, since_boot())
    }

    /// A command that was killed because the lease has ended may be seen before that end is.
    #[tokio::test]
    async fn a_run_whose_lease_is_lost_has_no_outcome_in_whatever_order_that_is_heard_of() {
        let held = lease(Duration::from_secs(60));
        let answered = end_of(&held, &CancellationToken::new(), |_| Box::pin(async {})).await;
        assert_eq!(answered, Some(Attempted::Answered(Err(HandlerError::retry("killed by signal 9")))));

        // Over by the clock, and nobody has noticed.
        let interrupt = CancellationToken::new();
        let short = lease(Duration::from_millis(500));
        let unnoticed = end_of(&short, &interrupt, {
            let short = short.clone();
            move |_| {
                let short = short.clone();
                Box::pin(async move {
                    while short.is_held() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                })
            }
        });
        assert_eq!(unnoticed.await, None);
        assert!(!short.lost().is_cancelled());

        // Both at once: neither order may win by chance.
        for _ in 0..50 {
            let lost = lease(Duration::from_secs(60));
            let token = lost.lost().clone();
            let both = end_of(&lost, &interrupt, move |_| {
                token.cancel();
                Box::pin(async {})
            });
            assert_eq!(both.await, None);
        }
    }

    /// Or an `at_most_once` task would start again on its word.
    #[tokio::test]
    async fn a_handler_that_fails_because_it_was_told_to_stop_has_not_failed() {
        for _ in 0..50 {
            let (held, interrupt) = (lease(Duration::from_secs(60)), CancellationToken::new());
            let stops = interrupt.clone();
            let interrupted = end_of(&held, &interrupt, move |cx| {
                stops.cancel();
                let told = cx.cancellation.clone();
                Box::pin(async move { told.cancelled().await })
            });
            assert_eq!(interrupted.await, Some(Attempted::Interrupted));
        }
    }

    #[tokio::test]
    async fn a_panic_is_told_in_its_own_words() {
        let panicked = tokio::spawn(async { panic::resume_unwind(Box::new("over the edge")) }).await;
        let attempted = ended(panicked);
        assert_eq!(attempted, Attempted::Panicked("the handler panicked: over the edge".to_owned()));
    }
}
