//! Forgets finished tasks whose time is over, and results that have expired, a few at a time.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::ledger::{LedgerError, SharedLedger, complain};

/// How many rows one step deletes, and clears: few enough not to be felt by other writes.
const STEP_ROWS: u32 = 256;
/// The pause between steps while there is something to prune.
const STEP_PAUSE: Duration = Duration::from_millis(50);
/// The pause when there is not.
const IDLE_PAUSE: Duration = Duration::from_secs(30);

/// Prunes until the shutdown.
pub async fn run(ledger: SharedLedger, retention: Duration, shutdown: CancellationToken) {
    loop {
        let pause = match step(&ledger, retention).await {
            Ok(true) => STEP_PAUSE,
            Ok(false) => IDLE_PAUSE,
            Err(error) => {
                complain(&error, "finished tasks and expired results cannot be pruned");
                IDLE_PAUSE
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Whether there may be more to do at once.
async fn step(ledger: &SharedLedger, retention: Duration) -> Result<bool, LedgerError> {
    let pruned = ledger.prune(retention, STEP_ROWS).await?;
    metrics::counter!("tasklane_pruned_total").increment(pruned.tasks);
    let expired = ledger.expire_results(STEP_ROWS).await?;
    metrics::counter!("tasklane_results_expired_total").increment(expired);
    Ok(pruned.more || expired == u64::from(STEP_ROWS))
}
