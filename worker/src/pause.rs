//! Queues that somebody has paused.
//!
//! Which ones only the ledger says, and it grants no claim there. What is known here saves the worker from asking: it
//! stops the consumer of such a queue, so that the backlog stays in the broker. The ledger is asked as often as the lease is
//! renewed, at once on a word over the control exchange, and when a claim was refused because of a pause.

use std::collections::BTreeSet;
use std::time::Duration;

use tasklane_common::ledger::{Ledger, LedgerError};
use tasklane_common::task::QueueName;
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::sleep;

use crate::life::Life;

/// The paused queues, as far as this life has heard.
#[derive(Debug)]
pub struct Pauses {
    known: watch::Sender<BTreeSet<QueueName>>,
    /// One look at a time, so that no older answer comes behind a newer one.
    looking: Mutex<()>,
    /// Is notified when the ledger may have something new.
    changed: Notify,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { known: watch::Sender::new(BTreeSet::new()), looking: Mutex::new(()), changed: Notify::new() }
    }
}

impl Pauses {
    /// Whether the queue is known to be paused.
    pub fn has(&self, queue: &QueueName) -> bool {
        self.known.borrow().contains(queue)
    }

    /// Returns when the queue is known to be paused, or to be not.
    pub async fn until(&self, queue: &QueueName, paused: bool) {
        // The sender lives as long as this.
        let _ = self.known.subscribe().wait_for(|known| known.contains(queue) == paused).await;
    }

    /// Has the ledger asked soon.
    pub fn look_soon(&self) {
        self.changed.notify_one();
    }

    /// Asks the ledger.
    ///
    /// # Errors
    /// When it does not answer; what was known stays.
    pub async fn look(&self, ledger: &dyn Ledger) -> Result<(), LedgerError> {
        let _looking = self.looking.lock().await;
        self.read(ledger).await
    }

    /// Whether the queue is paused, after a claim was refused because of a pause. Many ask at once, and the first one's
    /// answer is that of all.
    ///
    /// # Errors
    /// As [`Pauses::look`].
    pub async fn confirm(&self, ledger: &dyn Ledger, queue: &QueueName) -> Result<bool, LedgerError> {
        let _looking = self.looking.lock().await;
        if !self.has(queue) {
            self.read(ledger).await?;
        }
        Ok(self.has(queue))
    }

    async fn read(&self, ledger: &dyn Ledger) -> Result<(), LedgerError> {
        let paused: BTreeSet<_> = ledger.paused_queues().await?.into_iter().collect();
        self.known.send_if_modified(|known| {
            let differs = *known != paused;
            *known = paused;
            differs
        });
        Ok(())
    }
}

/// Keeps what is known up to date until the life ends.
pub async fn watch(life: &Life, period: Duration) {
    loop {
        tokio::select! {
            () = sleep(period) => {}
            () = life.pauses.changed.notified() => {}
            () = life.ended.cancelled() => return,
        }
        if let Err(error) = life.pauses.look(&*life.ledger).await {
            tracing::debug!(%error, "the ledger does not say which queues are paused, asking again");
        }
    }
}
