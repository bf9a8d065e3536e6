//! Pausing: nothing of the queue starts, and everything else goes on.

use std::time::Duration;

use jiff::Timestamp;

use super::{
    HOUR, complete, get, granted, lane, mark_queued, new_task, one, queue, recorded, refused, request, retry, run,
    settle, submission, worker,
};
use crate::ledger::{
    Caller, Claim, ClaimRequest, Failure, Ledger, Refusal, Renewal, Renewed, Settled, Settlement, Transition,
};
use crate::rescue;
use crate::state::State;
use crate::task::{ErrorKind, Fence, NewTask, Priority, WorkerId};

async fn pause(ledger: &dyn Ledger, name: &str) {
    ledger.set_paused(queue(name), true, Caller::UNKNOWN).await.unwrap();
}

async fn resume(ledger: &dyn Ledger, name: &str) {
    ledger.set_paused(queue(name), false, Caller::UNKNOWN).await.unwrap();
}

/// From whatever state it waits in, and a suspect as well; tasks of other queues are granted, and a refused task is
/// left as it is.
pub async fn a_paused_queue_grants_nothing(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let [accepted, queued, retryable, suspect] = recorded(ledger, 4, |_| {}).await[..] else { panic!("four tasks") };
    mark_queued(ledger, vec![(queued, Fence(0))]).await.unwrap();
    run(ledger, retryable, holder, retry(Duration::ZERO, "again")).await;
    let crash = Failure { message: String::new(), kind: ErrorKind::Crash };
    run(ledger, suspect, holder, Transition::Retry { delay: Duration::ZERO, error: crash }).await;
    let elsewhere = recorded(ledger, 1, |task| task.queue = queue("other")).await[0];
    pause(ledger, "default").await;
    for id in [accepted, queued, retryable, suspect] {
        let before = get(ledger, id).await;
        let request = ClaimRequest { crashes_below: 1, ..request(ledger, id, holder).await };
        assert_eq!(ledger.claim(request).await.unwrap(), Claim::Refused(Refusal::Paused));
        assert_eq!(refused(ledger, id, holder).await, Refusal::Paused);
        assert_eq!(get(ledger, id).await, before);
    }
    granted(ledger, elsewhere, holder).await;
    assert_eq!(refused(ledger, accepted, WorkerId::new()).await, Refusal::Paused, "whoever asks");
}

/// And what waited is granted as before.
pub async fn a_resumed_queue_goes_on(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    resume(ledger, "default").await;
    pause(ledger, "default").await;
    assert_eq!(refused(ledger, id, holder).await, Refusal::Paused);
    resume(ledger, "default").await;
    assert_eq!(granted(ledger, id, holder).await.fence, Fence(1));
    assert_eq!(ledger.paused_queues().await.unwrap(), []);
}

/// It settles, and is told apart from what waits; submissions are recorded, and due tasks are published.
pub async fn what_runs_in_a_paused_queue_goes_on(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let [runs, fails] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    let (ran, failed) = (granted(ledger, runs, holder).await, granted(ledger, fails, holder).await);
    pause(ledger, "default").await;
    assert_eq!(refused(ledger, runs, holder).await, Refusal::Held);
    assert_eq!(settle(ledger, runs, ran.fence, complete()).await, Settled::Applied);
    assert_eq!(refused(ledger, runs, holder).await, Refusal::Finished);
    assert_eq!(settle(ledger, fails, failed.fence, retry(Duration::ZERO, "again")).await, Settled::Applied);
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.iter().map(|due| due.id).collect::<Vec<_>>(), [fails]);
    mark_queued(ledger, vec![(fails, due[0].fence)]).await.unwrap();
    assert_eq!(get(ledger, fails).await.state, State::Queued);
    assert_eq!(refused(ledger, fails, holder).await, Refusal::Paused);
    let later = NewTask { run_at: Some(Timestamp::now() + HOUR), ..new_task() };
    let id = later.id;
    ledger.record(submission(vec![later])).await.unwrap();
    assert_eq!(refused(ledger, id, holder).await, Refusal::NotDue);
}

/// One resumption ends any number of pauses.
pub async fn pausing_twice_is_pausing_once(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    for _ in 0..2 {
        pause(ledger, "default").await;
        assert_eq!(ledger.paused_queues().await.unwrap(), [queue("default")]);
    }
    for _ in 0..2 {
        resume(ledger, "default").await;
    }
    granted(ledger, id, holder).await;
}

/// By name, and among the queues even when nothing has ever waited there.
pub async fn paused_queues_are_shown(ledger: &dyn Ledger) {
    one(ledger).await;
    for name in ["later", "empty"] {
        pause(ledger, name).await;
    }
    assert_eq!(ledger.paused_queues().await.unwrap(), [queue("empty"), queue("later")]);
    let shown = async || -> Vec<(String, bool, usize)> {
        let queues = ledger.queues().await.unwrap();
        queues.into_iter().map(|it| (it.queue.to_string(), it.paused.is_some(), it.counts.len())).collect()
    };
    let of = |name: &str, paused, counts| (name.to_owned(), paused, counts);
    assert_eq!(shown().await, [of("default", false, 1), of("empty", true, 0), of("later", true, 0)]);
    pause(ledger, "default").await;
    resume(ledger, "later").await;
    assert_eq!(shown().await, [of("default", true, 1), of("empty", true, 0)]);
}

/// What was given back because of the pause may be older than what was claimed before it. An empty queue has lost its
/// messages all the same.
pub async fn a_watermark_strands_nothing_of_a_paused_queue(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    mark_queued(ledger, vec![(id, Fence(0))]).await.unwrap();
    let heads = vec![(lane("default", Priority::Normal), Timestamp::now() + HOUR)];
    let renewal = Renewal { worker: holder, ttl: HOUR, running: 0, heads };
    assert_eq!(ledger.renew(renewal).await.unwrap(), Renewed::Held);
    pause(ledger, "default").await;
    assert_eq!(ledger.strand(lane("default", Priority::Normal), false, Duration::ZERO, 10).await.unwrap(), 0);
    resume(ledger, "default").await;
    assert_eq!(ledger.strand(lane("default", Priority::Normal), false, Duration::ZERO, 10).await.unwrap(), 1);

    let lost = one(ledger).await;
    mark_queued(ledger, vec![(lost, Fence(0))]).await.unwrap();
    pause(ledger, "default").await;
    super::until("the empty queue to be noticed", async || {
        (ledger.strand(lane("default", Priority::Normal), true, Duration::ZERO, 10).await.unwrap() == 1).then_some(())
    })
    .await;
    assert_eq!(get(ledger, lost).await.state, State::Accepted);
}

/// The rescue takes it over, and it waits like the others.
pub async fn a_dead_workers_task_waits_in_its_paused_queue(ledger: &dyn Ledger) {
    let (id, dies) = (one(ledger).await, worker(ledger).await);
    granted(ledger, id, dies).await;
    pause(ledger, "default").await;
    ledger.retire(dies).await.unwrap();
    let found = ledger.abandoned(1).await.unwrap().pop().unwrap();
    let settlement = Settlement { id, fence: found.fence, transition: rescue::decide(&found, 5, 0.5) };
    assert_eq!(ledger.settle(settlement).await.unwrap(), Settled::Applied);
    let next = worker(ledger).await;
    assert_eq!(refused(ledger, id, next).await, Refusal::Paused);
    resume(ledger, "default").await;
    assert_eq!(granted(ledger, id, next).await.attempt, 2);
}
