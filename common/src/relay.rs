//! The time axis: publishes tasks that are due, because their time has come, because they failed and may try again,
//! or because nobody is known to have published them.
//!
//! Every process runs one; the ledger hands each due task to one relay at a time. Publishing twice is harmless.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio_util::sync::CancellationToken;

use crate::ledger::{Due, LedgerError, SharedLedger, complain};
use crate::publisher::{Publication, Published, Publisher};
use crate::release::Nudges;

/// How many due tasks one round takes: bounds memory, and what a crash leaves unpublished for [`RESERVE`].
const ROUND_MAX: u32 = 256;
/// For how long a round's tasks are hidden from other relays; longer than a publication can take.
const RESERVE: Duration = Duration::from_secs(30);
/// The longest sleep: tasks due earlier may have come meanwhile from another process.
const SLEEP_MAX: Duration = Duration::from_millis(200);
const ERROR_PAUSE: Duration = Duration::from_secs(1);

/// Relays until the shutdown.
pub async fn run(ledger: SharedLedger, publisher: Publisher, nudges: Arc<Nudges>, shutdown: CancellationToken) {
    while !shutdown.is_cancelled() {
        // What is taken while the broker is away would only be hidden from everyone for a while.
        tokio::select! {
            () = publisher.connected() => {}
            () = shutdown.cancelled() => return,
        }
        let pause = match round(&ledger, &publisher).await {
            Ok(pause) => pause,
            Err(error) => {
                complain(&error, "due tasks cannot be relayed");
                ERROR_PAUSE
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = nudges.due.notified() => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Publishes what is due, and tells how long nothing will be.
async fn round(ledger: &SharedLedger, publisher: &Publisher) -> Result<Duration, LedgerError> {
    let wait = ledger.next_due().await?.unwrap_or(SLEEP_MAX);
    if !wait.is_zero() {
        return Ok(wait.min(SLEEP_MAX));
    }
    if !publisher.is_connected() {
        return Ok(SLEEP_MAX);
    }
    let due = ledger.fetch_due(ROUND_MAX, RESERVE).await?;
    metrics::counter!("tasklane_relayed_total").increment(due.len() as u64);
    let publications = due.into_iter().map(|task| async {
        let reserved = (task.id, task.fence);
        let published = publisher.publish(publication(task)).await;
        matches!(published, Published::Unknown | Published::Returned).then_some(reserved)
    });
    let unpublished: Vec<_> = join_all(publications).await.into_iter().flatten().collect();
    if !unpublished.is_empty() {
        // The connection has failed: a relay whose own is good shall not wait for the end of the reservation. Or the queue
        // is gone, and will be declared by the next try. What is refused keeps its reservation: a queue that takes nothing
        // would be tried without a pause.
        ledger.release(unpublished).await?;
    }
    Ok(Duration::ZERO)
}

fn publication(due: Due) -> Publication {
    let Due { id, kind, lane, args, fence, traceparent } = due;
    Publication { id, kind, lane, args, fence, traceparent, reply_to: None }
}
