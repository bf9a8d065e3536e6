//! How urgent a task is, and the lanes that follow from it.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::QueueName;

/// The urgency of a task: a worker that has both takes the more urgent one first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Before all others.
    High,
    /// The default.
    #[default]
    Normal,
    /// When nothing else is to do, and now and then all the same.
    Low,
}

impl Priority {
    /// All, the most urgent first.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    /// The name used in JSON and in the names of lanes.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }

    /// The number that ledgers keep: the higher, the more urgent.
    #[must_use]
    pub const fn code(self) -> i16 {
        match self {
            Self::High => 1,
            Self::Normal => 0,
            Self::Low => -1,
        }
    }

    /// The priority behind a code.
    #[must_use]
    pub fn from_code(code: i16) -> Option<Self> {
        Self::ALL.into_iter().find(|priority| priority.code() == code)
    }

    /// The priority of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|priority| priority.as_str() == name)
    }
}

/// The tasks of one queue that are equally urgent. Each lane is a queue of its own in the broker, and only within a
/// lane is the order that of publication.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane {
    /// The queue.
    pub queue: QueueName,
    /// How urgent they are.
    pub priority: Priority,
}

impl Lane {
    /// All lanes of a queue, the most urgent first.
    pub fn all_of(queue: &QueueName) -> impl Iterator<Item = Self> + use<'_> {
        Priority::ALL.into_iter().map(|priority| Self { queue: queue.clone(), priority })
    }
}

impl fmt::Display for Lane {
    /// `default` and `default.high`, as in the broker's names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.priority {
            Priority::Normal => self.queue.fmt(f),
            other => write!(f, "{}.{}", self.queue, other.as_str()),
        }
    }
}
