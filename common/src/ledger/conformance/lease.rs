//! Leases: a worker lives as long as the ledger's clock says, and not a moment longer.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{
    HOUR, complete, get, granted, kind, one, queue, recorded, refused, request, retry, settle, until, worker,
    worker_for, worker_record,
};
use crate::ledger::{
    Abandoned, Claim, ClaimRequest, GoneWorker, Ledger, RUNS_TOLD_MAX, Refusal, Renewal, Renewed, Run, Settled,
    WorkerEnd, WorkerRecord,
};
use crate::state::State;
use crate::task::{Fence, Guarantee, TaskId, WorkerId};

async fn renew(ledger: &dyn Ledger, worker: WorkerId, ttl: Duration) -> Renewed {
    ledger.renew(Renewal { worker, ttl, running: 1, heads: Vec::new() }).await.unwrap()
}

async fn abandoned_ids(ledger: &dyn Ledger) -> Vec<TaskId> {
    ledger.abandoned(100).await.unwrap().iter().map(|task| task.id).collect()
}

/// A task is abandoned when its own worker's lease has ended, and its worker's only.
pub async fn tasks_are_abandoned_after_the_lease_and_not_before(ledger: &dyn Ledger) {
    let [steady, lost] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    granted(ledger, steady, worker(ledger).await).await;
    let ttl = Duration::from_secs(2);
    let began = Instant::now();
    let brief = worker_for(ledger, ttl).await;
    granted(ledger, lost, brief).await;
    let found = until("the end of a lease", async || {
        let found = abandoned_ids(ledger).await;
        (!found.is_empty()).then_some(found)
    });
    assert_eq!(found.await, [lost]);
    // Both clocks count milliseconds, and round.
    assert!(began.elapsed() + Duration::from_millis(2) >= ttl, "abandoned after {:?}", began.elapsed());
    assert_eq!(get(ledger, lost).await.state, State::Running, "finding it changes nothing");
    assert_eq!(abandoned_ids(ledger).await, [lost], "it is found until somebody settles it");
}

/// A renewal counts from when it is made.
pub async fn a_renewed_lease_lives_on(ledger: &dyn Ledger) {
    let ttl = Duration::from_secs(3);
    let brief = worker_for(ledger, ttl).await;
    let first_end = Instant::now() + ttl;
    let [id, next] = recorded(ledger, 2, |_| {}).await[..] else { panic!("two tasks") };
    granted(ledger, id, brief).await;
    assert_eq!(renew(ledger, brief, HOUR).await, Renewed::Held);
    sleep_until(first_end).await;
    assert_eq!(abandoned_ids(ledger).await, []);
    assert_eq!(renew(ledger, brief, HOUR).await, Renewed::Held);
    granted(ledger, next, brief).await;
}

/// A lease that has ended has ended for good, whether or not anybody noticed.
pub async fn an_ended_lease_cannot_be_renewed(ledger: &dyn Ledger) {
    let unnoticed = worker_for(ledger, Duration::from_millis(100)).await;
    until("the lease's end", async || ledger.workers().await.unwrap().is_empty().then_some(())).await;
    assert_eq!(renew(ledger, unnoticed, HOUR).await, Renewed::Lost);

    let id = one(ledger).await;
    let noticed = worker_for(ledger, Duration::from_secs(2)).await;
    granted(ledger, id, noticed).await;
    until("the lease's end to be noticed", async || (abandoned_ids(ledger).await == [id]).then_some(())).await;
    for _ in 0..2 {
        assert_eq!(renew(ledger, noticed, HOUR).await, Renewed::Lost);
    }
    assert_eq!(abandoned_ids(ledger).await, [id]);
    assert_eq!(renew(ledger, WorkerId::new(), HOUR).await, Renewed::Lost, "a worker that never entered");
}

/// A worker that says good-bye need not be waited for.
pub async fn retiring_abandons_at_once(ledger: &dyn Ledger) {
    let (id, leaving) = (one(ledger).await, worker(ledger).await);
    granted(ledger, id, leaving).await;
    assert_eq!(abandoned_ids(ledger).await, []);
    ledger.retire(leaving).await.unwrap();
    ledger.retire(leaving).await.unwrap();
    assert_eq!(abandoned_ids(ledger).await, [id]);
    assert_eq!(renew(ledger, leaving, HOUR).await, Renewed::Lost);
    assert_eq!(refused(ledger, one(ledger).await, leaving).await, Refusal::LeaseLost);
    assert_eq!(ledger.workers().await.unwrap(), []);
}

/// The rescue has all it needs to decide.
pub async fn an_abandoned_task_is_told_in_full(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 4, |task| {
        (task.kind, task.queue, task.max_attempts) = (kind("pay.out"), queue("payments"), 7);
    });
    let ids = ids.await;
    for &id in &ids {
        let request = ClaimRequest { guarantee: Guarantee::AtMostOnce, ..request(ledger, id, holder).await };
        assert!(matches!(ledger.claim(request).await.unwrap(), Claim::Granted(_)));
    }
    ledger.retire(holder).await.unwrap();
    let mut found = ledger.abandoned(100).await.unwrap();
    found.sort_by_key(|task| task.id);
    let expected = ids.iter().map(|&id| Abandoned {
        id,
        kind: kind("pay.out"),
        queue: queue("payments"),
        fence: Fence(1),
        worker: holder,
        attempt: 1,
        max_attempts: 7,
        crashes: 0,
        guarantee: Guarantee::AtMostOnce,
        cancel_requested: false,
        lease_ended: None,
    });
    for task in &mut found {
        let ago = task.lease_ended.take();
        assert!(ago.is_none_or(|ago| ago < HOUR), "{ago:?}");
    }
    assert_eq!(found, expected.collect::<Vec<_>>());
    assert_eq!(ledger.abandoned(3).await.unwrap().len(), 3, "bounded");
}

/// Two rescues and the old holder settle the same run: one of them counts.
pub async fn the_old_holder_of_a_rescued_task_is_fenced(ledger: &dyn Ledger) {
    let (id, holder) = (one(ledger).await, worker(ledger).await);
    let fence = granted(ledger, id, holder).await.fence;
    ledger.retire(holder).await.unwrap();
    let found = ledger.abandoned(1).await.unwrap().pop().unwrap();
    assert_eq!(found.fence, fence);
    assert_eq!(settle(ledger, id, fence, retry(Duration::ZERO, "its worker died")).await, Settled::Applied);
    assert_eq!(settle(ledger, id, fence, retry(Duration::ZERO, "its worker died")).await, Settled::Fenced);
    assert_eq!(settle(ledger, id, fence, complete()).await, Settled::Fenced);
    assert_eq!(abandoned_ids(ledger).await, []);
    let next = granted(ledger, id, worker(ledger).await).await;
    assert_eq!((next.fence, next.attempt), (Fence(fence.0 + 1), 2));
    assert_eq!(settle(ledger, id, fence, complete()).await, Settled::Fenced);
    assert_eq!(get(ledger, id).await.state, State::Running);
}

/// The workers whose lease is alive, as they described themselves.
pub async fn live_workers_are_listed(ledger: &dyn Ledger) {
    let queues = vec![queue("default"), queue("mail")];
    let kinds = vec![kind("a.b"), kind("c")];
    let record = WorkerRecord { queues, kinds, name: Some("blau".to_owned()), pid: 4_711, ..worker_record() };
    ledger.register(record.clone(), HOUR).await.unwrap();
    let other = worker(ledger).await;
    ledger.retire(other).await.unwrap();
    let renewal = Renewal { worker: record.id, ttl: HOUR, running: 5, heads: Vec::new() };
    assert_eq!(ledger.renew(renewal).await.unwrap(), Renewed::Held);
    let [found] = &ledger.workers().await.unwrap()[..] else { panic!("one worker lives") };
    assert_eq!((found.id, &found.host, &found.version), (record.id, &record.host, &record.version));
    assert_eq!((&found.queues, &found.kinds), (&record.queues, &record.kinds));
    assert_eq!((found.concurrency, found.running), (8, 5));
    assert_eq!((found.name.as_deref(), found.pid), (Some("blau"), Some(4_711)));
    assert!((0..20_000).contains(&found.lease_age_ms), "{found:?}");
}

/// Of each worker its own runs, from the grant to the outcome.
pub async fn what_runs_under_a_worker_is_told(ledger: &dyn Ledger) {
    let [one, other] = [worker(ledger).await, worker(ledger).await];
    let [first, second, theirs, _waits] = recorded(ledger, 4, |_| {}).await[..] else { panic!("four tasks") };
    let running = async |worker| {
        let told = ledger.running(worker).await.unwrap().into_iter();
        told.map(|task| (task.id, task.fence, task.worker)).collect::<BTreeSet<_>>()
    };
    assert_eq!(running(one).await, BTreeSet::new());
    let [a, b] = [granted(ledger, first, one).await.fence, granted(ledger, second, one).await.fence];
    let c = granted(ledger, theirs, other).await.fence;
    assert_eq!(running(one).await, [(first, a, one), (second, b, one)].into());
    assert_eq!(running(other).await, [(theirs, c, other)].into());
    settle(ledger, first, a, complete()).await;
    settle(ledger, second, b, retry(HOUR, "again")).await;
    assert_eq!(running(one).await, BTreeSet::new());
    ledger.retire(other).await.unwrap();
    assert_eq!(running(other).await, [(theirs, c, other)].into(), "until somebody has taken it over");
}

/// Each run with its task, the longest first, and of no more than is shown of one worker.
pub async fn what_workers_run_is_told(ledger: &dyn Ledger) {
    let (busy, idle) = (worker(ledger).await, worker(ledger).await);
    let fleet = ledger.fleet().await.unwrap();
    assert_eq!((fleet.workers.len(), fleet.runs.len(), fleet.gone.len()), (2, 0, 0));
    let ids = recorded(ledger, RUNS_TOLD_MAX + 1, |_| {}).await;
    let mut fences = Vec::new();
    for id in &ids {
        fences.push(granted(ledger, *id, busy).await.fence);
    }
    let fleet = ledger.fleet().await.unwrap();
    assert_eq!((fleet.runs.len(), fleet.runs[&busy].len()), (1, RUNS_TOLD_MAX));
    assert_eq!(fleet.workers.iter().map(|worker| worker.id).collect::<Vec<_>>(), [busy, idle]);
    assert!(fleet.runs[&busy].is_sorted_by_key(|run| run.since));
    settle(ledger, ids[0], fences[0], retry(Duration::ZERO, "again")).await;
    for (id, fence) in ids.iter().zip(&fences).skip(1) {
        settle(ledger, *id, *fence, complete()).await;
    }
    granted(ledger, ids[0], idle).await;
    let task = get(ledger, ids[0]).await;
    let run = Run { task_id: ids[0], kind: task.kind, attempt: 2, since: task.started_at.unwrap() };
    assert_eq!(ledger.fleet().await.unwrap().runs, [(idle, vec![run])].into());
}

/// Also before anybody has declared it dead; the newest first, and who lost its lease has not stopped.
pub async fn who_went_is_told_with_how(ledger: &dyn Ledger) {
    let (lives, stops) = (worker(ledger).await, worker_record());
    let lost = WorkerRecord { name: Some("red".to_owned()), ..worker_record() };
    ledger.register(stops.clone(), HOUR).await.unwrap();
    ledger.retire(stops.id).await.unwrap();
    ledger.retire(stops.id).await.unwrap();
    ledger.register(lost.clone(), Duration::from_millis(1)).await.unwrap();
    let told = async || ledger.fleet().await.unwrap().gone;
    let silent = until("the lease to end", async || Some(told().await).filter(|gone| gone.len() == 2)).await;
    assert_eq!((silent[0].id, silent[0].ended_at, silent[0].ended), (lost.id, None, Some(WorkerEnd::LeaseEnded)));
    ledger.abandoned(10).await.unwrap();
    ledger.retire(lost.id).await.unwrap();
    let gone = told().await;
    let seen = |gone: &GoneWorker| (gone.id, gone.name.clone(), gone.host.clone(), gone.pid, gone.ended);
    let expected =
        |record: &WorkerRecord, end| (record.id, record.name.clone(), record.host.clone(), Some(record.pid), Some(end));
    assert_eq!(seen(&gone[0]), expected(&lost, WorkerEnd::LeaseEnded));
    assert_eq!(seen(&gone[1]), expected(&stops, WorkerEnd::Stopped));
    assert!(gone.iter().all(|gone| gone.started_at <= gone.ended_at.unwrap()), "{gone:?}");
    assert_eq!(ledger.workers().await.unwrap().iter().map(|worker| worker.id).collect::<Vec<_>>(), [lives]);
    super::prune(ledger, HOUR, 10).await;
    assert_eq!(told().await.len(), 2, "they are kept for an hour");
}
