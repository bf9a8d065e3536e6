//! What is said between a ledger and a worker about its lease, and about what dead workers have left.

use std::time::Duration;

use jiff::Timestamp;

use crate::task::{Fence, Guarantee, Kind, Lane, QueueName, TaskId, WorkerId};

/// A worker as it enters itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerRecord {
    /// Its identity, never used before.
    pub id: WorkerId,
    /// The name that its operator gave it.
    pub name: Option<String>,
    /// The machine's name.
    pub host: String,
    /// The number of its process there.
    pub pid: u32,
    /// The queues it consumes.
    pub queues: Vec<QueueName>,
    /// The kinds it has handlers for.
    pub kinds: Vec<Kind>,
    /// How many tasks it runs at once.
    pub concurrency: i32,
    /// The program's version.
    pub version: String,
}

/// Extends a lease, and carries what else a worker reports regularly.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// Whose lease.
    pub worker: WorkerId,
    /// How long it shall live from now.
    pub ttl: Duration,
    /// How many tasks the worker runs.
    pub running: i32,
    /// Per lane, the newest `queued_at` among the tasks delivered to this worker: the lane's watermark.
    ///
    /// Lanes are first-in-first-out, so a task queued well before it that still waits there has lost its message.
    pub heads: Vec<(Lane, Timestamp)>,
}

/// The ledger's answer to a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewed {
    /// The lease lives on.
    Held,
    /// It had ended before, and its tasks may be elsewhere: the worker must start over under a new id.
    Lost,
}

/// A running task, as whoever takes it from its worker must know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abandoned {
    /// The task.
    pub id: TaskId,
    /// The work.
    pub kind: Kind,
    /// Its queue.
    pub queue: QueueName,
    /// The fence of the run.
    pub fence: Fence,
    /// The worker that has it.
    pub worker: WorkerId,
    /// The attempt.
    pub attempt: i32,
    /// How many there may be.
    pub max_attempts: i32,
    /// How many crashes came before this one.
    pub crashes: i32,
    /// What the handler declared.
    pub guarantee: Guarantee,
    /// Whether somebody wanted it cancelled.
    pub cancel_requested: bool,
    /// How long ago the lease of its worker ended, if that is so and the worker was on this machine.
    pub lease_ended: Option<Duration>,
}
