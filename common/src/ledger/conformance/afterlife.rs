//! What can happen to a task that is over: it is run again, or forgotten.

use std::time::Duration;

use super::{
    HOUR, cancel, complete, discard, failure, get, granted, new_task, one, recorded, refused, run, settle, until,
    worker,
};
use crate::ledger::{
    Caller, Failure, Idempotency, Ledger, Recorded, Refusal, Replayed, Settled, Submission, Transition,
};
use crate::state::State;
use crate::task::{ErrorKind, Fence, NewTask, OnConflict, TaskId, Unique};

const NOW: Duration = Duration::ZERO;

/// Due at once, with one more attempt, its crashes forgiven, its errors kept.
pub async fn a_discarded_task_can_be_replayed(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let id = recorded(ledger, 1, |task| task.max_attempts = 2).await[0];
    let crash = || Failure { kind: ErrorKind::Crash, ..failure("died") };
    run(ledger, id, holder, Transition::Retry { delay: NOW, error: crash() }).await;
    run(ledger, id, holder, Transition::Discard { reason: "poison".to_owned(), error: crash() }).await;
    assert_eq!(ledger.replay(id, Caller::UNKNOWN).await.unwrap(), Replayed::From(State::Discarded));
    let task = get(ledger, id).await;
    assert_eq!((task.state, task.attempt, task.max_attempts), (State::Accepted, 2, 3));
    assert_eq!((task.reason, task.finished_at, task.errors.len()), (None, None, 2));
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.iter().map(|due| (due.id, due.fence)).collect::<Vec<_>>(), [(id, Fence(3))]);
    assert_eq!(ledger.replay(id, Caller::UNKNOWN).await.unwrap(), Replayed::From(State::Accepted), "it waits already");
    let grant = granted(ledger, id, holder).await;
    assert_eq!((grant.fence, grant.attempt, grant.max_attempts), (Fence(4), 3, 3));
    ledger.retire(holder).await.unwrap();
    assert_eq!(ledger.abandoned(1).await.unwrap()[0].crashes, 0);
}

/// Attempts that are left stay as they are.
pub async fn a_cancelled_task_can_be_replayed(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    run(ledger, id, holder, cancel()).await;
    assert_eq!(ledger.replay(id, Caller::UNKNOWN).await.unwrap(), Replayed::From(State::Cancelled));
    let task = get(ledger, id).await;
    assert_eq!((task.state, task.max_attempts, task.reason), (State::Accepted, 3, None));
    run(ledger, id, holder, complete()).await;
}

/// What completed, runs or waits is left alone, and told.
pub async fn only_failures_are_replayed(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let [completed, running, waiting] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    run(ledger, completed, holder, complete()).await;
    granted(ledger, running, holder).await;
    for (id, state) in [(completed, State::Completed), (running, State::Running), (waiting, State::Accepted)] {
        let before = get(ledger, id).await;
        assert_eq!(ledger.replay(id, Caller::UNKNOWN).await.unwrap(), Replayed::From(state));
        assert_eq!(get(ledger, id).await, before);
    }
    assert_eq!(ledger.replay(TaskId::new(), Caller::UNKNOWN).await.unwrap(), Replayed::Unknown);
}

/// What was published of it before starts nothing: it may come too early for a start that was put off.
pub async fn what_waits_for_its_time_is_started_before(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 3, |task| task.max_attempts = 3).await;
    let error = Failure { message: "no paper".to_owned(), kind: ErrorKind::Error };
    run(ledger, ids[0], holder, Transition::Retry { delay: HOUR, error: error.clone() }).await;
    run(ledger, ids[1], holder, Transition::Retry { delay: HOUR, error }).await;
    run(ledger, ids[2], holder, Transition::Snooze { delay: HOUR }).await;
    let before = get(ledger, ids[1]).await;
    let replays = vec![(ids[0], NOW), (ids[1], HOUR), (ids[2], NOW)];
    let mut replayed = ledger.replay_many(replays, Caller::UNKNOWN).await.unwrap();
    replayed.sort_unstable_by_key(|(id, _)| *id);
    let from = [State::Retryable, State::Retryable, State::Scheduled].map(Replayed::From);
    assert_eq!(replayed.into_iter().map(|(_, replayed)| replayed).collect::<Vec<_>>(), from);
    let started = get(ledger, ids[0]).await;
    assert_eq!((started.state, started.attempt, started.max_attempts), (State::Accepted, 1, 3));
    granted(ledger, ids[0], holder).await;
    granted(ledger, ids[2], holder).await;
    assert_eq!(refused(ledger, ids[1], holder).await, Refusal::NotDue);
    assert!(get(ledger, ids[1]).await.fence > before.fence, "the messages of before are void");
}

/// More than one statement takes, of all sorts, each at its own time.
pub async fn many_are_replayed_each_after_its_delay(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 1_100, |_| {}).await;
    ledger.cancel(ids[..1_099].to_vec(), "stop".to_owned(), Caller::UNKNOWN).await.unwrap();
    run(ledger, ids[1_099], holder, discard()).await;
    let unknown = TaskId::new();
    let delay = |index: usize| HOUR * u32::from(index % 2 == 1);
    let replays = ids.iter().enumerate().map(|(index, id)| (*id, delay(index)));
    let mut replayed = ledger.replay_many(replays.chain([(unknown, NOW)]).collect(), Caller::UNKNOWN).await.unwrap();
    replayed.sort_unstable_by_key(|(id, _)| *id);
    let before = |index| if index == 1_099 { State::Discarded } else { State::Cancelled };
    let expected: Vec<_> = ids.iter().enumerate().map(|(index, id)| (*id, Replayed::From(before(index)))).collect();
    assert_eq!(replayed, expected);
    let due = ledger.fetch_due(2_000, HOUR).await.unwrap();
    assert_eq!(due.len(), 550, "every second one");
    assert_eq!(refused(ledger, ids[1], holder).await, Refusal::NotDue);
    granted(ledger, ids[0], holder).await;
    let late = get(ledger, ids[1_099]).await;
    assert!(late.run_at > jiff::Timestamp::now() + HOUR / 2 && late.state == State::Accepted, "{late:?}");
    assert_eq!(ledger.replay_many(Vec::new(), Caller::UNKNOWN).await.unwrap(), []);
}

/// The first to get it back has it, and the others are told who that is.
pub async fn of_many_with_one_key_one_is_replayed(ledger: &dyn Ledger) {
    let mut ids = Vec::new();
    for _ in 0..3 {
        let unique = Unique { key: "one".to_owned(), window: None, on_conflict: OnConflict::Reject };
        ids.push(recorded(ledger, 1, |task| task.unique = Some(unique.clone())).await[0]);
        ledger.cancel(vec![ids[ids.len() - 1]], "stop".to_owned(), Caller::UNKNOWN).await.unwrap();
    }
    let plain = one(ledger).await;
    ledger.cancel(vec![plain], "stop".to_owned(), Caller::UNKNOWN).await.unwrap();
    let replays = ids.iter().chain([&plain]).map(|id| (*id, NOW)).collect();
    let mut replayed = ledger.replay_many(replays, Caller::UNKNOWN).await.unwrap();
    replayed.sort_unstable_by_key(|(id, _)| *id);
    let (again, held) = (Replayed::From(State::Cancelled), Replayed::KeyHeld(ids[0]));
    assert_eq!(replayed, [(ids[0], again), (ids[1], held), (ids[2], held), (plain, again)]);
    assert_eq!(get(ledger, ids[2]).await.state, State::Cancelled);
}

/// The one that failed stays as it is.
pub async fn a_task_tells_whose_work_it_does_again(ledger: &dyn Ledger) {
    let first = one(ledger).await;
    let again = recorded(ledger, 1, |task| task.retried_from = Some(first)).await[0];
    assert_eq!(get(ledger, again).await.retried_from, Some(first));
    let failed = get(ledger, first).await;
    assert_eq!((failed.retried_from, failed.retried_by), (None, Some(again)));
    assert_eq!(get(ledger, again).await.retried_by, None);
}

async fn pruned(ledger: &dyn Ledger, expected: u64) {
    let mut total = 0;
    while total < expected {
        total += until("finished tasks to be pruned", async || {
            Some(super::pruned(ledger, NOW, 1000).await).filter(|count| *count > 0)
        })
        .await;
    }
    assert_eq!(total, expected);
}

/// Retention counts from a task's end; what is not over stays, however old.
pub async fn old_finished_tasks_are_pruned(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 6, |_| {}).await;
    for (id, outcome) in ids.iter().zip([complete(), discard(), cancel(), Transition::Interrupt]) {
        run(ledger, *id, holder, outcome).await;
    }
    granted(ledger, ids[4], holder).await;
    assert_eq!(super::pruned(ledger, HOUR, 1000).await, 0, "within the retention");
    assert_eq!(ledger.get(ids.clone()).await.unwrap().len(), 6);
    pruned(ledger, 3).await;
    let mut left: Vec<TaskId> = ledger.get(ids.clone()).await.unwrap().iter().map(|task| task.id).collect();
    left.sort_unstable();
    assert_eq!(left, ids[3..]);
    assert_eq!(super::pruned(ledger, NOW, 1000).await, 0);
    // One that was passed by is found when its time has come.
    run(ledger, ids[3], holder, complete()).await;
    pruned(ledger, 1).await;
    assert_eq!(ledger.workers().await.unwrap().len(), 1);
}

/// A prune deletes no more than it was told, and many of them delete everything.
pub async fn pruning_is_bounded(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 25, |_| {}).await;
    for id in &ids {
        run(ledger, *id, holder, complete()).await;
    }
    let mut total = 0;
    while total < 25 {
        let count = until("a prune", async || Some(super::pruned(ledger, NOW, 10).await).filter(|count| *count > 0));
        let count = count.await;
        assert!(count <= 10, "{count} at once");
        total += count;
    }
    assert_eq!(ledger.get(ids).await.unwrap(), []);
}

/// A key lives as long as its task.
pub async fn a_pruned_key_is_free(ledger: &dyn Ledger) {
    let keyed = || Submission {
        tasks: vec![new_task()],
        idempotency: Some(Idempotency { key: "key".to_owned(), fingerprint: [1; 32] }),
        reserve: HOUR,
        group: None,
    };
    let first = keyed();
    let id = first.tasks[0].id;
    ledger.record(first).await.unwrap();
    run(ledger, id, worker(ledger).await, complete()).await;
    assert_eq!(ledger.record(keyed()).await.unwrap(), Recorded::Replayed(vec![id]));
    pruned(ledger, 1).await;
    assert!(matches!(ledger.record(keyed()).await.unwrap(), Recorded::New { .. }));
}

/// Whatever their end was, and however short ago; their keys are free.
pub async fn finished_tasks_are_purged_with_their_keys(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let unique = || Unique { key: "u".to_owned(), window: Some(HOUR), on_conflict: OnConflict::Reject };
    let keyed = || Submission {
        tasks: vec![NewTask { unique: Some(unique()), ..new_task() }],
        idempotency: Some(Idempotency { key: "key".to_owned(), fingerprint: [1; 32] }),
        reserve: HOUR,
        group: None,
    };
    let mut ids = recorded(ledger, 1_200, |_| {}).await;
    for (id, outcome) in ids.iter().zip([complete(), discard(), cancel()]) {
        run(ledger, *id, holder, outcome).await;
    }
    ledger.cancel(ids[3..].to_vec(), "not needed".to_owned(), Caller::UNKNOWN).await.unwrap();
    let first = keyed();
    ids.push(first.tasks[0].id);
    ledger.record(first).await.unwrap();
    run(ledger, ids[1_200], holder, complete()).await;
    assert_eq!(ledger.purge(ids.clone()).await.unwrap(), 1_201);
    assert_eq!(ledger.get(ids.clone()).await.unwrap(), []);
    assert_eq!(ledger.purge(ids).await.unwrap(), 0, "once");
    assert!(matches!(ledger.record(keyed()).await.unwrap(), Recorded::New { .. }));
}

/// Waiting and running tasks are left as they are, and so is one that was replayed in between.
pub async fn what_has_not_finished_is_not_purged(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let [waits, runs, again] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    let fence = granted(ledger, runs, holder).await.fence;
    run(ledger, again, holder, discard()).await;
    ledger.replay(again, Caller::UNKNOWN).await.unwrap();
    let before = ledger.get(vec![waits, runs, again]).await.unwrap();
    assert_eq!(ledger.purge(vec![waits, runs, again, TaskId::new()]).await.unwrap(), 0);
    assert_eq!(ledger.purge(Vec::new()).await.unwrap(), 0);
    for task in before {
        assert_eq!(get(ledger, task.id).await, task);
    }
    assert_eq!(settle(ledger, runs, fence, complete()).await, Settled::Applied);
}
