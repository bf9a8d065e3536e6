//! Random histories of many workers on one ledger, compared with a model that fits on a page.
//!
//! Calls that are made at the same time may take effect in any order, so a step is right when some order of its calls
//! explains, task by task, every answer and the row that is left.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use tokio::runtime::Handle;
use tokio::task::block_in_place;

use super::{HOUR, cancel, complete, failure, kind, mark_queued, new_task, queue, recorded, worker};
use crate::ledger::{
    Abandoned, Belief, Caller, Claim, ClaimRequest, Edit, Edited, Failure, Granted, Refusal, Replayed, Settled,
    Settlement, SharedLedger, Transition,
};
use crate::rescue;
use crate::state::{Event, State};
use crate::task::{ERRORS_KEPT, ErrorKind, Fence, Guarantee, Json, Task, TaskId, WorkerId};

const TASKS: usize = 4;
const WORKERS: usize = 3;
const MAX_CRASHES: i32 = 3;
/// Where tasks begin, and where they are moved to.
const QUEUES: [&str; 2] = ["default", "elsewhere"];
/// Why tasks are cancelled from outside.
const UNWANTED: &str = "nobody wants it any more";
/// How many calls are made at the same time: few enough that every order of them can be tried.
const TOGETHER_MAX: usize = 5;
const CASES: u32 = 48;
/// More than all that earlier cases have left behind.
const EVERYTHING: u32 = 100_000;

/// One thing that happens in a history.
#[derive(Debug, Clone)]
enum Step {
    /// Calls for these tasks, each through one of two handles, all at the same time.
    Together(Vec<(usize, usize, Act)>),
    /// A worker's lease ends, and another worker comes in its place.
    Die(usize),
    /// Abandoned tasks are rescued.
    Rescue,
    /// Due tasks are fetched for publication.
    Relay,
}

#[derive(Debug, Clone, Copy)]
enum Act {
    Claim { worker: usize, guarantee: Guarantee, crashes_below: i32, says: Says },
    Settle { stale: bool, how: How },
    MarkQueued { stale: bool },
    PutBack { wait: Duration, says: Says },
    Move { back: bool },
    Edit { wait: Option<Duration>, args: Option<u8>, max_attempts: Option<i32> },
    Cancel,
    Replay { wait: Duration },
}

/// What a message says, as against the row of its moment.
#[derive(Debug, Clone, Copy)]
struct Says {
    /// By how much its fence is behind, or if less than nothing, ahead; `None`: it does not say.
    behind: Option<i64>,
    other_kind: bool,
    other_args: bool,
}

#[derive(Debug, Clone, Copy)]
enum How {
    Complete,
    Retry { wait: Duration, kind: ErrorKind },
    Snooze { wait: Duration },
    Interrupt,
    Cancel,
    Discard,
}

/// An [`Act`] with the names and fences of its moment.
#[derive(Debug, Clone)]
enum Call {
    Claim {
        request: ClaimRequest,
        alive: bool,
    },
    Settle(Settlement),
    MarkQueued(Fence),
    PutBack(Duration, Belief),
    Move {
        from: &'static str,
        to: &'static str,
    },
    /// With the wait from which its time was made.
    Edit(Edit, Option<Duration>),
    Cancel,
    Replay(Duration),
}

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Granted { fence: Fence, attempt: i32 },
    Refused(Refusal),
    Settled(Settled),
    Replayed(Replayed),
    Edited(Edited),
    WasCancelled(State),
    Moved(bool),
    PutBack(Option<Refusal>),
    Nothing,
}

/// What the ledger should hold of a task.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    state: State,
    queue: &'static str,
    fence: Fence,
    attempt: i32,
    max_attempts: i32,
    crashes: i32,
    guarantee: Guarantee,
    worker: Option<WorkerId>,
    /// Its time is an hour away.
    early: bool,
    /// Its time was set by a call of this step: to one made at the same time it may have been a millisecond away.
    fresh: bool,
    /// When a relay may fetch it: now, in an hour, or never.
    due: Option<Duration>,
    errors: usize,
    reason: Option<String>,
    args: Json,
    /// Messages published under a lower fence are older than the last change.
    void_below: Fence,
    /// Somebody wants it cancelled, or wanted that before it ended.
    unwanted: bool,
}

impl Row {
    fn new(max_attempts: i32) -> Self {
        Self {
            state: State::Accepted,
            queue: QUEUES[0],
            fence: Fence(0),
            attempt: 0,
            max_attempts,
            crashes: 0,
            guarantee: Guarantee::AtLeastOnce,
            worker: None,
            early: false,
            fresh: false,
            due: Some(HOUR),
            errors: 0,
            reason: None,
            args: new_task().args,
            void_below: Fence(0),
            unwanted: false,
        }
    }

    fn waits(&self) -> bool {
        self.state != State::Running && !self.state.is_final()
    }

    fn apply(&mut self, call: &Call) -> Answer {
        match call {
            Call::Claim { request, alive } => self.claim(request, *alive),
            Call::Settle(settlement) => Answer::Settled(self.settle(settlement)),
            Call::MarkQueued(fence) => {
                if self.waits() && self.state != State::Queued && *fence == self.fence {
                    (self.state, self.due) = (State::Queued, None);
                }
                Answer::Nothing
            }
            Call::PutBack(wait, belief) => {
                let untrue = self.untrue(belief);
                // Who does not say of when it is may be the newest of an edited task.
                let refused = untrue.filter(|reason| *reason != Refusal::Outdated || belief.published.is_some());
                if refused.is_none() && self.waits() {
                    let wait = if self.early { HOUR } else { *wait };
                    (self.state, self.fence, self.due) = (State::Accepted, Fence(self.fence.0 + 1), Some(wait));
                }
                Answer::PutBack(refused)
            }
            Call::Move { from, to } => Answer::Moved(self.change_queue(from, to)),
            Call::Edit(edit, wait) => Answer::Edited(self.edit(edit, *wait)),
            Call::Cancel => Answer::WasCancelled(self.cancel()),
            Call::Replay(wait) => Answer::Replayed(Replayed::From(self.replay(*wait))),
        }
    }

    /// What is not true of what a message says.
    fn untrue(&self, belief: &Belief) -> Option<Refusal> {
        match belief.published {
            _ if belief.kind != new_task().kind => Some(Refusal::WrongKind),
            Some(published) if published > self.fence => Some(Refusal::WrongFence),
            published if self.void_below.0 > 0 && published.is_none_or(|fence| fence < self.void_below) => {
                Some(Refusal::Outdated)
            }
            _ if belief.args != self.args.digest() => Some(Refusal::WrongArgs),
            _ => None,
        }
    }

    fn claim(&mut self, request: &ClaimRequest, alive: bool) -> Answer {
        let refusal = match self.state {
            State::Running => Some(Refusal::Held),
            state if state.is_final() => Some(Refusal::Finished),
            _ if self.untrue(&request.belief).is_some() => self.untrue(&request.belief),
            _ if self.early => Some(Refusal::NotDue),
            _ if self.crashes >= request.crashes_below => Some(Refusal::Suspect),
            _ if !alive => Some(Refusal::LeaseLost),
            _ => None,
        };
        if let Some(refusal) = refusal {
            // The delivery is acked, so a relay must publish it again.
            if refusal == Refusal::NotDue && self.state == State::Queued {
                (self.state, self.due) = (State::Accepted, Some(HOUR));
            }
            return Answer::Refused(refusal);
        }
        (self.state, self.due, self.worker) = (State::Running, None, Some(request.worker));
        self.guarantee = request.guarantee;
        self.fence = Fence(self.fence.0 + 1);
        self.attempt += 1;
        Answer::Granted { fence: self.fence, attempt: self.attempt }
    }

    fn settle(&mut self, settlement: &Settlement) -> Settled {
        if self.state != State::Running || settlement.fence != self.fence {
            return Settled::Fenced;
        }
        let (wait, reason, error) = match &settlement.transition {
            Transition::Complete { .. } => (None, None, None),
            Transition::Retry { delay, error } => (Some(*delay), None, Some(error)),
            Transition::Snooze { delay } => (Some(*delay), None, None),
            Transition::Interrupt => (Some(Duration::ZERO), None, None),
            Transition::Cancel { reason } => (None, Some(reason.clone()), None),
            Transition::Discard { reason, error } => (None, Some(reason.clone()), Some(error)),
        };
        // Where somebody wants it cancelled nothing starts again, and the reason is theirs.
        let stops = self.unwanted && wait.is_some();
        let event = if stops { Event::Cancel } else { settlement.transition.event() };
        self.state = crate::state::next(State::Running, event).unwrap();
        if !self.unwanted || event != Event::Cancel {
            self.reason = reason;
        }
        let wait = wait.filter(|_| !stops);
        if matches!(event, Event::Snooze | Event::Interrupt) {
            self.attempt -= 1;
        }
        self.errors = (self.errors + usize::from(error.is_some())).min(ERRORS_KEPT);
        self.crashes += i32::from(error.is_some_and(|error| error.kind == ErrorKind::Crash));
        self.due = wait;
        if let Some(wait) = wait {
            (self.early, self.fresh) = (!wait.is_zero(), true);
        }
        if stops { Settled::Cancelled } else { Settled::Applied }
    }

    fn change_queue(&mut self, from: &str, to: &'static str) -> bool {
        let moves = self.waits() && self.queue == from;
        if moves {
            self.queue = to;
            self.void_messages();
            self.state = crate::state::next(self.state, Event::Move).unwrap();
            self.due = Some(if self.early { HOUR } else { Duration::ZERO });
        }
        moves
    }

    fn edit(&mut self, edit: &Edit, wait: Option<Duration>) -> Edited {
        let before = self.state;
        if !self.waits() {
            return Edited::From(before);
        }
        if edit.max_attempts.is_some_and(|most| most <= self.attempt) {
            return Edited::NoAttemptLeft(self.attempt);
        }
        if let Some(wait) = wait {
            self.early = !wait.is_zero();
        }
        self.void_messages();
        let due = if self.early { HOUR } else { Duration::ZERO };
        (self.state, self.due, self.fresh) = (State::Scheduled, Some(due), true);
        self.max_attempts = edit.max_attempts.unwrap_or(self.max_attempts);
        self.args = edit.args.clone().unwrap_or_else(|| self.args.clone());
        Edited::From(before)
    }

    fn void_messages(&mut self) {
        self.fence = Fence(self.fence.0 + 1);
        self.void_below = self.fence;
    }

    fn cancel(&mut self) -> State {
        let before = self.state;
        if !before.is_final() && !self.unwanted {
            (self.unwanted, self.reason) = (true, Some(UNWANTED.to_owned()));
            if before != State::Running {
                (self.state, self.due) = (State::Cancelled, None);
            }
        }
        before
    }

    fn replay(&mut self, wait: Duration) -> State {
        let before = self.state;
        if matches!(before, State::Scheduled | State::Retryable) {
            self.void_messages();
        }
        if crate::state::next(before, Event::Replay).is_some() {
            (self.state, self.due, self.early, self.fresh) = (State::Accepted, Some(wait), !wait.is_zero(), true);
            self.max_attempts = self.max_attempts.max(self.attempt + 1);
            (self.crashes, self.reason, self.unwanted) = (0, None, false);
        }
        before
    }

    /// What of this can be read.
    fn is_seen_as(&self, task: &Task) -> bool {
        let own = (self.state, self.fence, self.attempt, self.max_attempts, self.worker, &self.reason, self.errors);
        let seen =
            (task.state, task.fence, task.attempt, task.max_attempts, task.worker_id, &task.reason, task.errors.len());
        let times = (task.finished_at.is_some(), task.cancel_requested_at.is_some());
        own == seen
            && self.args == task.args
            && self.queue == task.queue.as_str()
            && times == (self.state.is_final(), self.unwanted)
    }

    /// Adds the rows that these calls leave in those orders that explain the answers and what can be read.
    fn explained(&self, calls: &[(Call, Answer)], left: &Task, explanations: &mut Vec<Self>) {
        if calls.is_empty() && self.is_seen_as(left) && !explanations.contains(self) {
            explanations.push(self.clone());
        }
        for first in 0..calls.len() {
            let mut rest = calls.to_vec();
            let (call, answer) = rest.remove(first);
            let mut row = self.clone();
            if row.apply(&call) != answer {
                let by_a_millisecond = self.fresh && self.waits() && answer == Answer::Refused(Refusal::NotDue);
                if !by_a_millisecond {
                    continue;
                }
                row = self.clone();
            }
            row.explained(&rest, left, explanations);
        }
    }
}

/// A ledger, the tasks of one history on it, and what the model holds of them.
struct World<'a> {
    handles: &'a [SharedLedger; 2],
    /// Two orders of calls can leave rows that differ in what cannot be read: each task has all that it may be.
    rows: BTreeMap<TaskId, Vec<Row>>,
    ids: Vec<TaskId>,
    /// The worker of each place, and those before it.
    workers: Vec<Vec<WorkerId>>,
}

impl<'a> World<'a> {
    async fn new(handles: &'a [SharedLedger; 2]) -> Self {
        let ids = recorded(&*handles[0], TASKS, |_| {}).await;
        let rows = ids.iter().map(|id| (*id, vec![Row::new(3)])).collect();
        let mut workers = Vec::new();
        for place in 0..WORKERS {
            workers.push(vec![worker(&*handles[place % 2]).await]);
        }
        Self { handles, rows, ids, workers }
    }

    async fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        self.rows.values_mut().flatten().for_each(|row| row.fresh = false);
        match step {
            Step::Together(acts) => self.together(acts).await,
            Step::Die(place) => self.die(*place).await,
            Step::Rescue => self.rescue().await,
            Step::Relay => self.relay().await,
        }
    }

    async fn together(&mut self, acts: &[(usize, usize, Act)]) -> Result<(), TestCaseError> {
        let calls: Vec<(TaskId, usize, Call)> = acts
            .iter()
            .map(|(task, handle, act)| (self.ids[*task], *handle, self.call(self.ids[*task], act)))
            .collect();
        let answers = join_all(calls.iter().map(|(id, handle, call)| make(&self.handles[*handle], *id, call))).await;
        let mut of_task: BTreeMap<TaskId, Vec<(Call, Answer)>> = BTreeMap::new();
        for ((id, _, call), answer) in calls.into_iter().zip(answers) {
            of_task.entry(id).or_default().push((call, answer));
        }
        for (id, calls) in of_task {
            let left = super::get(&*self.handles[0], id).await;
            let mut explanations = Vec::new();
            for row in &self.rows[&id] {
                row.explained(&calls, &left, &mut explanations);
            }
            prop_assert!(!explanations.is_empty(), "from {:#?} by {calls:#?} to {left:#?}", self.rows[&id]);
            self.rows.insert(id, explanations);
        }
        Ok(())
    }

    fn call(&self, id: TaskId, act: &Act) -> Call {
        let present = self.rows[&id][0].fence;
        let fence = |stale: bool| Fence(present.0 - i64::from(stale));
        match *act {
            Act::Claim { worker, guarantee, crashes_below, says } => {
                // Every second claim of a place that was taken anew is one that the dead worker had sent.
                let [.., newest] = &self.workers[worker % WORKERS][..] else { unreachable!() };
                let late = self.workers[worker % WORKERS].first().filter(|_| worker >= WORKERS);
                let worker = *late.unwrap_or(newest);
                let request = ClaimRequest { id, worker, guarantee, belief: self.belief(id, says), crashes_below };
                Call::Claim { request, alive: worker == *newest }
            }
            Act::Settle { stale, how } => {
                Call::Settle(Settlement { id, fence: fence(stale), transition: transition(how) })
            }
            Act::MarkQueued { stale } => Call::MarkQueued(fence(stale)),
            Act::PutBack { wait, says } => Call::PutBack(wait, self.belief(id, says)),
            Act::Move { back } => {
                let [from, to] = if back { [QUEUES[1], QUEUES[0]] } else { QUEUES };
                Call::Move { from, to }
            }
            Act::Edit { wait, args, max_attempts } => {
                let run_at = wait.map(|wait| jiff::Timestamp::now() + wait);
                let args = args.map(|n| Json::of(&n).unwrap());
                Call::Edit(Edit { run_at, args, max_attempts, ..Edit::default() }, wait)
            }
            Act::Cancel => Call::Cancel,
            Act::Replay { wait } => Call::Replay(wait),
        }
    }

    fn belief(&self, id: TaskId, says: Says) -> Belief {
        let row = &self.rows[&id][0];
        let name = if says.other_kind { "test.other" } else { "test.work" };
        let args = if says.other_args { Json::null() } else { row.args.clone() };
        let published = says.behind.map(|behind| Fence((row.fence.0 - behind).max(0)));
        Belief { kind: kind(name), published, args: args.digest() }
    }

    async fn die(&mut self, place: usize) -> Result<(), TestCaseError> {
        let [.., newest] = self.workers[place][..] else { unreachable!() };
        self.handles[place % 2].retire(newest).await.unwrap();
        self.workers[place].push(worker(&*self.handles[place % 2]).await);
        Ok(())
    }

    /// Two processes rescue at the same time; of each task's two rescues one counts.
    async fn rescue(&mut self) -> Result<(), TestCaseError> {
        let alive: Vec<WorkerId> = self.workers.iter().filter_map(|place| place.last().copied()).collect();
        let mut found = self.handles[0].abandoned(EVERYTHING).await.unwrap();
        found.retain(|task| self.rows.contains_key(&task.id));
        found.sort_by_key(|task| task.id);
        let is_abandoned = |row: &Row| row.state == State::Running && row.worker.is_some_and(|id| !alive.contains(&id));
        let told = |task: &Abandoned| (task.fence, task.attempt, task.crashes, task.guarantee, task.cancel_requested);
        let held = |row: &Row| (row.fence, row.attempt, row.crashes, row.guarantee, row.unwanted);
        for (id, rows) in &mut self.rows {
            let seen: Vec<_> = found.iter().filter(|task| task.id == *id).map(told).collect();
            let before = rows.clone();
            rows.retain(|row| seen == is_abandoned(row).then(|| held(row)).as_slice());
            prop_assert!(!rows.is_empty(), "{before:#?} is told as {seen:?}");
        }
        for task in found {
            let settlement = Settlement { id: task.id, fence: task.fence, transition: rescued(&task) };
            let answers = join_all(self.handles.iter().map(|ledger| ledger.settle(settlement.clone()))).await;
            let answers: Vec<Settled> = answers.into_iter().map(Result::unwrap).collect();
            let counted: Vec<Settled> = answers.into_iter().filter(|answer| *answer != Settled::Fenced).collect();
            let left = super::get(&*self.handles[1], task.id).await;
            for row in self.rows.get_mut(&task.id).unwrap() {
                prop_assert_eq!(&counted[..], [row.settle(&settlement)], "one of the two counts");
                prop_assert!(row.is_seen_as(&left), "{row:#?} {left:#?}");
            }
        }
        Ok(())
    }

    async fn relay(&mut self) -> Result<(), TestCaseError> {
        let fetched = self.handles[1].fetch_due(EVERYTHING, HOUR).await.unwrap();
        for (id, rows) in &mut self.rows {
            let due = fetched.iter().filter(|due| due.id == *id);
            let seen: Vec<_> = due.map(|due| (due.fence, due.lane.queue.as_str(), due.args.as_str())).collect();
            let is_due = |row: &Row| row.due == Some(Duration::ZERO);
            let before = rows.clone();
            for row in rows.iter_mut().filter(|row| is_due(row)) {
                row.fence.0 += 1;
            }
            rows.retain(|row| seen == is_due(row).then_some((row.fence, row.queue, row.args.as_str())).as_slice());
            prop_assert!(!rows.is_empty(), "{before:#?} is due as {seen:?}");
            rows.iter_mut().filter(|row| is_due(row)).for_each(|row| row.due = Some(HOUR));
        }
        Ok(())
    }
}

async fn make(ledger: &SharedLedger, id: TaskId, call: &Call) -> Answer {
    match call.clone() {
        Call::Claim { request, .. } => match ledger.claim(request).await.unwrap() {
            Claim::Granted(Granted { fence, attempt, .. }) => Answer::Granted { fence, attempt },
            Claim::Refused(reason) => Answer::Refused(reason),
        },
        Call::Settle(settlement) => Answer::Settled(ledger.settle(settlement).await.unwrap()),
        Call::MarkQueued(fence) => {
            mark_queued(&**ledger, vec![(id, fence)]).await.unwrap();
            Answer::Nothing
        }
        Call::PutBack(wait, belief) => Answer::PutBack(ledger.put_back(id, belief, wait).await.unwrap()),
        Call::Move { from, to } => {
            Answer::Moved(ledger.move_tasks(vec![id], queue(from), queue(to), Caller::UNKNOWN).await.unwrap() == 1)
        }
        Call::Edit(edit, _) => Answer::Edited(ledger.edit(id, edit, Caller::UNKNOWN).await.unwrap()),
        Call::Cancel => Answer::WasCancelled(super::cancelled(&**ledger, id, UNWANTED).await),
        Call::Replay(wait) => {
            let [(_, replayed)] = ledger.replay_many(vec![(id, wait)], Caller::UNKNOWN).await.unwrap()[..] else {
                panic!("one task")
            };
            Answer::Replayed(replayed)
        }
    }
}

fn transition(how: How) -> Transition {
    match how {
        How::Complete => complete(),
        How::Retry { wait, kind } => Transition::Retry { delay: wait, error: Failure { kind, ..failure("again") } },
        How::Snooze { wait } => Transition::Snooze { delay: wait },
        How::Interrupt => Transition::Interrupt,
        How::Cancel => cancel(),
        How::Discard => super::discard(),
    }
}

/// As the rescue decides, but what waits waits for longer than the test.
fn rescued(task: &Abandoned) -> Transition {
    match rescue::decide(task, MAX_CRASHES, 0.5) {
        Transition::Retry { delay, error } if !delay.is_zero() => Transition::Retry { delay: HOUR, error },
        decided => decided,
    }
}

fn wait() -> impl Strategy<Value = Duration> {
    prop_oneof![4 => Just(Duration::ZERO), 1 => Just(HOUR)]
}

fn how() -> impl Strategy<Value = How> {
    let kind = prop_oneof![Just(ErrorKind::Error), Just(ErrorKind::Crash)];
    prop_oneof![
        2 => Just(How::Complete),
        4 => (wait(), kind).prop_map(|(wait, kind)| How::Retry { wait, kind }),
        2 => wait().prop_map(|wait| How::Snooze { wait }),
        2 => Just(How::Interrupt),
        1 => Just(How::Cancel),
        1 => Just(How::Discard),
    ]
}

fn says() -> impl Strategy<Value = Says> {
    let far = i64::from(i32::MIN) << 31;
    let behind = prop_oneof![
        8 => Just(Some(0)), 4 => (1..4i64).prop_map(Some), 2 => Just(None), 1 => (-3..0i64).prop_map(Some), 1 => Just(Some(far))
    ];
    let seldom = || proptest::bool::weighted(0.06);
    (behind, seldom(), seldom()).prop_map(|(behind, other_kind, other_args)| Says { behind, other_kind, other_args })
}

fn act() -> impl Strategy<Value = Act> {
    let stale = || proptest::bool::weighted(0.25);
    let guarantee = prop_oneof![3 => Just(Guarantee::AtLeastOnce), 1 => Just(Guarantee::AtMostOnce)];
    let crashes_below = prop_oneof![3 => Just(i32::MAX), 1 => Just(MAX_CRASHES - 1)];
    let claim = (0..WORKERS * 2, guarantee, crashes_below, says())
        .prop_map(|(worker, guarantee, crashes_below, says)| Act::Claim { worker, guarantee, crashes_below, says });
    let edit = (proptest::option::of(wait()), any::<Option<u8>>(), proptest::option::of(1..4i32))
        .prop_map(|(wait, args, max_attempts)| Act::Edit { wait, args, max_attempts });
    prop_oneof![
        6 => claim,
        5 => (stale(), how()).prop_map(|(stale, how)| Act::Settle { stale, how }),
        2 => stale().prop_map(|stale| Act::MarkQueued { stale }),
        1 => (wait(), says()).prop_map(|(wait, says)| Act::PutBack { wait, says }),
        1 => any::<bool>().prop_map(|back| Act::Move { back }),
        2 => edit,
        1 => Just(Act::Cancel),
        1 => wait().prop_map(|wait| Act::Replay { wait }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let acts = proptest::collection::vec((0..TASKS, 0..2usize, act()), 1..=TOGETHER_MAX);
    prop_oneof![
        12 => acts.prop_map(Step::Together),
        1 => (0..WORKERS).prop_map(Step::Die),
        1 => Just(Step::Rescue),
        1 => Just(Step::Relay),
    ]
}

/// Whatever many workers do at the same time, the ledger answers as the model does.
pub async fn every_history_agrees_with_the_model(handles: &[SharedLedger; 2]) {
    let mut runner = TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
    let history = proptest::collection::vec(step(), 1..60);
    let handle = Handle::current();
    let outcome = block_in_place(|| {
        runner.run(&history, |steps| {
            handle.block_on(async {
                let mut world = World::new(handles).await;
                for step in &steps {
                    world.take(step).await?;
                }
                Ok(())
            })
        })
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
