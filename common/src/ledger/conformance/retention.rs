//! How long what is over is kept: by its queue, and its result by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::group::made;
use super::{HOUR, discard, get, kind, pruned, queue, recorded, run, until, worker};
use crate::ledger::{Caller, Ledger, ListQuery, Transition};
use crate::state::State;
use crate::task::{Json, QueueName, TaskId};

const NOW: Duration = Duration::ZERO;
const DAY: Duration = Duration::from_secs(86_400);

fn kept<const N: usize>(queues: [(&str, Duration); N]) -> BTreeMap<QueueName, Duration> {
    queues.into_iter().map(|(name, retention)| (queue(name), retention)).collect()
}

fn answer(result: &str) -> Transition {
    Transition::Complete { result: Json::parse(result.to_owned()).unwrap() }
}

/// Completes so many tasks of a queue.
async fn completed(ledger: &dyn Ledger, name: &str, count: usize) -> Vec<TaskId> {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, count, |task| task.queue = queue(name)).await;
    for id in &ids {
        run(ledger, *id, holder, answer("1")).await;
    }
    ids
}

async fn left(ledger: &dyn Ledger, ids: &[TaskId]) -> usize {
    ledger.get(ids.to_vec()).await.unwrap().len()
}

/// Prunes until these are gone, and says whether others went with them.
async fn gone(ledger: &dyn Ledger, retention: Duration, ids: &[TaskId]) -> u64 {
    let mut total = 0;
    while left(ledger, ids).await > 0 {
        total += until("tasks to be pruned", async || {
            Some(pruned(ledger, retention, 1000).await).filter(|count| *count > 0)
        })
        .await;
    }
    total - ids.len() as u64
}

/// Shorter or longer than others; what is said anew counts for what is there already, and what is said no more does not.
pub async fn a_queue_keeps_its_tasks_as_long_as_was_said(ledger: &dyn Ledger) {
    assert!(!ledger.set_retention(BTreeMap::new()).await.unwrap(), "there was nothing to forget");
    assert!(ledger.set_retention(kept([("short", NOW), ("long", DAY)])).await.unwrap());
    assert!(!ledger.set_retention(kept([("short", NOW), ("long", DAY)])).await.unwrap(), "it was said before");
    let short = completed(ledger, "short", 3).await;
    let plain = completed(ledger, "default", 2).await;
    let long = completed(ledger, "long", 4).await;
    assert_eq!(gone(ledger, HOUR, &short).await, 0);
    assert_eq!(left(ledger, &plain).await, 2);
    assert_eq!(gone(ledger, NOW, &plain).await, 0);
    assert_eq!(pruned(ledger, NOW, 1000).await, 0);
    assert_eq!(left(ledger, &long).await, 4);
    assert!(ledger.set_retention(kept([("long", HOUR)])).await.unwrap(), "one is shorter and one is forgotten");
    let short = completed(ledger, "short", 1).await;
    assert_eq!(pruned(ledger, HOUR, 1000).await, 0, "it is a queue like others");
    assert!(ledger.set_retention(BTreeMap::new()).await.unwrap());
    assert_eq!(gone(ledger, NOW, &[short, long].concat()).await, 0);
}

/// A queue that always has something to prune keeps no other waiting.
pub async fn queues_take_turns(ledger: &dyn Ledger) {
    let mut all = Vec::new();
    for name in ["a", "b", "c"] {
        all.push(completed(ledger, name, 12).await);
    }
    let youngest = get(ledger, all[2][11]).await.finished_at.unwrap();
    until("all of them to be older than now", async || {
        (crate::clock::wall_ms() > youngest.as_millisecond() + 50).then_some(())
    })
    .await;
    for _ in 0..3 {
        assert_eq!(pruned(ledger, NOW, 5).await, 5);
    }
    for ids in &all {
        assert_eq!(left(ledger, ids).await, 7);
    }
}

/// Whoever prunes rests only when a whole round has found nothing.
pub async fn what_is_pruned_next_is_told(ledger: &dyn Ledger) {
    assert!(!super::prune(ledger, NOW, 10).await.more, "an empty ledger has nothing");
    let ids = [completed(ledger, "a", 8).await, completed(ledger, "b", 8).await].concat();
    assert!(!super::prune(ledger, HOUR, 10).await.more, "nor one whose tasks are young");
    let (mut total, mut steps) = (0, 0);
    while left(ledger, &ids).await > 0 {
        let step = super::prune(ledger, NOW, 5).await;
        (total, steps) = (total + step.tasks, steps + 1);
        assert!(step.more || step.tasks < 5, "{step:?}");
        assert!(steps < 1000, "{total} of 16 after {steps} steps");
    }
    assert_eq!(total, 16);
    until("a round without any", async || (!super::prune(ledger, NOW, 5).await.more).then_some(())).await;
}

/// The members of a group count from its end, each by its own queue, and never while it is open.
pub async fn members_are_kept_as_long_as_their_queue_says(ledger: &dyn Ledger) {
    ledger.set_retention(kept([("long", DAY), ("short", NOW)])).await.unwrap();
    let holder = worker(ledger).await;
    let (group, ids) = made(ledger, 3).await;
    let moved = async |id, to| {
        assert_eq!(ledger.move_tasks(vec![id], queue("default"), queue(to), Caller::UNKNOWN).await.unwrap(), 1);
    };
    moved(ids[0], "long").await;
    moved(ids[1], "short").await;
    for id in &ids[..2] {
        run(ledger, *id, holder, answer("1")).await;
    }
    assert_eq!(pruned(ledger, NOW, 1000).await, 0, "the group is open");
    run(ledger, ids[2], holder, answer("1")).await;
    assert!(ledger.close_group(group).await.unwrap().is_some());
    assert_eq!(gone(ledger, HOUR, &ids[1..2]).await, 0);
    assert_eq!(left(ledger, &ids).await, 2);
    assert_eq!(gone(ledger, NOW, &ids[2..]).await, 0);
    for _ in 0..3 {
        assert_eq!(pruned(ledger, NOW, 1).await, 0);
    }
    assert!(ledger.group(group).await.unwrap().is_some(), "it stays as long as a member");
    ledger.set_retention(BTreeMap::new()).await.unwrap();
    assert_eq!(gone(ledger, NOW, &ids[..1]).await, 0);
}

/// Only the result goes, and only when its own time is over; that it was there is told.
pub async fn an_expired_result_is_cleared_and_its_task_stays(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let with = async |ttl| recorded(ledger, 1, |task| task.result_ttl = ttl).await[0];
    let (soon, later, never) = (with(Some(NOW)).await, with(Some(HOUR)).await, with(None).await);
    let (null, failed) = (with(Some(HOUR)).await, with(Some(NOW)).await);
    assert_eq!(super::expire_results(ledger, 100).await, 0, "nothing has finished");
    run(ledger, failed, holder, discard()).await;
    for (id, result) in [(soon, "[1]"), (later, "[2]"), (never, "[3]"), (null, "null")] {
        run(ledger, id, holder, answer(result)).await;
    }
    let before = get(ledger, soon).await;
    let expired = until("a result to expire", async || {
        Some(super::expire_results(ledger, 100).await).filter(|expired| *expired > 0)
    });
    assert_eq!(expired.await, 1);
    assert_eq!(super::expire_results(ledger, 100).await, 0, "once");
    let task = get(ledger, soon).await;
    assert_eq!((task.state, &task.result, task.result_expired), (State::Completed, &None, true));
    assert_eq!((task.finished_at, task.args, task.fence), (before.finished_at, before.args, before.fence));
    for (id, result) in [(later, Some("[2]")), (never, Some("[3]")), (null, Some("null")), (failed, None)] {
        let task = get(ledger, id).await;
        assert_eq!((task.result.as_ref().map(Json::as_str), task.result_expired), (result, false));
    }
    let listed = ledger.list(ListQuery { kind: Some(kind("test.work")), limit: 10, ..ListQuery::default() });
    let expired: Vec<_> = listed.await.unwrap().tasks.into_iter().filter(|task| task.result_expired).collect();
    assert_eq!(expired.iter().map(|task| task.id).collect::<Vec<_>>(), [soon]);
    assert_eq!(gone(ledger, NOW, &[soon]).await, 4, "it is pruned like the others");
}

/// No more at once than was asked for, and many times clear everything.
pub async fn expiring_is_bounded(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 25, |task| task.result_ttl = Some(NOW)).await;
    for id in &ids {
        run(ledger, *id, holder, answer("1")).await;
    }
    let mut total = 0;
    while total < 25 {
        let count = until("results to expire", async || {
            Some(super::expire_results(ledger, 10).await).filter(|count| *count > 0)
        })
        .await;
        assert!(count <= 10, "{count} at once");
        total += count;
    }
    assert!(ledger.get(ids).await.unwrap().iter().all(|task| task.result_expired));
}

/// By their end, whatever the order of their recording.
pub async fn the_oldest_go_first(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 6, |_| {}).await;
    let mut last = 0;
    for id in ids.iter().rev() {
        until("the next millisecond", async || (crate::clock::wall_ms() > last + 1).then_some(())).await;
        run(ledger, *id, holder, answer("1")).await;
        last = get(ledger, *id).await.finished_at.unwrap().as_millisecond();
    }
    until("the last to be older than now", async || (crate::clock::wall_ms() > last + 50).then_some(())).await;
    assert_eq!(pruned(ledger, NOW, 2).await, 2);
    let left: BTreeSet<TaskId> = ledger.get(ids.clone()).await.unwrap().iter().map(|task| task.id).collect();
    assert_eq!(left, ids[..4].iter().copied().collect());
}
