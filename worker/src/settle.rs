//! The end of a run: its outcome goes into the ledger, and is counted and told once it is there.

use std::time::Duration;

use jiff::Timestamp;
use metrics::Counter;
use tasklane_common::events::{Happening, TaskEvent};
use tasklane_common::ledger::{LedgerError, Settled, Settlement, Transition};
use tasklane_common::state::State;
use tasklane_common::task::{Fence, Json, Kind, QueueName, TaskId};
use tasklane_common::traces;
use tokio::time::{Instant, sleep};
use tracing::Span;

use crate::execute::LEDGER_PAUSE;
use crate::life::{Life, Stats};

/// How long an outcome is offered to a ledger that is away; after that the task counts as crashed.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// A run whose outcome is to be written.
pub(crate) struct Ran<'m> {
    pub(crate) id: TaskId,
    pub(crate) kind: Kind,
    pub(crate) queue: QueueName,
    pub(crate) fence: Fence,
    pub(crate) attempt: i32,
    pub(crate) completed: &'m Counter,
    pub(crate) span: Span,
}

impl Ran<'_> {
    /// What happened to it, for those who look.
    pub(crate) fn event(&self, life: &Life, at: Timestamp, (event, state): (Happening, State)) -> TaskEvent {
        let Self { id, attempt, .. } = *self;
        let (kind, queue, worker_id) = (self.kind.clone(), self.queue.clone(), Some(life.lease.worker()));
        TaskEvent { at, id, kind, queue, event, state, attempt, worker_id }
    }
}

/// Writes the outcome; whether the delivery may be acked. `in_doubt`: a transaction of the handler may have completed the
/// task.
pub(crate) async fn settle(life: &Life, ran: &Ran<'_>, transition: Transition, in_doubt: bool) -> bool {
    let Ran { id, fence, .. } = *ran;
    let settlement = Settlement { id, fence, transition };
    let deadline = Instant::now() + SETTLE_LIMIT;
    loop {
        let written = match life.ledger.settle(settlement.clone()).await {
            Ok(Settled::Fenced) if in_doubt => Box::pin(completed_after_all(life, id, fence)).await,
            // Nothing starts again: somebody wanted it cancelled.
            Ok(Settled::Cancelled) => Ok((Settled::Applied, Transition::Cancel { reason: String::new() })),
            Ok(settled) => Ok((settled, settlement.transition.clone())),
            Err(error) => Err(error),
        };
        match written {
            Ok((Settled::Applied | Settled::Cancelled, transition)) => {
                has_ended(life, ran, &transition);
                return true;
            }
            Ok((Settled::Fenced, _)) => {
                Stats::add(&life.stats.fenced);
                metrics::counter!("tasklane_results_fenced_total").increment(1);
                traces::fail(&ran.span, &"the result was refused");
                tracing::warn!(task.id = %id, task.fence = %fence, "the result was refused: the task is not this worker's any more");
                return true;
            }
            Err(error) if give_up(&error, deadline) => {
                tracing::error!(%error, task.id = %id, "the outcome could not be recorded: the task counts as crashed");
                return false;
            }
            Err(error) => tracing::warn!(%error, task.id = %id, "the outcome cannot be recorded, trying again"),
        }
        sleep(LEDGER_PAUSE).await;
    }
}

/// What a refused settlement means whose run may have committed: the refusal came after the commit, if there was one,
/// so a task that is completed under this fence was completed by it, and any other is somebody else's.
async fn completed_after_all(life: &Life, id: TaskId, fence: Fence) -> Result<(Settled, Transition), LedgerError> {
    let task = life.ledger.get(vec![id]).await?.pop();
    let completed = task.filter(|task| task.state == State::Completed && task.fence == fence);
    let Some(result) = completed.map(|task| task.result.unwrap_or_else(Json::null)) else {
        return Ok((Settled::Fenced, Transition::Interrupt));
    };
    tracing::info!(task.id = %id, task.fence = %fence, "the handler's transaction had committed: the task is completed");
    Ok((Settled::Applied, Transition::Complete { result }))
}

fn give_up(error: &LedgerError, deadline: Instant) -> bool {
    !error.is_retryable() || Instant::now() >= deadline
}

/// Counts and tells how a run has ended, once the ledger has it.
pub(crate) fn has_ended(life: &Life, ran: &Ran<'_>, transition: &Transition) {
    let counter = match transition {
        Transition::Complete { .. } => &life.stats.completed,
        Transition::Retry { .. } | Transition::Snooze { .. } => &life.stats.retried,
        Transition::Interrupt => &life.stats.interrupted,
        Transition::Cancel { .. } => &life.stats.cancelled,
        Transition::Discard { .. } => &life.stats.discarded,
    };
    let outcome = Happening::of(transition).0.as_str();
    ran.span.record("task.outcome", outcome);
    Stats::add(counter);
    match transition {
        Transition::Complete { .. } => {
            traces::succeed(&ran.span);
            ran.completed.increment(1);
        }
        _ => metrics::counter!("tasklane_tasks_settled_total", "kind" => ran.kind.as_str().to_owned(), "outcome" => outcome)
            .increment(1),
    }
    life.events.tell(|| ran.event(life, Timestamp::now(), Happening::of(transition)));
}

pub(crate) fn log_outcome(ran: &Ran<'_>, transition: &Transition) {
    let Ran { id, kind, attempt, .. } = ran;
    if let Transition::Retry { error, .. } | Transition::Discard { error, .. } = transition {
        traces::fail(&ran.span, &error.message);
    }
    match transition {
        Transition::Retry { delay, error } => tracing::warn!(
            task.id = %id, task.kind = %kind, task.attempt = attempt, error = %error.message, error.kind = error.kind.as_str(),
            delay_ms = delay.as_millis(), "the attempt failed, another will follow"
        ),
        Transition::Discard { reason, error } => tracing::warn!(
            task.id = %id, task.kind = %kind, task.attempt = attempt, error = %error.message, error.kind = error.kind.as_str(),
            reason, "the task is discarded"
        ),
        _ => {
            tracing::debug!(task.id = %id, task.kind = %kind, task.attempt = attempt, event = transition.event().as_str(), "the run has ended")
        }
    }
}
