//! What is recorded later: a task without its id, its time and its trace.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::clock::millis;
use crate::ledger::LedgerError;
use crate::task::{Json, Kind, NewTask, Priority, QueueName};

/// The task of each tick of a schedule, or the one that follows a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TaskTemplate {
    /// The work to do.
    pub kind: Kind,
    /// The queue that carries it.
    pub queue: QueueName,
    /// The handler's input.
    #[schema(value_type = serde_json::Value)]
    pub args: Json,
    /// The urgency.
    #[serde(default)]
    #[schema(required)]
    pub priority: Priority,
    /// How often it may start.
    pub max_attempts: i32,
    /// How long one run may take; null leaves it to the handler.
    pub timeout_ms: Option<i64>,
    /// How long after the task's end its result is kept; null means as long as the task.
    #[serde(default)]
    pub result_ttl_ms: Option<i64>,
    /// What it shares limits with, besides its queue and its kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency_key: Option<String>,
    /// The submitter's own labels; a schedule adds those of itself and of the tick.
    pub tags: BTreeMap<String, String>,
}

impl From<NewTask> for TaskTemplate {
    /// Leaves out what belongs to a single task.
    fn from(task: NewTask) -> Self {
        let NewTask { kind, queue, args, priority, max_attempts, timeout, tags, .. } = task;
        let (timeout_ms, result_ttl_ms) = (timeout.map(millis), task.result_ttl.map(millis));
        let concurrency_key = task.concurrency_key;
        Self { kind, queue, args, priority, max_attempts, timeout_ms, result_ttl_ms, concurrency_key, tags }
    }
}

impl From<TaskTemplate> for NewTask {
    /// A new task, to start at once.
    fn from(template: TaskTemplate) -> Self {
        let TaskTemplate { kind, queue, args, priority, max_attempts, tags, .. } = template;
        let duration = |ms: i64| Duration::from_millis(ms.unsigned_abs());
        Self {
            queue,
            priority,
            max_attempts,
            timeout: template.timeout_ms.map(duration),
            tags,
            result_ttl: template.result_ttl_ms.map(duration),
            concurrency_key: template.concurrency_key,
            ..Self::new(kind, args)
        }
    }
}

impl TaskTemplate {
    /// As the ledgers keep it.
    ///
    /// # Errors
    /// None: every template has a JSON form.
    pub fn to_json(&self) -> Result<String, LedgerError> {
        serde_json::to_string(self).map_err(|error| LedgerError::Corrupt(error.to_string()))
    }
}
