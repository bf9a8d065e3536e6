//! The ledger: a small SQL record of every task, and the only judge of what may run and which result counts.
//!
//! [`Ledger`] is implemented by [`sqlite`] (one machine, nothing to install) and [`postgres`] (several machines);
//! `conformance` is the suite that both pass. Every write groups itself with whatever else is waiting and is
//! durable when its future resolves. Times are judged by the ledger's clock, never by the caller's.

#[cfg(test)]
pub mod conformance;
mod caller;
mod claiming;
mod complaint;
mod leasing;
mod looking;
pub mod editing;
pub mod grouping;
pub mod postgres;
mod limiting;
mod scheduling;
pub mod sqlite;
pub mod transact;
mod unique;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

pub use self::caller::{ACTOR_BYTES_MAX, Caller};
pub(crate) use self::claiming::Believed;
pub use self::claiming::{
    Belief, Claim, ClaimRequest, Failure, Granted, Mark, Refusal, Settled, Settlement, Transition,
};
pub use self::complaint::complain;
pub use self::editing::{Edit, Edited};
pub use self::grouping::{Closed, EndedGroups};
pub use self::leasing::{Abandoned, Renewal, Renewed, WorkerRecord};
pub use self::limiting::{LimitSet, Released};
pub use self::looking::{
    Fleet, GONE_TOLD_MAX, GoneWorker, LIST_SCAN_MAX, ListQuery, Page, Paused, QueueCounts, RUNS_TOLD_MAX, Run, Worker,
    WorkerEnd,
};
pub(crate) use self::looking::{LIST_TIME, PAGE_BYTES_MAX, RUNS_LOOKED_AT, UNFINISHED_SEEN_MAX};
pub use self::scheduling::{
    Changed, DueSchedules, Fired, Firing, GivenUp, NextTick, ScheduleChange, SchedulePage, Unreadable,
};
pub use self::transact::{Native, Transacted};
pub use self::unique::Holder;
use crate::group::{Group, NewGroup};
use crate::limit::{Bounds, Limit, Scope};
use crate::schedule::{Schedule, ScheduleName};
use crate::state::State;
use crate::task::{Fence, GroupId, Json, Kind, Lane, LedgerId, NewTask, QueueName, Task, TaskId, WorkerId};

/// The schema version that this build reads and writes.
pub const SCHEMA_VERSION: i64 = 11;

/// How long a caller waits for a ledger before the call counts as unavailable.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a process that makes no ledger waits for one: producer and worker may be started together.
const FILE_PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks.
const FILE_LOOK: Duration = Duration::from_millis(50);

/// A shared ledger of either sort.
pub type SharedLedger = Arc<dyn Ledger>;

/// The judge: conditional writes over the tasks and the workers' leases.
#[async_trait]
pub trait Ledger: Send + Sync + fmt::Debug {
    /// Records tasks, all or none. After `Ok` they are durable.
    ///
    /// A task without `run_at` becomes `accepted`, one whose time is to come `scheduled`. The caller is expected to
    /// publish at once; when it has not marked the task queued within [`Submission::reserve`], a relay publishes.
    /// Of all tasks with one [unique key](crate::task::Unique) at most one holds it, whoever submits them when.
    async fn record(&self, submission: Submission) -> Result<Recorded, LedgerError>;

    /// What [`Ledger::record`] would answer to a repetition of so many tasks under this key; `None` when it would be new.
    async fn recorded_before(&self, given: Idempotency, tasks: usize) -> Result<Option<Recorded>, LedgerError>;

    /// The tasks that hold these unique keys at the moment; keys that nobody holds are left out.
    async fn holders(&self, keys: Vec<String>) -> Result<Vec<(String, Holder)>, LedgerError>;

    /// Marks published tasks `queued`, where no claim or other write has overtaken the publication (same fence).
    async fn mark_queued(&self, published: Vec<Mark>) -> Result<(), LedgerError>;

    /// How long the last completed runs of each of the queue's kinds took on average; of kinds that have run lately.
    async fn run_times(&self, queue: QueueName) -> Result<Vec<(Kind, Duration)>, LedgerError>;

    /// Tries to give a task to a worker whose lease is alive, under a new fence.
    async fn claim(&self, request: ClaimRequest) -> Result<Claim, LedgerError>;

    /// Writes the outcome of a run, if the fence still holds. Where [`Ledger::cancel`] was asked for in the meantime
    /// nothing starts again: what would have is cancelled, and what is final stays as it is.
    async fn settle(&self, settlement: Settlement) -> Result<Settled, LedgerError>;

    /// Puts a waiting task back to `accepted`, to be published again after `delay`; for what cannot run here now.
    ///
    /// Raises the fence, so that a late [`Ledger::mark_queued`] of the old publication changes nothing.
    /// A task that is not waiting is left alone, and so is one of which the message says what is not true: then it answers what.
    async fn put_back(&self, id: TaskId, belief: Belief, delay: Duration) -> Result<Option<Refusal>, LedgerError>;

    /// Enters a worker with a fresh lease of `ttl`.
    async fn register(&self, worker: WorkerRecord, ttl: Duration) -> Result<(), LedgerError>;

    /// Extends a lease by `ttl` from now, unless it has ended; never waits behind bulk writes.
    async fn renew(&self, renewal: Renewal) -> Result<Renewed, LedgerError>;

    /// Ends a worker's lease; what it still holds is abandoned at once.
    async fn retire(&self, worker: WorkerId) -> Result<(), LedgerError>;

    /// Running tasks whose worker's lease has ended, at most `limit`; ends such leases for good first,
    /// so that a renewal still under way fails.
    async fn abandoned(&self, limit: u32) -> Result<Vec<Abandoned>, LedgerError>;

    /// The tasks that run under a worker as far as the ledger knows; cheap.
    async fn running(&self, worker: WorkerId) -> Result<Vec<Abandoned>, LedgerError>;

    /// Takes up to `limit` tasks that are due for publication and hides them from other relays for `reserve`. Raises their
    /// fences: what was published before is told from what will be.
    async fn fetch_due(&self, limit: u32, reserve: Duration) -> Result<Vec<Due>, LedgerError>;

    /// Lets go of tasks that [`Ledger::fetch_due`] took for a relay and that it could not publish: they are due again
    /// now, where no claim or other write has overtaken that (same fence).
    async fn release(&self, unpublished: Vec<(TaskId, Fence)>) -> Result<(), LedgerError>;

    /// How long until the next task is due: zero when one is due, `None` when none waits.
    async fn next_due(&self) -> Result<Option<Duration>, LedgerError>;

    /// Makes `queued` tasks of a lane due again whose messages the broker lost: those published before the
    /// lane's [watermark](Renewal::heads) less `slack`, unless the queue is paused, and, when the lane is `empty` in
    /// the broker, all those
    /// published more than `slack` ago. At most `limit`; returns how many.
    async fn strand(&self, lane: Lane, empty: bool, slack: Duration, limit: u32) -> Result<u64, LedgerError>;

    /// The ledger's time, and what it was when it was last believed.
    async fn clock(&self) -> Result<LedgerClock, LedgerError>;

    /// Notes that the ledger's time is believed, for processes that start later.
    async fn believe_clock(&self, now: Timestamp) -> Result<(), LedgerError>;

    /// Deletes tasks that at `now`, a time of this ledger that is believed, had finished more than `retention` ago, or more than [their queue's](Ledger::set_retention), and
    /// long-dead workers. One step: at most `limit` tasks, and at most as many members of groups; queues take turns.
    ///
    /// The members of a group count from the group's end, and the group goes after the last of them.
    async fn prune(&self, now: Timestamp, retention: Duration, limit: u32) -> Result<Pruned, LedgerError>;

    /// Clears up to `limit` results whose [time](NewTask::result_ttl) after their task's end is over at `now`, as for
    /// [`Ledger::prune`]; returns how many. The tasks stay.
    async fn expire_results(&self, now: Timestamp, limit: u32) -> Result<u64, LedgerError>;

    /// Says for all processes how long the finished tasks of these queues are kept; what was said of others is forgotten.
    /// Whether that changed anything.
    async fn set_retention(&self, queues: BTreeMap<QueueName, Duration>) -> Result<bool, LedgerError>;

    /// Makes cancelled or discarded tasks `accepted` again, and those that wait for their time, each due after its delay; one more attempt is granted if
    /// none is left, and its crashes are forgiven. Takes a task's unique key back, or changes nothing of it where another
    /// holds it. Each task stands for itself; unknown ids are left out.
    async fn replay_many(
        &self,
        replays: Vec<(TaskId, Duration)>,
        caller: Caller,
    ) -> Result<Vec<(TaskId, Replayed)>, LedgerError>;

    /// [`Ledger::replay_many`] of one, due at once.
    async fn replay(&self, id: TaskId, caller: Caller) -> Result<Replayed, LedgerError> {
        let replayed = self.replay_many(vec![(id, Duration::ZERO)], caller).await?.pop();
        Ok(replayed.map_or(Replayed::Unknown, |(_, replayed)| replayed))
    }

    /// Changes a waiting task, all that is given or nothing. It is `scheduled` then, to be published at its `run_at`.
    ///
    /// Raises the fence, and voids all messages published under a lower one: [`Refusal::Outdated`]. They may still be in
    /// the broker, and say what held before.
    async fn edit(&self, id: TaskId, edit: Edit, caller: Caller) -> Result<Edited, LedgerError>;

    /// Cancels tasks for `reason`: a waiting one at once, and then no claim takes it any more; a running one when its
    /// worker, which asks by [`Ledger::cancelling`], has stopped it. The first to ask counts; each task stands for
    /// itself. The state of each before; unknown ids are left out.
    async fn cancel(
        &self,
        ids: Vec<TaskId>,
        reason: String,
        caller: Caller,
    ) -> Result<Vec<(TaskId, State)>, LedgerError>;

    /// A worker's runs that somebody wants cancelled, until they have ended; cheap when there are none.
    ///
    /// No part of the renewal: what locks the tasks must not keep a lease from being renewed.
    async fn cancelling(&self, worker: WorkerId) -> Result<Vec<(TaskId, Fence)>, LedgerError>;

    /// The tasks with these ids, in no particular order; unknown ids are left out.
    async fn get(&self, ids: Vec<TaskId>) -> Result<Vec<Task>, LedgerError>;

    /// The states of the tasks with these ids, in no particular order; unknown ids are left out. Reads neither args nor results.
    async fn states(&self, ids: Vec<TaskId>) -> Result<Vec<(TaskId, State)>, LedgerError>;

    /// One page of tasks, newest first.
    async fn list(&self, query: ListQuery) -> Result<Page, LedgerError>;

    /// Counts of the tasks that wait, run or failed, by queue.
    async fn queues(&self) -> Result<Vec<QueueCounts>, LedgerError>;

    /// Gives those of these tasks that wait in the queue `from` to the queue `to`, where a relay publishes them at once or
    /// at their time; tells how many.
    ///
    /// Raises their fences, so that a late [`Ledger::mark_queued`] of a publication to the old queue changes nothing, and
    /// voids the messages in the old queue as [`Ledger::edit`] does.
    async fn move_tasks(
        &self,
        ids: Vec<TaskId>,
        from: QueueName,
        to: QueueName,
        caller: Caller,
    ) -> Result<u64, LedgerError>;

    /// Deletes those of these tasks that have finished, with their keys, before their retention is over; tells how many.
    async fn purge(&self, ids: Vec<TaskId>) -> Result<u64, LedgerError>;

    /// Pauses a queue, or lets it go on. After `Ok` of a pause no claim takes a task of the queue ([`Refusal::Paused`]);
    /// what runs goes on, and everything else does, too: recording, publishing, settling.
    async fn set_paused(&self, queue: QueueName, paused: bool, caller: Caller) -> Result<(), LedgerError>;

    /// The paused queues, by name; cheap.
    async fn paused_queues(&self) -> Result<Vec<QueueName>, LedgerError>;

    /// The limits, by scope.
    async fn limits(&self) -> Result<Vec<Limit>, LedgerError>;

    /// Sets a limit. After `Ok` no claim exceeds it; what runs already counts and goes on.
    async fn set_limit(&self, scope: Scope, bounds: Bounds) -> Result<LimitSet, LedgerError>;

    /// Deletes a limit, whoever has set it; whether there was one.
    async fn delete_limit(&self, scope: Scope) -> Result<bool, LedgerError>;

    /// Makes these the limits that come from settings files; what the API has set stays as it is.
    async fn adopt_limits(&self, limits: Vec<(Scope, Bounds)>) -> Result<(), LedgerError>;

    /// Lets up to `limit` held tasks go for which their limits have a place, and keeps it for each: they are due for
    /// publication then. Looks at a bounded number of scopes, those `after` that one; cheap when nothing is held.
    ///
    /// Of the tasks that a scope holds, each concurrency key has its turn; of one key, the most urgent goes first, then
    /// the oldest.
    async fn release_held(&self, after: Option<Scope>, limit: u32) -> Result<Released, LedgerError>;

    /// Forgets up to `limit` places that are free again, and where buckets stood that are full; how many. No claim needs it: it
    /// keeps what is past from adding up.
    async fn forget_places(&self, limit: u32) -> Result<u64, LedgerError>;

    /// How many tasks wait in a queue or will within a minute, counted to `most`.
    async fn waiting(&self, queue: QueueName, most: u32) -> Result<u32, LedgerError>;

    /// The lanes that hold `queued` tasks; cheap whatever the backlog.
    async fn queued_lanes(&self) -> Result<Vec<Lane>, LedgerError>;

    /// The workers whose lease is alive.
    async fn workers(&self) -> Result<Vec<Worker>, LedgerError>;

    /// The workers as an operator looks at them: what they run, and who went lately and how.
    async fn fleet(&self) -> Result<Fleet, LedgerError>;

    /// Makes a schedule, or replaces the definition of one, if nobody has done so since it was read.
    async fn change_schedule(&self, change: ScheduleChange) -> Result<Changed, LedgerError>;

    /// Deletes a schedule; its tasks stay. Whether there was one.
    async fn delete_schedule(&self, name: ScheduleName) -> Result<bool, LedgerError>;

    /// A schedule, if there is one, and the ledger's time.
    async fn schedule(&self, name: ScheduleName) -> Result<(Timestamp, Option<Schedule>), LedgerError>;

    /// One page of at most `limit` schedules, by name, from behind `after`.
    async fn schedules(&self, after: Option<ScheduleName>, limit: u32) -> Result<SchedulePage, LedgerError>;

    /// Up to `limit` schedules whose next tick has come, and those whose next tick is of a time to which the clock has gone
    /// back since; cheap when there are none.
    async fn due_schedules(&self, limit: u32) -> Result<DueSchedules, LedgerError>;

    /// Fires ticks of a schedule: moves it on from the tick that was read, if it still stands there under the same
    /// definition, and records the tasks in the same transaction. They are due for a relay at once, or at their `run_at`.
    async fn fire(&self, firing: Firing) -> Result<Fired, LedgerError>;

    /// Looks at up to `limit` open groups, by id from behind `after`: which of them have no unfinished member? One probe a
    /// group, however many members it has; cheap when there are none.
    async fn ended_groups(&self, after: Option<GroupId>, limit: u32) -> Result<EndedGroups, LedgerError>;

    /// Closes a group if it is open and none of its members is unfinished: keeps how they ended, and records the task
    /// that follows, due for a relay at once, in the same transaction. `None` where nothing was written.
    ///
    /// What becomes of a member afterwards, by a replay, changes nothing of the group.
    async fn close_group(&self, id: GroupId) -> Result<Option<Closed>, LedgerError>;

    /// A group, and where its members stand.
    async fn group(&self, id: GroupId) -> Result<Option<Group>, LedgerError>;

    /// Which ledger this is: every process that has it says the same.
    fn id(&self) -> LedgerId;

    /// Where it is, for people: an absolute path, or an address without its password.
    fn place(&self) -> &str;

    /// Itself, for what is said in the words of its own library: a handler's writes in the completion's transaction.
    fn native(&self) -> Native<'_>;

    /// Answers when the ledger takes writes, or has taken one just now.
    async fn ping(&self) -> Result<(), LedgerError>;
}

/// Tasks to be recorded together.
#[derive(Debug, Clone)]
pub struct Submission {
    /// At least one.
    pub tasks: Vec<NewTask>,
    /// Given by the client to make its request repeatable.
    pub idempotency: Option<Idempotency>,
    /// For how long the caller keeps the publication to itself.
    pub reserve: Duration,
    /// The group that the tasks are the members of.
    pub group: Option<NewGroup>,
}

/// A client's promise that equal keys mean the same request.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// The client's key.
    pub key: String,
    /// SHA-256 of the request, to tell a repetition from a reuse.
    pub fingerprint: [u8; 32],
}

/// What became of a submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded {
    /// The tasks are in the ledger; creation time and states follow from the request.
    New {
        /// The ledger's time of the recording.
        at: Timestamp,
        /// Those that were not recorded, by index, and the task that holds the unique key of each:
        /// [`OnConflict::ReturnExisting`](crate::task::OnConflict::ReturnExisting).
        existing: Vec<(usize, TaskId)>,
    },
    /// The same key and request were recorded before: these are the tasks, in order.
    Replayed(Vec<TaskId>),
    /// The key was used for another request; nothing was recorded.
    KeyReused,
    /// These, by index, have a unique key that another task holds; nothing was recorded.
    NotUnique(Vec<(usize, Holder)>),
}

/// What a step of pruning did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How many tasks it deleted.
    pub tasks: u64,
    /// Whether another step may find more.
    pub more: bool,
}

/// What a ledger's clock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LedgerClock {
    /// Now.
    pub now: Timestamp,
    /// When it was last believed, if that is known.
    pub believed: Option<Timestamp>,
}

/// What became of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replayed {
    /// There is no such task.
    Unknown,
    /// This other task holds its unique key; nothing changed.
    KeyHeld(TaskId),
    /// It was in this state, and has left it where [`crate::state::next`] says so.
    From(State),
}

/// A task to be published now.
#[derive(Debug, Clone, PartialEq)]
pub struct Due {
    /// The task.
    pub id: TaskId,
    /// The work.
    pub kind: Kind,
    /// Where it goes.
    pub lane: Lane,
    /// The handler's input.
    pub args: Json,
    /// The row's fence, for [`Ledger::mark_queued`].
    pub fence: Fence,
    /// W3C trace context of the submission.
    pub traceparent: Option<String>,
}

/// What can go wrong with a ledger.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The ledger cannot be reached, or did not answer in time. Whether a write happened is unknown.
    #[error("the ledger is unavailable: {0}")]
    Unavailable(String),
    /// The ledger was written by a newer release.
    #[error(
        "the ledger has schema version {found}, but this release knows only up to {known}: start a release at least as new as the one that wrote it"
    )]
    NewerSchema {
        /// The version found.
        found: i64,
        /// The newest version that this build knows.
        known: i64,
    },
    /// The address is not one of a ledger.
    #[error("ledger_url must begin with sqlite:// or postgres://, such as sqlite://tasklane.db; {0}")]
    Address(String),
    /// There is no file, and this process is not to make one.
    #[error(
        "there is no ledger at {}: name the producer's in ledger_url, or start the producer first, which makes it; \
         a worker makes one only with create_ledger = true (--create-ledger)", .0.display()
    )]
    Missing(PathBuf),
    /// The open file was deleted, or another one lies in its place: what is written to it is lost.
    #[error(
        "the ledger's file {} was deleted or replaced while this process had it open, and nothing is written to it any more: \
         put it back, or stop all processes and start them again", .0.display()
    )]
    Replaced(PathBuf),
    /// The file is not what was written to it.
    #[error(
        "the ledger's file is damaged ({0}): stop all processes, then restore a backup, or see what `sqlite3 .recover` saves"
    )]
    Damaged(String),
    /// The library or server is not fit to be a ledger.
    #[error("{0}")]
    Unsuitable(String),
    /// A row holds what this build cannot read.
    #[error("the ledger holds a row that cannot be read: {0}")]
    Corrupt(String),
}

impl LedgerError {
    /// Whether a person must look after the ledger before it takes anything again.
    #[must_use]
    pub const fn is_broken(&self) -> bool {
        matches!(self, Self::Replaced(_) | Self::Damaged(_))
    }

    /// Whether the same call can succeed later without anybody mending anything.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable(_) => true,
            Self::NewerSchema { .. }
            | Self::Address(_)
            | Self::Missing(_)
            | Self::Replaced(_)
            | Self::Damaged(_)
            | Self::Unsuitable(_)
            | Self::Corrupt(_) => false,
        }
    }
}

/// Opens the ledger behind an address and brings its schema up to date.
///
/// `sqlite://tasklane.db` is a file relative to the working folder, `sqlite:///var/lib/tasklane.db` an absolute
/// one; `postgres://user:password@host/database` takes the options of libpq.
///
/// # Errors
/// [`LedgerError`], whose text never holds the address's password.
pub async fn open(url: &str) -> Result<SharedLedger, LedgerError> {
    if let Some(path) = url.strip_prefix("sqlite://") {
        return Ok(Arc::new(sqlite::SqliteLedger::open(path.as_ref()).await?));
    }
    connect(url).await
}

/// [`open`], for a process that makes no ledger of its own: waits a moment for a file that is not there, which a producer
/// may be about to make.
///
/// # Errors
/// As [`open`], and [`LedgerError::Missing`].
pub async fn open_existing(url: &str) -> Result<SharedLedger, LedgerError> {
    let Some(path) = url.strip_prefix("sqlite://").map(Path::new) else { return connect(url).await };
    let deadline = Instant::now() + FILE_PATIENCE;
    while !path.exists() {
        if Instant::now() >= deadline {
            return Err(LedgerError::Missing(sqlite::absolute(path)));
        }
        sleep(FILE_LOOK).await;
    }
    open(url).await
}

async fn connect(url: &str) -> Result<SharedLedger, LedgerError> {
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return Ok(Arc::new(postgres::PostgresLedger::connect(url).await?));
    }
    let scheme = url.split_once("://").map_or("none", |(scheme, _)| scheme);
    Err(LedgerError::Address(format!("its scheme is {scheme}")))
}
