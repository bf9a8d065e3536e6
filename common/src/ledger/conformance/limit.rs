//! How many run at once, how often they start, and what is held meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;

use super::{
    HOUR, cancelled, claim, complete, get, granted, kind, mark_queued, one, queue, recorded, refused, retry, run,
    settle, until, worker, worker_for,
};
use crate::ledger::{Caller, Claim, Ledger, LimitSet, Refusal, SharedLedger};
use crate::limit::{Bounds, LIMITS_MAX, Origin, Rate, Scope};
use crate::rescue;
use crate::state::State;
use crate::task::{Fence, Priority, TaskId, WorkerId};

fn most(running: u32) -> Bounds {
    Bounds { max_running: Some(running), ..Bounds::default() }
}

pub(super) async fn set(ledger: &dyn Ledger, scope: &str, bounds: Bounds) {
    ledger.set_limit(scope.parse().unwrap(), bounds).await.unwrap();
}

/// Lets go what can, however many rounds that takes.
pub(super) async fn release(ledger: &dyn Ledger) -> u32 {
    let (mut after, mut tasks) = (None, 0);
    loop {
        let released = ledger.release_held(after, 3).await.unwrap();
        (after, tasks) = (released.next, tasks + released.tasks);
        if after.is_none() {
            return tasks;
        }
    }
}

/// Those that a relay would publish now, in the order in which they were let go is not told by it.
pub(super) async fn due(ledger: &dyn Ledger) -> BTreeSet<TaskId> {
    ledger.fetch_due(100, HOUR).await.unwrap().into_iter().map(|due| due.id).collect()
}

/// As it was given, whoever gives it; each scope has one.
pub async fn limits_are_kept_as_they_were_set(ledger: &dyn Ledger) {
    let scope = |text: &str| text.parse::<Scope>().unwrap();
    let rate = Some(Rate { tasks: 7, per_ms: 60_000, burst: 3 });
    let all = Bounds { max_running: Some(5), rate, max_queued: Some(9) };
    assert_eq!(ledger.set_limit(scope("queue:default"), most(1)).await.unwrap(), LimitSet::Made);
    assert_eq!(ledger.set_limit(scope("queue:default"), all).await.unwrap(), LimitSet::Replaced);
    let shown = async || -> Vec<(String, Bounds, Origin)> {
        let limits = ledger.limits().await.unwrap();
        limits.into_iter().map(|limit| (limit.scope.to_string(), limit.bounds, limit.origin)).collect()
    };
    let file = vec![(scope("queue:default"), most(2)), (scope("key:tenant:*"), most(3))];
    ledger.adopt_limits(file).await.unwrap();
    let tenants = ("key:tenant:*".to_owned(), most(3), Origin::File);
    assert_eq!(
        shown().await,
        [tenants, ("queue:default".to_owned(), all, Origin::Api)],
        "the API goes before the file"
    );
    ledger.adopt_limits(vec![(scope("kind:a"), most(4))]).await.unwrap();
    let [kind, _] = &shown().await[..] else { panic!("two limits") };
    assert_eq!(kind, &("kind:a".to_owned(), most(4), Origin::File), "what the file does not have any more is gone");
    assert!(ledger.delete_limit(scope("queue:default")).await.unwrap());
    assert!(!ledger.delete_limit(scope("queue:default")).await.unwrap());
    assert_eq!(shown().await.len(), 1);
}

/// The ledger takes a bounded number.
pub async fn there_is_an_end_to_limits(ledger: &dyn Ledger) {
    let file = (0..LIMITS_MAX).map(|n| (Scope::named("key", &format!("k{n}")).unwrap(), most(1))).collect();
    ledger.adopt_limits(file).await.unwrap();
    let more = Scope::named("key", "more").unwrap();
    assert_eq!(ledger.set_limit(more, most(1)).await.unwrap(), LimitSet::TooMany);
    assert_eq!(ledger.set_limit("key:k0".parse().unwrap(), most(2)).await.unwrap(), LimitSet::Replaced);
    assert_eq!(ledger.limits().await.unwrap().len(), LIMITS_MAX);
}

/// The last place is taken once; who finds none is held, shown as such, and let go when the place is free.
pub async fn a_task_without_a_place_is_held(ledger: &dyn Ledger) {
    set(ledger, "kind:test.work", most(1)).await;
    let holder = worker(ledger).await;
    let [first, second, third] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    mark_queued(ledger, vec![(second, Fence(0))]).await.unwrap();
    let running = granted(ledger, first, holder).await;
    assert!(running.limited);
    assert_eq!(refused(ledger, second, holder).await, Refusal::Limited);
    let held = get(ledger, second).await;
    assert_eq!((held.state, held.limited_by.as_deref()), (State::Accepted, Some("kind:test.work")));
    assert_eq!(held.attempt, 0);
    let [counts] = &ledger.queues().await.unwrap()[..] else { panic!("one queue") };
    assert_eq!(counts.counts[&State::Accepted], 2, "the held one is counted");
    assert_eq!(ledger.waiting(queue("default"), 100).await.unwrap(), 1, "those that are not to wait an hour");
    // A late mark of the publication that was acked, and another delivery, change nothing.
    mark_queued(ledger, vec![(second, Fence(0))]).await.unwrap();
    assert_eq!(refused(ledger, second, holder).await, Refusal::Limited);
    assert_eq!((release(ledger).await, due(ledger).await.len()), (0, 0));

    settle(ledger, first, running.fence, complete()).await;
    assert_eq!(refused(ledger, third, holder).await, Refusal::Limited, "nobody goes before those who wait");
    assert_eq!(release(ledger).await, 1);
    assert_eq!(due(ledger).await, [second].into());
    assert_eq!(get(ledger, second).await.limited_by, None);
    assert_eq!(release(ledger).await, 0, "the place is kept");
    assert_eq!(refused(ledger, third, holder).await, Refusal::Limited);
    run(ledger, second, holder, complete()).await;
    assert_eq!(release(ledger).await, 1);
    run(ledger, third, holder, complete()).await;
    assert_eq!(release(ledger).await, 0);
}

/// Each key has its own places; a queue's and a kind's come on top, and a task takes all or none.
pub async fn every_limit_of_a_task_counts(ledger: &dyn Ledger) {
    set(ledger, "key:tenant:*", most(1)).await;
    set(ledger, "key:tenant:big", most(2)).await;
    set(ledger, "queue:default", most(3)).await;
    let holder = worker(ledger).await;
    let of = async |key: &str| recorded(ledger, 1, |task| task.concurrency_key = Some(key.to_owned())).await[0];
    let (a, a2) = (of("tenant:a").await, of("tenant:a").await);
    granted(ledger, a, holder).await;
    assert_eq!(refused(ledger, a2, holder).await, Refusal::Limited);
    assert_eq!(get(ledger, a2).await.limited_by.as_deref(), Some("key:tenant:a"));
    granted(ledger, of("tenant:big").await, holder).await;
    granted(ledger, of("tenant:big").await, holder).await;
    let full = of("other").await;
    assert_eq!(refused(ledger, full, holder).await, Refusal::Limited);
    assert_eq!(get(ledger, full).await.limited_by.as_deref(), Some("queue:default"));
    // In another queue only the key counts, and for a task without a key nothing does.
    let elsewhere = recorded(ledger, 1, |task| {
        task.queue = queue("elsewhere");
        task.concurrency_key = Some("tenant:b".to_owned());
    });
    assert!(granted(ledger, elsewhere.await[0], holder).await.limited);
    let plain = recorded(ledger, 1, |task| task.queue = queue("elsewhere")).await[0];
    assert!(!granted(ledger, plain, holder).await.limited);
}

/// What stands against a task besides comes first, and takes no place.
pub async fn only_who_could_run_takes_a_place(ledger: &dyn Ledger) {
    set(ledger, "kind:test.work", most(1)).await;
    let holder = worker(ledger).await;
    let id = one(ledger).await;
    assert_eq!(refused(ledger, id, WorkerId::new()).await, Refusal::LeaseLost);
    ledger.set_paused(queue("default"), true, Caller::UNKNOWN).await.unwrap();
    assert_eq!(refused(ledger, id, holder).await, Refusal::Paused);
    ledger.set_paused(queue("default"), false, Caller::UNKNOWN).await.unwrap();
    run(ledger, id, holder, complete()).await;
    assert_eq!(refused(ledger, id, holder).await, Refusal::Finished);
    granted(ledger, one(ledger).await, holder).await;
}

/// However a run ends, its place is free; a place that is kept for a task that is cancelled, too.
pub async fn every_end_frees_the_place(ledger: &dyn Ledger) {
    set(ledger, "kind:test.work", most(1)).await;
    let holder = worker(ledger).await;
    for transition in [complete(), super::discard(), super::cancel(), super::Transition::Interrupt] {
        let id = one(ledger).await;
        run(ledger, id, holder, transition).await;
        cancelled(ledger, id, "enough").await;
    }
    let again = one(ledger).await;
    run(ledger, again, holder, retry(Duration::ZERO, "again")).await;
    let fence = granted(ledger, again, holder).await.fence;
    let kept = one(ledger).await;
    assert_eq!(refused(ledger, kept, holder).await, Refusal::Limited);
    settle(ledger, again, fence, complete()).await;
    assert_eq!(release(ledger).await, 1);
    let next = one(ledger).await;
    assert_eq!(refused(ledger, next, holder).await, Refusal::Limited, "the place is kept for the other");
    assert_eq!(cancelled(ledger, kept, "not wanted").await, State::Accepted);
    assert_eq!(release(ledger).await, 1);
    run(ledger, next, holder, complete()).await;
    assert_eq!(cancelled(ledger, next, "too late").await, State::Completed);
}

/// A held task is as good as any that waits: it can be cancelled and moved.
pub async fn a_held_task_can_be_cancelled_and_moved(ledger: &dyn Ledger) {
    set(ledger, "queue:default", most(1)).await;
    let holder = worker(ledger).await;
    let [runs, stops, moves] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    granted(ledger, runs, holder).await;
    assert_eq!(refused(ledger, stops, holder).await, Refusal::Limited);
    assert_eq!(refused(ledger, moves, holder).await, Refusal::Limited);
    assert_eq!(cancelled(ledger, stops, "not wanted").await, State::Accepted);
    assert_eq!(ledger.move_tasks(vec![moves], queue("default"), queue("other"), Caller::UNKNOWN).await.unwrap(), 1);
    assert_eq!(due(ledger).await, [moves].into());
    assert_eq!(get(ledger, moves).await.limited_by, None);
    run(ledger, moves, holder, complete()).await;
    assert_eq!(get(ledger, stops).await.state, State::Cancelled);
}

/// The place of a dead worker's run is free when its task is rescued.
pub async fn a_dead_workers_place_is_free(ledger: &dyn Ledger) {
    set(ledger, "kind:test.work", most(1)).await;
    let (brief, holder) = (worker_for(ledger, Duration::from_millis(200)).await, worker(ledger).await);
    let [dies, waits] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    granted(ledger, dies, brief).await;
    assert_eq!(refused(ledger, waits, holder).await, Refusal::Limited);
    assert_eq!(release(ledger).await, 0, "nobody knows yet");
    let rescued = until("the lease to end", async || {
        let abandoned = ledger.abandoned(10).await.unwrap();
        (!abandoned.is_empty()).then_some(abandoned)
    });
    for abandoned in rescued.await {
        settle(ledger, abandoned.id, abandoned.fence, rescue::decide(&abandoned, 3, 0.5)).await;
    }
    assert_eq!(release(ledger).await, 1);
    run(ledger, waits, holder, complete()).await;
}

/// A limit that comes while tasks run counts them, and one that goes lets all go.
pub async fn a_limit_may_come_and_go(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let of = |task: &mut crate::task::NewTask| task.concurrency_key = Some("tenant:a".to_owned());
    let ids = recorded(ledger, 4, of).await;
    let fence = granted(ledger, ids[0], holder).await.fence;
    granted(ledger, ids[1], holder).await;
    set(ledger, "key:tenant:*", most(2)).await;
    assert_eq!(refused(ledger, ids[2], holder).await, Refusal::Limited);
    settle(ledger, ids[0], fence, complete()).await;
    assert_eq!(release(ledger).await, 1);
    set(ledger, "key:tenant:*", most(1)).await;
    granted(ledger, ids[2], holder).await;
    assert_eq!(refused(ledger, ids[3], holder).await, Refusal::Limited);
    ledger.delete_limit("key:tenant:*".parse().unwrap()).await.unwrap();
    assert_eq!(release(ledger).await, 1);
    assert!(!granted(ledger, ids[3], holder).await.limited);
}

/// The keys of a kind that is held have their turns; of one key the urgent and the old go first.
pub async fn keys_have_their_turns(ledger: &dyn Ledger) {
    set(ledger, "kind:test.work", most(1)).await;
    let holder = worker(ledger).await;
    let blocker = one(ledger).await;
    let mut running = (blocker, granted(ledger, blocker, holder).await.fence);
    let mut expected: BTreeMap<TaskId, &str> = BTreeMap::new();
    for (key, count) in [("a", 4), ("b", 2), ("c", 1)] {
        for id in recorded(ledger, count, |task| task.concurrency_key = Some(key.to_owned())).await {
            assert_eq!(refused(ledger, id, holder).await, Refusal::Limited);
            expected.insert(id, key);
        }
    }
    let urgent = recorded(ledger, 1, |task| {
        task.concurrency_key = Some("a".to_owned());
        task.priority = Priority::High;
    });
    let urgent = urgent.await[0];
    assert_eq!(refused(ledger, urgent, holder).await, Refusal::Limited);
    let oldest = *expected.keys().next().unwrap();
    expected.insert(urgent, "a");
    let mut order = Vec::new();
    while order.len() < expected.len() {
        settle(ledger, running.0, running.1, complete()).await;
        assert_eq!(release(ledger).await, 1);
        let [next] = Vec::from_iter(due(ledger).await)[..] else { panic!("one place") };
        order.push(next);
        running = (next, granted(ledger, next, holder).await.fence);
    }
    assert_eq!((order[0], order[3]), (urgent, oldest));
    let keys: String = order.iter().map(|id| expected[id]).collect();
    assert_eq!(keys, "abcabaaa");
}

/// What is past does not add up, and what runs or is on its way keeps its place.
pub async fn places_of_the_past_are_forgotten(ledger: &dyn Ledger) {
    let rate = Rate { tasks: 1_000_000, per_ms: 1, burst: 1_000 };
    set(ledger, "key:*", Bounds { rate: Some(rate), max_running: Some(1), ..Bounds::default() }).await;
    let holder = worker(ledger).await;
    let keyed = async |key: &str| recorded(ledger, 1, |task| task.concurrency_key = Some(key.to_owned())).await[0];
    let (runs, kept) = (keyed("a").await, keyed("b").await);
    let before_kept = keyed("b").await;
    granted(ledger, runs, holder).await;
    let fence = granted(ledger, before_kept, holder).await.fence;
    assert_eq!(refused(ledger, kept, holder).await, Refusal::Limited);
    settle(ledger, before_kept, fence, complete()).await;
    assert_eq!(release(ledger).await, 1);
    for key in ["c", "d", "e"] {
        run(ledger, keyed(key).await, holder, complete()).await;
    }
    // Three places, and the buckets of all five keys or fewer: `a`'s and `b`'s may be full already as well.
    let (mut forgotten, mut more) = (0, u64::MAX);
    while more > 0 {
        more = ledger.forget_places(2).await.unwrap();
        assert!(more <= 4, "{more} of two and two");
        forgotten += more;
    }
    assert!((6..=8).contains(&forgotten), "{forgotten}");
    assert_eq!(refused(ledger, keyed("a").await, holder).await, Refusal::Limited);
    assert_eq!(refused(ledger, keyed("b").await, holder).await, Refusal::Limited);
    run(ledger, kept, holder, complete()).await;
}

/// Many claim, settle and let go through two handles at once: every limit is reached, none is ever exceeded, and all
/// complete.
pub async fn no_limit_is_ever_exceeded(handles: &[SharedLedger; 2]) {
    const TASKS: usize = 240;
    let ledger = &*handles[0];
    set(ledger, "kind:test.work", most(5)).await;
    set(ledger, "key:*", most(2)).await;
    let keys = ["a", "b", "c", "d"];
    for key in keys {
        recorded(ledger, TASKS / keys.len(), |task| {
            task.concurrency_key = Some(key.to_owned());
            task.run_at = None;
        })
        .await;
    }
    // As a relay would find them.
    let page = ledger.list(crate::ledger::ListQuery { limit: 1_000, ..Default::default() }).await.unwrap();
    let todo = Mutex::new(page.tasks.into_iter().map(|task| task.id).collect::<Vec<_>>());
    let running: Mutex<BTreeMap<String, usize>> = Mutex::default();
    let (done, highest, held) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let enter = |key: &str| {
        let mut running = running.lock().unwrap();
        *running.entry(key.to_owned()).or_default() += 1;
        assert!(running[key] <= 2, "{running:?}");
        let all = running.values().sum::<usize>();
        assert!(all <= 5, "{running:?}");
        highest.fetch_max(all, Ordering::Relaxed);
    };
    let leave = |key: &str| *running.lock().unwrap().get_mut(key).unwrap() -= 1;
    let work = async |ledger: &dyn Ledger| {
        let holder = worker(ledger).await;
        while done.load(Ordering::Relaxed) < TASKS {
            let next = todo.lock().unwrap().pop();
            let Some(id) = next else {
                release(ledger).await;
                let due = due(ledger).await;
                todo.lock().unwrap().extend(due);
                continue;
            };
            match claim(ledger, id, holder).await {
                Claim::Granted(granted) => {
                    let key = get(ledger, id).await.concurrency_key.unwrap();
                    enter(&key);
                    // Until all places have been taken once, a run stays for others to come beside it.
                    for _ in 0..100 {
                        if highest.load(Ordering::Relaxed) == 5 {
                            break;
                        }
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    leave(&key);
                    settle(ledger, id, granted.fence, complete()).await;
                    done.fetch_add(1, Ordering::Relaxed);
                }
                Claim::Refused(reason) => {
                    assert_eq!(reason, Refusal::Limited);
                    held.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    };
    let all = join_all((0..12).map(|index| work(&*handles[index % 2])));
    tokio::time::timeout(super::LIMIT, all).await.expect("all tasks to complete");
    assert_eq!(done.load(Ordering::Relaxed), TASKS);
    assert!(held.load(Ordering::Relaxed) > 0, "somebody had to wait");
    assert_eq!(highest.load(Ordering::Relaxed), 5, "the limit is used");
}

/// What concerns no limit is as it is without any.
pub async fn other_tasks_are_not_concerned(ledger: &dyn Ledger) {
    set(ledger, "kind:other", most(1)).await;
    set(ledger, "queue:other", Bounds { max_queued: Some(1), ..Bounds::default() }).await;
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 3, |task| task.queue = queue("other")).await;
    for id in ids {
        assert!(!granted(ledger, id, holder).await.limited);
    }
    let other = recorded(ledger, 1, |task| task.kind = kind("other")).await[0];
    assert!(granted(ledger, other, holder).await.limited);
}
