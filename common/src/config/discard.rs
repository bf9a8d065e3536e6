//! What is never tried again, as a settings file says it.

use serde::de::{Deserialize, Deserializer, Error};

use crate::task::ErrorKind;

/// The sorts of failure for which a handler's table can say so: args that do not fit are final anyway, and a crash is
/// judged by whoever rescues the task.
const ERRORS: [ErrorKind; 3] = [ErrorKind::Error, ErrorKind::Panic, ErrorKind::Timeout];

/// Exit codes of programs: 0 is success.
pub(super) fn exit_codes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i32>, D::Error> {
    numbers(deserializer, "exit codes", 1, 255)
}

/// Statuses of HTTP answers: those below 300 are success, or none that ends a request.
pub(super) fn statuses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u16>, D::Error> {
    numbers(deserializer, "statuses", 300, 599)
}

/// Sorts of failure, by their names in a task's `errors`.
pub(super) fn errors<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ErrorKind>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    let kind = |name: String| {
        let known = ERRORS.into_iter().find(|kind| kind.as_str() == name);
        known.ok_or_else(|| {
            let allowed = ERRORS.map(ErrorKind::as_str).join(", ");
            D::Error::custom(format!("must be of {allowed}, but one is {name:?}"))
        })
    };
    names.into_iter().map(kind).collect()
}

fn numbers<'de, D: Deserializer<'de>, N: TryFrom<i64>>(
    deserializer: D,
    what: &str,
    min: i64,
    max: i64,
) -> Result<Vec<N>, D::Error> {
    let numbers = Vec::<i64>::deserialize(deserializer)?;
    let number = |number: i64| {
        let within = Some(number).filter(|number| (min..=max).contains(number));
        let fault = || D::Error::custom(format!("must be {what} from {min} to {max}, but one is {number}"));
        within.and_then(|number| N::try_from(number).ok()).ok_or_else(fault)
    };
    numbers.into_iter().map(number).collect()
}
