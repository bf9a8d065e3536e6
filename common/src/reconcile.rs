//! Finds `queued` tasks whose messages the broker no longer holds, and makes them due again.
//!
//! Each lane is looked at by itself, for only within one the broker is first-in-first-out. Two signs: the lane is empty
//! in the broker while the ledger still counts tasks in it; or younger tasks of the lane were delivered long after these
//! (its watermark). A task found wrongly is only
//! published twice, and the claim drops the second copy.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::control::Control;
use crate::ledger::{LedgerError, SharedLedger, complain};
use crate::publisher::Publisher;

/// How often the queues are compared.
const PERIOD: Duration = Duration::from_secs(5);
/// How long a message may be on its way between the broker and a claim before it counts as lost.
pub const SLACK: Duration = Duration::from_secs(15);
const ROUND_MAX: u32 = 1024;

/// Reconciles until the shutdown.
pub async fn run(ledger: SharedLedger, publisher: Publisher, shutdown: CancellationToken) {
    let control = Control::spawn(publisher.clone());
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = period.tick() => {}
            () = shutdown.cancelled() => return,
        }
        if !publisher.is_connected() {
            continue;
        }
        if let Err(error) = round(&ledger, &publisher, &control).await {
            complain(&error, "queues cannot be compared with the ledger");
        }
    }
}

async fn round(ledger: &SharedLedger, publisher: &Publisher, control: &Control) -> Result<(), LedgerError> {
    let queued = ledger.queued_lanes().await?;
    if queued.is_empty() {
        return Ok(());
    }
    // No answer is not an empty queue.
    let Some(depths) = publisher.lane_depths(&queued).await else { return Ok(()) };
    for lane in queued {
        // A lane that the broker does not have any more holds nothing.
        let empty = depths.get(&lane).is_none_or(|depth| depth.ready == 0);
        let stranded = ledger.strand(lane.clone(), empty, SLACK, ROUND_MAX).await?;
        if stranded > 0 {
            metrics::counter!("tasklane_stranded_total").increment(stranded);
            tracing::warn!(queue = %lane, tasks = stranded, "the broker lost messages of queued tasks: publishing them again");
            control.messages_lost(lane.queue);
        }
    }
    Ok(())
}
