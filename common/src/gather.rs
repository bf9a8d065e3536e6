//! Closes groups: when all tasks of a batch have ended, the one that follows them is recorded.
//!
//! Nothing is counted while tasks end. Every process looks whether an open group has an unfinished member, and the
//! ledger closes one that has none once: the follow-up is part of that write. Whoever dies before it has done nothing,
//! and after it any relay publishes.

use std::collections::HashSet;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::events::{Events, Happening, TaskEvent};
use crate::ledger::{Ledger, LedgerError, SharedLedger, complain};
use crate::state::State;
use crate::task::{GroupId, TaskId};

/// How many open groups one look takes.
const LOOK_MAX: u32 = 1_000;
/// The pause after all open groups were looked at.
const PAUSE: Duration = Duration::from_millis(150);
/// Processes look at different times, so that most find a group closed.
const SPREAD_MS: u64 = 50;
/// How many times longer than the looks themselves the pause is, when there are very many groups.
const REST: u32 = 4;
const ERROR_PAUSE: Duration = Duration::from_secs(1);

/// Closes groups until the shutdown.
pub async fn run(ledger: SharedLedger, events: Events, shutdown: CancellationToken) {
    let mut gatherer = Gatherer { ledger, events, unreadable: HashSet::new() };
    while !shutdown.is_cancelled() {
        let began = Instant::now();
        let pause = match gatherer.pass(&shutdown).await {
            Ok(()) => PAUSE.max(began.elapsed() * REST) + Duration::from_millis(rand::random_range(0..SPREAD_MS)),
            Err(error) => {
                complain(&error, "groups cannot be closed");
                ERROR_PAUSE
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

struct Gatherer {
    ledger: SharedLedger,
    events: Events,
    /// Groups that this build cannot read, each told once.
    unreadable: HashSet<GroupId>,
}

impl Gatherer {
    /// Looks at all open groups once.
    async fn pass(&mut self, shutdown: &CancellationToken) -> Result<(), LedgerError> {
        let mut after = None;
        while !shutdown.is_cancelled() {
            let looked = self.ledger.ended_groups(after, LOOK_MAX).await?;
            for id in looked.ended {
                if self.unreadable.contains(&id) {
                    continue;
                }
                match self.close(id).await {
                    Err(error) if !error.is_retryable() => {
                        tracing::error!(group.id = %id, %error, "this process cannot close the group: is another release in use?");
                        self.unreadable.insert(id);
                    }
                    closed => closed?,
                }
            }
            after = looked.next;
            if after.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Whoever else has closed it first has also logged, counted and told it.
    async fn close(&self, id: GroupId) -> Result<(), LedgerError> {
        let Some(closed) = self.ledger.close_group(id).await? else { return Ok(()) };
        tracing::debug!(group.id = %id, task.id = %closed.then_id, "all tasks of a group have ended");
        metrics::counter!("tasklane_groups_closed_total").increment(1);
        if self.events.wanted() {
            tell(&*self.ledger, &self.events, closed.then_id).await;
        }
        Ok(())
    }
}

/// Tells those who look of the task that follows. A ledger that is away now only costs them the event.
async fn tell(ledger: &dyn Ledger, events: &Events, then: TaskId) {
    let Some(task) = ledger.get(vec![then]).await.ok().and_then(|mut found| found.pop()) else { return };
    events.tell(|| TaskEvent {
        at: Timestamp::now(),
        id: task.id,
        kind: task.kind,
        queue: task.queue,
        event: Happening::Submitted,
        // As it was recorded; by now it may have started.
        state: State::Accepted,
        attempt: 0,
        worker_id: None,
    });
}
