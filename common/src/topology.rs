//! The names of everything that Tasklane has in the broker. `rabbitmq/definitions.json` declares the same.

use crate::task::{Kind, QueueName};

/// The durable topic exchange that every task passes; operators may bind queues of their own to it.
pub const TASKS_EXCHANGE: &str = "tasklane.tasks";
/// The durable fanout exchange that dead letters pass.
pub const DEAD_EXCHANGE: &str = "tasklane.dead";
/// The durable queue that holds dead letters until a person looks at them.
pub const DEAD_QUEUE: &str = "tasklane.dead";
/// What the names of all task queues begin with.
pub const QUEUE_PREFIX: &str = "tasklane.q.";
/// The header of a dead letter that says why it is one.
pub const REASON_HEADER: &str = "tasklane-reason";

/// The broker's name of a queue: `tasklane.q.<queue>`.
#[must_use]
pub fn broker_queue(queue: &QueueName) -> String {
    format!("{QUEUE_PREFIX}{queue}")
}

/// The key under which a task is published: `<queue>.<kind>`.
#[must_use]
pub fn routing_key(queue: &QueueName, kind: &Kind) -> String {
    format!("{queue}.{kind}")
}

/// The key by which a queue is bound: `<queue>.#`.
#[must_use]
pub fn binding_key(queue: &QueueName) -> String {
    format!("{queue}.#")
}
