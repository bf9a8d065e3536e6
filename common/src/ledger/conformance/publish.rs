//! Publishing: what is due, who publishes it, and what the broker lost.

use std::time::Duration;

use super::{
    HOUR, claim, complete, discard, get, granted, lane, mark_queued, new_task, one, put_back, queue, recorded, retry,
    run, submission, until, worker,
};
use crate::clock::{timestamp, wall_ms};
use crate::ledger::{Caller, Claim, Due, Ledger, Mark, Renewal, Renewed, Submission, Transition};
use crate::state::State;
use crate::task::{Fence, Lane, Priority, TaskId};

const NOW: Duration = Duration::ZERO;

async fn due_now(ledger: &dyn Ledger) -> Vec<TaskId> {
    let mut ids: Vec<TaskId> = ledger.fetch_due(1000, HOUR).await.unwrap().iter().map(|due| due.id).collect();
    ids.sort_unstable();
    ids
}

/// A confirmed publication makes the task queued and no longer due.
pub async fn a_published_task_is_marked_queued(ledger: &dyn Ledger) {
    let ids = recorded(ledger, 3, |_| {}).await;
    assert!(ledger.next_due().await.unwrap().is_some());
    mark_queued(ledger, ids.iter().map(|id| (*id, Fence(0))).collect()).await.unwrap();
    // Again, as after an answer that was lost; and nothing at all.
    mark_queued(ledger, vec![(ids[0], Fence(0)), (TaskId::new(), Fence(0))]).await.unwrap();
    mark_queued(ledger, Vec::new()).await.unwrap();
    for id in ids {
        assert_eq!(get(ledger, id).await.state, State::Queued);
    }
    assert_eq!(ledger.next_due().await.unwrap(), None);
}

/// A mark that comes after a claim, an outcome or a put-back would hide a task that is nowhere in the broker.
pub async fn a_late_mark_changes_nothing(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let ids = recorded(ledger, 4, |_| {}).await;
    granted(ledger, ids[0], worker).await;
    run(ledger, ids[1], worker, retry(HOUR, "later")).await;
    put_back(ledger, ids[2], HOUR).await.unwrap();
    run(ledger, ids[3], worker, complete()).await;
    mark_queued(ledger, ids.iter().map(|id| (*id, Fence(0))).collect()).await.unwrap();
    let mut states = Vec::new();
    for id in &ids {
        states.push(get(ledger, *id).await.state);
    }
    assert_eq!(states, [State::Running, State::Retryable, State::Accepted, State::Completed]);
    let due = ledger.next_due().await.unwrap();
    assert!(due.is_some_and(|due| due > HOUR / 2 && due <= HOUR), "{due:?}");
}

/// The submitter has its reserve to publish; then a relay does.
pub async fn a_new_task_is_due_after_its_reserve(ledger: &dyn Ledger) {
    one(ledger).await;
    let task = new_task();
    let expected = Due {
        id: task.id,
        kind: task.kind.clone(),
        lane: Lane { queue: task.queue.clone(), priority: Priority::Normal },
        args: task.args.clone(),
        fence: Fence(1),
        traceparent: Some("00-trace".to_owned()),
    };
    let tasks = vec![crate::task::NewTask { traceparent: expected.traceparent.clone(), ..task }];
    ledger
        .record(Submission { tasks, idempotency: None, reserve: Duration::from_millis(200), group: None })
        .await
        .unwrap();
    let due = until("the end of a reserve", async || ledger.fetch_due(10, HOUR).await.unwrap().pop()).await;
    assert_eq!(due, expected);
    assert_eq!(ledger.fetch_due(10, HOUR).await.unwrap(), [], "the other task's reserve goes on");
    assert_eq!(get(ledger, due.id).await.state, State::Accepted);
}

/// A scheduled task is published at its time, and may be marked then.
pub async fn a_scheduled_task_is_due_at_its_time(ledger: &dyn Ledger) {
    let run_at = timestamp(wall_ms() + 300);
    let id = recorded(ledger, 1, |task| task.run_at = Some(run_at)).await[0];
    let due = until("a scheduled task", async || ledger.fetch_due(10, HOUR).await.unwrap().pop()).await;
    assert_eq!((due.id, due.fence), (id, Fence(1)));
    mark_queued(ledger, vec![(id, due.fence)]).await.unwrap();
    let task = get(ledger, id).await;
    assert_eq!((task.state, task.run_at), (State::Queued, run_at));
    let grant = granted(ledger, id, worker(ledger).await).await;
    assert!(grant.started_at >= run_at);
}

/// Whoever fetched has its reserve; when it did not mark the task, the next one gets it. Each publishes under a fence of
/// its own, and only the last one's mark counts.
pub async fn what_was_fetched_is_hidden_and_comes_back(ledger: &dyn Ledger) {
    let ids = recorded(ledger, 5, |_| {}).await;
    let worker = worker(ledger).await;
    for &id in &ids {
        run(ledger, id, worker, retry(NOW, "again")).await;
    }
    let reserve = Duration::from_millis(1500);
    let first = ledger.fetch_due(2, reserve).await.unwrap();
    let rest = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!((first.len(), rest.len()), (2, 3));
    assert!(first.iter().all(|due| due.fence == Fence(2)));
    assert!(rest.iter().all(|due| !first.contains(due)), "{first:?} {rest:?}");
    let again = until("two tasks to come back", async || {
        let due = ledger.fetch_due(10, NOW).await.unwrap();
        (due.len() == 2).then_some(due)
    });
    let (mut again, mut first) = (again.await, first);
    again.sort_by_key(|due| due.id);
    first.sort_by_key(|due| due.id);
    mark_queued(ledger, first.iter().map(|due| (due.id, due.fence)).collect()).await.unwrap();
    assert_eq!(get(ledger, first[0].id).await.state, State::Retryable, "somebody else publishes it now");
    mark_queued(ledger, again.iter().map(|due| (due.id, due.fence)).collect()).await.unwrap();
    assert_eq!(get(ledger, first[0].id).await.state, State::Queued);
    first.iter_mut().for_each(|due| due.fence.0 += 1);
    assert_eq!(again, first);
}

/// A relay that could not publish lets go of its tasks at once, and of nothing that others have changed meanwhile.
pub async fn what_was_fetched_in_vain_is_due_again(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let ids = recorded(ledger, 5, |_| {}).await;
    for &id in &ids {
        run(ledger, id, worker, retry(NOW, "again")).await;
    }
    let fetched = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(fetched.len(), 5);
    let [kept, .., claimed, marked, returned] = &ids[..] else { panic!("five tasks") };
    granted(ledger, *claimed, worker).await;
    mark_queued(ledger, vec![(*marked, Fence(2))]).await.unwrap();
    put_back(ledger, *returned, HOUR).await.unwrap();
    let stale = (*kept, Fence(1));
    let mut unpublished: Vec<_> = ids[1..].iter().map(|id| (*id, Fence(2))).collect();
    unpublished.extend([stale, (TaskId::new(), Fence(2))]);
    ledger.release(unpublished).await.unwrap();
    ledger.release(Vec::new()).await.unwrap();
    assert_eq!(ledger.next_due().await.unwrap(), Some(NOW));
    assert_eq!(due_now(ledger).await, [ids[1]]);
    let states = [get(ledger, *claimed).await.state, get(ledger, *marked).await.state, get(ledger, ids[1]).await.state];
    assert_eq!(states, [State::Running, State::Queued, State::Retryable]);
    // What is due earlier stays so: another relay may have it already.
    let soon = Duration::from_millis(300);
    ledger.release(vec![(ids[1], Fence(3))]).await.unwrap();
    assert_eq!(ledger.fetch_due(10, soon).await.unwrap().len(), 1);
    until("the end of the second reserve", async || ledger.fetch_due(10, HOUR).await.unwrap().pop()).await;
}

/// Nothing, some time, or now.
pub async fn next_due_tells_how_long(ledger: &dyn Ledger) {
    assert_eq!(ledger.next_due().await.unwrap(), None);
    let id = recorded(ledger, 1, |task| task.run_at = Some(timestamp(wall_ms() + 3_600_000))).await[0];
    let wait = ledger.next_due().await.unwrap().unwrap();
    assert!(wait > HOUR / 2 && wait <= HOUR, "{wait:?}");
    let soon = one(ledger).await;
    run(ledger, soon, worker(ledger).await, Transition::Interrupt).await;
    assert_eq!(ledger.next_due().await.unwrap(), Some(NOW));
    assert_eq!(get(ledger, id).await.state, State::Scheduled);
}

/// A kind that this worker lacks: the task is published again later, and may be claimed at any time.
pub async fn putting_back_raises_the_fence(ledger: &dyn Ledger) {
    let [quick, slow] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    mark_queued(ledger, vec![(quick, Fence(0)), (slow, Fence(0))]).await.unwrap();
    put_back(ledger, quick, NOW).await.unwrap();
    put_back(ledger, slow, HOUR).await.unwrap();
    let due = until("a task put back", async || ledger.fetch_due(10, HOUR).await.unwrap().pop()).await;
    assert_eq!((due.id, due.fence), (quick, Fence(2)));
    let task = get(ledger, slow).await;
    assert_eq!((task.state, task.attempt), (State::Accepted, 0));
    let wait = ledger.next_due().await.unwrap().unwrap();
    assert!(wait > HOUR / 2 && wait <= HOUR, "{wait:?}");
    assert_eq!(granted(ledger, slow, worker(ledger).await).await.fence, Fence(2));
}

/// Only waiting tasks can be put back.
pub async fn putting_back_leaves_others_alone(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let [running, finished] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    granted(ledger, running, worker).await;
    run(ledger, finished, worker, complete()).await;
    let before = (get(ledger, running).await, get(ledger, finished).await);
    for id in [running, finished, TaskId::new()] {
        put_back(ledger, id, NOW).await.unwrap();
    }
    assert_eq!((get(ledger, running).await, get(ledger, finished).await), before);
    assert_eq!(ledger.next_due().await.unwrap(), None);
}

async fn queued(ledger: &dyn Ledger, name: &str, count: usize) -> Vec<TaskId> {
    let ids = recorded(ledger, count, |task| task.queue = queue(name)).await;
    mark_queued(ledger, ids.iter().map(|id| (*id, Fence(0))).collect()).await.unwrap();
    ids
}

/// A mark may be late under load; the time that it carries is that of the publication.
pub async fn a_late_mark_tells_when_it_was_published(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let ids = recorded(ledger, 2, |_| {}).await;
    let mark = |id, ago| Mark { id, fence: Fence(0), ago };
    ledger.mark_queued(vec![mark(ids[0], HOUR), mark(ids[1], NOW)]).await.unwrap();
    let late = granted(ledger, ids[0], worker).await.queued_at.unwrap();
    let prompt = granted(ledger, ids[1], worker).await.queued_at.unwrap();
    assert_eq!(prompt.duration_since(late).as_secs(), HOUR.as_secs() as i64);
}

/// Queues are first in, first out: what was queued well before the newest delivery, and waits, is not in the broker.
pub async fn a_passed_watermark_strands(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let lost = queued(ledger, "default", 3).await;
    let elsewhere = queued(ledger, "elsewhere", 1).await[0];
    let head = until("a later task's delivery", async || {
        let later = queued(ledger, "default", 1).await[0];
        let Claim::Granted(grant) = claim(ledger, later, worker).await else { panic!("the task is free") };
        let queued_at = grant.queued_at.unwrap();
        (queued_at.as_millisecond() - grant.first_due_at.as_millisecond() >= 0
            && queued_at.as_millisecond() > get(ledger, lost[2]).await.created_at.as_millisecond() + 100)
            .then_some(queued_at)
    })
    .await;
    let waiting = queued(ledger, "default", 1).await[0];
    let strand = |slack, limit| ledger.strand(lane("default", Priority::Normal), false, slack, limit);
    assert_eq!(strand(NOW, 100).await.unwrap(), 0, "no watermark is known");
    let heads = vec![(lane("default", Priority::Normal), head)];
    let renewal = Renewal { worker, ttl: HOUR, running: 0, heads };
    assert_eq!(ledger.renew(renewal.clone()).await.unwrap(), Renewed::Held);
    // A lower watermark, from a worker that is behind, changes nothing.
    let behind = Renewal { heads: vec![(lane("default", Priority::Normal), timestamp(1))], ..renewal };
    assert_eq!(ledger.renew(behind).await.unwrap(), Renewed::Held);
    assert_eq!(strand(HOUR, 100).await.unwrap(), 0, "within the slack");
    assert_eq!(strand(NOW, 2).await.unwrap(), 2, "bounded");
    assert_eq!(strand(NOW, 100).await.unwrap(), 1);
    assert_eq!(strand(NOW, 100).await.unwrap(), 0);
    assert_eq!(due_now(ledger).await, lost);
    assert_eq!(get(ledger, lost[0]).await.state, State::Accepted);
    for id in [waiting, elsewhere] {
        assert_eq!(get(ledger, id).await.state, State::Queued);
    }
    granted(ledger, lost[0], worker).await;
}

/// When the broker's queue is empty, nothing that was published can still be in it.
pub async fn an_empty_queue_strands(ledger: &dyn Ledger) {
    let lost = queued(ledger, "default", 2).await;
    let elsewhere = queued(ledger, "elsewhere", 1).await[0];
    let accepted = one(ledger).await;
    assert_eq!(ledger.strand(lane("default", Priority::Normal), true, HOUR, 100).await.unwrap(), 0, "within the slack");
    assert_eq!(ledger.strand(lane("default", Priority::Normal), false, NOW, 100).await.unwrap(), 0, "not empty");
    let mut stranded = 0;
    while stranded < 2 {
        stranded += until("the lost tasks", async || {
            Some(ledger.strand(lane("default", Priority::Normal), true, NOW, 100).await.unwrap())
                .filter(|count| *count > 0)
        })
        .await;
    }
    assert_eq!(due_now(ledger).await, lost);
    assert_eq!(get(ledger, elsewhere).await.state, State::Queued);
    assert_eq!(get(ledger, accepted).await.state, State::Accepted);
    ledger.record(submission(vec![new_task()])).await.unwrap();
}

/// Whatever happens to a task, it is published into the lane of its priority.
pub async fn a_task_keeps_its_priority(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    for priority in Priority::ALL {
        let id = recorded(ledger, 1, |task| (task.priority, task.queue) = (priority, queue("letters"))).await[0];
        let due = async || until("a due task", async || ledger.fetch_due(10, HOUR).await.unwrap().pop()).await;
        put_back(ledger, id, NOW).await.unwrap();
        assert_eq!(due().await.lane, lane("letters", priority), "put back");
        run(ledger, id, worker, retry(NOW, "again")).await;
        assert_eq!(due().await.lane, lane("letters", priority), "retried");
        run(ledger, id, worker, discard()).await;
        ledger.replay(id, Caller::UNKNOWN).await.unwrap();
        assert_eq!(due().await.lane, lane("letters", priority), "replayed");
        run(ledger, id, worker, complete()).await;
        assert_eq!(get(ledger, id).await.priority, priority);
    }
}

/// Only within a lane the broker is first in, first out: a mark of one says nothing of the others.
pub async fn lanes_are_stranded_each_by_its_own_mark(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let mut ids = Vec::new();
    for priority in Priority::ALL {
        ids.extend(recorded(ledger, 2, |task| task.priority = priority).await);
    }
    mark_queued(ledger, ids.iter().map(|id| (*id, Fence(0))).collect()).await.unwrap();
    let head = timestamp(wall_ms() + 60_000);
    for (index, priority) in Priority::ALL.into_iter().enumerate() {
        let heads = vec![(lane("default", priority), head)];
        assert_eq!(ledger.renew(Renewal { worker, ttl: HOUR, running: 0, heads }).await.unwrap(), Renewed::Held);
        for other in Priority::ALL {
            let stranded = ledger.strand(lane("default", other), false, NOW, 100).await.unwrap();
            assert_eq!(stranded, if other == priority { 2 } else { 0 }, "{other:?} after a mark of {priority:?}");
        }
        assert_eq!(due_now(ledger).await, ids[2 * index..2 * index + 2]);
    }
}

/// An empty lane has lost its own tasks, whatever the others hold.
pub async fn an_empty_lane_strands_alone(ledger: &dyn Ledger) {
    let low = recorded(ledger, 2, |task| task.priority = Priority::Low).await;
    let normal = recorded(ledger, 1, |_| {}).await[0];
    mark_queued(ledger, low.iter().chain([&normal]).map(|id| (*id, Fence(0))).collect()).await.unwrap();
    let mut found = ledger.queued_lanes().await.unwrap();
    found.sort();
    assert_eq!(found, [Priority::Normal, Priority::Low].map(|priority| lane("default", priority)));
    let stranded = async || {
        let count = ledger.strand(lane("default", Priority::Low), true, NOW, 100).await.unwrap();
        (count > 0).then_some(count)
    };
    assert_eq!(until("the lost tasks", stranded).await, 2);
    assert_eq!(due_now(ledger).await, low);
    assert_eq!(ledger.queued_lanes().await.unwrap(), [lane("default", Priority::Normal)]);
    assert_eq!(get(ledger, normal).await.state, State::Queued);
}
