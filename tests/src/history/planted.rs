//! The checker checked: clean histories pass, and every violation that is planted is found and named.

mod clean;
mod edits;
mod limits;
mod model;
mod takeovers;

use std::time::Duration;

use tasklane_common::task::Guarantee;

use self::clean::clean;
use super::check::{AFTER_THAW, Evidence, FinalTask, Followed, check};
use super::{Answered, Broken, Ending, Line, Op, Run};

const WORKER: i32 = 10;
const OTHER: i32 = 20;

fn line(at_ms: u64, pid: i32, op: Op) -> Line {
    let at = Duration::from_millis(at_ms);
    // The machine was started in 1970.
    Line { at, wall_s: Some(at.as_secs_f64()), pid, op }
}

fn submit(name: &str, outcome: Answered, count: usize, tasks: &[&str]) -> Line {
    let tasks = tasks.iter().map(|&task| task.to_owned()).collect();
    line(1, 1, Op::Submit { name: name.to_owned(), outcome, count, tasks })
}

fn run(task: &str, fence: u64) -> Run {
    Run { task: task.to_owned(), attempt: u32::try_from(fence).unwrap_or(0), fence }
}

fn start(at_ms: u64, pid: i32, task: &str, fence: u64) -> Line {
    line(at_ms, pid, Op::Start { run: run(task, fence), edition: 0, queue: Some("default".to_owned()) })
}

fn effect(at_ms: u64, pid: i32, task: &str, fence: u64) -> Line {
    line(at_ms, pid, Op::Effect(run(task, fence)))
}

fn end(at_ms: u64, pid: i32, task: &str, fence: u64, how: Ending) -> Line {
    line(at_ms, pid, Op::End { run: run(task, fence), how })
}

fn cancel(at_ms: u64, task: &str, fence: Option<u64>) -> Line {
    line(at_ms, 1, Op::Cancel { task: task.to_owned(), fence })
}

fn gone(at_ms: u64, process: i32, expected: bool) -> Line {
    line(at_ms, 1, Op::Gone { who: "worker".to_owned(), process, how: "signal: 9".to_owned(), expected })
}

fn done(at_ms: u64, pid: i32, task: &str, fence: u64) -> Vec<Line> {
    vec![
        start(at_ms, pid, task, fence),
        effect(at_ms + 5, pid, task, fence),
        end(at_ms + 6, pid, task, fence, Ending::Done),
    ]
}

fn completed(id: &str, name: &str, fence: u64) -> FinalTask {
    FinalTask {
        id: id.to_owned(),
        name: name.to_owned(),
        kind: "test.work".to_owned(),
        concurrency_key: None,
        edition: 0,
        guarantee: Guarantee::AtLeastOnce,
        state: "completed".to_owned(),
        reason: None,
        fence,
        result_fence: Some(fence),
        counted: None,
        unique_key: None,
        queue: "default".to_owned(),
        submitted_to: Some("default".to_owned()),
        started_at: None,
        group: None,
        follows: None,
    }
}

fn granted(id: &str, queue: &str, at_ms: u64) -> FinalTask {
    let (queue, submitted_to) = (queue.to_owned(), Some(queue.to_owned()));
    FinalTask { queue, submitted_to, started_at: Some(ms(at_ms)), ..completed(id, "paused", 1) }
}

fn member(task: FinalTask) -> FinalTask {
    FinalTask { group: Some("group".to_owned()), ..task }
}

/// What follows the group of two tasks, of which one was cancelled.
fn follower(id: &str) -> FinalTask {
    let follows = Some(Followed { id: "group".to_owned(), total: 2, completed: 1, cancelled: 1, discarded: 0 });
    FinalTask { follows, result_fence: None, ..completed(id, "", 1) }
}

fn paused(at_ms: u64) -> Line {
    line(at_ms, 1, Op::Paused { queue: "other".to_owned() })
}

fn resumed(at_ms: u64) -> Line {
    line(at_ms, 1, Op::Resumed { queue: "other".to_owned() })
}

fn moved(count: Option<u64>) -> Line {
    line(170, 1, Op::Moved { from: "default".to_owned(), to: "other".to_owned(), count })
}

fn cancelled(id: &str, name: &str) -> FinalTask {
    FinalTask { state: "cancelled".to_owned(), result_fence: None, ..completed(id, name, 0) }
}

fn unique(id: &str, name: &str) -> FinalTask {
    FinalTask { unique_key: Some("key".to_owned()), ..completed(id, name, 1) }
}

fn counted(id: &str, name: &str, fence: u64, number: i64) -> FinalTask {
    let guarantee = Guarantee::Transactional;
    FinalTask { guarantee, result_fence: None, counted: Some(number), ..completed(id, name, fence) }
}

fn interrupted(id: &str, name: &str) -> FinalTask {
    let (state, reason) = ("discarded".to_owned(), Some("interrupted".to_owned()));
    FinalTask { guarantee: Guarantee::AtMostOnce, state, reason, result_fence: None, ..completed(id, name, 1) }
}

/// What is planted into the clean evidence, how, and what must be found: this and nothing else.
type Planted = (&'static str, fn(&mut Evidence), &'static [Broken]);

const PLANTED: [Planted; 48] = [
    ("an accepted task is not in the ledger", |e| forget(e, "o"), &[Broken::Lost]),
    ("a task waits for ever", |e| task(e, "k").state = "retryable".to_owned(), &[Broken::Unfinished]),
    ("a task runs that no worker runs", |e| task(e, "o").state = "running".to_owned(), &[Broken::Stray]),
    ("a task still runs", still_runs, &[Broken::Unfinished]),
    ("an at_least_once task is discarded", |e| task(e, "k").state = "discarded".to_owned(), &[Broken::WrongEnd]),
    ("an at_most_once task is poison", |e| task(e, "c").reason = Some("poison".to_owned()), &[Broken::WrongEnd]),
    ("a completed task had no effect", |e| e.history.retain(|line| !is_effect(line, "b1")), &[Broken::NoEffect]),
    ("a key made two tasks", |e| more(e, "o2", "once"), &[Broken::Doubled]),
    ("a repetition answered another task", |e| answer(e, "once", "p"), &[Broken::Lost, Broken::Doubled]),
    ("an unknown submission made too many tasks", |e| more(e, "b3", "batch"), &[Broken::Doubled]),
    ("a batch is there by half", |e| forget(e, "b2"), &[Broken::Half]),
    ("a refused submission is there", |e| more(e, "r", "refused"), &[Broken::Unasked]),
    ("a task of nobody is there", |e| more(e, "x", "nobody"), &[Broken::Unasked]),
    ("a run of nobody", |e| e.history.extend(done(900, OTHER, "x", 1)), &[Broken::Unasked]),
    ("an effect without a start", |e| e.history.push(effect(900, OTHER, "o", 2)), &[Broken::Unasked]),
    ("a second run beside the first", |e| start_of(e, "k", 2).at = ms(150), &[Broken::Overlapping]),
    (
        "a cut run whose process lived on",
        |e| e.history.retain(|line| !is_gone(line)),
        &[Broken::Overlapping, Broken::OverLimit],
    ),
    ("a thawed run that goes on", |e| end_of(e, "f", 1).at += AFTER_THAW, &[Broken::Overlapping]),
    (
        "two runs and no freeze",
        |e| e.history.retain(|line| !is_frozen(line)),
        &[Broken::Overlapping, Broken::OverLimit],
    ),
    ("a fence that stands still", still, &[Broken::FenceStuck]),
    ("a start after completion", |e| e.history.push(start(9_000, OTHER, "k", 3)), &[Broken::StartedAfterEnd]),
    ("at_most_once twice", twice, &[Broken::Repeated]),
    ("cancelled, and nobody asked", |e| e.history.retain(|line| !is_cancel(line)), &[Broken::WrongEnd]),
    ("a start after a cancellation", start_cancelled, &[Broken::StartedAfterCancel, Broken::Disagreement]),
    ("a cancellation that was answered before the last start", cancel_early, &[Broken::StartedAfterCancel]),
    ("two tasks of one key", |e| start_of(e, "u2", 1).at = ms(155), &[Broken::KeyShared]),
    ("a tick without its task", |e| forget(e, "tick2"), &[Broken::Lost]),
    ("a result of another run", |e| task(e, "k").result_fence = Some(1), &[Broken::Disagreement]),
    ("completed, and the handler failed", |e| fail(e, "k", 2), &[Broken::Disagreement]),
    ("a transaction that did not run", |e| forget_runs(e, "t2"), &[Broken::Disagreement]),
    ("an effect without its completion", |e| e.counter += 1, &[Broken::Miscounted]),
    ("a completion without its effect", |e| e.counter -= 1, &[Broken::Miscounted]),
    ("one effect for two tasks", |e| task(e, "t2").counted = Some(1), &[Broken::Miscounted]),
    ("a grant in a pause", |e| task(e, "p").started_at = Some(ms(700)), &[Broken::StartedInPause]),
    ("a grant in a pause that nobody ends", |e| e.history.retain(|line| !is_resumed(line)), &[Broken::StartedInPause]),
    ("a task that nobody has moved", |e| e.history.retain(|line| !is_moved(line)), &[Broken::Misplaced]),
    ("a task in a queue of its own", |e| task(e, "m").queue = "third".to_owned(), &[Broken::Misplaced]),
    ("a moved task waits for ever", |e| task(e, "m").state = "queued".to_owned(), &[Broken::Unfinished]),
    ("a moved task is not in the ledger", |e| forget(e, "m"), &[Broken::Lost]),
    ("a group is not followed", |e| forget(e, "t"), &[Broken::Unfollowed]),
    ("a group is followed twice", follow_again, &[Broken::FollowedTwice]),
    ("a group is followed while one of it runs", |e| start_of(e, "t", 1).at = ms(452), &[Broken::FollowedEarly]),
    ("a member starts behind the end", start_behind, &[Broken::StartedAfterEnd, Broken::FollowedEarly]),
    ("a group is told of wrong ends", |e| told(e).discarded = 1, &[Broken::FollowedWrongly]),
    ("a group of nobody is followed", |e| told(e).id = "x".to_owned(), &[Broken::Unasked, Broken::Unfollowed]),
    ("a message is left", |e| e.queues[0].1 = Some(1), &[Broken::Leftover]),
    ("a queue is gone", |e| e.queues[0].1 = None, &[Broken::Leftover]),
    ("a worker ends unasked", |e| e.history.push(gone(9_000, 77, false)), &[Broken::Died]),
];

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn run_of(line: &Line) -> Option<&Run> {
    match &line.op {
        Op::Start { run, .. } | Op::Effect(run) | Op::End { run, .. } => Some(run),
        _ => None,
    }
}

fn still_runs(evidence: &mut Evidence) {
    task(evidence, "o").state = "running".to_owned();
    evidence.history.retain(|line| !matches!(&line.op, Op::End { run, .. } if run.task == "o"));
}

fn is_effect(line: &Line, id: &str) -> bool {
    matches!(&line.op, Op::Effect(run) if run.task == id)
}

fn is_gone(line: &Line) -> bool {
    matches!(line.op, Op::Gone { .. })
}

fn is_gone_of(line: &Line, id: i32) -> bool {
    matches!(line.op, Op::Gone { process, .. } if process == id)
}

fn is_cancel(line: &Line) -> bool {
    matches!(line.op, Op::Cancel { .. })
}

fn is_frozen(line: &Line) -> bool {
    matches!(line.op, Op::Frozen { .. })
}

fn is_resumed(line: &Line) -> bool {
    matches!(line.op, Op::Resumed { .. })
}

fn is_moved(line: &Line) -> bool {
    matches!(line.op, Op::Moved { .. })
}

fn told(evidence: &mut Evidence) -> &mut Followed {
    task(evidence, "t").follows.as_mut().expect("it follows the group")
}

fn start_behind(evidence: &mut Evidence) {
    evidence.history.push(start(9_000, OTHER, "g1", 2));
}

fn follow_again(evidence: &mut Evidence) {
    evidence.tasks.push(follower("again"));
    evidence.history.extend(done(800, OTHER, "again", 1));
}

fn task<'e>(evidence: &'e mut Evidence, id: &str) -> &'e mut FinalTask {
    evidence.tasks.iter_mut().find(|task| task.id == id).expect("a task of the clean evidence")
}

fn start_of<'e>(evidence: &'e mut Evidence, id: &str, fence: u64) -> &'e mut Line {
    let wanted = run(id, fence);
    let is_start = |line: &&mut Line| matches!(&line.op, Op::Start { run, .. } if *run == wanted);
    evidence.history.iter_mut().find(is_start).expect("a start of the clean evidence")
}

fn end_of<'e>(evidence: &'e mut Evidence, id: &str, fence: u64) -> &'e mut Line {
    let wanted = run(id, fence);
    let is_end = |line: &&mut Line| matches!(&line.op, Op::End { run, .. } if *run == wanted);
    evidence.history.iter_mut().find(is_end).expect("an end of the clean evidence")
}

fn forget(evidence: &mut Evidence, id: &str) {
    evidence.tasks.retain(|task| task.id != id);
    forget_runs(evidence, id);
}

fn forget_runs(evidence: &mut Evidence, id: &str) {
    evidence.history.retain(|line| run_of(line).is_none_or(|run| run.task != id));
}

fn more(evidence: &mut Evidence, id: &str, name: &str) {
    evidence.tasks.push(completed(id, name, 1));
    evidence.history.extend(done(900, OTHER, id, 1));
}

fn answer(evidence: &mut Evidence, name: &str, id: &str) {
    evidence.history.push(submit(name, Answered::Ok, 1, &[id]));
}

fn fail(evidence: &mut Evidence, id: &str, fence: u64) {
    end_of(evidence, id, fence).op = Op::End { run: run(id, fence), how: Ending::Again };
}

/// Both runs of a task under the first fence.
fn still(evidence: &mut Evidence) {
    for line in &mut evidence.history {
        if let Op::Start { run, .. } | Op::Effect(run) | Op::End { run, .. } = &mut line.op
            && run.task == "k"
        {
            run.fence = 1;
        }
    }
    let task = task(evidence, "k");
    (task.fence, task.result_fence) = (1, Some(1));
}

/// A cancelled task that starts all the same.
fn start_cancelled(evidence: &mut Evidence) {
    evidence.history.push(start(9_000, OTHER, "w", 1));
}

/// What was to end with the first run of a task had a second one.
fn cancel_early(evidence: &mut Evidence) {
    evidence.history.push(cancel(250, "k", Some(1)));
}

fn twice(evidence: &mut Evidence) {
    evidence.history.push(start(9_000, OTHER, "c", 2));
    task(evidence, "c").fence = 2;
}

#[test]
fn every_planted_violation_is_found_and_named() {
    assert_eq!(check(&clean()).violations, []);
    let planted: Vec<Planted> = PLANTED.into_iter().chain(limits::PLANTED).chain(edits::PLANTED).collect();
    for (what, plant, expected) in &planted {
        let mut evidence = clean();
        plant(&mut evidence);
        let verdict = check(&evidence);
        let found: Vec<Broken> = verdict.kinds().into_keys().collect();
        assert_eq!(found, *expected, "{what}: {:#?}", verdict.violations);
    }
    for broken in ALL {
        assert!(planted.iter().any(|(_, _, found)| found.contains(&broken)), "{broken} is planted nowhere");
    }
}

const ALL: [Broken; 25] = [
    Broken::Lost,
    Broken::Unfinished,
    Broken::WrongEnd,
    Broken::NoEffect,
    Broken::Doubled,
    Broken::Half,
    Broken::Unasked,
    Broken::Overlapping,
    Broken::FenceStuck,
    Broken::StartedAfterEnd,
    Broken::StartedAfterCancel,
    Broken::KeyShared,
    Broken::OverLimit,
    Broken::Misedited,
    Broken::StartedInPause,
    Broken::Misplaced,
    Broken::Unfollowed,
    Broken::FollowedTwice,
    Broken::FollowedEarly,
    Broken::FollowedWrongly,
    Broken::Repeated,
    Broken::Disagreement,
    Broken::Miscounted,
    Broken::Leftover,
    Broken::Died,
];

#[test]
fn the_clean_history_is_counted() {
    let counts = check(&clean()).counts;
    assert_eq!((counts.submitted, counts.unknown_absent, counts.unknown_present), (45, 1, 1));
    assert_eq!((counts.tasks, counts.completed, counts.interrupted, counts.cancelled), (48, 44, 1, 3));
    assert_eq!((counts.starts, counts.killed_runs, counts.dropped_runs), (52, 5, 2));
    assert_eq!((counts.transactional, counts.followed, counts.moved, counts.pauses), (3, 1, 1, 1));
    assert_eq!((counts.takeovers, counts.longest_after_thaw), (vec![ms(2_800)], ms(100)));
}
