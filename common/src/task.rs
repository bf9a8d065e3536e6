//! What a task is: its names, its numbers, and the record that the API shows.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use uuid::Uuid;

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

/// Why a name was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The name has no characters.
    #[error("must not be empty")]
    Empty,
    /// The name is over its limit.
    #[error("must be at most {max} bytes long, but has {actual}")]
    TooLong {
        /// The limit in bytes.
        max: usize,
        /// The name's length in bytes.
        actual: usize,
    },
    /// The name holds a character that its grammar lacks.
    #[error("must match {grammar}")]
    Grammar {
        /// The grammar as a regular expression.
        grammar: &'static str,
    },
}

/// Names the work: a stable string that the submitter and the handler agree on, such as `report.build`.
///
/// Dot-separated words of `A-Z a-z 0-9 _ -`, at most [`KIND_BYTES_MAX`] bytes: it is part of a routing key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, max_length = 128, pattern = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", examples("report.build"))]
pub struct Kind(Arc<str>);

/// Names a queue, such as `default`: at most [`QUEUE_BYTES_MAX`] bytes of `a-z 0-9 _ -`.
///
/// It has no dots, since `<queue>.#` must match the routing keys of one queue only.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, max_length = 64, pattern = r"^[a-z0-9_-]+$", examples("default"))]
pub struct QueueName(Arc<str>);

impl Kind {
    /// Checks a name against the grammar of kinds.
    ///
    /// # Errors
    /// [`NameError`] says which rule the name breaks.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        check_length(name, KIND_BYTES_MAX)?;
        let word = |word: &str| {
            !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
        };
        if !name.split('.').all(word) {
            return Err(NameError::Grammar { grammar: r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*" });
        }
        Ok(Self(name.into()))
    }
}

impl QueueName {
    /// Checks a name against the grammar of queue names.
    ///
    /// # Errors
    /// [`NameError`] says which rule the name breaks.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        check_length(name, QUEUE_BYTES_MAX)?;
        if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-')) {
            return Err(NameError::Grammar { grammar: "[a-z0-9_-]+" });
        }
        Ok(Self(name.into()))
    }
}

impl Default for QueueName {
    fn default() -> Self {
        Self("default".into())
    }
}

fn check_length(name: &str, max: usize) -> Result<(), NameError> {
    match name.len() {
        0 => Err(NameError::Empty),
        actual if actual > max => Err(NameError::TooLong { max, actual }),
        _ => Ok(()),
    }
}

/// What every checked name gives: its text, its display, its conversions and its parser.
macro_rules! name_conversions {
    ($($name:ident),*) => {$(
        impl $name {
            /// The name's text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(name: String) -> Result<Self, NameError> {
                Self::parse(&name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::parse(name)
            }
        }
    )*};
}

name_conversions!(Kind, QueueName);

/// A piece of JSON passed through as text, neither parsed again nor copied.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Json(Arc<RawValue>);

impl Json {
    /// Takes text that is one JSON value.
    ///
    /// # Errors
    /// When the text is not JSON.
    pub fn parse(text: String) -> Result<Self, serde_json::Error> {
        RawValue::from_string(text).map(|raw| Self(raw.into()))
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    /// When the value has no JSON form, such as a map with keys that are not strings.
    pub fn of(value: &(impl Serialize + ?Sized)) -> Result<Self, serde_json::Error> {
        serde_json::value::to_raw_value(value).map(|raw| Self(raw.into()))
    }

    /// JSON's `null`.
    #[must_use]
    pub fn null() -> Self {
        Self(RawValue::NULL.to_owned().into())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.get()
    }
}

impl From<Box<RawValue>> for Json {
    fn from(raw: Box<RawValue>) -> Self {
        Self(raw.into())
    }
}

impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
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

/// A claim to be the only task with a key. Keys are one space for all kinds and queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unique {
    /// The key, at most [`UNIQUE_KEY_BYTES_MAX`] bytes.
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
    pub at: Timestamp,
    /// What happened, at most [`ERROR_BYTES_MAX`] bytes.
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
    /// The newest failed attempts, oldest first, at most [`ERRORS_KEPT`].
    pub errors: Vec<AttemptError>,
    /// Why the task was cancelled or discarded, or why it shall be cancelled.
    pub reason: Option<String>,
    /// When it was recorded.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it may start next, or could last start.
    #[schema(value_type = String, format = DateTime)]
    pub run_at: Timestamp,
    /// When the newest attempt started.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// When it reached a final state.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<Timestamp>,
    /// When somebody asked for its cancellation; a run that was completed all the same keeps it.
    #[schema(value_type = Option<String>, format = DateTime)]
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
