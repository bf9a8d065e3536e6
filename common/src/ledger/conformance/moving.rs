//! Moving waiting tasks from one queue to another.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;

use super::{
    HOUR, cancelled, claim_by, complete, get, granted, mark_queued, new_task, one, queue, recorded, refused, retry,
    run, settle, submission, worker,
};
use crate::ledger::{Caller, Claim, Ledger, Refusal, Settled};
use crate::state::State;
use crate::task::{Fence, NewTask, TaskId};

async fn moved(ledger: &dyn Ledger, ids: &[TaskId]) -> u64 {
    ledger.move_tasks(ids.to_vec(), queue("default"), queue("other"), Caller::UNKNOWN).await.unwrap()
}

/// From each state in which it waits: it is published there at once, or when its time has come.
pub async fn a_waiting_task_goes_to_another_queue(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let [accepted, queued, retryable, later] = recorded(ledger, 4, |_| {}).await[..] else { panic!("four tasks") };
    mark_queued(ledger, vec![(queued, Fence(0))]).await.unwrap();
    run(ledger, retryable, holder, retry(Duration::ZERO, "again")).await;
    run(ledger, later, holder, retry(HOUR, "again")).await;
    let scheduled = NewTask { run_at: Some(Timestamp::now() + HOUR), ..new_task() };
    let scheduled_id = scheduled.id;
    ledger.record(submission(vec![scheduled])).await.unwrap();
    let ids = [accepted, queued, retryable, later, scheduled_id];
    let mut fences = Vec::new();
    for id in ids {
        fences.push(get(ledger, id).await.fence.0);
    }
    assert_eq!(moved(ledger, &ids).await, 5);
    let states = [State::Accepted, State::Accepted, State::Retryable, State::Retryable, State::Scheduled];
    for ((id, state), fence) in ids.into_iter().zip(states).zip(fences) {
        let task = get(ledger, id).await;
        assert_eq!((task.state, task.queue, task.fence.0), (state, queue("other"), fence + 1));
    }
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert!(due.iter().all(|due| due.lane.queue == queue("other")), "{due:?}");
    let due: BTreeSet<TaskId> = due.into_iter().map(|due| due.id).collect();
    assert_eq!(due, BTreeSet::from([accepted, queued, retryable]));
    assert_eq!(refused(ledger, scheduled_id, holder).await, Refusal::NotDue, "its time is its own");
    assert_eq!(refused(ledger, later, holder).await, Refusal::NotDue);
    let [counts] = &ledger.queues().await.unwrap()[..] else { panic!("one queue") };
    assert_eq!((&counts.queue, counts.counts.values().sum::<u64>()), (&queue("other"), 5));
}

/// Its publisher had sent it to the old queue, and says so only now.
pub async fn a_late_mark_of_the_old_queue_changes_nothing(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    assert_eq!(moved(ledger, &[id]).await, 1);
    mark_queued(ledger, vec![(id, Fence(0))]).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Accepted);
    let [due] = &ledger.fetch_due(10, HOUR).await.unwrap()[..] else { panic!("one is due") };
    mark_queued(ledger, vec![(id, due.fence)]).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Queued);
}

/// Before and after the new one is there, though its new queue is paused; and the new one starts it.
pub async fn a_message_left_in_the_old_queue_starts_nothing(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let (old, new) = (Some(Fence(0)), Some(Fence(1)));
    mark_queued(ledger, vec![(id, Fence(0))]).await.unwrap();
    moved(ledger, &[id]).await;
    assert_eq!(claim_by(ledger, id, holder, old).await, Claim::Refused(Refusal::Outdated));
    mark_queued(ledger, vec![(id, Fence(1))]).await.unwrap();
    ledger.set_paused(queue("other"), true, Caller::UNKNOWN).await.unwrap();
    assert_eq!(claim_by(ledger, id, holder, old).await, Claim::Refused(Refusal::Outdated));
    assert_eq!(claim_by(ledger, id, holder, new).await, Claim::Refused(Refusal::Paused));
    ledger.set_paused(queue("other"), false, Caller::UNKNOWN).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Queued, "its own message is there");
    let Claim::Granted(granted) = claim_by(ledger, id, holder, new).await else { panic!("refused") };
    assert_eq!(granted.fence, Fence(2));
    assert_eq!(claim_by(ledger, id, holder, old).await, Claim::Refused(Refusal::Held));
    assert_eq!(settle(ledger, id, granted.fence, complete()).await, Settled::Applied);
    assert_eq!(claim_by(ledger, id, holder, old).await, Claim::Refused(Refusal::Finished));
    assert_eq!(ledger.next_due().await.unwrap(), None);
}

/// What runs, has ended, or waits in a third queue; and what was moved is not moved again.
pub async fn what_does_not_wait_there_is_left_alone(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let [runs, ended, unwanted, waits] = recorded(ledger, 4, |_| {}).await[..] else { panic!("four tasks") };
    let third = recorded(ledger, 1, |task| task.queue = queue("third")).await[0];
    let fence = granted(ledger, runs, holder).await.fence;
    run(ledger, ended, holder, complete()).await;
    cancelled(ledger, unwanted, "not needed").await;
    let still = [runs, ended, unwanted, third];
    let before = ledger.get(still.to_vec()).await.unwrap();
    assert_eq!(moved(ledger, &[&still[..], &[waits, TaskId::new()]].concat()).await, 1);
    assert_eq!(moved(ledger, &[waits]).await, 0);
    assert_eq!(moved(ledger, &[]).await, 0);
    for task in before {
        assert_eq!(get(ledger, task.id).await, task);
    }
    assert_eq!(settle(ledger, runs, fence, complete()).await, Settled::Applied);
}

/// More than one statement takes.
pub async fn many_are_moved_together(ledger: &dyn Ledger) {
    let ids = recorded(ledger, 1_200, |_| {}).await;
    assert_eq!(moved(ledger, &ids).await, 1_200);
    let [counts] = &ledger.queues().await.unwrap()[..] else { panic!("one queue") };
    assert_eq!((&counts.queue, counts.counts[&State::Accepted]), (&queue("other"), 1_200));
}
