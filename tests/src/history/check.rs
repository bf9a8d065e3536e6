//! The checker: a pure function from a history, and from what ledger and broker hold in the end, to a verdict.

mod edits;
mod groups;
pub mod limits;
mod queues;
mod runs;
pub mod takeovers;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Deserialize;
use tasklane_common::task::Guarantee;

use self::limits::Limit;
use self::runs::{Freezes, Ran, Runs, freezes, runs};
use super::{Answered, Broken, Ending, Line, Op, Run, Verdict, Violation};

/// How long a process that was frozen past its lease may need, once thawed, to notice and to stop its handlers.
/// Nothing can end what does not run; the checker tells the longest such moment.
pub const AFTER_THAW: Duration = Duration::from_secs(1);

/// All that is judged.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Everything that happened.
    pub history: Vec<Line>,
    /// Every task in the ledger, when everything is over.
    pub tasks: Vec<FinalTask>,
    /// How many messages each queue holds then; `None` for a queue that is not there.
    pub queues: Vec<(String, Option<u32>)>,
    /// The limits that held all the time.
    pub limits: Vec<Limit>,
    /// How far the transactional tasks have counted in the ledger's database.
    pub counter: i64,
}

/// A task as the ledger has it in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinalTask {
    /// The task.
    pub id: String,
    /// The name of its submission.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// What it shares its places with others by.
    pub concurrency_key: Option<String>,
    /// The number of the change that its args are of; 0 are those of the submission.
    pub edition: u64,
    /// What a crash in the middle of its run means.
    pub guarantee: Guarantee,
    /// Its state.
    pub state: String,
    /// Why it is discarded.
    pub reason: Option<String>,
    /// Its last fence.
    pub fence: u64,
    /// The fence that its result names.
    pub result_fence: Option<u64>,
    /// The number that its result is, of a transactional task.
    pub counted: Option<i64>,
    /// What it is to be the only one of.
    pub unique_key: Option<String>,
    /// Its queue.
    pub queue: String,
    /// The queue that it was submitted to, where that is told.
    pub submitted_to: Option<String>,
    /// When its last run was granted, by the ledger's clock, since 1970.
    pub started_at: Option<Duration>,
    /// The group of which it is a member.
    pub group: Option<String>,
    /// The group that it follows, as it was told.
    pub follows: Option<Followed>,
}

/// What a task is told of the group that it follows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Followed {
    /// Which.
    pub id: String,
    /// How many members it has.
    pub total: usize,
    /// How many of them completed.
    pub completed: usize,
    /// How many were cancelled.
    pub cancelled: usize,
    /// How many were discarded.
    pub discarded: usize,
}

impl FinalTask {
    fn is_completed(&self) -> bool {
        self.state == "completed"
    }

    fn is_once(&self) -> bool {
        self.guarantee == Guarantee::AtMostOnce
    }

    /// Did this run complete it? Then the task was this run's until its end.
    fn is_completed_by(&self, run: &Run) -> bool {
        self.is_completed() && self.fence == run.fence
    }
}

/// Judges everything.
pub fn check(evidence: &Evidence) -> Verdict {
    let (runs, orphans) = runs(&evidence.history);
    let mut verdict = Verdict::default();
    for line in orphans {
        verdict.blame(Broken::Unasked, "a run", format!("it never began: {line:?}"));
    }
    check_submissions(evidence, &mut verdict);
    check_unasked_runs(evidence, &runs, &mut verdict);
    let freezes = freezes(&evidence.history);
    let cancellations = cancellations(&evidence.history);
    for task in &evidence.tasks {
        let ran = runs.get(task.id.as_str()).map_or(&[][..], Vec::as_slice);
        let asked = cancellations.get(task.id.as_str()).copied();
        check_end(task, ran, asked.is_some(), &mut verdict);
        check_order(task, ran, &mut verdict);
        check_cancellation(task, ran, asked.flatten(), &mut verdict);
        check_overlap(task, ran, &freezes, &mut verdict);
        count_runs(ran, &mut verdict);
    }
    takeovers::count(evidence, &runs, &mut verdict);
    check_unique_keys(evidence, &runs, &freezes, &mut verdict);
    groups::check(evidence, &runs, &mut verdict);
    queues::check(evidence, &mut verdict);
    limits::check(evidence, &runs, &freezes, &mut verdict);
    edits::check(evidence, &runs, &mut verdict);
    check_counter(evidence, &mut verdict);
    check_broker(evidence, &mut verdict);
    check_processes(evidence, &mut verdict);
    verdict
}

impl Verdict {
    fn blame(&mut self, broken: Broken, subject: &str, evidence: impl Into<String>) {
        self.violations.push(Violation { broken, subject: subject.to_owned(), evidence: evidence.into() });
    }
}

/// All that was said of one submission.
#[derive(Debug)]
struct Submission<'h> {
    best: Answered,
    count: usize,
    tasks: BTreeSet<&'h str>,
}

fn submissions(history: &[Line]) -> BTreeMap<&str, Submission<'_>> {
    let mut all: BTreeMap<&str, Submission<'_>> = BTreeMap::new();
    for line in history {
        let Op::Submit { name, outcome, count, tasks } = &line.op else { continue };
        let new = Submission { best: *outcome, count: *count, tasks: BTreeSet::new() };
        let submission = all.entry(name).or_insert(new);
        submission.best = submission.best.max(*outcome);
        submission.tasks.extend(tasks.iter().map(String::as_str));
    }
    all
}

fn check_submissions(evidence: &Evidence, verdict: &mut Verdict) {
    let submissions = submissions(&evidence.history);
    let mut recorded: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    // What follows a group was submitted with it.
    for task in evidence.tasks.iter().filter(|task| task.follows.is_none()) {
        recorded.entry(&task.name).or_default().insert(&task.id);
    }
    for (name, submission) in &submissions {
        check_submission(name, submission, &recorded.remove(name).unwrap_or_default(), verdict);
    }
    for (name, tasks) in recorded {
        verdict.blame(Broken::Unasked, name, format!("nobody has submitted the tasks {tasks:?}"));
    }
}

fn check_submission(name: &str, submission: &Submission<'_>, recorded: &BTreeSet<&str>, verdict: &mut Verdict) {
    let Submission { best, count, tasks } = submission;
    let present = recorded.len();
    match best {
        Answered::Ok => {
            verdict.counts.submitted += count;
            for task in tasks.difference(recorded) {
                verdict.blame(Broken::Lost, task, format!("accepted as {name}, and not in the ledger"));
            }
            // Some are promised without a word of their ids: the ticks of a schedule.
            if tasks.is_empty() && present < *count {
                verdict.blame(Broken::Lost, name, format!("{present} of {count} are there"));
            }
        }
        Answered::Unknown if present == 0 => verdict.counts.unknown_absent += 1,
        Answered::Unknown => verdict.counts.unknown_present += 1,
        Answered::Fail if present > 0 => {
            verdict.blame(Broken::Unasked, name, format!("it was refused, and left {recorded:?}"));
        }
        Answered::Fail => {}
    }
    if present > *count || tasks.len() > *count {
        let all: BTreeSet<_> = tasks.union(recorded).collect();
        verdict.blame(Broken::Doubled, name, format!("{count} were asked for, and there are {all:?}"));
    } else if *best == Answered::Unknown && present > 0 && present < *count {
        verdict.blame(Broken::Half, name, format!("{present} of {count} are there: {recorded:?}"));
    }
}

fn check_unasked_runs(evidence: &Evidence, runs: &Runs<'_>, verdict: &mut Verdict) {
    let known: BTreeSet<&str> = evidence.tasks.iter().map(|task| task.id.as_str()).collect();
    for (task, ran) in runs.iter().filter(|(task, _)| !known.contains(*task)) {
        verdict.blame(Broken::Unasked, task, format!("it ran, and the ledger has no such task: {ran:?}"));
    }
}

/// Did it end, as its guarantee says, with its effect, and under the fence that the ledger has?
fn check_end(task: &FinalTask, ran: &[Ran], unwanted: bool, verdict: &mut Verdict) {
    let FinalTask { id, guarantee, state, reason, fence, result_fence, .. } = task;
    let counts = &mut verdict.counts;
    counts.tasks += 1;
    match (state.as_str(), guarantee, reason.as_deref()) {
        ("completed", ..) => counts.completed += 1,
        ("discarded", Guarantee::AtMostOnce, Some("interrupted")) => return counts.interrupted += 1,
        ("cancelled", ..) if unwanted => return counts.cancelled += 1,
        ("discarded" | "cancelled", ..) => {
            return verdict.blame(Broken::WrongEnd, id, format!("{state} ({reason:?}): {ran:?}"));
        }
        ("running", ..) if !ran.iter().any(|run| run.run.fence == *fence && run.over().is_none()) => {
            return verdict.blame(Broken::Stray, id, format!("running under fence {fence}: {ran:?}"));
        }
        _ => return verdict.blame(Broken::Unfinished, id, format!("{state} under fence {fence}: {ran:?}")),
    }
    // A transactional effect is in the database and counted there; the worker may die before it has written its end.
    let transactional = *guarantee == Guarantee::Transactional;
    if !transactional && !ran.iter().any(|run| run.effect) {
        verdict.blame(Broken::NoEffect, id, format!("completed under fence {fence}: {ran:?}"));
    }
    let is_done = |run: &Ran| matches!(run.ended, Some((_, Ending::Done))) || transactional;
    if !ran.iter().any(|run| run.run.fence == *fence && is_done(run)) {
        verdict.blame(Broken::Disagreement, id, format!("no run was done under its last fence {fence}: {ran:?}"));
    }
    if result_fence.is_some_and(|result| result != *fence) {
        let told = format!("the fence is {fence}, the result is of {result_fence:?}: {ran:?}");
        verdict.blame(Broken::Disagreement, id, told);
    }
}

/// Were its starts allowed, each after the other?
fn check_order(task: &FinalTask, ran: &[Ran], verdict: &mut Verdict) {
    for pair in ran.windows(2) {
        if pair[0].run.fence >= pair[1].run.fence {
            verdict.blame(Broken::FenceStuck, &task.id, format!("{pair:?}"));
        }
    }
    if task.is_once() && ran.len() > 1 {
        verdict.blame(Broken::Repeated, &task.id, format!("{ran:?}"));
    }
    if let Some(run) = ran.iter().find(|run| run.run.fence > task.fence) {
        let broken = if task.is_completed() { Broken::StartedAfterEnd } else { Broken::Disagreement };
        let told = format!("{} under fence {}, and started as {run:?}", task.state, task.fence);
        verdict.blame(broken, &task.id, told);
    }
}

/// Did it start anew after a client was told that it will not?
fn check_cancellation(task: &FinalTask, ran: &[Ran], answered: Option<u64>, verdict: &mut Verdict) {
    let Some(fence) = answered else { return };
    if let Some(run) = ran.iter().find(|run| run.run.fence > fence) {
        let told = format!("its cancellation was answered under fence {fence}, and it started as {run:?}");
        verdict.blame(Broken::StartedAfterCancel, &task.id, told);
    }
}

/// The tasks that a client wanted cancelled, and the lowest fence that an answer told of each.
fn cancellations(history: &[Line]) -> BTreeMap<&str, Option<u64>> {
    let mut all: BTreeMap<&str, Option<u64>> = BTreeMap::new();
    for line in history {
        let Op::Cancel { task, fence } = &line.op else { continue };
        let lowest = all.entry(task).or_default();
        *lowest = lowest.iter().chain(fence).min().copied();
    }
    all
}

/// Did two tasks with one unique key run at the same time?
fn check_unique_keys(evidence: &Evidence, runs: &Runs<'_>, freezes: &Freezes, verdict: &mut Verdict) {
    let mut holders: BTreeMap<&str, Vec<&Ran>> = BTreeMap::new();
    for task in &evidence.tasks {
        let Some(key) = &task.unique_key else { continue };
        holders.entry(key).or_default().extend(runs.get(task.id.as_str()).into_iter().flatten());
    }
    for (key, mut ran) in holders {
        ran.sort_by_key(|run| run.began);
        for pair in ran.windows(2) {
            let [first, second] = pair else { continue };
            let apart = first.run.task == second.run.task || first.over().is_some_and(|over| over <= second.began);
            if !apart && after_thaw(first, second, freezes).is_none() {
                verdict.blame(Broken::KeyShared, key, format!("{first:?} beside {second:?}"));
            }
        }
    }
}

fn check_overlap(task: &FinalTask, ran: &[Ran], freezes: &Freezes, verdict: &mut Verdict) {
    for (at, first) in ran.iter().enumerate() {
        for second in &ran[at + 1..] {
            if first.over().is_some_and(|over| over <= second.began) {
                continue;
            }
            match after_thaw(first, second, freezes) {
                Some(moment) => {
                    let longest = &mut verdict.counts.longest_after_thaw;
                    *longest = moment.max(*longest);
                }
                None => verdict.blame(Broken::Overlapping, &task.id, format!("{first:?} beside {second:?}")),
            }
        }
    }
}

/// How long a run went on after its process was thawed, if it stood still when the next run of its task began and was
/// stopped soon after.
fn after_thaw(first: &Ran, second: &Ran, freezes: &Freezes) -> Option<Duration> {
    let over = first.over()?;
    freezes.get(&first.process)?.iter().find_map(|(frozen, thawed)| {
        let stood_still = first.began <= *frozen && *frozen <= second.began;
        let moment = match thawed {
            Some(thawed) => over.saturating_sub(*thawed),
            None => first.ended.is_none().then_some(Duration::ZERO)?,
        };
        (stood_still && moment <= AFTER_THAW).then_some(moment)
    })
}

fn count_runs(ran: &[Ran], verdict: &mut Verdict) {
    let counts = &mut verdict.counts;
    counts.starts += ran.len();
    counts.dropped_runs += ran.iter().filter(|run| matches!(run.ended, Some((_, Ending::Dropped)))).count();
    counts.killed_runs += ran.iter().filter(|run| run.killed.is_some()).count();
}

/// Each completed transactional task has counted one further, and nothing else has.
fn check_counter(evidence: &Evidence, verdict: &mut Verdict) {
    let transactional = evidence.tasks.iter().filter(|task| task.guarantee == Guarantee::Transactional);
    let completed: Vec<&FinalTask> = transactional.filter(|task| task.is_completed()).collect();
    verdict.counts.transactional = completed.len();
    let mut counted = BTreeSet::new();
    for task in &completed {
        if task.counted.is_none_or(|number| !counted.insert(number)) {
            let told = format!("its result is {:?}, which is none or another's as well", task.counted);
            verdict.blame(Broken::Miscounted, &task.id, told);
        }
    }
    let wanted = i64::try_from(completed.len()).unwrap_or(i64::MAX);
    if evidence.counter != wanted {
        let told = format!("{} after {wanted} transactional tasks", evidence.counter);
        verdict.blame(Broken::Miscounted, "the counter", told);
    }
}

fn check_broker(evidence: &Evidence, verdict: &mut Verdict) {
    for (queue, depth) in &evidence.queues {
        match depth {
            Some(0) => {}
            Some(depth) => verdict.blame(Broken::Leftover, queue, format!("it holds {depth} messages")),
            None => verdict.blame(Broken::Leftover, queue, "it is not there"),
        }
    }
}

fn check_processes(evidence: &Evidence, verdict: &mut Verdict) {
    for line in &evidence.history {
        if let Op::Gone { who, process, how, expected: false } = &line.op {
            verdict.blame(Broken::Died, who, format!("process {process}: {how}"));
        }
    }
}
