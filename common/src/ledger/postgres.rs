//! The ledger in a PostgreSQL database (13 or newer): for any number of machines.
//!
//! Every write is one conditional statement in autocommit, so nothing is ever left half-done and no lock outlives its
//! statement. Bulk writes go through one lane a kind, where whatever waits shares a statement. Time is the
//! server's `clock_timestamp()`: no other machine's clock judges a lease or a due time.
//!
//! # Connections
//!
//! A process opens at most fourteen, each when it is first needed, and gives back what rests: seven for whatever it does,
//! two for settling, one for leases, so that a renewal never waits behind bulk writes, and four for the transactions of
//! handlers. A producer uses up to seven of them, a worker up to ten, or fourteen with transactional handlers: plan the
//! server's `max_connections` by that. Where it has fewer, a producer makes do with three, and a worker with five: one for
//! its lease and one for settling are its own as long as it lives, and without the latter it claims nothing. A broken
//! connection is replaced at the next use; the calls it broke answer [`LedgerError::Unavailable`], and whether their
//! writes happened is unknown.

mod address;
mod afterlife;
mod claim;
mod connections;
mod editing;
mod fault;
mod groups;
mod lane;
pub(crate) mod layout;
mod lease;
mod limits;
mod list;
mod prune;
mod publish;
mod queues;
mod read;
mod record;
mod rows;
mod schedules;
mod schema;
mod session;
mod settle;
#[cfg(test)]
mod tests;
pub(crate) mod vitals;
mod transact;
mod unique;
mod workers;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use self::claim::Claiming;
use self::connections::{Connections, Pool, Source};
use self::fault::Fault;
use self::lane::{Lane, TRIES};
use self::prune::Walk;
use self::publish::{MarkQueued, PutBack, Stranded};
use self::record::Record;
use self::session::{OWN, Wanted};
use self::settle::Settling;
use crate::clock::timestamp;
use crate::group::Group;
use crate::ledger::Holder;
use crate::ledger::{
    Abandoned, Belief, CALL_TIMEOUT, Caller, Changed, Claim, ClaimRequest, Closed, Due, DueSchedules, Edit, Edited,
    EndedGroups, Fired, Firing, Fleet, Idempotency, Ledger, LedgerClock, LedgerError, LimitSet, ListQuery, Mark,
    Native, Page, Pruned, QueueCounts, Recorded, Refusal, Released, Renewal, Renewed, Replayed, ScheduleChange,
    SchedulePage, Settled, Settlement, Submission, Worker, WorkerRecord,
};
use crate::limit::{Bounds, Limit, Scope};
use crate::schedule::{Schedule, ScheduleName};
use crate::state::State;
use crate::task::{self, Fence, GroupId, Kind, LedgerId, QueueName, Task, TaskId, WorkerId};

/// Connections of the process for all but settling, leases and handlers' transactions.
const CONNECTIONS: usize = 7;
/// How many of them each lane may use that every task passes; a lane for settling has as many of its own.
const BUSY_CONNECTIONS: usize = 2;
/// How many may be used by those who ask: clients, whose reads may be slow.
const ASKING_CONNECTIONS: usize = 3;
/// How many may be used by what keeps the whole going, which waits for no client's read.
const UPKEEP_CONNECTIONS: usize = 3;
/// How long a start waits for a server that takes no more connections: those that are up make room within it.
const START_LIMIT: Duration = Duration::from_secs(20);
const START_PAUSE: Duration = Duration::from_millis(500);

/// How many tasks one statement releases, cancels, moves, purges or replays.
const STATEMENT_TASKS_MAX: usize = 512;

/// Connections for the transactions of handlers: so many of them can be under way in one process.
const TRANSACTIONS: usize = 4;

/// The ledger on a server.
pub struct PostgresLedger {
    id: LedgerId,
    place: String,
    record: Lane<Record>,
    mark_queued: Lane<MarkQueued>,
    claim: Lane<Claiming>,
    settle: Lane<Settling>,
    put_back: Lane<PutBack>,
    /// What the lane settles with, to be there before anything is claimed.
    settling: Connections,
    leases: Connections,
    shared: Connections,
    upkeep: Connections,
    transactions: Connections,
    pruning: Walk,
}

impl PostgresLedger {
    /// Connects, checks the server, and brings the schema up to date.
    ///
    /// # Errors
    /// [`LedgerError`], whose text never holds the address's password: `Address`, `Unavailable` when the server does
    /// not answer, `NewerSchema`, or `Unsuitable` when it is too old or refuses the user.
    pub async fn connect(url: &str) -> Result<Self, LedgerError> {
        let servers = address::servers(url)?;
        let place = connections::place(&servers);
        let own = |most| Pool::start(Source::new(servers.clone(), OWN, Wanted::Writable), most, 1);
        let (common, settling, leases) = (own(CONNECTIONS), own(BUSY_CONNECTIONS), own(1));
        let some = |most| Connections::new(&common, most);
        let upkeep = some(UPKEEP_CONNECTIONS);
        enter(&upkeep).await?;
        let id = schema::prepare(&upkeep).await?;
        let transactions = Pool::start(Source::new(servers, session::TRANSACTIONS, Wanted::Writable), TRANSACTIONS, 0);
        Ok(Self {
            id,
            place,
            record: Lane::start(some(BUSY_CONNECTIONS)),
            mark_queued: Lane::start(some(1)),
            claim: Lane::start(some(BUSY_CONNECTIONS)),
            settle: Lane::start(Connections::new(&settling, BUSY_CONNECTIONS)),
            put_back: Lane::start(some(1)),
            settling: Connections::new(&settling, 1),
            leases: Connections::new(&leases, 1),
            shared: some(ASKING_CONNECTIONS),
            upkeep,
            transactions: Connections::new(&transactions, TRANSACTIONS),
            pruning: Walk::default(),
        })
    }
}

impl fmt::Debug for PostgresLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresLedger").field("place", &self.place).finish_non_exhaustive()
    }
}

/// The first connection, and whether what it is told stays with it.
async fn enter(connections: &Connections) -> Result<(), Fault> {
    let began = Instant::now();
    loop {
        match connections.are_apart().await {
            Err(Fault::Crowded(_)) if began.elapsed() < START_LIMIT => sleep(START_PAUSE).await,
            entered => return entered,
        }
    }
}

/// Gives a call its limit.
async fn within<T>(call: impl Future<Output = Result<T, Fault>>) -> Result<T, LedgerError> {
    let answered = timeout(CALL_TIMEOUT, call).await;
    Ok(answered.unwrap_or_else(|_| Err(Fault::late("the ledger's server")))?)
}

/// Gives a call its limit, and makes it again where the server rolled it back for the sake of another one.
async fn again<T, F>(call: impl Fn() -> F) -> Result<T, LedgerError>
where
    F: Future<Output = Result<T, Fault>>,
{
    within(async {
        let mut tries = 1;
        loop {
            match call().await {
                Err(Fault::Collided(_)) if tries < TRIES => tries += 1,
                answered => return answered,
            }
        }
    })
    .await
}

#[async_trait]
impl Ledger for PostgresLedger {
    async fn record(&self, submission: Submission) -> Result<Recorded, LedgerError> {
        if submission.tasks.is_empty() {
            return Err(LedgerError::Unsuitable("a submission has at least one task".to_owned()));
        }
        let several_under_a_key = submission.idempotency.is_some() && submission.tasks.len() > 1;
        if several_under_a_key
            || submission.group.is_some()
            || submission.tasks.iter().any(|task| task.unique.is_some())
        {
            return again(|| record::record_alone(&self.shared, &submission)).await;
        }
        within(self.record.write(submission)).await
    }

    async fn recorded_before(&self, given: Idempotency, tasks: usize) -> Result<Option<Recorded>, LedgerError> {
        again(|| record::recorded_before(&self.shared, &given, tasks)).await
    }

    async fn holders(&self, keys: Vec<String>) -> Result<Vec<(String, Holder)>, LedgerError> {
        again(|| unique::held(&self.shared, &keys)).await
    }

    async fn mark_queued(&self, published: Vec<Mark>) -> Result<(), LedgerError> {
        if published.is_empty() {
            return Ok(());
        }
        within(self.mark_queued.write(published)).await
    }

    async fn claim(&self, request: ClaimRequest) -> Result<Claim, LedgerError> {
        within(async {
            // Who could not settle it claims nothing: it would run in vain, and again elsewhere.
            self.settling.assure().await?;
            self.claim.write(request).await
        })
        .await
    }

    async fn settle(&self, settlement: Settlement) -> Result<Settled, LedgerError> {
        within(self.settle.write(settlement)).await
    }

    async fn put_back(&self, id: TaskId, belief: Belief, delay: Duration) -> Result<Option<Refusal>, LedgerError> {
        within(self.put_back.write(publish::Return { id, belief, delay })).await
    }

    async fn register(&self, worker: WorkerRecord, ttl: Duration) -> Result<(), LedgerError> {
        again(|| lease::register(&self.leases, &worker, ttl)).await
    }

    async fn renew(&self, renewal: Renewal) -> Result<Renewed, LedgerError> {
        again(|| lease::renew(&self.leases, &renewal)).await
    }

    async fn retire(&self, worker: WorkerId) -> Result<(), LedgerError> {
        again(|| lease::retire(&self.leases, worker)).await
    }

    async fn abandoned(&self, limit: u32) -> Result<Vec<Abandoned>, LedgerError> {
        again(|| lease::abandoned(&self.upkeep, limit)).await
    }

    async fn running(&self, worker: WorkerId) -> Result<Vec<Abandoned>, LedgerError> {
        again(|| lease::running(&self.upkeep, worker)).await
    }

    async fn fetch_due(&self, limit: u32, reserve: Duration) -> Result<Vec<Due>, LedgerError> {
        again(|| publish::fetch_due(&self.upkeep, limit, reserve)).await
    }

    async fn release(&self, unpublished: Vec<(TaskId, Fence)>) -> Result<(), LedgerError> {
        for some in unpublished.chunks(STATEMENT_TASKS_MAX) {
            again(|| publish::release(&self.upkeep, some)).await?;
        }
        Ok(())
    }

    async fn next_due(&self) -> Result<Option<Duration>, LedgerError> {
        again(|| publish::next_due(&self.upkeep)).await
    }

    async fn strand(&self, lane: task::Lane, empty: bool, slack: Duration, limit: u32) -> Result<u64, LedgerError> {
        let stranded = Stranded { lane, empty, slack, limit };
        again(|| publish::strand(&self.upkeep, &stranded)).await
    }

    async fn clock(&self) -> Result<LedgerClock, LedgerError> {
        let (now, believed) = within(schema::clock(&self.upkeep)).await?;
        Ok(LedgerClock { now: timestamp(now), believed: believed.map(timestamp) })
    }

    async fn believe_clock(&self, now: Timestamp) -> Result<(), LedgerError> {
        again(|| schema::believe(&self.upkeep, now.as_millisecond())).await
    }

    async fn prune(&self, now: Timestamp, retention: Duration, limit: u32) -> Result<Pruned, LedgerError> {
        let by = (now.as_millisecond(), retention);
        again(|| prune::prune(&self.upkeep, &self.pruning, by, limit)).await
    }

    async fn expire_results(&self, now: Timestamp, limit: u32) -> Result<u64, LedgerError> {
        again(|| prune::expire_results(&self.upkeep, now.as_millisecond(), limit)).await
    }

    async fn set_retention(&self, queues: BTreeMap<QueueName, Duration>) -> Result<bool, LedgerError> {
        again(|| prune::set_retention(&self.upkeep, &queues)).await
    }

    async fn replay_many(
        &self,
        replays: Vec<(TaskId, Duration)>,
        caller: Caller,
    ) -> Result<Vec<(TaskId, Replayed)>, LedgerError> {
        let mut replayed = Vec::with_capacity(replays.len());
        for some in replays.chunks(STATEMENT_TASKS_MAX) {
            replayed.extend(again(|| afterlife::replay(&self.shared, some, &caller)).await?);
        }
        Ok(replayed)
    }

    async fn edit(&self, id: TaskId, edit: Edit, caller: Caller) -> Result<Edited, LedgerError> {
        again(|| editing::edit(&self.shared, id, &edit, &caller)).await
    }

    async fn cancel(
        &self,
        ids: Vec<TaskId>,
        reason: String,
        caller: Caller,
    ) -> Result<Vec<(TaskId, State)>, LedgerError> {
        let mut before = Vec::with_capacity(ids.len());
        for some in ids.chunks(STATEMENT_TASKS_MAX) {
            before.extend(again(|| afterlife::cancel(&self.shared, some, &reason, &caller)).await?);
        }
        Ok(before)
    }

    async fn cancelling(&self, worker: WorkerId) -> Result<Vec<(TaskId, Fence)>, LedgerError> {
        again(|| lease::cancelling(&self.upkeep, worker)).await
    }

    async fn get(&self, ids: Vec<TaskId>) -> Result<Vec<Task>, LedgerError> {
        again(|| read::get(&self.shared, &ids)).await
    }

    async fn states(&self, ids: Vec<TaskId>) -> Result<Vec<(TaskId, State)>, LedgerError> {
        again(|| read::states(&self.shared, &ids)).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, LedgerError> {
        again(|| list::list(&self.shared, &query)).await
    }

    async fn queues(&self) -> Result<Vec<QueueCounts>, LedgerError> {
        again(|| read::queues(&self.shared)).await
    }

    async fn move_tasks(
        &self,
        ids: Vec<TaskId>,
        from: QueueName,
        to: QueueName,
        caller: Caller,
    ) -> Result<u64, LedgerError> {
        let mut moved = 0;
        for some in ids.chunks(STATEMENT_TASKS_MAX) {
            moved += again(|| queues::move_tasks(&self.shared, some, (&from, &to), &caller)).await?;
        }
        Ok(moved)
    }

    async fn purge(&self, ids: Vec<TaskId>) -> Result<u64, LedgerError> {
        let mut purged = 0;
        for some in ids.chunks(STATEMENT_TASKS_MAX) {
            purged += again(|| prune::purge(&self.shared, some)).await?;
        }
        Ok(purged)
    }

    async fn set_paused(&self, queue: QueueName, paused: bool, caller: Caller) -> Result<(), LedgerError> {
        again(|| queues::set_paused(&self.shared, &queue, paused, &caller)).await
    }

    async fn paused_queues(&self) -> Result<Vec<QueueName>, LedgerError> {
        again(|| queues::paused(&self.upkeep)).await
    }

    async fn limits(&self) -> Result<Vec<Limit>, LedgerError> {
        again(|| limits::all(&self.shared)).await
    }

    async fn set_limit(&self, scope: Scope, bounds: Bounds) -> Result<LimitSet, LedgerError> {
        again(|| limits::set(&self.shared, &scope, &bounds)).await
    }

    async fn delete_limit(&self, scope: Scope) -> Result<bool, LedgerError> {
        again(|| limits::delete(&self.shared, &scope)).await
    }

    async fn adopt_limits(&self, limits: Vec<(Scope, Bounds)>) -> Result<(), LedgerError> {
        again(|| limits::adopt(&self.upkeep, &limits)).await
    }

    async fn release_held(&self, after: Option<Scope>, limit: u32) -> Result<Released, LedgerError> {
        again(|| limits::release(&self.upkeep, after.as_ref(), limit)).await
    }

    async fn forget_places(&self, limit: u32) -> Result<u64, LedgerError> {
        again(|| limits::forget_places(&self.upkeep, limit)).await
    }

    async fn waiting(&self, queue: QueueName, most: u32) -> Result<u32, LedgerError> {
        again(|| limits::waiting(&self.upkeep, &queue, most)).await
    }

    async fn queued_lanes(&self) -> Result<Vec<task::Lane>, LedgerError> {
        again(|| read::queued_lanes(&self.upkeep)).await
    }

    async fn run_times(&self, queue: QueueName) -> Result<Vec<(Kind, Duration)>, LedgerError> {
        again(|| read::run_times(&self.shared, &queue)).await
    }

    async fn workers(&self) -> Result<Vec<Worker>, LedgerError> {
        again(|| workers::alive(&self.upkeep)).await
    }

    async fn fleet(&self) -> Result<Fleet, LedgerError> {
        again(|| workers::fleet(&self.shared)).await
    }

    async fn change_schedule(&self, change: ScheduleChange) -> Result<Changed, LedgerError> {
        let definition = change.definition.to_json()?;
        let revision = Uuid::now_v7();
        again(|| schedules::change(&self.shared, &change, &definition, revision)).await
    }

    async fn delete_schedule(&self, name: ScheduleName) -> Result<bool, LedgerError> {
        again(|| schedules::delete(&self.shared, &name)).await
    }

    async fn schedule(&self, name: ScheduleName) -> Result<(Timestamp, Option<Schedule>), LedgerError> {
        again(|| schedules::one(&self.shared, &name)).await
    }

    async fn schedules(&self, after: Option<ScheduleName>, limit: u32) -> Result<SchedulePage, LedgerError> {
        again(|| schedules::page(&self.shared, after.as_ref(), limit)).await
    }

    async fn due_schedules(&self, limit: u32) -> Result<DueSchedules, LedgerError> {
        again(|| schedules::due(&self.upkeep, limit)).await
    }

    async fn fire(&self, firing: Firing) -> Result<Fired, LedgerError> {
        again(|| schedules::fire(&self.upkeep, &firing)).await
    }

    async fn ended_groups(&self, after: Option<GroupId>, limit: u32) -> Result<EndedGroups, LedgerError> {
        again(|| groups::ended(&self.upkeep, after, limit)).await
    }

    async fn close_group(&self, id: GroupId) -> Result<Option<Closed>, LedgerError> {
        again(|| groups::close(&self.upkeep, id)).await
    }

    async fn group(&self, id: GroupId) -> Result<Option<Group>, LedgerError> {
        again(|| groups::one(&self.shared, id)).await
    }

    fn id(&self) -> LedgerId {
        self.id
    }

    fn place(&self) -> &str {
        &self.place
    }

    fn native(&self) -> Native<'_> {
        Native::Postgres(self)
    }

    async fn ping(&self) -> Result<(), LedgerError> {
        within(self.upkeep.check()).await
    }
}
