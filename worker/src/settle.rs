//! The end of a run: its outcome goes into the ledger, and is counted and told once it is there.

use std::time::Duration;

use jiff::Timestamp;
use metrics::Counter;
use tasklane_common::events::{Happening, TaskEvent};
use tasklane_common::ledger::{Failure, LedgerError, Settled, Settlement, Transition, complain};
use tasklane_common::state::State;
use tasklane_common::task::{ERROR_BYTES_MAX, ErrorKind, Fence, Json, Kind, Priority, QueueName, TaskId, truncate};
use tasklane_common::traces;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::Span;

use crate::arbiter::Permit;
use crate::execute::LEDGER_PAUSE;
use crate::life::{Life, Stats};

/// How long an outcome is still offered after the lease has ended: a task that nobody has taken over yet is settled by it.
const AFTER_LEASE: Duration = Duration::from_secs(60);
/// How long a ledger that refuses an outcome gets it offered as it is. A right that was taken away by mistake comes back
/// within it; after it, what the handler has given is left out.
const REFUSED_LIMIT: Duration = Duration::from_secs(60);
/// The longest pause between two offers to a ledger that refuses.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

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

/// Writes the outcome, however long the ledger is away: the task is this worker's as long as the lease lives. Whether the
/// delivery may be acked. `in_doubt`: a transaction of the handler may have completed the task.
pub(crate) async fn settle(life: &Life, ran: &Ran<'_>, transition: Transition, in_doubt: bool) -> bool {
    let Ran { id, fence, .. } = *ran;
    let mut settlement = Settlement { id, fence, transition };
    let mut offer = Offer::default();
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
            Err(error) if offer.is_over(life) => {
                tracing::error!(%error, task.id = %id, "the outcome could not be recorded before the lease ended: the task counts as crashed");
                return false;
            }
            Err(error) => {
                complain(&error, "an outcome cannot be recorded, trying again");
                if offer.is_refused(&error) {
                    tracing::error!(%error, task.id = %id, "the ledger refuses the outcome: what the handler gave is left out of it");
                    settlement.transition = without_words(settlement.transition, &error);
                }
            }
        }
        offer.wait(life).await;
    }
}

/// How an outcome has fared that is not recorded yet.
struct Offer {
    pause: Duration,
    /// It takes a place like a run, so that no more is claimed than can be recorded.
    place: Option<Permit>,
    /// Since when the worker has no right to it any more.
    unleased_since: Option<Instant>,
    /// Since when the ledger refuses it.
    refused_since: Option<Instant>,
}

impl Default for Offer {
    fn default() -> Self {
        Self { pause: LEDGER_PAUSE, place: None, unleased_since: None, refused_since: None }
    }
}

impl Offer {
    /// Waits until the next offer.
    async fn wait(&mut self, life: &Life) {
        let next = Instant::now() + self.pause;
        if self.place.is_none() {
            self.place = timeout_at(next, life.permits.acquire(Priority::High)).await.ok();
        }
        sleep_until(next).await;
    }

    /// Whether the lease, or the life, ended so long ago that somebody else has the task.
    fn is_over(&mut self, life: &Life) -> bool {
        if !life.lease.lost().is_cancelled() && !life.ended.is_cancelled() {
            return false;
        }
        self.unleased_since.get_or_insert_with(Instant::now).elapsed() >= AFTER_LEASE
    }

    /// Whether the ledger has refused it for so long that this is about the outcome itself.
    fn is_refused(&mut self, error: &LedgerError) -> bool {
        if error.is_retryable() || error.is_broken() {
            (self.pause, self.refused_since) = (LEDGER_PAUSE, None);
            return false;
        }
        self.pause = (self.pause * 2).min(REFUSED_PAUSE);
        let since = *self.refused_since.get_or_insert_with(Instant::now);
        if since.elapsed() < REFUSED_LIMIT {
            return false;
        }
        self.refused_since = None;
        true
    }
}

/// The outcome without the handler's result, error and reasons, which the ledger may be unable to keep. What had completed is
/// not run again.
fn without_words(transition: Transition, why: &LedgerError) -> Transition {
    let message = format!("the outcome of the run could not be recorded: {why}");
    let error = |kind| Failure { message: truncate(&message, ERROR_BYTES_MAX), kind };
    match transition {
        Transition::Complete { .. } => {
            Transition::Discard { reason: "final_error".to_owned(), error: error(ErrorKind::Error) }
        }
        Transition::Retry { delay, error: given } => Transition::Retry { delay, error: error(given.kind) },
        Transition::Discard { reason, error: given } => Transition::Discard { reason, error: error(given.kind) },
        Transition::Cancel { .. } => Transition::Cancel { reason: message },
        Transition::Snooze { .. } | Transition::Interrupt => transition,
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
