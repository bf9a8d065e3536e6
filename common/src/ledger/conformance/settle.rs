//! Settling: each outcome's row, and nothing from a stale holder.

use std::time::Duration;

use futures::join;

use super::{
    HOUR, cancel, complete, discard, failure, get, granted, one, recorded, retry, run, settle, until, worker,
    worker_for,
};
use crate::ledger::{Failure, Ledger, Settled, Transition};
use crate::state::State;
use crate::task::{AttemptError, ERROR_BYTES_MAX, ERRORS_KEPT, ErrorKind, Fence, Json, Task};

async fn settled(ledger: &dyn Ledger, transition: Transition) -> Task {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    run(ledger, id, worker, transition).await;
    let task = get(ledger, id).await;
    assert_eq!(task.worker_id, Some(worker));
    assert_eq!(ledger.abandoned(10).await.unwrap(), []);
    task
}

/// Completed, with the handler's answer; nothing is due any more.
pub async fn completing_keeps_the_result(ledger: &dyn Ledger) {
    let result = Json::parse(r#"{"z":"\u0000","a":[1.50]}"#.to_owned()).unwrap();
    let task = settled(ledger, Transition::Complete { result: result.clone() }).await;
    assert_eq!((task.state, task.result, task.attempt), (State::Completed, Some(result), 1));
    assert!(task.finished_at >= task.started_at && task.finished_at.is_some());
    assert_eq!((task.reason, task.errors), (None, Vec::new()));
    assert_eq!(ledger.next_due().await.unwrap(), None);
}

/// Retryable after its delay, with the attempt's error.
pub async fn retrying_waits_and_keeps_the_error(ledger: &dyn Ledger) {
    let task = settled(ledger, retry(HOUR, "no luck")).await;
    assert_eq!((task.state, task.attempt, task.finished_at), (State::Retryable, 1, None));
    let started = task.started_at.unwrap();
    assert!(task.run_at.as_millisecond() - started.as_millisecond() >= 3_600_000, "{task:?}");
    let [AttemptError { attempt, at, message, kind }] = &task.errors[..] else { panic!("one error: {task:?}") };
    assert_eq!((*attempt, message.as_str(), *kind), (1, "no luck", ErrorKind::Error));
    assert!(*at >= started && *at < task.run_at, "{task:?}");
    let due = ledger.next_due().await.unwrap().unwrap();
    assert!(due <= HOUR && due > HOUR / 2, "{due:?}");
}

/// Scheduled again, as if the attempt had not been.
pub async fn snoozing_gives_the_attempt_back(ledger: &dyn Ledger) {
    let task = settled(ledger, Transition::Snooze { delay: HOUR }).await;
    assert_eq!((task.state, task.attempt, task.fence), (State::Scheduled, 0, Fence(1)));
    assert!(task.run_at.as_millisecond() - task.started_at.unwrap().as_millisecond() >= 3_600_000, "{task:?}");
    assert_eq!((task.errors, task.finished_at), (Vec::new(), None));
}

/// Accepted again and due, as if the attempt had not been.
pub async fn interrupting_gives_the_attempt_back_at_once(ledger: &dyn Ledger) {
    let task = settled(ledger, Transition::Interrupt).await;
    assert_eq!((task.state, task.attempt, task.fence), (State::Accepted, 0, Fence(1)));
    assert_eq!((task.errors, task.finished_at), (Vec::new(), None));
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.iter().map(|due| (due.id, due.fence)).collect::<Vec<_>>(), [(task.id, Fence(2))]);
}

/// Cancelled, and why.
pub async fn cancelling_keeps_the_reason(ledger: &dyn Ledger) {
    let task = settled(ledger, cancel()).await;
    assert_eq!((task.state, task.reason.as_deref()), (State::Cancelled, Some("not wanted")));
    assert!(task.finished_at.is_some() && task.errors.is_empty());
    assert_eq!(ledger.next_due().await.unwrap(), None);
}

/// Discarded, why, and the last error.
pub async fn discarding_keeps_reason_and_error(ledger: &dyn Ledger) {
    let task = settled(ledger, discard()).await;
    assert_eq!((task.state, task.reason.as_deref()), (State::Discarded, Some("exhausted")));
    assert!(task.finished_at.is_some());
    assert_eq!(task.errors.iter().map(|error| error.message.as_str()).collect::<Vec<_>>(), ["broken"]);
    assert_eq!(ledger.next_due().await.unwrap(), None);
}

/// Whoever held the task before changes nothing, by no outcome, while it runs elsewhere and after it.
pub async fn a_stale_fence_changes_nothing(ledger: &dyn Ledger) {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let stale = run(ledger, id, worker, retry(Duration::ZERO, "taken away")).await.fence;
    let held = granted(ledger, id, worker).await.fence;
    let outcomes = || {
        [
            complete(),
            retry(HOUR, "late"),
            Transition::Snooze { delay: HOUR },
            Transition::Interrupt,
            cancel(),
            discard(),
        ]
    };
    let before = get(ledger, id).await;
    for outcome in outcomes() {
        assert_eq!(settle(ledger, id, stale, outcome.clone()).await, Settled::Fenced, "{outcome:?}");
        assert_eq!(settle(ledger, id, Fence(held.0 + 1), outcome).await, Settled::Fenced);
    }
    assert_eq!(get(ledger, id).await, before);
    assert_eq!(settle(ledger, id, held, complete()).await, Settled::Applied);
    let before = get(ledger, id).await;
    for outcome in outcomes() {
        assert_eq!(settle(ledger, id, held, outcome).await, Settled::Fenced);
    }
    assert_eq!(get(ledger, id).await, before);
}

/// Two outcomes of one run at the same moment: one counts, and the row is entirely its own.
pub async fn one_of_two_settlements_is_applied(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    for id in recorded(ledger, 10, |_| {}).await {
        let fence = granted(ledger, id, worker).await.fence;
        let both = join!(settle(ledger, id, fence, complete()), settle(ledger, id, fence, discard()));
        let task = get(ledger, id).await;
        match both {
            (Settled::Applied, Settled::Fenced) => assert_eq!((task.state, task.reason), (State::Completed, None)),
            (Settled::Fenced, Settled::Applied) => assert_eq!((task.state, task.result), (State::Discarded, None)),
            _ => panic!("one settlement counts: {both:?}"),
        }
    }
}

/// A task that fails for ever does not grow for ever.
pub async fn only_the_newest_errors_are_kept(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    let id = recorded(ledger, 1, |task| task.max_attempts = 100).await[0];
    let attempts = ERRORS_KEPT + 3;
    for attempt in 1..=attempts {
        run(ledger, id, worker, retry(Duration::ZERO, &format!("failure {attempt}"))).await;
    }
    let errors = get(ledger, id).await.errors;
    let found: Vec<(i32, String)> = errors.into_iter().map(|error| (error.attempt, error.message)).collect();
    let expected: Vec<(i32, String)> =
        (4..=attempts).map(|attempt| (i32::try_from(attempt).unwrap(), format!("failure {attempt}"))).collect();
    assert_eq!(found, expected);
}

/// No text that a handler can say keeps its task from being settled, or makes it unreadable.
pub async fn any_text_can_be_settled(ledger: &dyn Ledger) {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let hostile = "\"}],\\ {$1} '; DROP TABLE tasks; -- \u{1f} \u{1F980} \r\n\t";
    run(ledger, id, worker, retry(Duration::ZERO, hostile)).await;
    run(ledger, id, worker, retry(Duration::ZERO, "a NUL \0 inside")).await;
    run(ledger, id, worker, retry(Duration::ZERO, &"ü".repeat(ERROR_BYTES_MAX))).await;
    let discard = Transition::Discard { reason: "NUL \0 too".to_owned(), error: failure("") };
    run(ledger, id, worker, discard).await;
    let task = get(ledger, id).await;
    assert_eq!(task.state, State::Discarded);
    assert_eq!(task.errors[0].message, hostile);
    assert_eq!(task.errors.len(), 4);
    assert!(task.errors[2].message.len() <= ERROR_BYTES_MAX);
    assert!(task.reason.is_some_and(|reason| reason.starts_with("NUL ") && reason.ends_with(" too")));
}

/// Crashes, and only crashes, raise the count that ends in quarantine.
pub async fn crashes_are_counted(ledger: &dyn Ledger) {
    let id = recorded(ledger, 1, |task| task.max_attempts = 10).await[0];
    let steady = worker(ledger).await;
    for kind in [ErrorKind::Crash, ErrorKind::Error, ErrorKind::Panic, ErrorKind::Crash, ErrorKind::Timeout] {
        let error = Failure { message: String::new(), kind };
        run(ledger, id, steady, Transition::Retry { delay: Duration::ZERO, error }).await;
    }
    let brief = worker_for(ledger, Duration::from_secs(30)).await;
    granted(ledger, id, brief).await;
    ledger.retire(brief).await.unwrap();
    let abandoned = until("the abandoned task", async || ledger.abandoned(1).await.unwrap().pop()).await;
    assert_eq!(abandoned.crashes, 2);
}
