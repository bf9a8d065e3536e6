//! Takes over the tasks of workers whose lease has ended. Every process does; the fence lets one of them win.

use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::events::{Events, Happening, TaskEvent};
use crate::ledger::{Abandoned, Failure, LedgerError, Settled, Settlement, SharedLedger, Transition, complain};
use crate::standstill::Standstills;
use crate::state::State;
use crate::task::{ErrorKind, Guarantee};
use crate::vital;

/// How often ended leases are looked for: the takeover takes the rest of the lease and this.
const PERIOD: Duration = Duration::from_millis(500);
const ROUND_MAX: u32 = 256;
/// The wait of a task that has crashed before: it keeps a poisonous task away from its neighbours of the last crash.
const AGAIN: Backoff = Backoff { base_ms: 2_000, max_ms: 60_000 };

/// The reason of a task that was given up because it took its workers down.
pub const POISON: &str = "poison";

/// Rescues until the shutdown.
pub async fn run(ledger: SharedLedger, events: Events, max_crashes: i32, shutdown: CancellationToken) {
    let standstills = Standstills::new();
    vital::spawn("standstill", standstills.clone().watch(shutdown.clone()));
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = period.tick() => {}
            () = shutdown.cancelled() => return,
        }
        if let Err(error) = round(&ledger, &events, &standstills, max_crashes).await {
            complain(&error, "abandoned tasks cannot be rescued");
        }
    }
}

async fn round(
    ledger: &SharedLedger,
    events: &Events,
    standstills: &Standstills,
    max_crashes: i32,
) -> Result<(), LedgerError> {
    let abandoned = ledger.abandoned(ROUND_MAX).await?;
    let rescues = abandoned.iter().map(|task| async {
        let slept = task.lease_ended.is_some_and(|ago| standstills.explain(ago));
        let transition = if slept { awaken(task) } else { None };
        let transition = transition.unwrap_or_else(|| decide(task, max_crashes, rand::random()));
        let (outcome, leads_to) = (label(&transition), happening(&transition));
        let settlement = Settlement { id: task.id, fence: task.fence, transition };
        // Fenced: another process has rescued it first.
        let settled = ledger.settle(settlement).await?;
        if settled != Settled::Fenced {
            let (outcome, leads_to) = match settled {
                Settled::Cancelled => ("cancelled", (Happening::Cancelled, State::Cancelled)),
                _ => (outcome, leads_to),
            };
            events.tell(|| event(task, leads_to));
            metrics::counter!("tasklane_rescued_total", "outcome" => outcome).increment(1);
            tracing::warn!(
                task.id = %task.id, task.kind = %task.kind, task.attempt = task.attempt, worker.id = %task.worker, outcome,
                "the lease of the task's worker has ended in mid-run"
            );
        }
        Ok(())
    });
    futures::future::join_all(rescues).await.into_iter().collect()
}

/// What it means for a task that the whole machine stood still with its worker: that was no crash, and costs no attempt.
/// `None` where it means the same as a crash: the run may have taken effect, or nobody wants another.
fn awaken(task: &Abandoned) -> Option<Transition> {
    (task.guarantee != Guarantee::AtMostOnce && !task.cancel_requested).then_some(Transition::Interrupt)
}

/// What a crash in mid-run means for a task. `random` is of 0 to 1.
#[must_use]
pub fn decide(task: &Abandoned, max_crashes: i32, random: f64) -> Transition {
    let crashes = task.crashes + 1;
    let effect = match task.guarantee {
        Guarantee::AtLeastOnce | Guarantee::AtMostOnce => "whether the task took effect is unknown",
        Guarantee::Transactional => "its writes to the ledger's database were rolled back",
    };
    let error = Failure {
        message: format!("the lease of worker {} has ended in mid-run: {effect}", task.worker),
        kind: ErrorKind::Crash,
    };
    let discard = |reason: &str, error| Transition::Discard { reason: reason.to_owned(), error };
    match task.guarantee {
        // Also when somebody wanted it cancelled: the run may have taken effect, and `cancelled` would deny that.
        Guarantee::AtMostOnce => discard("interrupted", error),
        Guarantee::AtLeastOnce | Guarantee::Transactional => match () {
            // No start follows: the ledger makes it cancelled instead, with this crash among its errors.
            () if task.cancel_requested => Transition::Retry { delay: Duration::ZERO, error },
            () if crashes >= max_crashes => discard(POISON, error),
            () if task.attempt >= task.max_attempts => discard("exhausted", error),
            () if crashes == 1 => Transition::Retry { delay: Duration::ZERO, error },
            () => Transition::Retry { delay: AGAIN.delay_with(crashes - 1, random), error },
        },
    }
}

/// What it is to those who look; what ends the task is told as every other end.
const fn happening(transition: &Transition) -> (Happening, State) {
    match Happening::of(transition) {
        (Happening::Retried, state) => (Happening::Rescued, state),
        ended => ended,
    }
}

fn event(task: &Abandoned, (event, state): (Happening, State)) -> TaskEvent {
    let (kind, queue, worker_id) = (task.kind.clone(), task.queue.clone(), Some(task.worker));
    TaskEvent { at: Timestamp::now(), id: task.id, kind, queue, event, state, attempt: task.attempt, worker_id }
}

fn label(transition: &Transition) -> &'static str {
    match transition {
        Transition::Discard { reason, .. } if reason == POISON => POISON,
        Transition::Discard { reason, .. } if reason == "interrupted" => "interrupted",
        Transition::Discard { .. } => "exhausted",
        Transition::Interrupt => "stood_still",
        _ => "retried",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Fence, Kind, QueueName, TaskId, WorkerId};
    use proptest::prelude::*;

    fn guarantee() -> impl Strategy<Value = Guarantee> {
        prop_oneof![Just(Guarantee::AtLeastOnce), Just(Guarantee::AtMostOnce), Just(Guarantee::Transactional)]
    }

    prop_compose! {
        fn abandoned()(attempt in 1..30i32, max_attempts in 1..30i32, crashes in 0..10i32, guarantee in guarantee(),
            cancel_requested in proptest::bool::weighted(0.2)) -> Abandoned {
            Abandoned {
                id: TaskId::new(),
                kind: Kind::parse("k").unwrap(),
                queue: QueueName::default(),
                fence: Fence(attempt.into()),
                worker: WorkerId::new(),
                attempt,
                max_attempts,
                crashes,
                guarantee,
                cancel_requested,
                lease_ended: None,
            }
        }
    }

    proptest! {
        #[test]
        fn at_most_once_never_starts_again(task in abandoned(), max_crashes in 1..10i32) {
            let interrupted = matches!(decide(&task, max_crashes, 0.5), Transition::Discard { reason, .. } if reason == "interrupted");
            prop_assert_eq!(interrupted, task.guarantee == Guarantee::AtMostOnce);
        }

        #[test]
        fn another_start_needs_an_attempt_and_an_unproven_suspicion(task in abandoned(), max_crashes in 1..10i32) {
            let task = Abandoned { cancel_requested: false, ..task };
            if let Transition::Retry { delay, .. } = decide(&task, max_crashes, 0.5) {
                prop_assert!(task.attempt < task.max_attempts && task.crashes + 1 < max_crashes);
                prop_assert_eq!(delay.is_zero(), task.crashes == 0, "only the first crash starts again at once");
            }
        }

        #[test]
        fn a_machine_that_slept_is_no_crash_and_starts_nothing_twice(task in abandoned()) {
            let again = task.guarantee != Guarantee::AtMostOnce && !task.cancel_requested;
            prop_assert_eq!(awaken(&task), again.then_some(Transition::Interrupt));
        }

        /// The ledger turns a retry of such a task into its cancellation, and leaves what is final as it is.
        #[test]
        fn what_was_to_be_cancelled_is_not_blamed(task in abandoned(), max_crashes in 1..10i32) {
            let task = Abandoned { cancel_requested: true, ..task };
            let left_to_the_request = matches!(decide(&task, max_crashes, 0.5), Transition::Retry { .. });
            prop_assert_eq!(left_to_the_request, task.guarantee != Guarantee::AtMostOnce);
        }
    }
}
