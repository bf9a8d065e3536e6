//! Forgets tasks that finished longer ago than the retention, a few at a time.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::ledger::SharedLedger;

/// How many rows one step looks at: small enough not to be felt by other writes.
const STEP_ROWS: u32 = 256;
/// The pause between steps while there is something to prune.
const STEP_PAUSE: Duration = Duration::from_millis(50);
/// The pause when there is not.
const IDLE_PAUSE: Duration = Duration::from_secs(30);

/// Prunes until the shutdown.
pub async fn run(ledger: SharedLedger, retention: Duration, shutdown: CancellationToken) {
    loop {
        let pause = match ledger.prune(retention, STEP_ROWS).await {
            Ok(0) => IDLE_PAUSE,
            Ok(pruned) => {
                metrics::counter!("tasklane_pruned_total").increment(pruned);
                STEP_PAUSE
            }
            Err(error) => {
                tracing::warn!(%error, "finished tasks cannot be pruned");
                IDLE_PAUSE
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
