//! Claiming: once, under a fence that rises, by a worker that lives.

use std::time::Duration;

use futures::future::join_all;

use super::{
    HOUR, belief, claim, complete, discard, get, granted, kind, mark_queued, new_task, one, recorded, refused, request,
    retry, run, settle, submission, until, worker, worker_for,
};
use crate::clock::{timestamp, wall_ms};
use crate::ledger::{Belief, Caller, Claim, ClaimRequest, Edit, Edited, Failure, Ledger, Refusal, Settled, Transition};
use crate::state::State;
use crate::task::{ErrorKind, Fence, Guarantee, Json, TaskId, WorkerId};

/// The grant holds what the run needs to know, and the row says who runs it.
pub async fn a_grant_tells_what_the_worker_needs(ledger: &dyn Ledger) {
    let id = recorded(ledger, 1, |task| task.timeout = Some(Duration::from_secs(9))).await[0];
    mark_queued(ledger, vec![(id, Fence(0))]).await.unwrap();
    let holder = worker(ledger).await;
    let request = ClaimRequest { guarantee: Guarantee::AtMostOnce, ..request(ledger, id, holder).await };
    let Claim::Granted(grant) = ledger.claim(request).await.unwrap() else { panic!("the task is free") };
    let task = get(ledger, id).await;
    assert_eq!((grant.fence, grant.attempt, grant.max_attempts), (Fence(1), 1, 3));
    assert_eq!(
        (grant.timeout, grant.first_due_at, grant.run_at),
        (Some(Duration::from_secs(9)), task.run_at, task.run_at)
    );
    assert!(grant.queued_at.is_some_and(|at| at >= task.created_at && at <= grant.started_at), "{grant:?}");
    assert_eq!((task.state, task.fence, task.attempt), (State::Running, Fence(1), 1));
    assert_eq!((task.worker_id, task.started_at), (Some(holder), Some(grant.started_at)));
}

/// Not from its recording where it was to wait, nor from a later attempt's time; a person's word begins it anew.
pub async fn an_age_counts_from_when_a_task_was_first_due(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let soon = timestamp(wall_ms() + 300);
    let id = recorded(ledger, 1, |task| task.run_at = Some(soon)).await[0];
    let claimable = async || match claim(ledger, id, holder).await {
        Claim::Granted(grant) => Some(grant),
        Claim::Refused(_) => None,
    };
    let first = until("the task to be due", claimable).await;
    assert_eq!((first.first_due_at, first.run_at), (soon, soon));
    for outcome in [retry(Duration::from_millis(20), "again"), Transition::Snooze { delay: Duration::from_millis(20) }]
    {
        assert_eq!(settle(ledger, id, get(ledger, id).await.fence, outcome).await, Settled::Applied);
        let later = until("the next attempt to be due", claimable).await;
        assert!(later.first_due_at == soon && later.run_at > soon, "{later:?}");
    }
    assert_eq!(settle(ledger, id, get(ledger, id).await.fence, discard()).await, Settled::Applied);
    ledger.replay(id, Caller::UNKNOWN).await.unwrap();
    let anew = granted(ledger, id, holder).await;
    assert!(anew.first_due_at == anew.run_at && anew.run_at > soon, "{anew:?}");
    let again = retry(HOUR, "again");
    assert_eq!(settle(ledger, id, anew.fence, again).await, Settled::Applied);
    let edit = Edit { run_at: Some(timestamp(wall_ms() + 20)), ..Edit::default() };
    assert_eq!(ledger.edit(id, edit, Caller::UNKNOWN).await.unwrap(), Edited::From(State::Retryable));
    let edited = until("the edited time", claimable).await;
    assert!(edited.first_due_at == edited.run_at && edited.run_at > anew.run_at, "{edited:?}");
}

/// Fifty claims of one task at the same time, five workers: one grant.
pub async fn one_of_fifty_claims_is_granted(ledger: &dyn Ledger) {
    let mut workers = Vec::new();
    for _ in 0..5 {
        workers.push(worker(ledger).await);
    }
    let ids = recorded(ledger, 4, |_| {}).await;
    let asking = (0..50).flat_map(|turn| ids.iter().map(move |&id| (id, turn)));
    let claims = join_all(asking.map(|(id, turn)| claim(ledger, id, workers[turn % workers.len()]))).await;
    let grants = claims.iter().filter(|claim| matches!(claim, Claim::Granted(_))).count();
    assert_eq!(grants, ids.len());
    assert!(
        claims.iter().all(|claim| matches!(claim, Claim::Granted(_) | Claim::Refused(Refusal::Held))),
        "{claims:?}"
    );
    for id in ids {
        assert_eq!(get(ledger, id).await.fence, Fence(1));
    }
}

/// No two runs of a task have the same fence, whether or not they cost an attempt.
pub async fn the_fence_rises_with_every_claim(ledger: &dyn Ledger) {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let outcomes =
        [retry(Duration::ZERO, "again"), Transition::Snooze { delay: Duration::ZERO }, Transition::Interrupt];
    let mut seen = Vec::new();
    for outcome in outcomes {
        seen.push(run(ledger, id, worker, outcome).await);
    }
    seen.push(granted(ledger, id, worker).await);
    let fences: Vec<i64> = seen.iter().map(|grant| grant.fence.0).collect();
    assert!(fences.windows(2).all(|pair| pair[0] < pair[1]), "{fences:?}");
    assert_eq!(seen.iter().map(|grant| grant.attempt).collect::<Vec<_>>(), [1, 2, 2, 2]);
}

/// A task waits for its time, whoever asks, and can be had then.
pub async fn a_task_is_not_claimed_before_its_time(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let scheduled = recorded(ledger, 1, |task| task.run_at = Some(timestamp(wall_ms() + 3_600_000))).await[0];
    assert_eq!(refused(ledger, scheduled, worker).await, Refusal::NotDue);
    let retryable = one(ledger).await;
    run(ledger, retryable, worker, retry(HOUR, "later")).await;
    assert_eq!(refused(ledger, retryable, worker).await, Refusal::NotDue);

    let mut soon = new_task();
    soon.run_at = Some(timestamp(wall_ms() + 300));
    let (id, run_at) = (soon.id, soon.run_at);
    ledger.record(submission(vec![soon])).await.unwrap();
    let grant = until("a scheduled task's time", async || match claim(ledger, id, worker).await {
        Claim::Granted(grant) => Some(grant),
        Claim::Refused(reason) => {
            assert_eq!(reason, Refusal::NotDue);
            None
        }
    });
    assert!(Some(grant.await.started_at) >= run_at);
}

/// A worker that never entered, whose lease ran out, or that retired gets nothing.
pub async fn a_claim_needs_a_living_lease(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    assert_eq!(refused(ledger, id, WorkerId::new()).await, Refusal::LeaseLost);
    let retired = worker(ledger).await;
    ledger.retire(retired).await.unwrap();
    assert_eq!(refused(ledger, id, retired).await, Refusal::LeaseLost);
    let brief = worker_for(ledger, Duration::from_millis(50)).await;
    until("a lease's end", async || ledger.workers().await.unwrap().is_empty().then_some(())).await;
    assert_eq!(refused(ledger, id, brief).await, Refusal::LeaseLost);
    assert_eq!(get(ledger, id).await.state, State::Accepted);
}

/// Unknown, held and finished are told apart.
pub async fn a_refusal_says_why(ledger: &dyn Ledger) {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    assert_eq!(refused(ledger, TaskId::new(), worker).await, Refusal::Unknown);
    let grant = granted(ledger, id, worker).await;
    assert_eq!(refused(ledger, id, worker).await, Refusal::Held);
    assert_eq!(settle(ledger, id, grant.fence, complete()).await, Settled::Applied);
    assert_eq!(refused(ledger, id, worker).await, Refusal::Finished);
}

/// A message can arrive before its publisher has written that it was sent: the task is claimed all the same.
pub async fn a_delivery_may_overtake_the_mark(ledger: &dyn Ledger) {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let grant = granted(ledger, id, worker).await;
    assert_eq!(grant.queued_at, None);
    mark_queued(ledger, vec![(id, Fence(0))]).await.unwrap();
    assert_eq!(get(ledger, id).await.state, State::Running);
    assert_eq!(settle(ledger, id, grant.fence, complete()).await, Settled::Applied);
}

/// A worker can ask for a task on the condition that few crashes have hit it.
pub async fn a_suspect_is_not_granted_unasked(ledger: &dyn Ledger) {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let error = Failure { message: String::new(), kind: ErrorKind::Crash };
    run(ledger, id, worker, Transition::Retry { delay: Duration::ZERO, error }).await;
    let request = ClaimRequest { crashes_below: 1, ..request(ledger, id, worker).await };
    assert_eq!(ledger.claim(request.clone()).await.unwrap(), Claim::Refused(Refusal::Suspect));
    let claim = ledger.claim(ClaimRequest { crashes_below: 2, ..request.clone() }).await.unwrap();
    assert!(matches!(claim, Claim::Granted(_)), "{claim:?}");
    assert_eq!(ledger.claim(request).await.unwrap(), Claim::Refused(Refusal::Held));
}

/// Anybody who may publish can say anything. What is not true starts nothing and changes nothing, and the task's own message
/// is as good as before.
pub async fn a_message_that_says_what_is_not_true_starts_nothing(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let args = Json::of(&"new").unwrap();
    let old = belief(ledger, id).await;
    ledger.edit(id, Edit { args: Some(args), ..Edit::default() }, Caller::UNKNOWN).await.unwrap();
    let truth = belief(ledger, id).await;
    let far = Some(Fence(1 << 62));
    let lies = [
        (Belief { kind: kind("pay"), ..truth.clone() }, Refusal::WrongKind),
        (Belief { kind: kind("pay"), published: None, ..truth.clone() }, Refusal::WrongKind),
        (Belief { published: far, ..truth.clone() }, Refusal::WrongFence),
        (Belief { published: far, ..old.clone() }, Refusal::WrongFence),
        (Belief { args: old.args, ..truth.clone() }, Refusal::WrongArgs),
        (old, Refusal::Outdated),
    ];
    let before = get(ledger, id).await;
    for (lie, refusal) in lies {
        let request = ClaimRequest { belief: lie.clone(), ..request(ledger, id, holder).await };
        assert_eq!(ledger.claim(request).await.unwrap(), Claim::Refused(refusal), "{lie:?}");
        assert_eq!(ledger.put_back(id, lie.clone(), HOUR).await.unwrap(), Some(refusal), "{lie:?}");
        assert_eq!(get(ledger, id).await, before, "{lie:?}");
    }
    let unknown = ledger.put_back(TaskId::new(), truth.clone(), HOUR).await.unwrap();
    assert_eq!(unknown, Some(Refusal::Unknown));
    assert_eq!(
        ledger.put_back(id, Belief { published: None, ..truth }, HOUR).await.unwrap(),
        None,
        "it does not say of when"
    );
    granted(ledger, id, holder).await;
}
