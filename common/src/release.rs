//! Lets tasks go that a limit holds, when it has a place for them.
//!
//! Every process looks, when a run that took a place has ended here, when a rate lets the next one start, and now and
//! then in case that the process which should have looked is gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::ledger::{LedgerError, SharedLedger, complain};

/// How many tasks one round lets go.
const ROUND_MAX: u32 = 256;
/// The longest sleep: places may have become free in another process, or by a worker's death.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// The shortest: under load one round serves many places.
const SLEEP_MIN: Duration = Duration::from_millis(2);
/// How often places of the past are forgotten, and how many at once.
const FORGET_PERIOD: Duration = Duration::from_secs(10);
const FORGET_MAX: u32 = 2_000;
const ERROR_PAUSE: Duration = Duration::from_secs(1);

/// What one loop of a process tells another, so that nobody has to wait for its next look.
#[derive(Debug, Default)]
pub struct Nudges {
    /// A run that took a place has ended.
    pub freed: Notify,
    /// Tasks are due for publication.
    pub due: Notify,
}

/// Lets go until the shutdown.
pub async fn run(ledger: SharedLedger, nudges: Arc<Nudges>, shutdown: CancellationToken) {
    let mut forget_at = Instant::now();
    while !shutdown.is_cancelled() {
        if Instant::now() >= forget_at {
            forget_at = Instant::now() + FORGET_PERIOD;
            if let Err(error) = ledger.forget_places(FORGET_MAX).await {
                tracing::debug!(%error, "places of the past are not forgotten");
            }
        }
        let pause = match round(&ledger, &nudges).await {
            Ok(pause) => pause,
            Err(error) => {
                complain(&error, "held tasks cannot be let go");
                ERROR_PAUSE
            }
        };
        // What is told in this time is remembered.
        tokio::time::sleep(SLEEP_MIN).await;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = nudges.freed.notified() => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Lets go what can, and tells how long nothing will.
async fn round(ledger: &SharedLedger, nudges: &Nudges) -> Result<Duration, LedgerError> {
    let (mut after, mut wait, mut tasks) = (None, SLEEP_MAX, 0);
    loop {
        let released = ledger.release_held(after, ROUND_MAX).await?;
        if released.tasks > 0 {
            metrics::counter!("tasklane_released_total").increment(released.tasks.into());
            nudges.due.notify_one();
        }
        tasks += released.tasks;
        wait = released.wait.map_or(wait, |until| until.min(wait));
        after = released.next;
        if after.is_none() {
            return Ok(if tasks >= ROUND_MAX { Duration::ZERO } else { wait });
        }
    }
}
