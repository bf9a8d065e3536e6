//! Editing: what waits is changed as a whole, and no message of before brings back what was.

use std::time::Duration;

use jiff::Timestamp;

use super::{
    HOUR, claim_by, complete, discard, get, granted, lane, mark_queued, new_task, one, queue, recorded, refused, retry,
    run, settle, submission, until, worker,
};
use crate::ledger::{Caller, Claim, Edit, Edited, Ledger, Refusal};
use crate::limit::Bounds;
use crate::state::State;
use crate::task::{Fence, Json, NewTask, Priority, TaskId, WorkerId};

fn json(text: &str) -> Json {
    Json::parse(text.to_owned()).unwrap()
}

fn in_an_hour() -> Timestamp {
    crate::clock::timestamp(crate::clock::wall_ms()) + HOUR
}

/// A waiting task of each sort, in the order of [`STATES`].
async fn waiting(ledger: &dyn Ledger) -> [TaskId; 4] {
    let [accepted, queued, retryable] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    mark_queued(ledger, vec![(queued, Fence(0))]).await.unwrap();
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
            priority: Some(Priority::High),
            max_attempts: Some(9),
            timeout: Some(Duration::from_millis(1_500)),
        };
        assert_eq!(ledger.edit(id, edit, Caller::UNKNOWN).await.unwrap(), Edited::From(state));
        let task = get(ledger, id).await;
        assert_eq!((task.state, task.run_at, task.args.as_str()), (State::Scheduled, run_at, "[2]"));
        assert_eq!((task.queue.as_str(), task.priority), ("other", Priority::High));
        assert_eq!((task.max_attempts, task.timeout_ms), (9, Some(1_500)));
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
        ledger.edit(id, Edit { args: Some(json("3")), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
        let task = get(ledger, id).await;
        let (state, fence) = (State::Scheduled, Fence(before.fence.0 + 1));
        let last_change = task.last_change.clone();
        assert_eq!(task, crate::task::Task { state, fence, args: json("3"), last_change, ..before });
    }
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.len(), 2, "those whose time has come: {due:?}");
    assert!(due.iter().all(|due| due.args.as_str() == "3" && due.fence == Fence(2)), "{due:?}");
}

/// No claim is granted before the new time, whatever message it comes by; a time in the past means at once.
pub async fn an_edited_task_waits_for_its_new_time(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    for id in waiting(ledger).await {
        ledger.edit(id, Edit { run_at: Some(in_an_hour()), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
        assert_eq!(refused(ledger, id, holder).await, Refusal::NotDue);
        assert_eq!(get(ledger, id).await.state, State::Scheduled);
        let past = Some(Timestamp::UNIX_EPOCH);
        ledger.edit(id, Edit { run_at: past, ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
        let task = get(ledger, id).await;
        assert!(task.run_at >= task.created_at, "at once, and not before it was recorded: {task:?}");
        granted(ledger, id, holder).await;
    }
}

/// A message counts for the row as it was published, and none of before the last change does; in any later attempt.
pub async fn a_message_of_before_an_edit_starts_nothing(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let mut seen = vec![None, Some(Fence(0))];
    for (text, priority) in [("[2]", Priority::High), ("[3]", Priority::Low)] {
        let (args, queue, priority_too) = (Some(json(text)), Some(queue("other")), Some(priority));
        ledger
            .edit(id, Edit { args, queue, priority: priority_too, ..Edit::default() }, Caller::UNKNOWN)
            .await
            .unwrap();
        let [due] = &ledger.fetch_due(10, HOUR).await.unwrap()[..] else { panic!("one is due") };
        assert_eq!((due.args.as_str(), &due.lane), (text, &lane("other", priority)));
        mark_queued(ledger, vec![(id, due.fence)]).await.unwrap();
        for older in &seen {
            assert_eq!(claim_by(ledger, id, holder, *older).await, Claim::Refused(Refusal::Outdated));
        }
        assert_eq!(get(ledger, id).await.state, State::Queued, "its own message is there");
        let Claim::Granted(granted) = claim_by(ledger, id, holder, Some(due.fence)).await else { panic!("refused") };
        assert!(granted.queued_at.is_some());
        assert_eq!(claim_by(ledger, id, holder, None).await, Claim::Refused(Refusal::Held));
        settle(ledger, id, granted.fence, retry(Duration::ZERO, "again")).await;
        assert_eq!(claim_by(ledger, id, holder, Some(Fence(0))).await, Claim::Refused(Refusal::Outdated));
        seen.push(Some(due.fence));
    }
    // Since the last change the args are the same, so any message of since then may start it.
    assert!(matches!(claim_by(ledger, id, holder, *seen.last().unwrap()).await, Claim::Granted(_)));
    let plain = one(ledger).await;
    assert!(matches!(claim_by(ledger, plain, holder, None).await, Claim::Granted(_)), "nobody has edited this one");
}

/// It would be given back, or published once more, for nothing.
pub async fn a_message_of_before_is_refused_whatever_else_holds(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    ledger.edit(id, Edit { run_at: Some(in_an_hour()), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
    mark_queued(ledger, vec![(id, Fence(1))]).await.unwrap();
    ledger.set_paused(queue("default"), true, Caller::UNKNOWN).await.unwrap();
    let dead = WorkerId::new();
    assert_eq!(claim_by(ledger, id, dead, Some(Fence(0))).await, Claim::Refused(Refusal::Outdated));
    assert_eq!(get(ledger, id).await.state, State::Queued, "its own message is there");
    assert_eq!(claim_by(ledger, id, dead, Some(Fence(1))).await, Claim::Refused(Refusal::NotDue));
}

/// It would hide the task from the relay, although its message says what held before.
pub async fn a_late_mark_of_the_old_publication_changes_nothing(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    ledger.edit(id, Edit { args: Some(json("1")), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
    mark_queued(ledger, vec![(id, Fence(0))]).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Scheduled);
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.iter().map(|due| (due.id, due.fence)).collect::<Vec<_>>(), [(id, Fence(2))]);
    mark_queued(ledger, vec![(id, Fence(2))]).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Queued);
}

/// It is published again, and asks its limits as any other; it keeps to the time that it was given.
pub async fn a_held_task_can_be_edited(ledger: &dyn Ledger) {
    let most = Bounds { max_running: Some(1), ..Bounds::default() };
    ledger.set_limit("queue:default".parse().unwrap(), most).await.unwrap();
    let holder = worker(ledger).await;
    let [runs, goes, stays] = recorded(ledger, 3, |_| {}).await[..] else { panic!("three tasks") };
    let fence = granted(ledger, runs, holder).await.fence;
    for id in [goes, stays] {
        assert_eq!(refused(ledger, id, holder).await, Refusal::Limited);
    }
    ledger.edit(goes, Edit { queue: Some(queue("other")), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
    ledger.edit(stays, Edit { run_at: Some(in_an_hour()), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
    assert_eq!((get(ledger, goes).await.limited_by, get(ledger, stays).await.limited_by), (None, None));
    // A message that is void has no place to ask for.
    assert_eq!(claim_by(ledger, goes, holder, Some(Fence(0))).await, Claim::Refused(Refusal::Outdated));
    run(ledger, goes, holder, complete()).await;
    settle(ledger, runs, fence, complete()).await;
    assert_eq!(ledger.release_held(None, 10).await.unwrap().tasks, 0, "nothing is held any more");
    assert_eq!(refused(ledger, stays, holder).await, Refusal::NotDue);
}

/// A limit that the task has reached already is refused with all else that was given.
pub async fn an_attempt_must_be_left(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    for _ in 0..2 {
        run(ledger, id, holder, retry(Duration::ZERO, "again")).await;
    }
    let before = get(ledger, id).await;
    let edit = Edit { max_attempts: Some(2), args: Some(json("2")), ..Edit::default() };
    assert_eq!(ledger.edit(id, edit, Caller::UNKNOWN).await.unwrap(), Edited::NoAttemptLeft(2));
    assert_eq!(get(ledger, id).await, before);
    let edit = Edit { max_attempts: Some(3), ..Edit::default() };
    assert_eq!(ledger.edit(id, edit, Caller::UNKNOWN).await.unwrap(), Edited::From(State::Retryable));
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
        assert_eq!(ledger.edit(id, edit, Caller::UNKNOWN).await.unwrap(), Edited::From(state));
        assert_eq!(get(ledger, id).await, before);
    }
    assert_eq!(ledger.edit(TaskId::new(), Edit::default(), Caller::UNKNOWN).await.unwrap(), Edited::Unknown);
}

/// JSON survives an edit as it was written.
pub async fn any_args_can_be_edited_in(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    let text = r#"{"b": [1, 2.50], "a":"\u0000 Größe 😀", "b":null}"#;
    ledger
        .edit(id, Edit { args: Some(json(text)), run_at: Some(in_an_hour()), ..Edit::default() }, Caller::UNKNOWN)
        .await
        .unwrap();
    assert_eq!(get(ledger, id).await.args.as_str(), text);
    ledger.edit(id, Edit { run_at: Some(Timestamp::UNIX_EPOCH), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
    let due = until("it to be due", async || ledger.fetch_due(1, HOUR).await.unwrap().pop()).await;
    assert_eq!(due.args.as_str(), text);
}
