//! The ledger in one SQLite file: nothing to install, for all processes of one machine.
//!
//! Write-ahead log with `synchronous=FULL`; one writer thread a process with group commit; readers apart. Leases are
//! measured by the time since boot, which all processes of the machine share and nobody can set; a lease of another
//! boot has ended. The file must lie on a local file system.

mod claim;
mod editing;
mod groups;
mod guard;
mod limits;
mod list;
mod prune;
mod queues;
mod read;
mod record;
mod schedules;
mod schema;
#[cfg(test)]
mod tests;
pub(crate) mod vitals;
mod transact;
mod unique;
mod workers;
mod write;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use uuid::Uuid;

use self::guard::Guard;
use self::prune::Walk;
use self::read::Readers;
use self::writer::Writer;
use crate::clock::{timestamp, wall_ms};
use crate::group::Group;
use crate::ledger::Holder;
use crate::ledger::{
    Abandoned, Belief, Caller, Changed, Claim, ClaimRequest, Closed, Due, DueSchedules, Edit, Edited, EndedGroups,
    Fired, Firing, Fleet, Idempotency, Ledger, LedgerClock, LedgerError, LimitSet, ListQuery, Mark, Native, Page,
    Pruned, QueueCounts, Recorded, Refusal, Released, Renewal, Renewed, Replayed, ScheduleChange, SchedulePage,
    Settled, Settlement, Submission, Worker, WorkerRecord,
};
use crate::limit::{Bounds, Limit, Scope};
use crate::schedule::{Schedule, ScheduleName};
use crate::state::State;
use crate::task::{Fence, GroupId, Kind, Lane, LedgerId, QueueName, Task, TaskId, WorkerId};

/// How many tasks one call over many tasks writes before others get their turn.
const TURN_ROWS_MAX: usize = 512;

/// The ledger in a file.
pub struct SqliteLedger {
    id: LedgerId,
    place: String,
    boot_id: Arc<str>,
    guard: Arc<Guard>,
    writer: Writer,
    readers: Readers,
    upkeep: Readers,
    pruning: Mutex<Walk>,
}

impl SqliteLedger {
    /// Opens or creates the file and brings its schema up to date.
    ///
    /// # Errors
    /// [`LedgerError`] when the file cannot be used, or was written by a newer release.
    pub async fn open(path: &Path) -> Result<Self, LedgerError> {
        let path = absolute(path);
        let opening = tokio::task::spawn_blocking(move || {
            let connection = schema::open_writer(&path)?;
            let id = schema::id(&connection).map_err(|error| schema::cannot_open(&path, &error))?;
            let guard = Arc::new(Guard::of(&path));
            let writer = Writer::spawn(connection, Arc::clone(&guard))?;
            let readers = || Readers::open(&path, Arc::clone(&guard));
            let (readers, upkeep) = (readers()?, readers()?);
            let boot_id = crate::clock::boot_id()
                .map_err(|error| LedgerError::Unsuitable(format!("the kernel tells no boot id: {error}")))?;
            let place = path.display().to_string();
            Ok(Self { id, place, boot_id: boot_id.into(), guard, writer, readers, upkeep, pruning: Mutex::default() })
        });
        opening.await.map_err(|error| LedgerError::Unavailable(format!("cannot open the ledger: {error}")))?
    }
}

/// The path from the root, so that it means the same in every folder.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

impl fmt::Debug for SqliteLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteLedger").field("place", &self.place).finish_non_exhaustive()
    }
}

#[async_trait]
impl Ledger for SqliteLedger {
    async fn record(&self, submission: Submission) -> Result<Recorded, LedgerError> {
        self.writer.write(submission.tasks.len(), move |db| record::record(db, &submission)).await
    }

    async fn recorded_before(&self, given: Idempotency, _: usize) -> Result<Option<Recorded>, LedgerError> {
        self.readers.read(move |db| record::recorded_before(db, &given)).await
    }

    async fn holders(&self, keys: Vec<String>) -> Result<Vec<(String, Holder)>, LedgerError> {
        self.readers.read(move |db| unique::holders(db, &keys)).await
    }

    async fn mark_queued(&self, published: Vec<Mark>) -> Result<(), LedgerError> {
        for some in published.chunks(TURN_ROWS_MAX) {
            let some = some.to_vec();
            self.writer.write(some.len(), move |db| write::mark_queued(db, &some)).await?;
        }
        Ok(())
    }

    async fn claim(&self, request: ClaimRequest) -> Result<Claim, LedgerError> {
        let boot_id = Arc::clone(&self.boot_id);
        self.writer.write(1, move |db| claim::claim(db, &request, &boot_id)).await
    }

    async fn settle(&self, settlement: Settlement) -> Result<Settled, LedgerError> {
        self.writer.write(1, move |db| write::settle(db, &settlement)).await
    }

    async fn put_back(&self, id: TaskId, belief: Belief, delay: Duration) -> Result<Option<Refusal>, LedgerError> {
        self.writer.write(1, move |db| write::put_back(db, id, &belief, delay)).await
    }

    async fn register(&self, worker: WorkerRecord, ttl: Duration) -> Result<(), LedgerError> {
        let boot_id = Arc::clone(&self.boot_id);
        self.writer.write_urgently(move |db| write::register(db, &worker, ttl, &boot_id)).await
    }

    async fn renew(&self, renewal: Renewal) -> Result<Renewed, LedgerError> {
        let boot_id = Arc::clone(&self.boot_id);
        self.writer.write_urgently(move |db| write::renew(db, &renewal, &boot_id)).await
    }

    async fn retire(&self, worker: WorkerId) -> Result<(), LedgerError> {
        self.writer.write(1, move |db| write::retire(db, worker)).await
    }

    async fn abandoned(&self, limit: u32) -> Result<Vec<Abandoned>, LedgerError> {
        let boot_id = Arc::clone(&self.boot_id);
        if !self.upkeep.read(move |db| read::anything_abandoned(db, &boot_id)).await? {
            return Ok(Vec::new());
        }
        let boot_id = Arc::clone(&self.boot_id);
        self.writer.write_urgently(move |db| write::abandoned(db, limit, &boot_id)).await
    }

    async fn running(&self, worker: WorkerId) -> Result<Vec<Abandoned>, LedgerError> {
        self.upkeep.read(move |db| read::running(db, worker)).await
    }

    async fn fetch_due(&self, limit: u32, reserve: Duration) -> Result<Vec<Due>, LedgerError> {
        self.writer.write(limit as usize, move |db| write::fetch_due(db, limit, reserve)).await
    }

    async fn release(&self, unpublished: Vec<(TaskId, Fence)>) -> Result<(), LedgerError> {
        for some in unpublished.chunks(TURN_ROWS_MAX) {
            let some = some.to_vec();
            self.writer.write(some.len(), move |db| write::release(db, &some)).await?;
        }
        Ok(())
    }

    async fn next_due(&self) -> Result<Option<Duration>, LedgerError> {
        self.upkeep.read(read::next_due).await
    }

    async fn strand(&self, lane: Lane, empty: bool, slack: Duration, limit: u32) -> Result<u64, LedgerError> {
        self.writer.write(limit as usize, move |db| write::strand(db, &lane, empty, slack, limit)).await
    }

    async fn clock(&self) -> Result<LedgerClock, LedgerError> {
        let believed = self.readers.read(schema::believed).await?;
        Ok(LedgerClock { now: timestamp(wall_ms()), believed: believed.map(timestamp) })
    }

    async fn believe_clock(&self, now: Timestamp) -> Result<(), LedgerError> {
        self.writer.write(1, move |db| schema::believe(db, now.as_millisecond())).await
    }

    async fn prune(&self, now: Timestamp, retention: Duration, limit: u32) -> Result<Pruned, LedgerError> {
        let by = (now.as_millisecond(), retention);
        let walk = self.pruning.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (pruned, walk) =
            self.writer.write(limit as usize, move |db| prune::prune(db, by, limit, walk.clone())).await?;
        *self.pruning.lock().unwrap_or_else(PoisonError::into_inner) = walk;
        Ok(pruned)
    }

    async fn expire_results(&self, now: Timestamp, limit: u32) -> Result<u64, LedgerError> {
        self.writer.write(limit as usize, move |db| prune::expire_results(db, now.as_millisecond(), limit)).await
    }

    async fn set_retention(&self, queues: BTreeMap<QueueName, Duration>) -> Result<bool, LedgerError> {
        self.writer.write(queues.len() + 1, move |db| prune::set_retention(db, &queues)).await
    }

    async fn replay_many(
        &self,
        replays: Vec<(TaskId, Duration)>,
        caller: Caller,
    ) -> Result<Vec<(TaskId, Replayed)>, LedgerError> {
        let mut replayed = Vec::with_capacity(replays.len());
        for some in replays.chunks(TURN_ROWS_MAX) {
            let (some, caller) = (some.to_vec(), caller.clone());
            replayed.extend(self.writer.write(some.len(), move |db| write::replay(db, &some, &caller)).await?);
        }
        Ok(replayed)
    }

    async fn edit(&self, id: TaskId, edit: Edit, caller: Caller) -> Result<Edited, LedgerError> {
        self.writer.write(1, move |db| editing::edit(db, id, &edit, &caller)).await
    }

    async fn cancel(
        &self,
        ids: Vec<TaskId>,
        reason: String,
        caller: Caller,
    ) -> Result<Vec<(TaskId, State)>, LedgerError> {
        let mut before = Vec::with_capacity(ids.len());
        for some in ids.chunks(TURN_ROWS_MAX) {
            let (some, reason, caller) = (some.to_vec(), reason.clone(), caller.clone());
            before.extend(
                self.writer.write(some.len(), move |db| write::cancel(db, &some, &reason, Some(&caller))).await?,
            );
        }
        Ok(before)
    }

    async fn cancelling(&self, worker: WorkerId) -> Result<Vec<(TaskId, Fence)>, LedgerError> {
        self.upkeep.read(move |db| read::cancelling(db, worker)).await
    }

    async fn get(&self, ids: Vec<TaskId>) -> Result<Vec<Task>, LedgerError> {
        self.readers.read(move |db| read::get(db, &ids)).await
    }

    async fn states(&self, ids: Vec<TaskId>) -> Result<Vec<(TaskId, State)>, LedgerError> {
        self.readers.read(move |db| read::states(db, &ids)).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, LedgerError> {
        self.readers.read(move |db| list::list(db, &query)).await
    }

    async fn queues(&self) -> Result<Vec<QueueCounts>, LedgerError> {
        self.readers.read(read::queues).await
    }

    async fn move_tasks(
        &self,
        ids: Vec<TaskId>,
        from: QueueName,
        to: QueueName,
        caller: Caller,
    ) -> Result<u64, LedgerError> {
        let mut moved = 0;
        for some in ids.chunks(TURN_ROWS_MAX) {
            let (some, from, to, caller) = (some.to_vec(), from.clone(), to.clone(), caller.clone());
            moved +=
                self.writer.write(some.len(), move |db| queues::move_tasks(db, &some, (&from, &to), &caller)).await?;
        }
        Ok(moved)
    }

    async fn purge(&self, ids: Vec<TaskId>) -> Result<u64, LedgerError> {
        let mut purged = 0;
        for some in ids.chunks(TURN_ROWS_MAX) {
            let some = some.to_vec();
            purged += self.writer.write(some.len(), move |db| prune::purge(db, &some)).await?;
        }
        Ok(purged)
    }

    async fn set_paused(&self, queue: QueueName, paused: bool, caller: Caller) -> Result<(), LedgerError> {
        self.writer.write(1, move |db| queues::set_paused(db, &queue, paused, &caller)).await
    }

    async fn paused_queues(&self) -> Result<Vec<QueueName>, LedgerError> {
        self.upkeep.read(queues::paused).await
    }

    async fn limits(&self) -> Result<Vec<Limit>, LedgerError> {
        self.readers.read(limits::all).await
    }

    async fn set_limit(&self, scope: Scope, bounds: Bounds) -> Result<LimitSet, LedgerError> {
        self.writer.write(1, move |db| limits::set(db, &scope, &bounds)).await
    }

    async fn delete_limit(&self, scope: Scope) -> Result<bool, LedgerError> {
        self.writer.write(1, move |db| limits::delete(db, &scope)).await
    }

    async fn adopt_limits(&self, limits: Vec<(Scope, Bounds)>) -> Result<(), LedgerError> {
        self.writer.write(limits.len(), move |db| limits::adopt(db, &limits)).await
    }

    async fn release_held(&self, after: Option<Scope>, limit: u32) -> Result<Released, LedgerError> {
        if !self.upkeep.read(limits::anything_held).await? {
            return Ok(Released::default());
        }
        self.writer.write(limit as usize, move |db| limits::release(db, after.as_ref(), limit)).await
    }

    async fn forget_places(&self, limit: u32) -> Result<u64, LedgerError> {
        self.writer.write(limit as usize, move |db| limits::forget_places(db, limit)).await
    }

    async fn waiting(&self, queue: QueueName, most: u32) -> Result<u32, LedgerError> {
        self.upkeep.read(move |db| limits::waiting(db, &queue, most)).await
    }

    async fn queued_lanes(&self) -> Result<Vec<Lane>, LedgerError> {
        self.upkeep.read(read::queued_lanes).await
    }

    async fn run_times(&self, queue: QueueName) -> Result<Vec<(Kind, Duration)>, LedgerError> {
        self.readers.read(move |db| read::run_times(db, &queue)).await
    }

    async fn workers(&self) -> Result<Vec<Worker>, LedgerError> {
        let boot_id = Arc::clone(&self.boot_id);
        self.upkeep.read(move |db| workers::alive(db, &boot_id)).await
    }

    async fn fleet(&self) -> Result<Fleet, LedgerError> {
        let boot_id = Arc::clone(&self.boot_id);
        self.readers.read(move |db| workers::fleet(db, &boot_id)).await
    }

    async fn change_schedule(&self, change: ScheduleChange) -> Result<Changed, LedgerError> {
        let definition = change.definition.to_json()?;
        let revision = Uuid::now_v7();
        self.writer.write(1, move |db| schedules::change(db, &change, &definition, revision)).await
    }

    async fn delete_schedule(&self, name: ScheduleName) -> Result<bool, LedgerError> {
        self.writer.write(1, move |db| schedules::delete(db, &name)).await
    }

    async fn schedule(&self, name: ScheduleName) -> Result<(Timestamp, Option<Schedule>), LedgerError> {
        self.readers.read(move |db| Ok((timestamp(wall_ms()), schedules::one(db, &name)?))).await
    }

    async fn schedules(&self, after: Option<ScheduleName>, limit: u32) -> Result<SchedulePage, LedgerError> {
        self.readers.read(move |db| schedules::page(db, after.as_ref(), limit)).await
    }

    async fn due_schedules(&self, limit: u32) -> Result<DueSchedules, LedgerError> {
        self.upkeep.read(move |db| schedules::due(db, limit)).await
    }

    async fn fire(&self, firing: Firing) -> Result<Fired, LedgerError> {
        self.writer.write(firing.tasks.len() + 1, move |db| schedules::fire(db, &firing)).await
    }

    async fn ended_groups(&self, after: Option<GroupId>, limit: u32) -> Result<EndedGroups, LedgerError> {
        self.upkeep.read(move |db| groups::ended(db, after, limit)).await
    }

    async fn close_group(&self, id: GroupId) -> Result<Option<Closed>, LedgerError> {
        self.writer.write(2, move |db| groups::close(db, id)).await
    }

    async fn group(&self, id: GroupId) -> Result<Option<Group>, LedgerError> {
        self.readers.read(move |db| groups::one(db, id)).await
    }

    fn id(&self) -> LedgerId {
        self.id
    }

    fn place(&self) -> &str {
        &self.place
    }

    fn native(&self) -> Native<'_> {
        Native::Sqlite(self)
    }

    async fn ping(&self) -> Result<(), LedgerError> {
        if self.guard.is_fresh()? {
            return Ok(());
        }
        self.writer.write_urgently(schema::touch).await
    }
}
