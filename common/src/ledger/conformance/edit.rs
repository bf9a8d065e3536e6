//! Editing: what waits is changed as a whole, and no message of before brings back what was.

use std::time::Duration;

use jiff::Timestamp;

use super::{
    HOUR, claim_from, complete, discard, get, granted, new_task, one, queue, recorded, refused, retry, run, settle,
    submission, until, worker,
};
use crate::ledger::{Claim, Edit, Edited, Ledger, Refusal};
use crate::state::State;
use crate::task::{Fence, Json, NewTask, TaskId};

fn json(text: &str) -> Json {
    Json::parse(text.to_owned()).unwrap()
}

fn in_an_hour() -> Timestamp {
    crate::clock::timestamp(crate::clock::wall_ms()) + HOUR
}

/// A waiting task of each sort, in the order of [`STATES`].
async fn waiting(ledger: &dyn Ledger) -> [TaskId; 4] {
    let [accepted, queued, retryable] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    ledger.mark_queued(vec![(queued, Fence(0))]).await.unwrap();
    run(ledger, retryable, worker(ledger).await, retry(HOUR, "later")).await;
    let scheduled = NewTask { run_at: Some(in_an_hour()), ..new_task() };
    let ids = [accepted, scheduled.id, queued, retryable];
    ledger.record(submission(vec![scheduled])).await.unwrap();
    ids
}

const STATES: [State; 4] = [State::Accepted, State::Scheduled, State::Queued, State::Retryable];

/// Wherever it waits, and it is told from where; all that was given holds, and is due at the new time.
pub async fn a_waiting_task_can_be_changed(ledger: &dyn Ledger) {
    let ids = waiting(ledger).await;
    let run_at = in_an_hour() + HOUR;
    for (id, state) in ids.into_iter().zip(STATES) {
        let before = get(ledger, id).await;
        let edit = Edit {
            run_at: Some(run_at),
            args: Some(json("[2]")),
            queue: Some(queue("other")),
            max_attempts: Some(9),
            timeout: Some(Duration::from_millis(1_500)),
        };
        assert_eq!(ledger.edit(id, edit).await.unwrap(), Edited::From(state));
        let task = get(ledger, id).await;
        assert_eq!((task.state, task.run_at, task.args.as_str()), (State::Scheduled, run_at, "[2]"));
        assert_eq!((task.queue.as_str(), task.max_attempts, task.timeout_ms), ("other", 9, Some(1_500)));
        assert_eq!((task.fence.0, task.attempt), (before.fence.0 + 1, before.attempt));
        assert_eq!((task.errors, task.created_at), (before.errors, before.created_at));
    }
    assert_eq!(ledger.fetch_due(10, HOUR).await.unwrap(), [], "none before its time");
    let next = ledger.next_due().await.unwrap().unwrap();
    assert!(next > HOUR && next <= HOUR * 2, "{next:?}");
}

/// Above all its time: a change of the args does not start what is to start later.
pub async fn what_is_left_out_stays(ledger: &dyn Ledger) {
    for id in waiting(ledger).await {
        let before = get(ledger, id).await;
        ledger.edit(id, Edit { args: Some(json("3")), ..Edit::default() }).await.unwrap();
        let task = get(ledger, id).await;
        let (state, fence) = (State::Scheduled, Fence(before.fence.0 + 1));
        assert_eq!(task, crate::task::Task { state, fence, args: json("3"), ..before });
    }
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.len(), 2, "those whose time has come: {due:?}");
    assert!(due.iter().all(|due| due.args.as_str() == "3" && due.fence == Fence(1)), "{due:?}");
}

/// No claim is granted before the new time, whatever message it comes by; a time in the past means at once.
pub async fn an_edited_task_waits_for_its_new_time(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    for id in waiting(ledger).await {
        ledger.edit(id, Edit { run_at: Some(in_an_hour()), ..Edit::default() }).await.unwrap();
        assert_eq!(refused(ledger, id, holder).await, Refusal::NotDue);
        assert_eq!(get(ledger, id).await.state, State::Scheduled);
        let past = Some(Timestamp::UNIX_EPOCH);
        ledger.edit(id, Edit { run_at: past, ..Edit::default() }).await.unwrap();
        let task = get(ledger, id).await;
        assert!(task.run_at >= task.created_at, "at once, and not before it was recorded: {task:?}");
        granted(ledger, id, holder).await;
    }
}

/// A plain task's claim tells none: those of the message hold. An edited one's does, in each attempt.
pub async fn the_newest_args_are_told_to_every_claim(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let first = granted(ledger, id, holder).await;
    assert_eq!(first.args, None);
    settle(ledger, id, first.fence, retry(Duration::ZERO, "again")).await;
    for text in [r#"{"n": 2}"#, r#"{"n":3}"#] {
        ledger.edit(id, Edit { args: Some(json(text)), ..Edit::default() }).await.unwrap();
        let granted = granted(ledger, id, holder).await;
        assert_eq!(granted.args, Some(json(text)));
        settle(ledger, id, granted.fence, retry(Duration::ZERO, "again")).await;
    }
    assert_eq!(granted(ledger, id, holder).await.args, Some(json(r#"{"n":3}"#)));
    // Of one whose args were not changed they are told as well: an edit before may have.
    let id = one(ledger).await;
    ledger.edit(id, Edit { max_attempts: Some(7), ..Edit::default() }).await.unwrap();
    let granted = granted(ledger, id, holder).await;
    assert_eq!((granted.args, granted.max_attempts), (Some(new_task().args), 7));
}

/// It would hide the task from the relay, although its message says what held before.
pub async fn a_late_mark_of_the_old_publication_changes_nothing(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    ledger.edit(id, Edit { args: Some(json("1")), ..Edit::default() }).await.unwrap();
    ledger.mark_queued(vec![(id, Fence(0))]).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Scheduled);
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.iter().map(|due| (due.id, due.fence)).collect::<Vec<_>>(), [(id, Fence(1))]);
    ledger.mark_queued(vec![(id, Fence(1))]).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Queued);
}

/// The message in the old queue is void; that in the new one is not.
pub async fn a_moved_task_is_granted_from_its_new_queue_only(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    ledger.mark_queued(vec![(id, Fence(0))]).await.unwrap();
    ledger.edit(id, Edit { queue: Some(queue("other")), ..Edit::default() }).await.unwrap();
    assert_eq!(refused(ledger, id, holder).await, Refusal::Moved);
    assert_eq!(ledger.fetch_due(10, HOUR).await.unwrap()[0].queue, queue("other"));
    ledger.mark_queued(vec![(id, Fence(1))]).await.unwrap();
    assert_eq!(refused(ledger, id, holder).await, Refusal::Moved);
    assert_eq!(get(ledger, id).await.state, State::Queued, "its own message is there");
    let Claim::Granted(granted) = claim_from(ledger, id, holder, "other").await else { panic!("refused") };
    assert_eq!(refused(ledger, id, holder).await, Refusal::Held);
    settle(ledger, id, granted.fence, complete()).await;
    assert_eq!(refused(ledger, id, holder).await, Refusal::Finished);
    // A message of one that nobody has edited may come from anywhere: an operator may have moved it.
    let id = one(ledger).await;
    assert!(matches!(claim_from(ledger, id, holder, "other").await, Claim::Granted(_)));
}

/// A limit that the task has reached already is refused with all else that was given.
pub async fn an_attempt_must_be_left(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    for _ in 0..2 {
        run(ledger, id, holder, retry(Duration::ZERO, "again")).await;
    }
    let before = get(ledger, id).await;
    let edit = Edit { max_attempts: Some(2), args: Some(json("2")), ..Edit::default() };
    assert_eq!(ledger.edit(id, edit).await.unwrap(), Edited::NoAttemptLeft(2));
    assert_eq!(get(ledger, id).await, before);
    let edit = Edit { max_attempts: Some(3), ..Edit::default() };
    assert_eq!(ledger.edit(id, edit).await.unwrap(), Edited::From(State::Retryable));
    assert_eq!(granted(ledger, id, holder).await.max_attempts, 3);
}

/// It is told and left as it is.
pub async fn what_runs_or_has_ended_is_not_edited(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let [running, completed, discarded, cancelled] = recorded(ledger, 4, |_| {}).await[..] else { panic!("four") };
    granted(ledger, running, holder).await;
    run(ledger, completed, holder, complete()).await;
    run(ledger, discarded, holder, discard()).await;
    super::cancelled(ledger, cancelled, "not needed").await;
    let states = [State::Running, State::Completed, State::Discarded, State::Cancelled];
    for (id, state) in [running, completed, discarded, cancelled].into_iter().zip(states) {
        let before = get(ledger, id).await;
        let edit = Edit { args: Some(json("0")), run_at: Some(in_an_hour()), max_attempts: Some(1), ..Edit::default() };
        assert_eq!(ledger.edit(id, edit).await.unwrap(), Edited::From(state));
        assert_eq!(get(ledger, id).await, before);
    }
    assert_eq!(ledger.edit(TaskId::new(), Edit::default()).await.unwrap(), Edited::Unknown);
}

/// Its older message may be delivered long before those that were queued before the newer one: taken for the queue's
/// head, it would have them all published a second time.
pub async fn an_edited_task_tells_no_watermark(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    ledger.edit(id, Edit { max_attempts: Some(5), ..Edit::default() }).await.unwrap();
    ledger.mark_queued(vec![(id, Fence(1))]).await.unwrap();
    assert_eq!(granted(ledger, id, holder).await.queued_at, None);
}

/// JSON survives an edit as it was written.
pub async fn any_args_can_be_edited_in(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let text = r#"{"b": [1, 2.50], "a":"\u0000 Größe 😀", "b":null}"#;
    ledger.edit(id, Edit { args: Some(json(text)), run_at: Some(in_an_hour()), ..Edit::default() }).await.unwrap();
    assert_eq!(get(ledger, id).await.args.as_str(), text);
    ledger.edit(id, Edit { run_at: Some(Timestamp::UNIX_EPOCH), ..Edit::default() }).await.unwrap();
    let due = until("it to be due", async || ledger.fetch_due(1, HOUR).await.unwrap().pop()).await;
    assert_eq!(due.args.as_str(), text);
    assert_eq!(granted(ledger, id, holder).await.args, Some(json(text)));
}
