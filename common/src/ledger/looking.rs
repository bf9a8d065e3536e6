//! What is asked of a ledger to be shown, and the answers.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::clock::millis;
use crate::state::State;
use crate::task::{GroupId, Kind, QueueName, Task, TaskId, WorkerId};

/// How many of a queue's last runs tell how long its kinds take.
pub(crate) const RUNS_LOOKED_AT: i64 = 100;

/// Which tasks to list.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Only in this state.
    pub state: Option<State>,
    /// Only of this kind.
    pub kind: Option<Kind>,
    /// Only of this queue.
    pub queue: Option<QueueName>,
    /// Only with all of these tags, each of its value.
    pub tags: Vec<(String, String)>,
    /// Only members of this group.
    pub group: Option<GroupId>,
    /// Only those whose last error's message has this in it.
    pub error: Option<String>,
    /// Only those recorded then or later.
    pub since: Option<Timestamp>,
    /// Only those recorded before that.
    pub until: Option<Timestamp>,
    /// Only those that this worker runs, or was the last to run.
    pub worker: Option<WorkerId>,
    /// Only those with this reason, whole.
    pub reason: Option<String>,
    /// Only tasks older than this one.
    pub before: Option<TaskId>,
    /// At most so many tasks; 1 to 1,000.
    pub limit: u32,
}

/// How many rows one page may look at before it ends short; keeps a rare filter from reading a whole ledger.
pub const LIST_SCAN_MAX: u32 = 50_000;

/// How long one page is looked for before it ends short.
pub(crate) const LIST_TIME: Duration = Duration::from_secs(1);

/// How many tasks in an unfinished state are looked at by themselves. Where more are, the newest of all are looked at, among
/// which are enough of them.
pub(crate) const UNFINISHED_SEEN_MAX: u32 = 50_000;

/// How far the clock that made an id may be off the one that recorded the task.
const CLOCKS_APART: Duration = Duration::from_secs(24 * 60 * 60);

impl ListQuery {
    /// The ids between which all of its tasks are, as far as it says: the greatest and the least, neither of them included.
    pub(crate) fn bounds(&self) -> (Uuid, Uuid) {
        let begun_at = |ms: i64| {
            let ms = u64::try_from(ms).unwrap_or(0).min((1 << 48) - 1);
            Uuid::from_u128(u128::from(ms) << 80)
        };
        let apart = millis(CLOCKS_APART);
        let until = self.until.map_or(Uuid::max(), |until| begun_at(until.as_millisecond().saturating_add(apart)));
        let before = self.before.map_or(Uuid::max(), |id| id.0);
        let since = self.since.map_or(Uuid::nil(), |since| begun_at(since.as_millisecond().saturating_sub(apart)));
        (before.min(until), since)
    }

    /// Whether a task meets what a ledger's own language tells only roughly.
    pub(crate) fn lets_through(&self, task: &Task) -> bool {
        let says = |text: &String| task.errors.last().is_some_and(|error| error.message.contains(text.as_str()));
        self.tags.iter().all(|(key, value)| task.tags.get(key) == Some(value)) && self.error.as_ref().is_none_or(says)
    }

    /// The text of an error as it stands within JSON.
    pub(crate) fn error_in_json(&self) -> Option<String> {
        let written = self.error.as_ref().and_then(|text| serde_json::to_string(text).ok())?;
        Some(written[1..written.len() - 1].to_owned())
    }
}

/// How many bytes of args and results one page holds, unless a single task has more; then the page is short.
pub(crate) const PAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A page of tasks.
#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    /// Newest first; may be fewer than asked for, even none, while `next` is set.
    pub tasks: Vec<Task>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<TaskId>,
}

/// A queue as the ledger sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueCounts {
    /// The queue.
    pub queue: QueueName,
    /// How many tasks are in each state; the unfinished ones, `cancelled` and `discarded`, zeros left out.
    pub counts: BTreeMap<State, u64>,
    /// For how long the longest-waiting claimable task has been able to start.
    pub oldest_waiting: Option<Duration>,
    /// Since when it is paused, and by whom; `None` when it is not.
    pub paused: Option<Paused>,
}

/// A pause of a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paused {
    /// Since when.
    pub at: Timestamp,
    /// Who paused it, as far as the call said.
    pub by: Option<String>,
}

/// A live worker as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Worker {
    /// Its identity, new at every start.
    pub id: WorkerId,
    /// The name that its operator gave it (`TASKLANE_NAME`); null when none was given.
    pub name: Option<String>,
    /// The machine's name.
    pub host: String,
    /// The number of its process there; null of a worker of an earlier release.
    pub pid: Option<u32>,
    /// The queues it consumes.
    pub queues: Vec<QueueName>,
    /// The kinds it has handlers for.
    pub kinds: Vec<Kind>,
    /// How many tasks it runs at once.
    pub concurrency: i32,
    /// How many it ran at its last renewal.
    pub running: i32,
    /// The program's version.
    pub version: String,
    /// When it entered.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub started_at: Timestamp,
    /// How long ago it last renewed its lease.
    pub lease_age_ms: i64,
}

/// What a worker runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Run {
    /// The task.
    pub task_id: TaskId,
    /// The work.
    pub kind: Kind,
    /// Which attempt.
    pub attempt: i32,
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub since: Timestamp,
}

/// A worker that is not alive any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GoneWorker {
    /// Its identity.
    pub id: WorkerId,
    /// The name that its operator gave it.
    pub name: Option<String>,
    /// The machine's name.
    pub host: String,
    /// The number that its process had there.
    pub pid: Option<u32>,
    /// The program's version.
    pub version: String,
    /// When it entered.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub started_at: Timestamp,
    /// When it was seen to be gone; null when nobody has seen it yet, or of a worker of an earlier release.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub ended_at: Option<Timestamp>,
    /// How it went; null of a worker of an earlier release.
    pub ended: Option<WorkerEnd>,
}

/// How a worker went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkerEnd {
    /// It was told to stop, and has said so.
    Stopped,
    /// Its lease ended without a word: it was killed, has crashed, stood still, or was cut off.
    LeaseEnded,
}

/// How many runs of one worker are told: the oldest.
pub const RUNS_TOLD_MAX: usize = 100;
/// How many workers that are gone are told: the newest.
pub const GONE_TOLD_MAX: u32 = 100;
/// How many runs of all workers are looked at for that.
pub(crate) const RUNS_READ_MAX: u32 = 10_000;

/// All workers, as an operator looks at them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fleet {
    /// Those whose lease is alive.
    pub workers: Vec<Worker>,
    /// What they run, at most [`RUNS_TOLD_MAX`] each, the longest first.
    pub runs: BTreeMap<WorkerId, Vec<Run>>,
    /// Those that went within the last hour, the newest first.
    pub gone: Vec<GoneWorker>,
}

impl WorkerEnd {
    /// As the ledgers store it.
    pub(crate) const fn code(self) -> i16 {
        match self {
            Self::Stopped => 1,
            Self::LeaseEnded => 2,
        }
    }

    /// What [`WorkerEnd::code`] made.
    pub(crate) const fn from_code(code: i16) -> Option<Self> {
        match code {
            1 => Some(Self::Stopped),
            2 => Some(Self::LeaseEnded),
            _ => None,
        }
    }
}

/// The runs by their worker, from the longest to the newest.
pub(crate) fn by_worker(runs: impl IntoIterator<Item = (WorkerId, Run)>) -> BTreeMap<WorkerId, Vec<Run>> {
    let mut by_worker: BTreeMap<WorkerId, Vec<Run>> = BTreeMap::new();
    for (worker, run) in runs {
        let runs = by_worker.entry(worker).or_default();
        if runs.len() < RUNS_TOLD_MAX {
            runs.push(run);
        }
    }
    by_worker
}
