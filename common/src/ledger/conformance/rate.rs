//! How often tasks start, and when they are let go for that.

use std::time::Duration;

use futures::future::join_all;

use super::limit::{due, release, set};
use super::{claim, complete, recorded, refused, run, until, worker};
use crate::ledger::{Claim, Ledger, Refusal};
use crate::limit::{Bounds, Rate};

/// No more start than the rate lets, the others wait for as long as it tells, and a rest gives a burst.
pub async fn a_rate_spreads_the_starts(ledger: &dyn Ledger) {
    let rate = Rate { tasks: 2, per_ms: 3_600_000, burst: 3 };
    set(ledger, "kind:test.work", Bounds { rate: Some(rate), ..Bounds::default() }).await;
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 5, |_| {}).await;
    for id in &ids[..3] {
        run(ledger, *id, holder, complete()).await;
    }
    for id in &ids[3..] {
        assert_eq!(refused(ledger, *id, holder).await, Refusal::Limited, "the burst is used up");
    }
    let released = ledger.release_held(None, 10).await.unwrap();
    assert_eq!((released.tasks, released.next), (0, None));
    let wait = released.wait.unwrap();
    assert!(wait > Duration::from_secs(1_700) && wait <= Duration::from_secs(1_800), "{wait:?}");
    let faster = Rate { tasks: 10, per_ms: 1_000, burst: 1 };
    set(ledger, "kind:test.work", Bounds { rate: Some(faster), ..Bounds::default() }).await;
    until("the rate to let one start", async || (release(ledger).await == 1).then_some(())).await;
    run(ledger, ids[3], holder, complete()).await;
    until("the rate to let the other start", async || (release(ledger).await == 1).then_some(())).await;
    run(ledger, ids[4], holder, complete()).await;
}

/// While one is on its way the next is let go in the pace of the rate. If both arrive at once one of them has come too soon.
pub async fn tasks_are_let_go_in_the_pace_of_the_rate(ledger: &dyn Ledger) {
    let interval = Duration::from_millis(250);
    let rate = Rate { tasks: 4, per_ms: 1_000, burst: 1 };
    set(ledger, "kind:test.work", Bounds { rate: Some(rate), ..Bounds::default() }).await;
    let holder = worker(ledger).await;
    let ids = recorded(ledger, 4, |_| {}).await;
    run(ledger, ids[0], holder, complete()).await;
    for id in &ids[1..] {
        assert_eq!(refused(ledger, *id, holder).await, Refusal::Limited);
    }
    until("one to be let go", async || (release(ledger).await == 1).then_some(())).await;
    let released = ledger.release_held(None, 10).await.unwrap();
    let is_next_gone = released.tasks == 1;
    assert!(is_next_gone || released.wait.is_some_and(|wait| wait <= interval), "without a claim: {released:?}");
    until("the next to be let go", async || (is_next_gone || release(ledger).await == 1).then_some(())).await;
    let on_their_way = due(ledger).await;
    assert_eq!(on_their_way, ids[1..3].iter().copied().collect());
    let claims = join_all(on_their_way.iter().map(|id| claim(ledger, *id, holder))).await;
    assert_eq!(claims.iter().filter(|claim| matches!(claim, Claim::Granted(_))).count(), 1, "{claims:?}");
    assert!(claims.contains(&Claim::Refused(Refusal::Limited)), "{claims:?}");
}
