//! Compares what the ledger says that this worker runs with what it does run.
//!
//! A claim may be granted whose answer never comes: its bytes lay in the network when the worker had given up asking, or
//! the worker was told to stop meanwhile. Nobody runs such a task, and no lease ends for it, so it is given back here.

use std::collections::HashSet;
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use rand::random;
use tasklane_common::events::{Happening, TaskEvent};
use tasklane_common::ledger::{Abandoned, LedgerError, Settled, Settlement, Transition, complain};
use tasklane_common::rescue;
use tasklane_common::state::State;
use tasklane_common::task::{Fence, TaskId};
use tokio::time::sleep;

use crate::life::Life;

/// Runs that the ledger has and this worker does not.
pub(crate) type Strays = HashSet<(TaskId, Fence)>;

/// Gives back what strays, until the life ends.
pub(crate) async fn watch(life: &Life, period: Duration) {
    let mut suspects = Strays::new();
    loop {
        tokio::select! {
            () = sleep(period) => {}
            () = life.ended.cancelled() => return,
        }
        match strays(life).await {
            Ok(found) => {
                // Once is no proof: an outcome may have been written between the look there and the look here.
                let seen: Strays = found.iter().map(|task| (task.id, task.fence)).collect();
                give_back(life, found.into_iter().filter(|task| suspects.contains(&(task.id, task.fence)))).await;
                suspects = seen;
            }
            Err(error) => tracing::debug!(%error, "the ledger does not say what runs here, asking again"),
        }
    }
}

/// The last look of a worker that takes nothing any more: what strays now would count as crashed when its lease ends.
pub(crate) async fn finish(life: &Life) {
    match strays(life).await {
        Ok(found) => give_back(life, found).await,
        Err(error) => {
            complain(&error, "the ledger does not say what runs here: what should not counts as crashed");
        }
    }
}

async fn strays(life: &Life) -> Result<Vec<Abandoned>, LedgerError> {
    let mut running = life.ledger.running(life.lease.worker()).await?;
    running.retain(|task| !life.held.has(task.id, task.fence));
    Ok(running)
}

async fn give_back(life: &Life, strays: impl IntoIterator<Item = Abandoned>) {
    join_all(strays.into_iter().map(|task| settle(life, task))).await;
}

async fn settle(life: &Life, task: Abandoned) {
    let transition = decide(&task, life.held.is_broken(task.id, task.fence), life.settings.common.max_crashes);
    let (event, state) = Happening::of(&transition);
    let settled = life.ledger.settle(Settlement { id: task.id, fence: task.fence, transition }).await;
    let (event, state) = match settled {
        // Its outcome was on its way after all, or the lease has ended.
        Ok(Settled::Fenced) => return,
        Ok(Settled::Cancelled) => (Happening::Cancelled, State::Cancelled),
        Ok(Settled::Applied) => (event, state),
        Err(error) => {
            complain(&error, "a task that does not run here cannot be given back");
            return;
        }
    };
    life.held.forget_broken(task.id);
    metrics::counter!("tasklane_strays_total").increment(1);
    tracing::warn!(
        task.id = %task.id, task.kind = %task.kind, task.fence = %task.fence, outcome = event.as_str(),
        "the ledger had this task running here, and it does not: given back"
    );
    life.nudges.freed.notify_one();
    let (kind, queue, worker_id) = (task.kind.clone(), task.queue.clone(), Some(task.worker));
    let at = Timestamp::now();
    life.events.tell(|| TaskEvent { at, id: task.id, kind, queue, event, state, attempt: task.attempt, worker_id });
}

/// What never began costs no attempt, whatever its guarantee; what had begun has crashed.
fn decide(task: &Abandoned, begun: bool, max_crashes: i32) -> Transition {
    if begun { rescue::decide(task, max_crashes, random()) } else { Transition::Interrupt }
}
