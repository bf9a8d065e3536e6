//! What a call changes tells who made it.

use std::time::Duration;

use super::{complete, discard, get, granted, one, queue, run, settle, worker};
use crate::ledger::{Caller, Edit, Ledger};
use crate::task::{ChangeCall, LastChange, TaskId};

fn caller(name: &str) -> Caller {
    Caller { actor: Some(name.to_owned()), request_id: Some(format!("of {name}")) }
}

/// The newest change, which was made at a time between those of these two looks.
async fn last_change(ledger: &dyn Ledger, id: TaskId) -> (ChangeCall, Option<String>, Option<String>) {
    let task = get(ledger, id).await;
    let LastChange { call, by, at, request_id } = task.last_change.unwrap();
    let now = ledger.due_schedules(1).await.unwrap().now;
    assert!(task.created_at <= at && at <= now, "{} <= {at} <= {now}", task.created_at);
    (call, by, request_id)
}

fn of(call: ChangeCall, name: &str) -> (ChangeCall, Option<String>, Option<String>) {
    let Caller { actor, request_id } = caller(name);
    (call, actor, request_id)
}

/// The newest of them, and what workers do changes nothing of it.
pub async fn the_newest_change_is_kept_with_its_caller(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    assert_eq!(get(ledger, id).await.last_change, None);
    let edit = Edit { max_attempts: Some(9), ..Edit::default() };
    ledger.edit(id, edit, caller("Jörg \"the\" editor")).await.unwrap();
    assert_eq!(last_change(ledger, id).await, of(ChangeCall::Edit, "Jörg \"the\" editor"));
    let to = queue("other");
    assert_eq!(ledger.move_tasks(vec![id], queue("default"), to, caller("mover")).await.unwrap(), 1);
    assert_eq!(last_change(ledger, id).await, of(ChangeCall::Move, "mover"));
    let fence = granted(ledger, id, holder).await.fence;
    assert_eq!(last_change(ledger, id).await, of(ChangeCall::Move, "mover"));
    ledger.cancel(vec![id], "no".to_owned(), caller("first")).await.unwrap();
    ledger.cancel(vec![id], "no".to_owned(), caller("second")).await.unwrap();
    assert_eq!(last_change(ledger, id).await, of(ChangeCall::Cancel, "first"), "the first to ask counts");
    settle(ledger, id, fence, discard()).await;
    ledger.replay(id, caller("again")).await.unwrap();
    assert_eq!(last_change(ledger, id).await, of(ChangeCall::Retry, "again"));
    run(ledger, id, holder, complete()).await;
    assert_eq!(last_change(ledger, id).await, of(ChangeCall::Retry, "again"));
    let waits = one(ledger).await;
    ledger.cancel(vec![waits], "no".to_owned(), Caller::UNKNOWN).await.unwrap();
    assert_eq!(last_change(ledger, waits).await, (ChangeCall::Cancel, None, None));
}

/// What is refused, or finds nothing to do, is nobody's change.
pub async fn what_changes_nothing_has_no_caller(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let fence = granted(ledger, id, holder).await.fence;
    ledger.edit(id, Edit { max_attempts: Some(9), ..Edit::default() }, caller("a")).await.unwrap();
    ledger.replay_many(vec![(id, Duration::ZERO)], caller("a")).await.unwrap();
    ledger.move_tasks(vec![id], queue("default"), queue("other"), caller("a")).await.unwrap();
    settle(ledger, id, fence, complete()).await;
    ledger.cancel(vec![id], "too late".to_owned(), caller("a")).await.unwrap();
    assert_eq!(get(ledger, id).await.last_change, None);
}

/// Who paused a queue first is told until it is resumed.
pub async fn a_pause_tells_who_made_it(ledger: &dyn Ledger) {
    let paused = async || ledger.queues().await.unwrap().pop().and_then(|queue| queue.paused);
    let began = ledger.due_schedules(1).await.unwrap().now;
    ledger.set_paused(queue("q"), true, caller("anna")).await.unwrap();
    let first = paused().await.unwrap();
    assert_eq!(first.by.as_deref(), Some("anna"));
    assert!(began <= first.at && first.at <= ledger.due_schedules(1).await.unwrap().now);
    ledger.set_paused(queue("q"), true, caller("ben")).await.unwrap();
    assert_eq!(paused().await, Some(first));
    ledger.set_paused(queue("q"), false, caller("ben")).await.unwrap();
    assert_eq!(paused().await, None);
    ledger.set_paused(queue("q"), true, Caller::UNKNOWN).await.unwrap();
    assert_eq!(paused().await.unwrap().by, None);
}
