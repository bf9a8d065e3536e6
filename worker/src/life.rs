//! One life of a worker: from entering the ledger under a new id to the end of its lease.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tasklane_common::events::Events;
use tasklane_common::ledger::SharedLedger;
use tasklane_common::publisher::Publisher;
use tasklane_common::release::Nudges;
use tasklane_common::task::Lane;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::arbiter::Arbiter;
use crate::config::Settings;
use crate::held::Held;
use crate::lanes::Lanes;
use crate::lease::Lease;
use crate::lookout::Stalled;
use crate::meters::Meters;
use crate::pause::Pauses;
use crate::registry::Registry;

/// What everything in one life shares.
#[derive(Debug)]
pub struct Life {
    /// The right to run anything.
    pub lease: Lease,
    /// The handlers.
    pub registry: Registry,
    /// The judge.
    pub ledger: SharedLedger,
    /// For notices to waiting clients.
    pub publisher: Publisher,
    /// Tells whoever looks what happens to tasks.
    pub events: Events,
    /// The settings.
    pub settings: Arc<Settings>,
    /// The metrics of each kind.
    pub meters: Meters,
    /// One permit a running task.
    pub permits: Arbiter,
    /// One permit: a suspect runs with no other suspect beside it.
    pub suspects: Arc<Semaphore>,
    /// Every delivery under way.
    pub deliveries: TaskTracker,
    /// Is cancelled when no further delivery shall be taken.
    pub draining: CancellationToken,
    /// Is cancelled when running handlers shall be cut short.
    pub interrupt: CancellationToken,
    /// Is cancelled at the very end.
    pub ended: CancellationToken,
    /// What this process has done so far, over all lives.
    pub stats: Arc<Stats>,
    /// The tasks that the ledger has granted to this life, or may have.
    pub held: Held,
    /// Is notified when the ledger has something for [`crate::cancel`].
    pub asked: Notify,
    /// Is notified when messages of a queue of this worker were lost.
    pub messages_lost: Notify,
    /// Wakes the loops that wait for what happens in this life.
    pub nudges: Arc<Nudges>,
    /// The queues that somebody has paused.
    pub pauses: Pauses,
    /// How many starts failed in a row for want of what the machine has no more of.
    pub starved: AtomicU32,
    /// Per lane, the newest `queued_at` delivered since the last renewal.
    pub heads: Mutex<HashMap<Lane, Timestamp>>,
}

impl Life {
    /// Notes that a task queued at `queued_at` was delivered.
    pub fn note_head(&self, lane: &Lane, queued_at: Timestamp) {
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        let head = heads.entry(lane.clone()).or_insert(queued_at);
        *head = (*head).max(queued_at);
    }

    /// Takes the notes for the next renewal; what a failed one loses is soon noted again.
    pub fn take_heads(&self) -> Vec<(Lane, Timestamp)> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).drain().collect()
    }
}

/// Counts since the start of the process.
#[derive(Debug, Default)]
pub struct Stats {
    /// Handlers started.
    pub started: AtomicU64,
    /// Tasks completed.
    pub completed: AtomicU64,
    /// Failed attempts that will be followed by another, and snoozes.
    pub retried: AtomicU64,
    /// Tasks discarded.
    pub discarded: AtomicU64,
    /// Tasks cancelled.
    pub cancelled: AtomicU64,
    /// Runs cut short by the shutdown.
    pub interrupted: AtomicU64,
    /// Results refused because somebody else held the task.
    pub fenced: AtomicU64,
    /// From which lanes deliveries can come in at this moment.
    pub lanes: Lanes,
    /// Whether the lease is held at this moment.
    pub leased: AtomicBool,
    /// The lanes whose messages are ready and do not come.
    pub stalled: Stalled,
}

impl Stats {
    /// Adds one.
    pub fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
