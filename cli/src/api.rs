//! The parts of the API's answers that are shown to people. What a newer producer adds is passed over.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A task.
#[derive(Debug, Deserialize)]
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) kind: String,
    pub(crate) queue: String,
    pub(crate) state: String,
    pub(crate) args: Option<Box<RawValue>>,
    #[serde(default)]
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) attempt: i64,
    pub(crate) max_attempts: i64,
    pub(crate) result: Option<Box<RawValue>>,
    #[serde(default)]
    pub(crate) result_expired: bool,
    #[serde(default)]
    pub(crate) errors: Vec<AttemptError>,
    pub(crate) reason: Option<String>,
    pub(crate) created_at: Timestamp,
    pub(crate) run_at: Timestamp,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) finished_at: Option<Timestamp>,
    pub(crate) cancel_requested_at: Option<Timestamp>,
    pub(crate) worker_id: Option<String>,
    pub(crate) timeout_ms: Option<i64>,
    pub(crate) retried_from: Option<String>,
    pub(crate) retried_by: Option<String>,
    pub(crate) concurrency_key: Option<String>,
    pub(crate) limited_by: Option<String>,
    pub(crate) last_change: Option<LastChange>,
}

/// The newest call that changed a task.
#[derive(Debug, Deserialize)]
pub(crate) struct LastChange {
    pub(crate) call: String,
    pub(crate) by: Option<String>,
    pub(crate) at: Timestamp,
    pub(crate) request_id: Option<String>,
}

impl Task {
    /// Whether it will not move again by itself.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.state.as_str(), "completed" | "cancelled" | "discarded")
    }
}

/// A failed attempt.
#[derive(Debug, Deserialize)]
pub(crate) struct AttemptError {
    pub(crate) attempt: i64,
    pub(crate) at: Timestamp,
    pub(crate) message: String,
    pub(crate) kind: String,
}

/// A page of tasks, as JSON each.
#[derive(Debug, Deserialize)]
pub(crate) struct TaskPage {
    pub(crate) tasks: Vec<Box<RawValue>>,
    pub(crate) next_cursor: Option<String>,
}

/// The answer to a batch, as JSON each.
#[derive(Debug, Deserialize)]
pub(crate) struct BatchAccepted {
    pub(crate) tasks: Vec<Box<RawValue>>,
    pub(crate) group: Option<Identified>,
}

/// What has an id.
#[derive(Debug, Deserialize)]
pub(crate) struct Identified {
    pub(crate) id: String,
}

/// How far a cancellation by a filter has come.
#[derive(Debug, Deserialize)]
pub(crate) struct CancelledTasks {
    pub(crate) cancelled: u64,
    pub(crate) requested: u64,
    pub(crate) next_cursor: Option<String>,
}

/// How far a purge has come.
#[derive(Debug, Deserialize)]
pub(crate) struct PurgedTasks {
    pub(crate) purged: u64,
    pub(crate) next_cursor: Option<String>,
}

/// How far a move has come.
#[derive(Debug, Deserialize)]
pub(crate) struct MovedTasks {
    pub(crate) moved: u64,
    pub(crate) next_cursor: Option<String>,
}

/// How far a retry by a filter has come.
#[derive(Debug, Deserialize)]
pub(crate) struct RetriedTasks {
    pub(crate) retried: u64,
    pub(crate) conflicts: u64,
    pub(crate) next_cursor: Option<String>,
}

/// The tasks of a batch with an end.
#[derive(Debug, Deserialize)]
pub(crate) struct Group {
    pub(crate) id: String,
    pub(crate) total: u64,
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) then: Then,
    pub(crate) created_at: Timestamp,
    pub(crate) finished_at: Option<Timestamp>,
}

/// What follows it.
#[derive(Debug, Deserialize)]
pub(crate) struct Then {
    pub(crate) id: Option<String>,
    pub(crate) kind: String,
}

/// A queue.
#[derive(Debug, Deserialize)]
pub(crate) struct Queue {
    pub(crate) name: String,
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) oldest_waiting_ms: Option<i64>,
    pub(crate) broker_depth: Option<u64>,
    pub(crate) workers: Option<u64>,
    #[serde(default)]
    pub(crate) paused: bool,
    pub(crate) paused_at: Option<Timestamp>,
    pub(crate) paused_by: Option<String>,
}

impl Queue {
    /// How many tasks are in a state.
    pub(crate) fn count(&self, state: &str) -> u64 {
        self.counts.get(state).copied().unwrap_or_default()
    }
}

/// All queues.
#[derive(Debug, Deserialize)]
pub(crate) struct QueueList {
    pub(crate) queues: Vec<Queue>,
}

/// A live worker.
#[derive(Debug, Deserialize)]
pub(crate) struct Worker {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) host: String,
    pub(crate) pid: Option<u32>,
    pub(crate) queues: Vec<String>,
    pub(crate) kinds: Vec<String>,
    pub(crate) concurrency: i64,
    pub(crate) running: i64,
    pub(crate) version: String,
    pub(crate) started_at: Timestamp,
    pub(crate) lease_age_ms: i64,
    #[serde(default)]
    pub(crate) runs: Vec<Run>,
}

/// What a worker runs.
#[derive(Debug, Deserialize)]
pub(crate) struct Run {
    pub(crate) task_id: String,
    pub(crate) kind: String,
    pub(crate) attempt: i64,
    pub(crate) since: Timestamp,
}

/// A worker that is not alive any more.
#[derive(Debug, Deserialize)]
pub(crate) struct GoneWorker {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) host: String,
    pub(crate) pid: Option<u32>,
    pub(crate) version: String,
    pub(crate) started_at: Timestamp,
    pub(crate) ended_at: Option<Timestamp>,
    pub(crate) ended: Option<String>,
}

/// The workers.
#[derive(Debug, Deserialize)]
pub(crate) struct WorkerList {
    pub(crate) workers: Vec<Worker>,
    #[serde(default)]
    pub(crate) gone: Vec<GoneWorker>,
}

/// Something that happened to a task.
#[derive(Debug, Deserialize)]
pub(crate) struct TaskEvent {
    pub(crate) at: Timestamp,
    pub(crate) id: String,
    pub(crate) kind: String,
    pub(crate) queue: String,
    pub(crate) event: String,
    pub(crate) state: String,
    pub(crate) attempt: i64,
    pub(crate) worker_id: Option<String>,
}

/// A schedule.
#[derive(Debug, Deserialize)]
pub(crate) struct Schedule {
    pub(crate) name: String,
    pub(crate) cron: String,
    pub(crate) timezone: String,
    pub(crate) task: Template,
    pub(crate) catch_up: String,
    pub(crate) catch_up_max: u32,
    pub(crate) overlap: String,
    pub(crate) jitter_ms: i64,
    pub(crate) paused: bool,
    pub(crate) paused_at: Option<Timestamp>,
    pub(crate) paused_by: Option<String>,
    #[serde(default)]
    pub(crate) next_runs: Vec<Timestamp>,
    pub(crate) last_tick: Option<Timestamp>,
    pub(crate) last_task_id: Option<String>,
    pub(crate) last_skipped: Option<Timestamp>,
    #[serde(default)]
    pub(crate) skipped_in_a_row: i64,
    pub(crate) blocked_by: Option<String>,
    pub(crate) next_at: Option<Timestamp>,
    pub(crate) ticks: Ticks,
}

/// What each tick submits.
#[derive(Debug, Deserialize)]
pub(crate) struct Template {
    pub(crate) kind: String,
    pub(crate) queue: String,
    pub(crate) args: Option<Box<RawValue>>,
    pub(crate) priority: Option<String>,
    pub(crate) max_attempts: i64,
    pub(crate) timeout_ms: Option<i64>,
    pub(crate) concurrency_key: Option<String>,
    #[serde(default)]
    pub(crate) tags: BTreeMap<String, String>,
}

/// What became of a schedule's ticks.
#[derive(Debug, Deserialize)]
pub(crate) struct Ticks {
    pub(crate) fired: i64,
    pub(crate) skipped: i64,
    pub(crate) missed: i64,
}

/// A page of schedules, as JSON each.
#[derive(Debug, Deserialize)]
pub(crate) struct SchedulePage {
    pub(crate) schedules: Vec<Box<RawValue>>,
    #[serde(default)]
    pub(crate) unreadable: Vec<Unreadable>,
    pub(crate) next_cursor: Option<String>,
}

/// A schedule that the producer cannot read.
#[derive(Debug, Deserialize)]
pub(crate) struct Unreadable {
    pub(crate) name: String,
    pub(crate) problem: String,
}

/// A limit.
#[derive(Debug, Deserialize)]
pub(crate) struct Limit {
    pub(crate) of: String,
    pub(crate) name: String,
    pub(crate) max_running: Option<u32>,
    pub(crate) rate: Option<Rate>,
    pub(crate) max_queued: Option<u32>,
    pub(crate) origin: String,
}

/// How often tasks start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rate {
    pub(crate) tasks: u32,
    pub(crate) per_ms: u64,
    pub(crate) burst: u32,
}

/// All limits.
#[derive(Debug, Deserialize)]
pub(crate) struct LimitList {
    pub(crate) limits: Vec<Limit>,
}

/// What the producer stands on.
#[derive(Debug, Deserialize)]
pub(crate) struct Readiness {
    pub(crate) ledger: bool,
    pub(crate) broker: bool,
    pub(crate) stopping: bool,
}

/// An error, RFC 9457.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Problem {
    pub(crate) title: String,
    pub(crate) detail: String,
    pub(crate) code: String,
    pub(crate) errors: Vec<FieldError>,
    pub(crate) instance: Option<String>,
}

/// A place in a request, and what is wrong there.
#[derive(Debug, Deserialize)]
pub(crate) struct FieldError {
    pub(crate) path: String,
    pub(crate) message: String,
}
