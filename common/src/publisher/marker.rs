//! Tells the ledger, lazily and in batches, which publications the broker has confirmed.
//!
//! Lateness is wanted: a task that a worker claims within 100 ms needs no mark, and its write is saved.
//! A mark that gets lost only makes the relay publish the task once more, which the claim makes harmless.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use crate::ledger::{Mark, SharedLedger, complain};
use crate::task::{Fence, TaskId};

const LINGER: Duration = Duration::from_millis(100);
const BATCH_MAX: usize = 1024;
const WAITING_MAX: usize = 8192;
const TRIES: u32 = 3;

/// Where confirmed publications are reported.
#[derive(Debug, Clone)]
pub struct Marks(mpsc::Sender<(TaskId, Fence, Instant)>);

impl Marks {
    /// Reports one; waits when the ledger is slow.
    pub async fn confirmed(&self, id: TaskId, fence: Fence) {
        // The marker ends only after its last sender.
        let _ = self.0.send((id, fence, Instant::now())).await;
    }
}

/// Starts the marker; it ends when every [`Marks`] is dropped and the last marks are written.
#[must_use]
pub fn spawn(ledger: SharedLedger) -> Marks {
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    crate::vital::spawn("marker", run(ledger, receiver));
    Marks(sender)
}

async fn run(ledger: SharedLedger, mut receiver: mpsc::Receiver<(TaskId, Fence, Instant)>) {
    let mut batch = Vec::new();
    while receiver.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let until = Instant::now() + LINGER;
        while batch.len() < BATCH_MAX {
            let room = BATCH_MAX - batch.len();
            match timeout_at(until, receiver.recv_many(&mut batch, room)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        write(&ledger, std::mem::take(&mut batch)).await;
    }
}

async fn write(ledger: &SharedLedger, batch: Vec<(TaskId, Fence, Instant)>) {
    for attempt in 1..=TRIES {
        let marks = batch.iter().map(|&(id, fence, at)| Mark { id, fence, ago: at.elapsed() });
        match ledger.mark_queued(marks.collect()).await {
            Ok(()) => return,
            Err(error) if attempt == TRIES || !error.is_retryable() => {
                complain(&error, "published tasks could not be marked, the relay will publish them again");
                return;
            }
            Err(_) => sleep(LINGER * attempt).await,
        }
    }
}
