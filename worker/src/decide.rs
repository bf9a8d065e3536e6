//! What a run's end means for its task: decided here, without any input or output, and done elsewhere.

use std::time::Duration;

use tasklane_common::backoff::Delays;
use tasklane_common::ledger::{Failure, Transition};
use tasklane_common::task::{ERROR_BYTES_MAX, ErrorKind, Guarantee, Json, truncate};

use crate::handler::{HandlerError, Outcome, Remedy};

/// The largest result that the ledger keeps, in bytes of JSON.
pub const RESULT_BYTES_MAX: usize = 1024 * 1024;

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Attempted {
    /// The handler answered.
    Answered(Result<Outcome, HandlerError>),
    /// The task is completed with this result, in the transaction of the handler's own writes.
    Committed(Json),
    /// The handler panicked.
    Panicked(String),
    /// Its time was over.
    TimedOut(Duration),
    /// The worker is shutting down and its grace was over.
    Interrupted,
    /// Somebody wanted it cancelled, and it was stopped.
    Cancelled,
}

/// What the decision needs to know of the task.
#[derive(Debug, Clone)]
pub struct Policy {
    /// This attempt.
    pub attempt: i32,
    /// How many there may be.
    pub max_attempts: i32,
    /// How long the next one waits.
    pub delays: Delays,
    /// How old the task is, counted from its recording.
    pub age: Duration,
    /// The age past which no other attempt starts.
    pub max_age: Option<Duration>,
    /// What an unknown outcome means.
    pub guarantee: Guarantee,
}

/// Where the task goes. `random`, of 0 to 1, is the backoff's jitter.
#[must_use]
pub fn decide(attempted: Attempted, policy: &Policy, random: f64) -> Transition {
    match attempted {
        Attempted::Answered(Ok(Outcome::Complete(result))) => complete(result),
        Attempted::Committed(result) => Transition::Complete { result },
        // The run's own commit would have been noticed.
        Attempted::Answered(Ok(Outcome::Committed(_))) => {
            discard("final_error", failure(ErrorKind::Error, "the answer is that of another run's transaction"))
        }
        Attempted::Answered(Ok(Outcome::Snooze(delay))) => Transition::Snooze { delay },
        Attempted::Answered(Ok(Outcome::Cancel(reason))) => {
            Transition::Cancel { reason: truncate(&reason, ERROR_BYTES_MAX) }
        }
        Attempted::Answered(Err(HandlerError { message, remedy, kind })) => {
            let error = Failure { message, kind };
            match remedy {
                Remedy::Discard => discard("final_error", error),
                Remedy::Retry(delay) => retry(delay, error, policy, random),
            }
        }
        Attempted::Panicked(message) => unknown(failure(ErrorKind::Panic, &message), policy, random),
        Attempted::TimedOut(limit) => {
            let message = format!("the run took longer than its {} ms", limit.as_millis());
            unknown(failure(ErrorKind::Timeout, &message), policy, random)
        }
        // The ledger knows who wanted that and why, and keeps it.
        Attempted::Cancelled => Transition::Cancel { reason: "cancelled in mid-run".to_owned() },
        Attempted::Interrupted => match policy.guarantee {
            Guarantee::AtLeastOnce | Guarantee::Transactional => Transition::Interrupt,
            Guarantee::AtMostOnce => {
                discard("interrupted", failure(ErrorKind::Error, "the worker shut down in mid-run"))
            }
        },
    }
}

fn complete(result: Json) -> Transition {
    match check_result(&result) {
        Ok(()) => Transition::Complete { result },
        Err(message) => discard("final_error", failure(ErrorKind::Error, &message)),
    }
}

/// Refuses what is too large to be kept, and says so.
pub(crate) fn check_result(result: &Json) -> Result<(), String> {
    match result.as_str().len() {
        0..=RESULT_BYTES_MAX => Ok(()),
        bytes => Err(format!(
            "the result has {bytes} bytes, but at most {RESULT_BYTES_MAX} are kept: store it elsewhere and answer its address"
        )),
    }
}

/// The run was cut in the middle: whether it took effect is not known.
fn unknown(error: Failure, policy: &Policy, random: f64) -> Transition {
    match policy.guarantee {
        Guarantee::AtLeastOnce | Guarantee::Transactional => retry(None, error, policy, random),
        Guarantee::AtMostOnce => discard("interrupted", error),
    }
}

fn retry(delay: Option<Duration>, error: Failure, policy: &Policy, random: f64) -> Transition {
    if policy.attempt >= policy.max_attempts {
        return discard("exhausted", error);
    }
    let delay = delay.unwrap_or_else(|| policy.delays.delay_with(policy.attempt, random));
    // An attempt that would start too late need not be waited for.
    if policy.max_age.is_some_and(|most| policy.age.saturating_add(delay) > most) {
        return discard("too_old", error);
    }
    Transition::Retry { delay, error }
}

fn discard(reason: &str, error: Failure) -> Transition {
    Transition::Discard { reason: reason.to_owned(), error }
}

fn failure(kind: ErrorKind, message: &str) -> Failure {
    Failure { message: truncate(message, ERROR_BYTES_MAX), kind }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tasklane_common::backoff::Backoff;

    fn attempted() -> impl Strategy<Value = Attempted> {
        prop_oneof![
            Just(Attempted::Answered(Ok(Outcome::done()))),
            (0u64..10_000).prop_map(|ms| Attempted::Answered(Ok(Outcome::Snooze(Duration::from_millis(ms))))),
            Just(Attempted::Answered(Ok(Outcome::Cancel("stop".to_owned())))),
            Just(Attempted::Answered(Err(HandlerError::retry("again")))),
            Just(Attempted::Answered(Err(HandlerError::discard("never")))),
            Just(Attempted::Panicked("oh".to_owned())),
            Just(Attempted::TimedOut(Duration::from_secs(1))),
            Just(Attempted::Interrupted),
            Just(Attempted::Cancelled),
        ]
    }

    fn policy(attempt: i32, max_attempts: i32, once: bool) -> Policy {
        let guarantee = if once { Guarantee::AtMostOnce } else { Guarantee::AtLeastOnce };
        let (delays, age) = (Delays::from(Backoff::default()), Duration::ZERO);
        Policy { attempt, max_attempts, delays, age, max_age: None, guarantee }
    }

    proptest! {
        #[test]
        fn the_last_attempt_is_the_last(attempted in attempted(), max in 1..50i32, once in any::<bool>()) {
            let transition = decide(attempted, &policy(max, max, once), 0.5);
            let another = matches!(transition, Transition::Retry { .. });
            prop_assert!(!another, "{transition:?}");
        }

        /// With `at_most_once` only the handler itself can ask for another start.
        #[test]
        fn an_unknown_outcome_is_never_repeated_at_most_once(attempted in attempted(), attempt in 1..50i32) {
            let asked = matches!(attempted, Attempted::Answered(_));
            let transition = decide(attempted, &policy(attempt, 100, true), 0.5);
            let repeated = matches!(transition, Transition::Retry { .. } | Transition::Interrupt);
            prop_assert!(!repeated || asked, "{transition:?}");
        }

        /// Whatever asks for it, and however long it waits; what ends the task ends it as it would have.
        #[test]
        fn no_attempt_starts_past_the_age(
            attempted in attempted(), once in any::<bool>(), age in 0u64..100_000, most in 0u64..100_000, wish in any::<Option<u16>>(),
        ) {
            let attempted = match wish {
                Some(ms) => {
                    Attempted::Answered(Err(HandlerError::retry_after("later", Duration::from_millis(ms.into()))))
                }
                None => attempted,
            };
            let (age, most) = (Duration::from_millis(age), Duration::from_millis(most));
            let unlimited = Policy { age, ..policy(1, 5, once) };
            let limited = Policy { max_age: Some(most), ..unlimited.clone() };
            let (free, bound) = (decide(attempted.clone(), &unlimited, 0.5), decide(attempted, &limited, 0.5));
            match free {
                Transition::Retry { delay, error } if age + delay > most => {
                    prop_assert_eq!(bound, Transition::Discard { reason: "too_old".to_owned(), error });
                }
                free => prop_assert_eq!(bound, free),
            }
        }

        #[test]
        fn a_wish_for_a_delay_is_granted(ms in 0u64..1_000_000) {
            let delay = Duration::from_millis(ms);
            let attempted = Attempted::Answered(Err(HandlerError::retry_after("later", delay)));
            let granted = matches!(decide(attempted, &policy(1, 2, false), 0.5), Transition::Retry { delay: d, .. } if d == delay);
            prop_assert!(granted);
        }
    }

    #[test]
    fn a_result_too_large_is_told() {
        let large = Json::of(&"x".repeat(RESULT_BYTES_MAX)).unwrap();
        let transition = decide(Attempted::Answered(Ok(Outcome::Complete(large))), &policy(1, 5, false), 0.5);
        assert!(matches!(transition, Transition::Discard { error, .. } if error.message.contains("1048578 bytes")));
    }
}
