//! Two handles of one ledger, as two processes have them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use futures::future::join_all;
use futures::join;

use super::{
    HOUR, cancelled, claim, claim_by, complete, get, granted, mark_queued, new_task, queue, recorded, refused, retry,
    run, schedule, settle, until, worker, worker_for,
};
use crate::ledger::{
    Caller, Changed, Claim, Edit, Edited, Fired, GivenUp, Idempotency, Ledger, NextTick, Recorded, Refusal, Renewal,
    Renewed, ScheduleChange, Settled, Submission,
};
use crate::state::State;
use crate::task::{Fence, Json, TaskId, WorkerId};

/// Both ask for the same tasks at the same time, in different order.
pub async fn one_of_all_claims_is_granted(here: &dyn Ledger, there: &dyn Ledger) {
    let ids = recorded(here, 60, |_| {}).await;
    let (one, other) = join!(worker(here), worker(there));
    let claims = join!(
        join_all(ids.iter().map(|id| claim(here, *id, one))),
        join_all(ids.iter().rev().map(|id| claim(there, *id, other)))
    );
    let won = |claims: &[Claim]| claims.iter().filter(|claim| matches!(claim, Claim::Granted(_))).count();
    assert_eq!(won(&claims.0) + won(&claims.1), ids.len());
    for id in ids {
        let task = get(there, id).await;
        assert_eq!((task.state, task.fence.0, task.attempt), (State::Running, 1, 1));
    }
}

/// A client repeats its request to another producer: the tasks of the first are the tasks of both.
pub async fn one_of_all_equal_requests_is_recorded(here: &dyn Ledger, there: &dyn Ledger) {
    for size in [1, 5] {
        let request = |key: usize| Submission {
            tasks: std::iter::repeat_with(new_task).take(size).collect(),
            idempotency: Some(Idempotency { key: format!("{size} {key}"), fingerprint: [3; 32] }),
            reserve: HOUR,
            group: None,
        };
        let answers = join!(
            join_all((0..20).map(|key| here.record(request(key)))),
            join_all((0..20).rev().map(|key| there.record(request(key))))
        );
        for (one, other) in answers.0.into_iter().zip(answers.1.into_iter().rev()) {
            let new = |recorded: &Recorded| matches!(recorded, Recorded::New { .. });
            let (one, other) = (one.unwrap(), other.unwrap());
            assert!(new(&one) != new(&other), "{one:?} {other:?}");
        }
    }
}

/// Two relays at work: each due task goes to one of them.
pub async fn relays_share_what_is_due(here: &dyn Ledger, there: &dyn Ledger) {
    let ids = recorded(here, 50, |_| {}).await;
    let holder = worker(here).await;
    for &id in &ids {
        run(here, id, holder, retry(Duration::ZERO, "again")).await;
    }
    let mut fetched = Vec::new();
    for _ in 0..20 {
        let (one, other) = join!(here.fetch_due(10, HOUR), there.fetch_due(10, HOUR));
        fetched.extend(one.unwrap().into_iter().chain(other.unwrap()).map(|due| due.id));
    }
    fetched.sort_unstable();
    assert_eq!(fetched, ids);
}

/// What one process does to a lease binds the other.
pub async fn a_lease_ended_by_one_is_lost_for_the_other(here: &dyn Ledger, there: &dyn Ledger) {
    let ids = recorded(here, 2, |_| {}).await;
    let brief = worker_for(here, Duration::from_secs(2)).await;
    let fence = granted(here, ids[0], brief).await.fence;
    let found = until("the lease's end", async || there.abandoned(1).await.unwrap().pop()).await;
    assert_eq!((found.id, found.fence), (ids[0], fence));
    let renewal = Renewal { worker: brief, ttl: HOUR, running: 1, heads: Vec::new() };
    assert_eq!(here.renew(renewal).await.unwrap(), Renewed::Lost);
    assert_eq!(refused(here, ids[1], brief).await, Refusal::LeaseLost);
    assert_eq!(settle(there, ids[0], fence, retry(Duration::ZERO, "its worker died")).await, Settled::Applied);
    assert_eq!(settle(here, ids[0], fence, complete()).await, Settled::Fenced);
}

/// A cancellation, a claim and a completion at the same time: whatever comes first, what was told is true.
pub async fn cancel_claim_and_completion_leave_one_truth(here: &dyn Ledger, there: &dyn Ledger) {
    let worker = worker(here).await;
    let mut seen = std::collections::BTreeSet::new();
    for (turn, id) in recorded(here, 600, |_| {}).await.into_iter().enumerate() {
        // A machine may be such that one of them is late for long.
        if turn >= 60 && seen.contains(&State::Accepted) {
            break;
        }
        let run = async {
            match claim(here, id, worker).await {
                Claim::Granted(granted) => Some(settle(here, id, granted.fence, complete()).await),
                Claim::Refused(reason) => {
                    assert_eq!(reason, Refusal::Finished);
                    None
                }
            }
        };
        let cancel = cancelled(there, id, "asked");
        let (settled, before) = if turn % 2 == 0 {
            tokio::join!(run, cancel)
        } else {
            let (before, settled) = tokio::join!(cancel, run);
            (settled, before)
        };
        let task = get(there, id).await;
        let expected = match before {
            State::Accepted => (None, State::Cancelled, 0),
            State::Running | State::Completed => (Some(Settled::Applied), State::Completed, 1),
            other => panic!("{other}"),
        };
        assert_eq!((settled, task.state, task.attempt), expected, "cancelled when it was {before}");
        seen.insert(before);
    }
    assert!(seen.contains(&State::Accepted), "some came too early to start: {seen:?}");
}

/// Everything at once through both handles, every task offered to both: each starts once and completes.
pub async fn every_task_runs_once_under_load(here: &dyn Ledger, there: &dyn Ledger) {
    let starts: Mutex<BTreeMap<TaskId, u32>> = Mutex::default();
    let (one, other) = join!(worker(here), worker(there));
    let ids: Vec<TaskId> = join_all((0..40).map(|_| recorded(here, 10, |_| {}))).await.concat();
    let work = async |ledger: &dyn Ledger, worker: WorkerId, id: TaskId| {
        if let Claim::Granted(grant) = claim(ledger, id, worker).await {
            *starts.lock().unwrap().entry(id).or_default() += 1;
            assert_eq!(settle(ledger, id, grant.fence, complete()).await, Settled::Applied);
        }
    };
    let marks = join_all(
        ids.chunks(7).map(|some| mark_queued(here, some.iter().map(|id| (*id, crate::task::Fence(0))).collect())),
    );
    join!(
        marks,
        join_all(ids.iter().map(|id| work(here, one, *id))),
        join_all(ids.iter().rev().map(|id| work(there, other, *id)))
    );
    let starts = starts.into_inner().unwrap();
    assert_eq!(starts.len(), ids.len());
    assert!(starts.values().all(|count| *count == 1), "{starts:?}");
    let tasks = there.get(ids.clone()).await.unwrap();
    assert!(tasks.len() == ids.len() && tasks.iter().all(|task| task.state == State::Completed));
    assert_eq!(there.next_due().await.unwrap(), None);
}

/// Claims through both are under way when one of them pauses the queue: what did not run when that was answered waits.
pub async fn nothing_starts_after_a_pause_was_answered(here: &dyn Ledger, there: &dyn Ledger) {
    let default = queue("default");
    let (one, other) = join!(worker(here), worker(there));
    let running = async |ids: &[TaskId]| -> BTreeSet<TaskId> {
        let tasks = here.get(ids.to_vec()).await.unwrap();
        tasks.into_iter().filter(|task| task.state == State::Running).map(|task| task.id).collect()
    };
    for round in 0..20 {
        let ids = recorded(here, 60, |_| {}).await;
        let (begin, begun) = tokio::sync::oneshot::channel();
        let begin = Mutex::new(Some(begin));
        let start = async |ledger: &dyn Ledger, worker: WorkerId, id: TaskId| {
            let answer = claim(ledger, id, worker).await;
            // The pause comes while the others are on their way.
            let _ = begin.lock().unwrap().take().map(|begin| begin.send(()));
            answer
        };
        let pause = async {
            begun.await.unwrap();
            here.set_paused(default.clone(), true, Caller::UNKNOWN).await.unwrap();
            running(&ids).await
        };
        let (at_the_answer, ..) = join!(
            pause,
            join_all(ids.iter().step_by(2).map(|id| start(here, one, *id))),
            join_all(ids.iter().skip(1).step_by(2).map(|id| start(there, other, *id)))
        );
        assert_eq!(running(&ids).await, at_the_answer, "round {round}");
        assert_eq!(there.paused_queues().await.unwrap(), std::slice::from_ref(&default));
        there.set_paused(default.clone(), false, Caller::UNKNOWN).await.unwrap();
    }
}

/// Ten of each process fire the same ticks at the same moment: each tick has one task, and none is left out.
pub async fn every_tick_is_fired_once_by_all(here: &dyn Ledger, there: &dyn Ledger) {
    schedule::made(here, "a", 100).await;
    let (first, last) = (100, 125);
    let fire = async |ledger: &dyn Ledger| {
        let mut won = 0;
        loop {
            let seen = schedule::now(ledger, "a").await;
            let at = seen.next_at.unwrap().as_second();
            if at > last {
                return won;
            }
            match ledger.fire(schedule::firing(&seen, &[at], at + 1)).await.unwrap() {
                Fired::Recorded(1) => won += 1,
                Fired::Overtaken => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let won = join!(join_all((0..10).map(|_| fire(here))), join_all((0..10).map(|_| fire(there))));
    let won: i64 = won.0.into_iter().chain(won.1).sum();
    assert_eq!(won, last - first + 1);
    let tasks = schedule::tasks(there, "a").await;
    let ticks: BTreeSet<_> = tasks.iter().map(|task| task.tags["tick"].clone()).collect();
    let expected: BTreeSet<_> = (first..=last).map(|second| schedule::tick(second).to_string()).collect();
    assert_eq!((tasks.len(), &ticks), (expected.len(), &expected));
    assert_eq!(schedule::now(here, "a").await.ticks.fired, won);
}

/// A definition is replaced while its tick is fired: the tick is of one definition, and the schedule goes on by the new one.
pub async fn one_of_a_change_and_a_firing_comes_first(here: &dyn Ledger, there: &dyn Ledger) {
    for round in 0..20 {
        let text = format!("s{round}");
        let read = schedule::made(here, &text, 100).await;
        let stays = round % 2 == 0;
        let mut definition = schedule::definition();
        definition.task.tags.insert("of".to_owned(), "the new one".to_owned());
        let next = if stays { NextTick::Stays } else { NextTick::At(schedule::tick(1_000)) };
        let given_up = (!stays).then_some(GivenUp { tick: schedule::tick(100), ticks: 1 });
        let change = schedule::anew(&text, definition, next);
        let change = ScheduleChange { replaces: Some(read.revision), given_up, ..change };
        let (fired, changed) = join!(here.fire(schedule::firing(&read, &[100], 110)), there.change_schedule(change));
        let applied = matches!(changed.unwrap(), Changed::Applied(_));
        let seen = schedule::now(here, &text).await;
        let count = match fired.unwrap() {
            Fired::Recorded(1) => 1,
            Fired::Overtaken => 0,
            other => panic!("{other:?}"),
        };
        assert!(applied || !stays && count == 1, "what gives up a tick is not written once that was fired");
        let next = if stays || !applied { 100 + 10 * count as i64 } else { 1_000 };
        assert_eq!(seen.next_at, Some(schedule::tick(next)), "a change takes no firing back");
        assert_eq!(seen.ticks.missed, i64::from(!stays && applied), "each tick is fired or counted");
        assert_eq!(schedule::tasks(there, &text).await.len(), count);
        assert_eq!(seen.ticks.fired, count as i64);
    }
}

/// Whichever comes first: the message of before starts the task and it is not edited, or it is edited and not started.
pub async fn an_edit_and_a_claim_come_one_after_the_other(here: &dyn Ledger, there: &dyn Ledger) {
    let holder = worker(here).await;
    for id in recorded(here, 60, |_| {}).await {
        let args = Json::parse("[\"new\"]".to_owned()).unwrap();
        let edit = Edit { args: Some(args.clone()), ..Edit::default() };
        let (claimed, edited) =
            join!(claim_by(here, id, holder, Some(Fence(0))), there.edit(id, edit, Caller::UNKNOWN));
        let task = get(there, id).await;
        match (edited.unwrap(), claimed) {
            (Edited::From(State::Accepted), Claim::Refused(Refusal::Outdated)) => {
                assert_eq!((task.state, task.args), (State::Scheduled, args));
            }
            (Edited::From(State::Running), Claim::Granted(granted)) => {
                assert_eq!((task.state, task.fence, task.args), (State::Running, granted.fence, new_task().args));
            }
            other => panic!("{other:?}"),
        }
    }
}
