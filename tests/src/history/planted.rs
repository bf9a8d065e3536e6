//! The checker checked: clean histories pass, and every violation that is planted is found and named.

use std::time::Duration;

use proptest::prelude::*;
use tasklane_common::task::Guarantee;

use super::check::{AFTER_THAW, Evidence, FinalTask, check};
use super::{Answered, Broken, Ending, Line, Op, Run};

const WORKER: i32 = 10;
const OTHER: i32 = 20;

fn line(at_ms: u64, pid: i32, op: Op) -> Line {
    Line { at: Duration::from_millis(at_ms), wall_s: None, pid, op }
}

fn submit(name: &str, outcome: Answered, count: usize, tasks: &[&str]) -> Line {
    let tasks = tasks.iter().map(|&task| task.to_owned()).collect();
    line(1, 1, Op::Submit { name: name.to_owned(), outcome, count, tasks })
}

fn run(task: &str, fence: u64) -> Run {
    Run { task: task.to_owned(), attempt: u32::try_from(fence).unwrap_or(0), fence }
}

fn start(at_ms: u64, pid: i32, task: &str, fence: u64) -> Line {
    line(at_ms, pid, Op::Start(run(task, fence)))
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
        guarantee: Guarantee::AtLeastOnce,
        state: "completed".to_owned(),
        reason: None,
        fence,
        result_fence: Some(fence),
        counted: None,
        unique_key: None,
    }
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

/// A task that was killed and done elsewhere, a batch of two without an answer, one that left nothing, one that was
/// refused, an `at_most_once` task that was cut, one that was done, one that was frozen and done elsewhere, and two
/// transactional ones, the first of them killed right behind its commit.
fn clean() -> Evidence {
    let mut history = vec![
        submit("killed", Answered::Unknown, 1, &[]),
        submit("killed", Answered::Ok, 1, &["k"]),
        submit("batch", Answered::Unknown, 2, &[]),
        submit("nothing", Answered::Unknown, 1, &[]),
        submit("refused", Answered::Fail, 1, &[]),
        submit("cut", Answered::Ok, 1, &["c"]),
        submit("once", Answered::Ok, 1, &["o"]),
        submit("frozen", Answered::Ok, 1, &["f"]),
        submit("counts", Answered::Ok, 2, &["t1", "t2"]),
        submit("unwanted", Answered::Ok, 1, &["w"]),
        submit("only", Answered::Ok, 2, &["u1", "u2"]),
        submit("ticks", Answered::Ok, 2, &[]),
        cancel(50, "w", None),
        cancel(60, "w", Some(0)),
        start(100, WORKER, "t1", 1),
        start(100, WORKER, "k", 1),
        start(100, WORKER, "c", 1),
        gone(200, WORKER, true),
        start(300, OTHER, "f", 1),
        line(400, 1, Op::Frozen { process: OTHER }),
        start(3_400, 30, "f", 2),
        line(3_500, 1, Op::Thawed { process: OTHER }),
        effect(3_510, OTHER, "f", 1),
        end(3_520, OTHER, "f", 1, Ending::Dropped),
        effect(3_600, 30, "f", 2),
        end(3_600, 30, "f", 2, Ending::Done),
    ];
    history.extend(done(3_000, OTHER, "k", 2));
    for task in ["b1", "b2", "o", "t2", "u1", "tick1", "tick2"] {
        history.extend(done(150, OTHER, task, 1));
    }
    history.extend(done(160, WORKER, "u2", 1));
    let tasks = vec![
        completed("k", "killed", 2),
        completed("b1", "batch", 1),
        completed("b2", "batch", 1),
        interrupted("c", "cut"),
        FinalTask { guarantee: Guarantee::AtMostOnce, ..completed("o", "once", 1) },
        completed("f", "frozen", 2),
        counted("t1", "counts", 1, 1),
        counted("t2", "counts", 1, 2),
        cancelled("w", "unwanted"),
        unique("u1", "only"),
        unique("u2", "only"),
        completed("tick1", "ticks", 1),
        completed("tick2", "ticks", 1),
    ];
    Evidence { history, tasks, queues: vec![("tasklane.q.default".to_owned(), Some(0))], counter: 2 }
}

/// What is planted into the clean evidence, how, and what must be found: this and nothing else.
type Planted = (&'static str, fn(&mut Evidence), &'static [Broken]);

const PLANTED: [Planted; 35] = [
    ("an accepted task is not in the ledger", |e| forget(e, "o"), &[Broken::Lost]),
    ("a task waits for ever", |e| task(e, "k").state = "retryable".to_owned(), &[Broken::Unfinished]),
    ("a task still runs", |e| task(e, "o").state = "running".to_owned(), &[Broken::Unfinished]),
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
    ("a cut run whose process lived on", |e| e.history.retain(|line| !is_gone(line)), &[Broken::Overlapping]),
    ("a thawed run that goes on", |e| end_of(e, "f", 1).at += AFTER_THAW, &[Broken::Overlapping]),
    ("two runs and no freeze", |e| e.history.retain(|line| !is_frozen(line)), &[Broken::Overlapping]),
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
    ("an effect without its completion", |e| e.counter = 3, &[Broken::Miscounted]),
    ("a completion without its effect", |e| e.counter = 1, &[Broken::Miscounted]),
    ("one effect for two tasks", |e| task(e, "t2").counted = Some(1), &[Broken::Miscounted]),
    ("a message is left", |e| e.queues[0].1 = Some(1), &[Broken::Leftover]),
    ("a queue is gone", |e| e.queues[0].1 = None, &[Broken::Leftover]),
    ("a worker ends unasked", |e| e.history.push(gone(9_000, 77, false)), &[Broken::Died]),
];

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn run_of(line: &Line) -> Option<&Run> {
    match &line.op {
        Op::Start(run) | Op::Effect(run) | Op::End { run, .. } => Some(run),
        _ => None,
    }
}

fn is_effect(line: &Line, id: &str) -> bool {
    matches!(&line.op, Op::Effect(run) if run.task == id)
}

fn is_gone(line: &Line) -> bool {
    matches!(line.op, Op::Gone { .. })
}

fn is_cancel(line: &Line) -> bool {
    matches!(line.op, Op::Cancel { .. })
}

fn is_frozen(line: &Line) -> bool {
    matches!(line.op, Op::Frozen { .. })
}

fn task<'e>(evidence: &'e mut Evidence, id: &str) -> &'e mut FinalTask {
    evidence.tasks.iter_mut().find(|task| task.id == id).expect("a task of the clean evidence")
}

fn start_of<'e>(evidence: &'e mut Evidence, id: &str, fence: u64) -> &'e mut Line {
    let wanted = Op::Start(run(id, fence));
    evidence.history.iter_mut().find(|line| line.op == wanted).expect("a start of the clean evidence")
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
        if let Op::Start(run) | Op::Effect(run) | Op::End { run, .. } = &mut line.op
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
    for (what, plant, expected) in PLANTED {
        let mut evidence = clean();
        plant(&mut evidence);
        let verdict = check(&evidence);
        let found: Vec<Broken> = verdict.kinds().into_keys().collect();
        assert_eq!(found, expected, "{what}: {:#?}", verdict.violations);
    }
    for broken in ALL {
        assert!(PLANTED.iter().any(|(_, _, found)| found.contains(&broken)), "{broken} is planted nowhere");
    }
}

const ALL: [Broken; 17] = [
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
    Broken::Repeated,
    Broken::Disagreement,
    Broken::Miscounted,
    Broken::Leftover,
    Broken::Died,
];

#[test]
fn the_clean_history_is_counted() {
    let counts = check(&clean()).counts;
    assert_eq!((counts.submitted, counts.unknown_absent, counts.unknown_present), (11, 1, 1));
    assert_eq!((counts.tasks, counts.completed, counts.interrupted, counts.cancelled), (13, 11, 1, 1));
    assert_eq!((counts.starts, counts.killed_runs, counts.dropped_runs), (14, 3, 1));
    assert_eq!(counts.transactional, 2);
    assert_eq!((counts.takeovers, counts.longest_after_thaw), (vec![ms(2_800)], ms(20)));
}

/// How a run that is not the last may end.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Killed,
    Dropped,
    Failed,
    Frozen,
}

/// What happens to one submission, in the model.
#[derive(Clone, Debug)]
enum Fate {
    Refused,
    Unrecorded,
    Recorded { unknown_first: u8, answered: bool, size: usize, once: bool, cuts: Vec<Cut>, finished: bool },
}

fn fate() -> impl Strategy<Value = Fate> {
    let cut = prop_oneof![Just(Cut::Killed), Just(Cut::Dropped), Just(Cut::Failed), Just(Cut::Frozen)];
    let recorded =
        (0..3u8, any::<bool>(), 1..4usize, any::<bool>(), proptest::collection::vec(cut, 0..4), any::<bool>());
    let recorded = recorded.prop_map(|(unknown_first, answered, size, once, cuts, finished)| Fate::Recorded {
        unknown_first: unknown_first.max(u8::from(!answered)),
        answered,
        size,
        once,
        cuts,
        finished,
    });
    prop_oneof![1 => Just(Fate::Refused), 1 => Just(Fate::Unrecorded), 8 => recorded]
}

/// A world that keeps its promises: it plays each fate, and writes the history down.
#[derive(Default)]
struct Model {
    evidence: Evidence,
    now_ms: u64,
    next_process: i32,
}

impl Model {
    fn play(&mut self, name: &str, fate: &Fate) {
        match fate {
            Fate::Refused => self.evidence.history.push(submit(name, Answered::Fail, 1, &[])),
            Fate::Unrecorded => self.evidence.history.push(submit(name, Answered::Unknown, 1, &[])),
            Fate::Recorded { unknown_first, answered, size, once, cuts, finished } => {
                let ids: Vec<String> = (0..*size).map(|at| format!("{name}.{at}")).collect();
                let unknown = submit(name, Answered::Unknown, *size, &[]);
                self.evidence.history.extend(std::iter::repeat_n(unknown, usize::from(*unknown_first)));
                if *answered {
                    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
                    self.evidence.history.push(submit(name, Answered::Ok, *size, &ids));
                }
                for id in &ids {
                    self.run(id, name, if *once { &[] } else { cuts }, *once && !finished);
                }
            }
        }
    }

    fn run(&mut self, id: &str, name: &str, cuts: &[Cut], interrupted_at_once: bool) {
        let mut fence = 1;
        for cut in cuts {
            self.cut(id, fence, *cut);
            fence += 1;
        }
        if interrupted_at_once {
            self.cut(id, fence, Cut::Killed);
            return self.evidence.tasks.push(interrupted(id, name));
        }
        let (now_ms, process) = self.tick();
        self.evidence.history.extend(done(now_ms, process, id, fence));
        self.evidence.tasks.push(completed(id, name, fence));
    }

    fn cut(&mut self, id: &str, fence: u64, cut: Cut) {
        let (now_ms, process) = self.tick();
        let history = &mut self.evidence.history;
        history.push(start(now_ms, process, id, fence));
        match cut {
            Cut::Killed => history.push(gone(now_ms + 50, process, true)),
            Cut::Dropped => history.push(end(now_ms + 50, process, id, fence, Ending::Dropped)),
            Cut::Failed => history.push(end(now_ms + 50, process, id, fence, Ending::Again)),
            Cut::Frozen => {
                history.push(line(now_ms + 50, 1, Op::Frozen { process }));
                history.push(line(now_ms + 5_000, 1, Op::Thawed { process }));
                history.push(end(now_ms + 5_020, process, id, fence, Ending::Dropped));
            }
        }
    }

    /// The next run begins later, and in another process.
    fn tick(&mut self) -> (u64, i32) {
        self.now_ms += 1_000;
        self.next_process += 1;
        (self.now_ms, self.next_process)
    }
}

proptest! {
    #[test]
    fn a_history_that_keeps_every_promise_passes(fates in proptest::collection::vec(fate(), 0..40)) {
        let mut model = Model::default();
        for (at, fate) in fates.iter().enumerate() {
            model.play(&format!("s{at}"), fate);
        }
        // The file's order is that of the writes, which for lines of one moment is nobody's promise.
        model.evidence.history.reverse();
        model.evidence.history.sort_by_key(|line| line.at);
        prop_assert_eq!(check(&model.evidence).violations, []);
    }
}
