//! What a person changes of a task that waits.

use std::time::Duration;

use jiff::Timestamp;

use crate::state::State;
use crate::task::{Json, Priority, QueueName};

/// What shall be different; what is `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Edit {
    /// When it may start; a time in the past means at once.
    pub run_at: Option<Timestamp>,
    /// The handler's input.
    pub args: Option<Json>,
    /// The queue that carries it.
    pub queue: Option<QueueName>,
    /// How urgent it is.
    pub priority: Option<Priority>,
    /// How often it may start: more often than it has.
    pub max_attempts: Option<i32>,
    /// How long one run may take.
    pub timeout: Option<Duration>,
}

impl Edit {
    /// The names of the fields that shall be different.
    #[must_use]
    pub fn fields(&self) -> Vec<&'static str> {
        let Self { run_at, args, queue, priority, max_attempts, timeout } = self;
        let given = [
            (run_at.is_some(), "run_at"),
            (args.is_some(), "args"),
            (queue.is_some(), "queue"),
            (priority.is_some(), "priority"),
            (max_attempts.is_some(), "max_attempts"),
            (timeout.is_some(), "timeout_ms"),
        ];
        given.into_iter().filter(|(given, _)| *given).map(|(_, name)| name).collect()
    }
}

/// What became of an [`Edit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edited {
    /// There is no such task.
    Unknown,
    /// It has started so often already, and `max_attempts` would leave it no attempt; nothing changed.
    NoAttemptLeft(i32),
    /// It was in this state, and was changed where [`crate::state::next`] says so.
    From(State),
}
