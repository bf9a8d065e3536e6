//! Unique keys: of all tasks with one key at most one holds it.

use std::collections::HashMap;
use std::time::Duration;

use futures::future::join_all;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use tokio::runtime::Handle;
use tokio::task::block_in_place;

use super::{
    HOUR, cancel, cancelled, complete, discard, get, granted, new_task, run, settle, submission, until, worker,
};
use crate::ledger::{Caller, Holder, Idempotency, Ledger, Recorded, Replayed, SharedLedger, Submission};
use crate::state::State;
use crate::task::{NewTask, OnConflict, TaskId, Unique, WorkerId};

/// How many random histories are tried.
const CASES: u32 = 32;

fn unique(key: &str, window: Option<Duration>, on_conflict: OnConflict) -> NewTask {
    NewTask { unique: Some(Unique { key: key.to_owned(), window, on_conflict }), ..new_task() }
}

fn alone(on_conflict: OnConflict) -> NewTask {
    unique("key", None, on_conflict)
}

/// Records a task that nobody stands in the way of.
async fn first(ledger: &dyn Ledger, task: NewTask) -> TaskId {
    let id = task.id;
    let recorded = ledger.record(submission(vec![task])).await.unwrap();
    assert!(matches!(&recorded, Recorded::New { existing, .. } if existing.is_empty()), "{recorded:?}");
    id
}

async fn in_the_way(ledger: &dyn Ledger, task: NewTask) -> TaskId {
    let id = task.id;
    let recorded = ledger.record(submission(vec![task])).await.unwrap();
    assert_eq!(ledger.get(vec![id]).await.unwrap(), [], "{recorded:?}");
    match recorded {
        Recorded::NotUnique(holders) if holders.len() == 1 => holders[0].1.id,
        other => panic!("{other:?}"),
    }
}

/// Until it has finished, whatever that comes to.
pub async fn a_key_is_held_until_the_end(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    for end in [complete(), cancel(), discard()] {
        let id = first(ledger, alone(OnConflict::Reject)).await;
        assert_eq!(get(ledger, id).await.unique_key.as_deref(), Some("key"));
        assert_eq!(in_the_way(ledger, alone(OnConflict::Reject)).await, id);
        let run = granted(ledger, id, worker).await;
        assert_eq!(in_the_way(ledger, alone(OnConflict::Reject)).await, id);
        settle(ledger, id, run.fence, end).await;
    }
    first(ledger, unique("other", None, OnConflict::Reject)).await;
    let id = first(ledger, alone(OnConflict::Reject)).await;
    cancelled(ledger, id, "not wanted").await;
    first(ledger, alone(OnConflict::Reject)).await;
}

/// A window is over when it is over, and not before.
pub async fn a_window_is_held_whatever_becomes_of_the_task(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let done = first(ledger, unique("long", Some(HOUR), OnConflict::Reject)).await;
    run(ledger, done, worker, complete()).await;
    for on_conflict in [OnConflict::Reject, OnConflict::ReplaceWaiting] {
        assert_eq!(in_the_way(ledger, unique("long", None, on_conflict)).await, done);
    }
    let waiting = first(ledger, unique("short", Some(Duration::from_millis(300)), OnConflict::Reject)).await;
    assert_eq!(in_the_way(ledger, unique("short", None, OnConflict::Reject)).await, waiting);
    let later = until("the window's end", async || {
        let task = unique("short", None, OnConflict::Reject);
        let id = task.id;
        let recorded = ledger.record(submission(vec![task])).await.unwrap();
        matches!(recorded, Recorded::New { .. }).then_some(id)
    })
    .await;
    assert_eq!(get(ledger, waiting).await.state, State::Accepted, "the earlier one stays");
    assert_eq!(in_the_way(ledger, unique("short", None, OnConflict::Reject)).await, later);
}

/// The earlier task stands for the later.
pub async fn an_existing_task_is_answered(ledger: &dyn Ledger) {
    let id = first(ledger, alone(OnConflict::Reject)).await;
    let plain = new_task();
    let tasks = vec![alone(OnConflict::ReturnExisting), plain.clone()];
    let left_out = tasks[0].id;
    let recorded = ledger.record(submission(tasks)).await.unwrap();
    assert!(matches!(&recorded, Recorded::New { existing, .. } if *existing == [(0, id)]), "{recorded:?}");
    assert_eq!(ledger.get(vec![left_out]).await.unwrap(), []);
    assert_eq!(get(ledger, plain.id).await.state, State::Accepted);
    let recorded = ledger.record(submission(vec![alone(OnConflict::ReturnExisting)])).await.unwrap();
    assert!(matches!(&recorded, Recorded::New { existing, .. } if *existing == [(0, id)]), "{recorded:?}");
}

/// What waits gives way, what runs does not.
pub async fn a_waiting_task_is_replaced(ledger: &dyn Ledger) {
    let old = first(ledger, alone(OnConflict::Reject)).await;
    let new = first(ledger, alone(OnConflict::ReplaceWaiting)).await;
    let (was, is) = (get(ledger, old).await, get(ledger, new).await);
    assert_eq!((was.state, was.reason), (State::Cancelled, Some(format!("replaced by {new}"))));
    assert!(was.cancel_requested_at.is_some() && was.finished_at.is_some());
    assert_eq!(is.state, State::Accepted);
    assert_eq!(in_the_way(ledger, alone(OnConflict::Reject)).await, new);
    let run = granted(ledger, new, worker(ledger).await).await;
    assert_eq!(in_the_way(ledger, alone(OnConflict::ReplaceWaiting)).await, new);
    settle(ledger, new, run.fence, complete()).await;
    first(ledger, alone(OnConflict::ReplaceWaiting)).await;
}

/// One conflict keeps the whole submission out, and it says which.
pub async fn a_conflict_leaves_nothing_behind(ledger: &dyn Ledger) {
    let holder = first(ledger, unique("held", None, OnConflict::Reject)).await;
    let replaceable = first(ledger, unique("waiting", None, OnConflict::Reject)).await;
    let tasks = vec![
        new_task(),
        unique("waiting", None, OnConflict::ReplaceWaiting),
        unique("held", None, OnConflict::Reject),
        unique("free", None, OnConflict::Reject),
    ];
    let ids = tasks.iter().map(|task| task.id).collect();
    assert_eq!(
        ledger.record(submission(tasks)).await.unwrap(),
        Recorded::NotUnique(vec![(2, Holder { id: holder, state: get(ledger, holder).await.state })])
    );
    assert_eq!(ledger.get(ids).await.unwrap(), []);
    assert_eq!(get(ledger, replaceable).await.state, State::Accepted);
    first(ledger, unique("free", None, OnConflict::Reject)).await;
}

/// A repeated request is a repetition, and no conflict with itself.
pub async fn a_repetition_is_no_conflict(ledger: &dyn Ledger) {
    for size in [1, 3] {
        let asked = || Submission {
            tasks: (0..size).map(|n| unique(&format!("{size} {n}"), None, OnConflict::Reject)).collect(),
            idempotency: Some(Idempotency { key: format!("key {size}"), fingerprint: [1; 32] }),
            reserve: HOUR,
            group: None,
        };
        let request = asked();
        let ids: Vec<TaskId> = request.tasks.iter().map(|task| task.id).collect();
        assert!(matches!(ledger.record(request).await.unwrap(), Recorded::New { .. }));
        assert_eq!(ledger.record(asked()).await.unwrap(), Recorded::Replayed(ids));
    }
}

/// A task that is run again takes its key back, if it can.
pub async fn a_replay_needs_its_key(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let old = first(ledger, alone(OnConflict::Reject)).await;
    run(ledger, old, worker, discard()).await;
    let new = first(ledger, alone(OnConflict::Reject)).await;
    assert_eq!(ledger.replay(old, Caller::UNKNOWN).await.unwrap(), Replayed::KeyHeld(new));
    assert_eq!(get(ledger, old).await.state, State::Discarded);
    run(ledger, new, worker, complete()).await;
    assert_eq!(ledger.replay(old, Caller::UNKNOWN).await.unwrap(), Replayed::From(State::Discarded));
    assert_eq!(in_the_way(ledger, alone(OnConflict::Reject)).await, old);
}

/// A key is held by a task that is kept.
pub async fn a_pruned_task_holds_nothing(ledger: &dyn Ledger) {
    let id = first(ledger, unique("key", Some(HOUR), OnConflict::Reject)).await;
    run(ledger, id, worker(ledger).await, complete()).await;
    until("the task to be pruned", async || {
        super::prune(ledger, Duration::ZERO, 100).await;
        ledger.get(vec![id]).await.unwrap().is_empty().then_some(())
    })
    .await;
    first(ledger, alone(OnConflict::Reject)).await;
}

/// However many ask at once through however many processes, one holds the key.
pub async fn one_of_all_unique_tasks_stands(one: &dyn Ledger, other: &dyn Ledger) {
    for on_conflict in [OnConflict::Reject, OnConflict::ReturnExisting, OnConflict::ReplaceWaiting] {
        let key = format!("{on_conflict:?}");
        let asked: Vec<NewTask> = (0..40).map(|_| unique(&key, None, on_conflict)).collect();
        let ids: Vec<TaskId> = asked.iter().map(|task| task.id).collect();
        let ledgers = [one, other].into_iter().cycle();
        let answers =
            join_all(asked.into_iter().zip(ledgers).map(|(task, ledger)| ledger.record(submission(vec![task]))));
        let answers: Vec<_> = answers.await.into_iter().map(Result::unwrap).collect();
        let tasks = one.get(ids).await.unwrap();
        let standing: Vec<_> = tasks.iter().filter(|task| !task.state.is_final()).collect();
        assert_eq!(standing.len(), 1, "{tasks:#?}");
        let recorded = if on_conflict == OnConflict::ReplaceWaiting { 40 } else { 1 };
        assert_eq!(tasks.len(), recorded, "{on_conflict:?}");
        let of_it = |answer: &Recorded| match answer {
            Recorded::New { existing, .. } => existing.iter().all(|(_, id)| *id == standing[0].id),
            Recorded::NotUnique(holders) => holders.iter().all(|(_, holder)| holder.id == standing[0].id),
            _ => false,
        };
        assert!(answers.iter().all(of_it), "{answers:?}");
    }
}

/// One thing that happens to the tasks of a few keys.
#[derive(Debug, Clone, Copy)]
enum Act {
    Submit { key: usize, on_conflict: OnConflict },
    Claim { pick: usize },
    Complete { pick: usize },
    Discard { pick: usize },
    Cancel { pick: usize },
    Replay { pick: usize },
}

fn act() -> impl Strategy<Value = Act> {
    let on_conflict =
        prop_oneof![Just(OnConflict::Reject), Just(OnConflict::ReturnExisting), Just(OnConflict::ReplaceWaiting)];
    prop_oneof![
        4 => (0..3usize, on_conflict).prop_map(|(key, on_conflict)| Act::Submit { key, on_conflict }),
        2 => any::<usize>().prop_map(|pick| Act::Claim { pick }),
        1 => any::<usize>().prop_map(|pick| Act::Complete { pick }),
        1 => any::<usize>().prop_map(|pick| Act::Discard { pick }),
        1 => any::<usize>().prop_map(|pick| Act::Cancel { pick }),
        2 => any::<usize>().prop_map(|pick| Act::Replay { pick }),
    ]
}

/// Whatever happens at the same time through two processes: no key has two unfinished tasks, and a submission is
/// refused only where one is.
pub async fn no_key_ever_has_two_unfinished_tasks(handles: &[SharedLedger; 2]) {
    let mut runner = TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
    let history = proptest::collection::vec(proptest::collection::vec((0..2usize, act()), 1..=6), 1..30);
    let handle = Handle::current();
    let outcome = block_in_place(|| runner.run(&history, |steps| handle.block_on(play(handles, steps))));
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

async fn play(handles: &[SharedLedger; 2], steps: Vec<Vec<(usize, Act)>>) -> Result<(), TestCaseError> {
    let case = TaskId::new();
    let holder = worker(&*handles[0]).await;
    let mut ids = Vec::new();
    for step in steps {
        let acts = step.iter().map(|(handle, act)| make(&*handles[*handle], *act, case, &ids, holder));
        let fresh: Vec<TaskId> = join_all(acts).await.into_iter().flatten().collect();
        ids.extend(fresh);
        let tasks = handles[1].get(ids.clone()).await.unwrap();
        let mut unfinished: HashMap<_, Vec<TaskId>> = HashMap::new();
        for task in tasks.iter().filter(|task| !task.state.is_final()) {
            unfinished.entry(task.unique_key.clone()).or_default().push(task.id);
        }
        prop_assert!(unfinished.values().all(|ids| ids.len() == 1), "{unfinished:#?} after {step:?}");
        for n in 0..3 {
            let probe = unique(&format!("{case} {n}"), None, OnConflict::Reject);
            let id = probe.id;
            let expected = unfinished.get(&probe.unique.as_ref().map(|unique| unique.key.clone()));
            match (handles[0].record(submission(vec![probe])).await.unwrap(), expected) {
                (Recorded::NotUnique(holders), Some(ids)) => prop_assert_eq!(holders[0].1.id, ids[0]),
                (Recorded::New { .. }, None) => {
                    handles[0].cancel(vec![id], "a probe".to_owned(), Caller::UNKNOWN).await.unwrap();
                }
                (recorded, expected) => prop_assert!(false, "{recorded:?} where {expected:?} stands"),
            }
        }
    }
    Ok(())
}

/// Answers the id of what was submitted.
async fn make(ledger: &dyn Ledger, act: Act, case: TaskId, ids: &[TaskId], holder: WorkerId) -> Option<TaskId> {
    let picked = |pick: usize| ids.get(pick.checked_rem(ids.len())?).copied();
    match act {
        Act::Submit { key, on_conflict } => {
            let task = unique(&format!("{case} {key}"), None, on_conflict);
            let id = task.id;
            ledger.record(submission(vec![task])).await.unwrap();
            return Some(id);
        }
        Act::Claim { pick } => {
            super::claim(ledger, picked(pick)?, holder).await;
        }
        Act::Complete { pick } | Act::Discard { pick } => {
            let id = picked(pick)?;
            let fence = ledger.get(vec![id]).await.unwrap().pop()?.fence;
            let end = if matches!(act, Act::Complete { .. }) { complete() } else { discard() };
            settle(ledger, id, fence, end).await;
        }
        Act::Cancel { pick } => {
            ledger.cancel(vec![picked(pick)?], "not wanted".to_owned(), Caller::UNKNOWN).await.unwrap();
        }
        Act::Replay { pick } => {
            ledger.replay(picked(pick)?, Caller::UNKNOWN).await.unwrap();
        }
    }
    None
}
