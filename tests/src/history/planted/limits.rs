//! Runs under limits, in a history that keeps them and in some that do not.

use std::time::Duration;

use tasklane_common::task::Guarantee;

use super::super::check::limits::{Bound, Limit, Scope};
use super::super::check::{AFTER_THAW, Evidence, FinalTask, check};
use super::super::verdict::Usage;
use super::super::{Answered, Broken, Ending, Line, Op};
use super::{
    Planted, cancel, cancelled, completed, counted, done, effect, end, end_of, gone, granted, is_gone_of, line, ms,
    start, start_of, submit, task,
};

const HERE: i32 = 40;
const KILLED: i32 = 41;
const FROZEN: i32 = 42;
const BRIEFLY_FROZEN: i32 = 43;

/// Two of a kind at once, one of each tenant, two starts a second; the same of queues.
pub(super) fn all() -> Vec<Limit> {
    let limit = |scope, bound| Limit { scope, bound };
    let rate = Bound::Rate { tasks: 2, per: Duration::from_secs(1), burst: 1 };
    vec![
        limit(Scope::Kind("few".to_owned()), Bound::Running(2)),
        limit(Scope::Keys("tenant:".to_owned()), Bound::Running(1)),
        limit(Scope::Kind("paced".to_owned()), rate),
        limit(Scope::Queue("narrow".to_owned()), Bound::Running(1)),
        limit(Scope::Queue("slow".to_owned()), rate),
    ]
}

fn few(id: &str, fence: u64) -> FinalTask {
    FinalTask { kind: "few".to_owned(), ..completed(id, "limited", fence) }
}

fn of_tenant(tenant: &str, task: FinalTask) -> FinalTask {
    FinalTask { concurrency_key: Some(format!("tenant:{tenant}")), ..task }
}

fn paced(id: &str, granted_ms: u64) -> FinalTask {
    let (kind, started_at) = ("paced".to_owned(), Some(ms(granted_ms)));
    FinalTask { kind, started_at, ..completed(id, "limited", 1) }
}

/// Adds tasks that keep their limits: one takes the place of one that was killed, two run beside one that lost its place
/// while its process stood still, one beside one that kept it, tenants run beside each other, one starts in the moment
/// between a commit and the end of its run, and some start as fast as they may.
pub(super) fn keep(evidence: &mut Evidence) {
    let runs = [
        submit("limited", Answered::Ok, 16, &[]),
        start(4_000, HERE, "l1", 1),
        start(4_000, KILLED, "l2", 1),
        gone(4_050, KILLED, true),
        effect(4_100, HERE, "l1", 1),
        end(4_100, HERE, "l1", 1, Ending::Done),
        start(5_000, FROZEN, "l4", 1),
        line(5_100, 1, Op::Frozen { process: FROZEN }),
        line(9_000, 1, Op::Thawed { process: FROZEN }),
        end(9_100, FROZEN, "l4", 1, Ending::Dropped),
        start(10_000, BRIEFLY_FROZEN, "l6", 1),
        line(10_010, 1, Op::Frozen { process: BRIEFLY_FROZEN }),
        line(10_100, 1, Op::Thawed { process: BRIEFLY_FROZEN }),
        effect(10_110, BRIEFLY_FROZEN, "l6", 1),
        end(10_110, BRIEFLY_FROZEN, "l6", 1, Ending::Done),
        start(4_000, HERE, "c1", 1),
        end(4_050, HERE, "c1", 1, Ending::Done),
    ];
    evidence.history.extend(runs);
    let done_at = [
        (4_060, "l3", 1),
        (4_200, "l2", 2),
        (8_500, "l4", 2),
        (8_502, "l5", 1),
        (10_020, "l7", 1),
        (10_200, "l8", 1),
        (4_000, "a1", 1),
        (4_006, "a2", 1),
        (4_002, "v1", 1),
        (4_040, "c2", 1),
        (1_000, "p1", 1),
        (1_500, "p2", 1),
        (2_000, "p3", 1),
    ];
    evidence.history.extend(done_at.into_iter().flat_map(|(at_ms, id, fence)| done(at_ms, HERE, id, fence)));
    let of_tenants = [("a", "a1"), ("a", "a2"), ("b", "v1"), ("c", "c2")];
    evidence.tasks.extend([few("l2", 2), few("l4", 2)]);
    evidence.tasks.extend(["l1", "l3", "l5", "l6", "l7", "l8"].map(|id| few(id, 1)));
    evidence.tasks.extend(of_tenants.map(|(tenant, id)| of_tenant(tenant, completed(id, "limited", 1))));
    evidence.tasks.push(of_tenant("c", counted("c1", "limited", 1, 3)));
    evidence.tasks.extend([("p1", 1_000), ("p2", 1_500), ("p3", 2_000)].map(|(id, at_ms)| paced(id, at_ms)));
    evidence.counter += 1;
}

/// Says from which queue the tasks of these starts came.
fn from(from: &str, lines: impl IntoIterator<Item = Line>) -> Vec<Line> {
    let mut lines: Vec<Line> = lines.into_iter().collect();
    for line in &mut lines {
        if let Op::Start { queue, .. } = &mut line.op {
            *queue = Some(from.to_owned());
        }
    }
    lines
}

/// Adds tasks of limited queues: one takes the place of another, and of one that failed and runs in another queue meanwhile;
/// some start as fast as they may, beside one that came there after its start.
pub(super) fn keep_queues(evidence: &mut Evidence) {
    let moved =
        |from: &str, to: &str| line(4_100, 1, Op::Moved { from: from.to_owned(), to: to.to_owned(), count: None });
    let ids = ["n1", "n2", "n3", "n4", "q1", "q2", "q3"];
    evidence.history.extend([submit("queues", Answered::Ok, ids.len(), &ids), cancel(4_200, "q3", Some(1))]);
    evidence.history.extend([moved("narrow", "default"), moved("default", "slow")]);
    evidence.history.extend(from("narrow", done(4_000, HERE, "n1", 1)));
    evidence.history.extend(from("narrow", done(4_006, HERE, "n2", 1)));
    evidence.history.extend(from("narrow", [start(4_020, HERE, "n3", 1), end(4_050, HERE, "n3", 1, Ending::Again)]));
    evidence.history.extend(done(4_200, HERE, "n3", 2));
    evidence.history.extend(from("narrow", done(4_200, HERE, "n4", 1)));
    evidence.history.extend(from("slow", [done(1_010, HERE, "q1", 1), done(1_510, HERE, "q2", 1)].concat()));
    evidence.history.extend([start(1_300, HERE, "q3", 1), end(1_310, HERE, "q3", 1, Ending::Again)]);
    let of = |queue: &str, id: &str| FinalTask { name: "queues".to_owned(), ..granted(id, queue, 0) };
    evidence.tasks.extend(["n1", "n2", "n4"].map(|id| of("narrow", id)));
    evidence.tasks.push(FinalTask { submitted_to: Some("narrow".to_owned()), ..completed("n3", "queues", 2) });
    evidence.tasks.extend(
        [("q1", 1_000), ("q2", 1_500)].map(|(id, at_ms)| FinalTask { started_at: Some(ms(at_ms)), ..of("slow", id) }),
    );
    let (queue, started_at) = ("slow".to_owned(), Some(ms(1_290)));
    evidence.tasks.push(FinalTask { queue, started_at, fence: 1, ..cancelled("q3", "queues") });
}

fn move_the_second_run(evidence: &mut Evidence) {
    let line = start_of(evidence, "n3", 2);
    *line = from("narrow", [line.clone()]).remove(0);
}

pub(super) const PLANTED: [Planted; 14] = [
    ("one more of a kind", |e| start_of(e, "l3", 1).at = ms(4_040), &[Broken::OverLimit]),
    ("a place taken before its holder is dead", die_later, &[Broken::OverLimit]),
    ("a place taken whose holder has not ended", never_die, &[Broken::Overlapping, Broken::OverLimit]),
    (
        "one more beside a frozen run that keeps its place",
        |e| start_of(e, "l8", 1).at = ms(10_022),
        &[Broken::OverLimit],
    ),
    ("a thawed run that goes on", thawed_goes_on, &[Broken::Overlapping, Broken::OverLimit]),
    ("two of a tenant", |e| start_of(e, "a2", 1).at = ms(4_003), &[Broken::OverLimit]),
    ("two of a tenant before a commit", end_the_transaction_late, &[Broken::OverLimit]),
    ("a start too soon", |e| task(e, "p2").started_at = Some(ms(1_498)), &[Broken::OverLimit]),
    ("two in a queue", |e| start_of(e, "n2", 1).at = ms(4_003), &[Broken::OverLimit]),
    ("one more in a queue that another left later", |e| start_of(e, "n3", 1).at = ms(4_010), &[Broken::OverLimit]),
    ("a run in a full queue that another came to", move_the_second_run, &[Broken::OverLimit]),
    ("a start too soon in a queue", |e| task(e, "q2").started_at = Some(ms(1_498)), &[Broken::OverLimit]),
    ("a held task waits for ever", |e| task(e, "p3").state = "accepted".to_owned(), &[Broken::Unfinished]),
    ("a held task is lost", |e| super::forget(e, "a2"), &[Broken::Lost]),
];

fn die_later(evidence: &mut Evidence) {
    let dead = evidence.history.iter_mut().find(|line| is_gone_of(line, KILLED)).expect("it was killed");
    dead.at = ms(4_061);
}

fn never_die(evidence: &mut Evidence) {
    evidence.history.retain(|line| !is_gone_of(line, KILLED));
}

fn thawed_goes_on(evidence: &mut Evidence) {
    end_of(evidence, "l4", 1).at += AFTER_THAW;
}

/// The transaction was another run's, so this one has its place until it ends.
fn end_the_transaction_late(evidence: &mut Evidence) {
    let task = task(evidence, "c1");
    task.guarantee = Guarantee::AtLeastOnce;
    (task.counted, task.result_fence) = (None, Some(1));
    evidence.history.push(effect(4_045, HERE, "c1", 1));
    evidence.counter -= 1;
}

#[test]
fn limits_are_counted() {
    let mut evidence = super::clean();
    let used = |evidence: &Evidence| check(evidence).counts.limits;
    let usage = |runs, most, allowed| Usage { runs, most, allowed };
    let expected = [
        ("key/tenant:* at once", usage(5, 1, 1)),
        ("kind/few at once", usage(10, 2, 2)),
        ("kind/paced in 1 s", usage(3, 3, 3)),
        ("queue/narrow at once", usage(4, 1, 1)),
        ("queue/slow in 1 s", usage(2, 2, 3)),
    ];
    assert_eq!(used(&evidence), expected.map(|(name, usage)| (name.to_owned(), usage)).into());
    start_of(&mut evidence, "l3", 1).at = ms(4_040);
    assert_eq!(used(&evidence)["kind/few at once"], usage(10, 3, 2));
}
