//! Whether the worker can do its work at this moment.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tasklane_common::ledger::SharedLedger;
use tasklane_common::telemetry::AsyncReadiness;

use crate::life::Stats;

/// Answers `/readyz`.
#[derive(Debug, Clone)]
pub struct Readiness {
    pub(crate) stats: Arc<Stats>,
    pub(crate) ledger: SharedLedger,
}

impl AsyncReadiness for Readiness {
    async fn problem(&self) -> Option<String> {
        if let Err(error) = self.ledger.ping().await {
            return Some(error.to_string());
        }
        if !self.stats.leased.load(Ordering::Relaxed) {
            return Some("the worker has no lease".to_owned());
        }
        // Before the connection: that is being made anew because of this.
        if let Some(queue) = self.stats.stalled.any() {
            return Some(format!("messages are ready in queue {queue} and there is room, but none is delivered"));
        }
        if self.stats.lanes.any_good() {
            return None;
        }
        let out = self.stats.lanes.out();
        if out.is_empty() {
            return Some("the worker is not consuming: the broker is away".to_owned());
        }
        Some(format!("the worker is not consuming: {}", out.join("; ")))
    }

    /// The lanes that are bad while others are good: those are served, so the worker is ready.
    fn notes(&self) -> Vec<String> {
        self.stats.lanes.out()
    }
}
