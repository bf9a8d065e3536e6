//! Cancelling: a waiting task at once, a running one when its worker has stopped it.

use std::time::Duration;

use super::{
    HOUR, cancel, cancelled, complete, discard, failure, get, granted, mark_queued, new_task, one, put_back, recorded,
    refused, retry, run, settle, submission, worker,
};
use crate::ledger::{Caller, Failure, Ledger, Refusal, Replayed, Settled, Settlement, Transition};
use crate::rescue;
use crate::state::State;
use crate::task::{ErrorKind, Fence, Guarantee, NewTask, Task, TaskId, WorkerId};

/// What a worker is to stop.
async fn told(ledger: &dyn Ledger, worker: WorkerId) -> Vec<(TaskId, Fence)> {
    let mut cancelling = ledger.cancelling(worker).await.unwrap();
    cancelling.sort_unstable();
    cancelling
}

/// A waiting task of each sort.
async fn waiting(ledger: &dyn Ledger) -> [TaskId; 4] {
    let [accepted, queued, retryable] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    mark_queued(ledger, vec![(queued, Fence(0))]).await.unwrap();
    run(ledger, retryable, worker(ledger).await, retry(HOUR, "later")).await;
    let run_at = Some(jiff::Timestamp::now() + HOUR);
    let scheduled = NewTask { run_at, ..new_task() };
    let ids = [accepted, scheduled.id, queued, retryable];
    ledger.record(submission(vec![scheduled])).await.unwrap();
    ids
}

fn assert_cancelled(task: &Task, reason: &str) {
    assert_eq!((task.state, task.reason.as_deref()), (State::Cancelled, Some(reason)), "{task:?}");
    assert!(task.finished_at.is_some() && task.cancel_requested_at.is_some(), "{task:?}");
}

/// Wherever it waits, and it is told from where.
pub async fn a_waiting_task_is_cancelled_at_once(ledger: &dyn Ledger) {
    let states = [State::Accepted, State::Scheduled, State::Queued, State::Retryable];
    for (id, state) in waiting(ledger).await.into_iter().zip(states) {
        assert_eq!(cancelled(ledger, id, "not needed").await, state);
        assert_cancelled(&get(ledger, id).await, "not needed");
    }
}

/// Its message may be in the broker, or published a second time: no claim takes it any more.
pub async fn a_cancelled_task_is_never_granted(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    for id in waiting(ledger).await {
        cancelled(ledger, id, "not needed").await;
        assert_eq!(refused(ledger, id, holder).await, Refusal::Finished);
        let fence = get(ledger, id).await.fence;
        mark_queued(ledger, vec![(id, fence)]).await.unwrap();
        put_back(ledger, id, Duration::ZERO).await.unwrap();
        assert_eq!(refused(ledger, id, holder).await, Refusal::Finished);
        assert_eq!(get(ledger, id).await.state, State::Cancelled);
    }
}

/// Nothing is published that was cancelled before, and nothing counts it as waiting.
pub async fn a_relay_forgets_what_is_cancelled(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    put_back(ledger, id, Duration::ZERO).await.unwrap();
    cancelled(ledger, id, "not needed").await;
    assert_eq!(ledger.next_due().await.unwrap(), None);
    assert_eq!(ledger.fetch_due(10, HOUR).await.unwrap(), []);
    let [queue] = &ledger.queues().await.unwrap()[..] else { panic!("one queue") };
    assert_eq!(queue.counts.get(&State::Cancelled), Some(&1), "{queue:?}");
}

/// Its worker is told until the run has ended; then it is cancelled by whoever wanted it and for that reason.
pub async fn a_running_task_is_asked_first(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let fence = granted(ledger, id, holder).await.fence;
    assert_eq!(told(ledger, holder).await, []);
    assert_eq!(cancelled(ledger, id, "asked").await, State::Running);
    let task = get(ledger, id).await;
    assert_eq!((task.state, task.reason.as_deref(), task.finished_at), (State::Running, Some("asked"), None));
    assert!(task.cancel_requested_at.is_some());
    for _ in 0..2 {
        assert_eq!(told(ledger, holder).await, [(id, fence)]);
    }
    assert_eq!(settle(ledger, id, fence, cancel()).await, Settled::Applied);
    assert_cancelled(&get(ledger, id).await, "asked");
    assert_eq!(told(ledger, holder).await, []);
}

/// A worker hears of its own runs only.
pub async fn only_its_own_worker_is_told(ledger: &dyn Ledger) {
    let (holder, other) = (worker(ledger).await, worker(ledger).await);
    let mut mine = recorded(ledger, 2, |_| {}).await;
    let [theirs, unasked] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    mine.sort_unstable();
    for (id, worker) in [(mine[0], holder), (mine[1], holder), (theirs, other), (unasked, holder)] {
        granted(ledger, id, worker).await;
    }
    ledger.cancel(vec![mine[0], mine[1], theirs], "asked".to_owned(), Caller::UNKNOWN).await.unwrap();
    assert_eq!(told(ledger, holder).await, [(mine[0], Fence(1)), (mine[1], Fence(1))]);
    assert_eq!(told(ledger, other).await, [(theirs, Fence(1))]);
}

/// A retry, a snooze and an interruption become the cancellation; the attempt was made, and its error is kept.
pub async fn what_would_start_again_is_cancelled(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let snooze = Transition::Snooze { delay: HOUR };
    for (again, errors) in [(retry(HOUR, "broken"), 1), (snooze, 0), (Transition::Interrupt, 0)] {
        let id = one(ledger).await;
        let fence = granted(ledger, id, holder).await.fence;
        cancelled(ledger, id, "asked").await;
        assert_eq!(settle(ledger, id, fence, again.clone()).await, Settled::Cancelled, "{again:?}");
        let task = get(ledger, id).await;
        assert_cancelled(&task, "asked");
        assert_eq!((task.attempt, task.errors.len()), (1, errors), "{again:?}");
        assert_eq!(settle(ledger, id, fence, complete()).await, Settled::Fenced);
        assert_eq!(refused(ledger, id, holder).await, Refusal::Finished);
    }
    assert_eq!(ledger.next_due().await.unwrap(), None);
}

/// A run that ends in time has ended as it did.
pub async fn what_is_final_stays_as_it_is(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ends = [(complete(), State::Completed, None), (discard(), State::Discarded, Some("exhausted".to_owned()))];
    for (end, state, reason) in ends {
        let id = one(ledger).await;
        let fence = granted(ledger, id, holder).await.fence;
        cancelled(ledger, id, "asked").await;
        assert_eq!(settle(ledger, id, fence, end).await, Settled::Applied);
        let task = get(ledger, id).await;
        assert_eq!((task.state, task.reason), (state, reason));
        assert!(task.cancel_requested_at.is_some(), "that it was asked is not forgotten");
    }
    assert_eq!(told(ledger, holder).await, []);
}

/// The rescue cancels what was to be cancelled, even on its last attempt; only with `at_most_once` it is `interrupted`,
/// since it may have taken effect.
pub async fn the_request_of_a_dead_worker_is_kept(ledger: &dyn Ledger) {
    let (id, holder) = (recorded(ledger, 1, |task| task.max_attempts = 1).await[0], worker(ledger).await);
    granted(ledger, id, holder).await;
    cancelled(ledger, id, "asked").await;
    ledger.retire(holder).await.unwrap();
    let found = ledger.abandoned(1).await.unwrap().pop().unwrap();
    assert!(found.cancel_requested);
    let settlement = Settlement { id, fence: found.fence, transition: rescue::decide(&found, 5, 0.5) };
    assert_eq!(ledger.settle(settlement.clone()).await.unwrap(), Settled::Cancelled);
    let task = get(ledger, id).await;
    assert_cancelled(&task, "asked");
    assert_eq!(task.errors[0].kind, ErrorKind::Crash);
    assert_eq!(ledger.settle(settlement).await.unwrap(), Settled::Fenced, "two rescues, one of which counts");

    let once = crate::ledger::Abandoned { guarantee: Guarantee::AtMostOnce, ..found };
    let decided = rescue::decide(&once, 5, 0.5);
    assert!(matches!(decided, Transition::Discard { ref reason, .. } if reason == "interrupted"), "{decided:?}");
}

/// Asking again changes nothing, neither who asked nor when.
pub async fn the_first_to_ask_counts(ledger: &dyn Ledger) {
    let [waits, runs] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    granted(ledger, runs, worker(ledger).await).await;
    for (id, before, again) in [(waits, State::Accepted, State::Cancelled), (runs, State::Running, State::Running)] {
        assert_eq!(cancelled(ledger, id, "first").await, before);
        let first = get(ledger, id).await;
        assert_eq!(cancelled(ledger, id, "second").await, again);
        assert_eq!(get(ledger, id).await, first);
    }
}

/// What was completed or discarded is told and left as it is; what is not there is left out.
pub async fn what_has_ended_is_left_alone(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    for (end, state) in [(complete(), State::Completed), (discard(), State::Discarded)] {
        let id = one(ledger).await;
        run(ledger, id, holder, end).await;
        let before = get(ledger, id).await;
        assert_eq!(cancelled(ledger, id, "too late").await, state);
        assert_eq!(get(ledger, id).await, before);
    }
    assert_eq!(ledger.cancel(vec![TaskId::new()], "nobody".to_owned(), Caller::UNKNOWN).await.unwrap(), []);
    assert_eq!(ledger.cancel(Vec::new(), "nobody".to_owned(), Caller::UNKNOWN).await.unwrap(), []);
}

/// A replay forgets the request: the next run is nobody's to stop.
pub async fn a_replayed_task_is_wanted_again(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let fence = granted(ledger, id, holder).await.fence;
    cancelled(ledger, id, "asked").await;
    settle(ledger, id, fence, Transition::Interrupt).await;
    assert_eq!(ledger.replay(id, Caller::UNKNOWN).await.unwrap(), Replayed::From(State::Cancelled));
    assert_eq!(get(ledger, id).await.cancel_requested_at, None);
    let fence = granted(ledger, id, holder).await.fence;
    assert_eq!(told(ledger, holder).await, []);
    let crash = Failure { kind: ErrorKind::Crash, ..failure("died") };
    let again = Transition::Retry { delay: Duration::ZERO, error: crash };
    assert_eq!(settle(ledger, id, fence, again).await, Settled::Applied);
}

/// More than one statement takes, of all sorts; any text is a reason.
pub async fn many_are_cancelled_together(ledger: &dyn Ledger) {
    let ids = recorded(ledger, 1_200, |_| {}).await;
    let holder = worker(ledger).await;
    let runs = granted(ledger, ids[700], holder).await;
    let reason = "wegen \u{0} Größe 😀";
    let mut before = ledger.cancel(ids.clone(), reason.to_owned(), Caller::UNKNOWN).await.unwrap();
    before.sort_unstable();
    assert_eq!(before.len(), ids.len());
    assert_eq!(before.iter().filter(|(_, state)| *state == State::Accepted).count(), ids.len() - 1);
    assert_eq!(told(ledger, holder).await, [(ids[700], runs.fence)]);
    let left = ledger.get(ids).await.unwrap();
    assert_eq!(left.iter().filter(|task| task.state == State::Cancelled).count(), 1_199);
}
