//! Forgets finished tasks whose time is over, and results that have expired, a few at a time.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::since_boot;
use crate::leap::{Trust, Verdict};
use crate::ledger::{LedgerError, SharedLedger, complain};

/// How many rows one step deletes, and clears: few enough not to be felt by other writes.
const STEP_ROWS: u32 = 256;
/// The pause between steps while there is something to prune.
const STEP_PAUSE: Duration = Duration::from_millis(50);
/// The pause when there is not.
const IDLE_PAUSE: Duration = Duration::from_secs(30);

/// Prunes until the shutdown.
pub async fn run(ledger: SharedLedger, retention: Duration, shutdown: CancellationToken) {
    let mut trust = Trust::default();
    loop {
        let pause = match step(&ledger, retention, &mut trust).await {
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
async fn step(ledger: &SharedLedger, retention: Duration, trust: &mut Trust) -> Result<bool, LedgerError> {
    let clock = ledger.clock().await?;
    let verdict = trust.judge(clock, since_boot());
    verdict.tell();
    let note = match verdict {
        Verdict::Leapt(_) | Verdict::Unsure => return Ok(false),
        Verdict::Believed { note } | Verdict::BelievedAgain { note } => note,
    };
    if note {
        ledger.believe_clock(clock.now).await?;
    }
    // By the time that was judged: the clock may leap just now.
    let pruned = ledger.prune(clock.now, retention, STEP_ROWS).await?;
    metrics::counter!("tasklane_pruned_total").increment(pruned.tasks);
    let expired = ledger.expire_results(clock.now, STEP_ROWS).await?;
    metrics::counter!("tasklane_results_expired_total").increment(expired);
    Ok(pruned.more || expired == u64::from(STEP_ROWS))
}
