//! What a run's end means for its task: decided here, without any input or output, and done elsewhere.

use std::time::Duration;

use tasklane_common::backoff::Delays;
use tasklane_common::ledger::{Failure, Transition};
use tasklane_common::task::{ERROR_BYTES_MAX, ErrorKind, Guarantee, Json, truncate};

use crate::handler::{HandlerError, Outcome, Remedy};

/// The largest result that is kept where the settings do not say, in bytes of JSON.
pub const RESULT_BYTES_MAX: usize = 1024 * 1024;

/// The reason of what is discarded for its age.
const TOO_OLD: &str = "too_old";

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
    /// It did not begin: [`Policy::is_too_old`].
    TooOld,
}

impl Attempted {
    /// Why nothing was begun, if nothing was.
    pub(crate) fn not_started(&self) -> Option<&str> {
        match self {
            Self::Answered(Err(HandlerError { message, remedy: Remedy::GiveBack, .. })) => Some(message),
            _ => None,
        }
    }
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
    /// How long ago the task was first due.
    pub age: Duration,
    /// The age past which no attempt but the first starts.
    pub max_age: Option<Duration>,
    /// The largest result that is kept, in bytes of JSON.
    pub result_bytes_max: usize,
    /// Sorts of failure after which no other attempt is made.
    pub discard_errors: Vec<ErrorKind>,
    /// What an unknown outcome means.
    pub guarantee: Guarantee,
}

impl Policy {
    /// Whether this attempt must not begin: it is not the first, and the task is past its age.
    #[must_use]
    pub fn is_too_old(&self) -> bool {
        self.attempt > 1 && self.max_age.is_some_and(|most| self.age > most)
    }
}

/// Where the task goes. `random`, of 0 to 1, is the backoff's jitter.
#[must_use]
pub fn decide(attempted: Attempted, policy: &Policy, random: f64) -> Transition {
    match attempted {
        Attempted::Answered(Ok(Outcome::Complete(result))) => complete(result, policy.result_bytes_max),
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
                Remedy::Unknown => unknown(error, policy, random),
                Remedy::GiveBack => Transition::Interrupt,
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
        Attempted::TooOld => {
            let (age, most) = (policy.age.as_millis(), policy.max_age.unwrap_or_default().as_millis());
            let message = format!(
                "the attempt was not begun: the task was first due {age} ms ago, and the max_age_ms of its kind is {most}"
            );
            discard(TOO_OLD, failure(ErrorKind::Error, &message))
        }
        Attempted::Interrupted => match policy.guarantee {
            Guarantee::AtLeastOnce | Guarantee::Transactional => Transition::Interrupt,
            Guarantee::AtMostOnce => {
                discard("interrupted", failure(ErrorKind::Error, "the worker shut down in mid-run"))
            }
        },
    }
}

fn complete(result: Json, bytes_max: usize) -> Transition {
    match check_result(&result, bytes_max) {
        Ok(()) => Transition::Complete { result },
        Err(message) => discard("final_error", failure(ErrorKind::Error, &message)),
    }
}

/// Refuses what is too large to be kept, and says so.
pub(crate) fn check_result(result: &Json, bytes_max: usize) -> Result<(), String> {
    match result.as_str().len() {
        bytes if bytes <= bytes_max => Ok(()),
        bytes => Err(format!(
            "the result has {bytes} bytes, but at most {bytes_max} are kept: store it elsewhere and answer its address"
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
    if policy.discard_errors.contains(&error.kind) {
        return discard("final_error", error);
    }
    if policy.attempt >= policy.max_attempts {
        return discard("exhausted", error);
    }
    let delay = delay.unwrap_or_else(|| policy.delays.delay_with(policy.attempt, random));
    // An attempt that would start too late need not be waited for.
    if policy.max_age.is_some_and(|most| policy.age.saturating_add(delay) > most) {
        return discard(TOO_OLD, error);
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
            Just(Attempted::Answered(Err(HandlerError::unknown("perhaps")))),
            Just(Attempted::Answered(Err(HandlerError::not_started("no memory")))),
            Just(Attempted::Panicked("oh".to_owned())),
            Just(Attempted::TimedOut(Duration::from_secs(1))),
            Just(Attempted::Interrupted),
            Just(Attempted::Cancelled),
        ]
    }

    fn policy(attempt: i32, max_attempts: i32, once: bool) -> Policy {
        Policy {
            attempt,
            max_attempts,
            delays: Backoff::default().into(),
            age: Duration::ZERO,
            max_age: None,
            result_bytes_max: RESULT_BYTES_MAX,
            discard_errors: Vec::new(),
            guarantee: if once { Guarantee::AtMostOnce } else { Guarantee::AtLeastOnce },
        }
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
            let is_unknown = |error: &HandlerError| error.remedy == Remedy::Unknown;
            let asked = matches!(&attempted, Attempted::Answered(answer) if !answer.as_ref().is_err_and(is_unknown));
            let transition = decide(attempted, &policy(attempt, 100, true), 0.5);
            let repeated = matches!(transition, Transition::Retry { .. } | Transition::Interrupt);
            prop_assert!(!repeated || asked, "{transition:?}");
        }

        /// Whatever asks for it, and however long it waits; what ends the task ends it as it would have.
        #[test]
        fn no_attempt_starts_past_the_age(
            attempted in attempted(), once in any::<bool>(), age in 0u64..100_000, most in 1u64..100_000, wish in any::<Option<u16>>(),
        ) {
            let wished = |ms: u16| HandlerError::retry_after("later", Duration::from_millis(ms.into()));
            let attempted = wish.map_or(attempted, |ms| Attempted::Answered(Err(wished(ms))));
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

        /// What is decided for a wait and what is looked at when it is over agree.
        #[test]
        fn only_another_attempt_can_be_too_old(attempt in 1..50i32, age in 0u64..1_000, most in 1u64..1_000) {
            let (age, most) = (Duration::from_millis(age), Duration::from_millis(most));
            let limited = Policy { age, max_age: Some(most), ..policy(attempt, 50, false) };
            prop_assert_eq!(limited.is_too_old(), attempt > 1 && age > most);
            let unlimited = Policy { max_age: None, ..limited };
            prop_assert!(!unlimited.is_too_old());
        }

        /// Whoever asks for another attempt, and however many are left.
        #[test]
        fn a_failure_of_a_final_sort_is_final(attempted in attempted(), attempt in 1..50i32, once in any::<bool>()) {
            let sorts = [ErrorKind::Error, ErrorKind::Panic, ErrorKind::Timeout];
            let strict = Policy { discard_errors: sorts.to_vec(), ..policy(attempt, 100, once) };
            let (free, bound) = (decide(attempted.clone(), &policy(attempt, 100, once), 0.5), decide(attempted, &strict, 0.5));
            match free {
                Transition::Retry { error, .. } => {
                    prop_assert_eq!(bound, Transition::Discard { reason: "final_error".to_owned(), error });
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
    fn an_attempt_that_was_not_begun_says_why() {
        let age = Duration::from_millis(7_001);
        let old = Policy { age, max_age: Some(Duration::from_secs(7)), ..policy(2, 20, true) };
        let Transition::Discard { reason, error } = decide(Attempted::TooOld, &old, 0.5) else { panic!("it ends") };
        let message =
            "the attempt was not begun: the task was first due 7001 ms ago, and the max_age_ms of its kind is 7000";
        assert_eq!((reason.as_str(), error.message.as_str()), ("too_old", message));
    }

    /// One sort does not stand for another.
    #[test]
    fn other_sorts_are_tried_again() {
        let strict = Policy { discard_errors: vec![ErrorKind::Timeout], ..policy(1, 5, false) };
        let late = decide(Attempted::TimedOut(Duration::from_secs(1)), &strict, 0.5);
        assert!(matches!(late, Transition::Discard { reason, .. } if reason == "final_error"));
        let panicked = decide(Attempted::Panicked("oh".to_owned()), &strict, 0.5);
        assert!(matches!(panicked, Transition::Retry { .. }));
    }

    #[test]
    fn what_did_not_start_costs_no_attempt_whatever_its_guarantee() {
        for once in [false, true] {
            let attempted = Attempted::Answered(Err(HandlerError::not_started("no memory")));
            assert_eq!(decide(attempted, &policy(5, 5, once), 0.5), Transition::Interrupt);
        }
    }

    #[test]
    fn a_result_too_large_is_told() {
        let small = Policy { result_bytes_max: 12, ..policy(1, 5, false) };
        let completed = |text: &str| {
            let result = Json::of(text).unwrap();
            decide(Attempted::Answered(Ok(Outcome::Complete(result))), &small, 0.5)
        };
        assert!(matches!(completed("0123456789"), Transition::Complete { .. }));
        let Transition::Discard { reason, error } = completed("0123456789a") else { panic!("it is too large") };
        let message = "the result has 13 bytes, but at most 12 are kept: store it elsewhere and answer its address";
        assert_eq!((reason.as_str(), error.message.as_str()), ("final_error", message));
    }
}
