//! What a task is: its names, its numbers, and the record that the API shows.

mod json;
mod name;
mod priority;
mod readable;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

pub use self::json::{Digest, Json};
pub use self::name::{Kind, NameError, QueueName};
pub use self::priority::{Lane, Priority};
pub use self::readable::check_readable;
use crate::state::State;

/// Longest `kind`, in bytes.
pub const KIND_BYTES_MAX: usize = 128;
/// Longest queue name, in bytes.
pub const QUEUE_BYTES_MAX: usize = 64;
/// Longest reason of a cancellation that a client may give, in bytes.
pub const REASON_BYTES_MAX: usize = 1024;
/// Longest error message kept in the ledger, in bytes.
pub const ERROR_BYTES_MAX: usize = 4096;
/// Longest unique key, in bytes.
pub const UNIQUE_KEY_BYTES_MAX: usize = 255;
/// How many errors of a task the ledger keeps: the newest.
pub const ERRORS_KEPT: usize = 20;

/// The identity of a task: a UUID of version 7, so that ids sort by submission time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = Uuid)]
pub struct TaskId(pub Uuid);

impl TaskId {
    /// A new id, made from this machine's wall clock and randomness.
    #[must_use]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Default for TaskId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for TaskId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::try_parse(text).map(Self)
    }
}

/// The identity of one life of a worker: new at every start and after every lost lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = Uuid)]
pub struct WorkerId(pub Uuid);

impl WorkerId {
    /// A new id, never used before.
    #[must_use]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Default for WorkerId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The identity of a group: a UUID of version 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = Uuid)]
pub struct GroupId(pub Uuid);

impl GroupId {
    /// A new id, made from this machine's wall clock and randomness.
    #[must_use]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Default for GroupId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for GroupId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::try_parse(text).map(Self)
    }
}

/// Names a ledger, wherever it lies: given once, when it is made, and copied with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LedgerId(pub Uuid);

impl fmt::Display for LedgerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number that rises with every claim of a task: the holder of the highest one is the only holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = i64)]
pub struct Fence(pub i64);

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a crash in the middle of a run means for the task; declared by the handler.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    /// The task starts again elsewhere, as the next attempt. For idempotent work. The default.
    #[default]
    AtLeastOnce,
    /// The task never starts again: it is discarded with reason `interrupted`. For payments and e-mail.
    AtMostOnce,
    /// The handler's own writes to the ledger's database commit together with the completion, so a run that is cut
    /// leaves nothing behind and the task starts again, as the next attempt. For data work in the same database.
    Transactional,
}

/// A validated submission that has not been recorded yet. Only request validation and library callers make it.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// The id that the task will have.
    pub id: TaskId,
    /// The work to do.
    pub kind: Kind,
    /// The queue that carries it.
    pub queue: QueueName,
    /// The handler's input.
    pub args: Json,
    /// Its urgency.
    pub priority: Priority,
    /// How often it may start; at least 1.
    pub max_attempts: i32,
    /// How long one run may take; `None` leaves it to the handler.
    pub timeout: Option<Duration>,
    /// When it may start; `None` means at once.
    pub run_at: Option<Timestamp>,
    /// The submitter's own labels.
    pub tags: BTreeMap<String, String>,
    /// W3C trace context of the submission.
    pub traceparent: Option<String>,
    /// What it is the only one of; `None` for most.
    pub unique: Option<Unique>,
    /// What it shares [limits](crate::limit) with, besides its queue and its kind.
    pub concurrency_key: Option<String>,
    /// The failed task whose work it does with other args; `None` for most.
    pub retried_from: Option<TaskId>,
    /// How long after the task's end its result is kept; `None` means as long as the task.
    pub result_ttl: Option<Duration>,
}

impl NewTask {
    /// A task of the queue `default` of which nothing else is said: it may start once, and at once.
    #[must_use]
    pub fn new(kind: Kind, args: Json) -> Self {
        Self {
            id: TaskId::new(),
            kind,
            queue: QueueName::default(),
            args,
            priority: Priority::default(),
            max_attempts: 1,
            timeout: None,
            run_at: None,
            tags: BTreeMap::new(),
            traceparent: None,
            unique: None,
            concurrency_key: None,
            retried_from: None,
            result_ttl: None,
        }
    }
}

/// A claim to be the only task with a key. Keys are one space for all kinds and queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unique {
    /// The key, at most 255 bytes.
    pub key: String,
    /// For how long after its recording the task holds the key, finished or not; `None` until it has finished.
    /// A task that is not kept any more holds nothing.
    pub window: Option<Duration>,
    /// What happens when another task holds the key.
    pub on_conflict: OnConflict,
}

/// What happens to a task whose unique key another task holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnConflict {
    /// It is refused, and so is all that was submitted with it. The default.
    #[default]
    Reject,
    /// It is not recorded; the other one stands for it.
    ReturnExisting,
    /// The other one is cancelled if it waits, and refuses it if it runs or has finished.
    ReplaceWaiting,
}

/// One failed attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttemptError {
    /// The attempt that failed, counted from 1.
    pub attempt: i32,
    /// When it failed.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub at: Timestamp,
    /// What happened, at most 4,096 bytes.
    pub message: String,
    /// Which sort of failure it was.
    pub kind: ErrorKind,
}

/// The sorts of failure that end an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The handler returned an error.
    Error,
    /// The handler panicked.
    Panic,
    /// The run took longer than its timeout.
    Timeout,
    /// The args did not fit the handler's type.
    Args,
    /// The worker died, or lost its lease, in the middle of the run.
    Crash,
}

impl ErrorKind {
    /// The name used in JSON and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Panic => "panic",
            Self::Timeout => "timeout",
            Self::Args => "args",
            Self::Crash => "crash",
        }
    }
}

/// A task as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// The task's identity.
    pub id: TaskId,
    /// The work to do.
    pub kind: Kind,
    /// The queue that carries it.
    pub queue: QueueName,
    /// Where the task stands.
    pub state: State,
    /// The handler's input.
    #[schema(value_type = serde_json::Value)]
    pub args: Json,
    /// The submitter's own labels.
    pub tags: BTreeMap<String, String>,
    /// The urgency.
    pub priority: Priority,
    /// How many attempts have started; snoozes and interruptions by shutdown do not count.
    pub attempt: i32,
    /// How many attempts there may be.
    pub max_attempts: i32,
    /// The fence of the newest claim; 0 before the first.
    pub fence: Fence,
    /// What the handler answered; null until completed, and once it has expired.
    #[schema(value_type = Option<serde_json::Value>)]
    pub result: Option<Json>,
    /// Whether the result was cleared because its `result_ttl_ms` after the task's end was over.
    pub result_expired: bool,
    /// The newest failed attempts, oldest first, at most 20.
    pub errors: Vec<AttemptError>,
    /// Why the task was cancelled or discarded, or why it shall be cancelled.
    pub reason: Option<String>,
    /// When it was recorded.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub created_at: Timestamp,
    /// When it may start next, or could last start.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub run_at: Timestamp,
    /// When the newest attempt started.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub started_at: Option<Timestamp>,
    /// When it reached a final state.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub finished_at: Option<Timestamp>,
    /// When somebody asked for its cancellation; a run that was completed all the same keeps it.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub cancel_requested_at: Option<Timestamp>,
    /// The worker of the newest attempt.
    pub worker_id: Option<WorkerId>,
    /// How long one run may take; null leaves it to the handler.
    pub timeout_ms: Option<i64>,
    /// How long after the task's end its result is kept; null means as long as the task.
    pub result_ttl_ms: Option<i64>,
    /// What it was to be the only one of.
    pub unique_key: Option<String>,
    /// The group whose end it is part of.
    pub group_id: Option<GroupId>,
    /// What it shares limits with, besides its queue and its kind.
    pub concurrency_key: Option<String>,
    /// The limit that holds it, such as `kind:email.send`; null when none does.
    pub limited_by: Option<String>,
    /// The failed task whose work it does with other args.
    pub retried_from: Option<TaskId>,
    /// The newest task that does its work with other args; then a retry by filter leaves it out.
    pub retried_by: Option<TaskId>,
    /// The newest call that changed it: a cancellation, a retry, an edit or a move; null when there was none.
    pub last_change: Option<LastChange>,
}

/// The newest call that changed a task, and who made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LastChange {
    /// What was done.
    pub call: ChangeCall,
    /// Who did it, as the client's `Tasklane-Actor` said; null when it did not.
    pub by: Option<String>,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub at: Timestamp,
    /// The request's `X-Request-Id`, under which the producer has logged it.
    pub request_id: Option<String>,
}

/// The calls that change what was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeCall {
    /// It was cancelled, or its cancellation was asked for.
    Cancel,
    /// It was run again.
    Retry,
    /// Something about it was changed.
    Edit,
    /// It was given to another queue.
    Move,
}

/// Cuts a text to at most `max` bytes at a character's border, marking the cut with an ellipsis.
#[must_use]
pub fn truncate(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(max.saturating_sub('…'.len_utf8()));
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_dotted_words() {
        for good in ["a", "report.build", "A-b_c.9"] {
            assert_eq!(Kind::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "a/b", "ä", &"x".repeat(129)] {
            assert!(Kind::parse(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn queue_names_have_no_dots() {
        assert!(QueueName::parse("emails-2_x").is_ok());
        for bad in ["", "a.b", "A", "ä", &"x".repeat(65)] {
            assert!(QueueName::parse(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn priorities_have_names_and_codes() {
        for priority in Priority::ALL {
            assert_eq!(Priority::from_code(priority.code()), Some(priority));
            assert_eq!(Priority::from_name(priority.as_str()), Some(priority));
            assert_eq!(serde_json::json!(priority), priority.as_str());
        }
        assert!(Priority::ALL.is_sorted_by(|more, less| more < less && more.code() > less.code()));
        assert_eq!((Priority::from_code(2), Priority::from_name("HIGH")), (None, None));
    }

    #[test]
    fn truncation_respects_characters_and_the_limit() {
        assert_eq!(truncate("short", 5), "short");
        let cut = truncate(&"ü".repeat(10), 10);
        assert!(cut.len() <= 10 && cut.ends_with('…'), "{cut}");
    }
}
