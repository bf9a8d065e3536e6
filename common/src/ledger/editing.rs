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
