//! A history that keeps every promise, into which violations are planted.

use super::*;

/// All that keeps its promises.
pub(super) fn clean() -> Evidence {
    let mut evidence = unlimited();
    limits::keep(&mut evidence);
    limits::keep_queues(&mut evidence);
    edits::keep(&mut evidence);
    evidence
}

/// A task that was killed and done elsewhere, a batch of two without an answer, one that left nothing, one that was
/// refused, an `at_most_once` task that was cut, one that was done, one that was frozen and done elsewhere, two
/// transactional ones, the first of them killed right behind its commit, two of a queue that was paused in between, one
/// that was moved, and a group of two with what followed it.
fn unlimited() -> Evidence {
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
        submit("paused", Answered::Ok, 3, &["h", "p", "e"]),
        submit("moved", Answered::Ok, 1, &["m"]),
        submit("group", Answered::Ok, 2, &["g1", "g2"]),
        cancel(55, "g2", Some(0)),
        resumed(30),
        paused(500),
        resumed(2_500),
        moved(None),
        moved(Some(1)),
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
    // In hand when the queue was paused; after that; and in another queue meanwhile.
    for (at_ms, task) in [(510, "h"), (2_600, "p"), (600, "e"), (400, "m"), (450, "g1"), (700, "t")] {
        history.extend(done(at_ms, OTHER, task, 1));
    }
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
        granted("h", "other", 490),
        granted("p", "other", 2_590),
        granted("e", "default", 590),
        FinalTask { queue: "other".to_owned(), ..completed("m", "moved", 1) },
        member(completed("g1", "group", 1)),
        member(cancelled("g2", "group")),
        follower("t"),
        completed("tick1", "ticks", 1),
        completed("tick2", "ticks", 1),
    ];
    let queues = vec![("tasklane.q.default".to_owned(), Some(0))];
    Evidence { history, tasks, queues, limits: limits::all(), counter: 2 }
}
