//! From what a client asks to be changed to what the ledger is asked, without any IO.

use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use tasklane_common::ledger::Edit;
use tasklane_common::task::{Json, Priority};
use utoipa::ToSchema;

use crate::error::{ApiError, FieldError};
use crate::extract::{self, JsonFault};
use crate::request::{self, Faults, MAX_ATTEMPTS_MAX, TIMEOUT_MS_MAX};

/// What shall be different about a task; at least one of these. `null` stands for a field left out, but for `args`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EditTask {
    /// When it may start, RFC 3339; a time in the past means at once. Not together with `delay_ms`.
    #[schema(format = DateTime)]
    run_at: Option<String>,
    /// How long it waits from now; 0 starts it at once. Not together with `run_at`.
    #[schema(minimum = 0, maximum = 31_536_000_000_i64)]
    delay_ms: Option<i64>,
    /// The handler's input: any JSON, 1 MiB at most.
    #[serde(default, deserialize_with = "request::given")]
    #[schema(value_type = Option<serde_json::Value>)]
    args: Option<Box<RawValue>>,
    /// The queue that carries it.
    #[schema(max_length = 64, pattern = "^[a-z0-9_-]+$", examples("default"))]
    queue: Option<String>,
    /// How urgent it is: `high`, `normal` or `low`.
    priority: Option<String>,
    /// How often it may start: more often than it has.
    #[schema(minimum = 1, maximum = 1000)]
    max_attempts: Option<i64>,
    /// How long one run may take.
    #[schema(minimum = 1, maximum = 86_400_000)]
    timeout_ms: Option<i64>,
}

/// Reads the body of an edit. Delays count from `now`.
///
/// # Errors
/// [`ApiError::InvalidJson`], or [`ApiError::InvalidEdit`] with all faults.
pub fn edit(body: &[u8], now: Timestamp) -> Result<Edit, ApiError> {
    let asked: EditTask = extract::object(body).map_err(|fault| match fault {
        JsonFault::Syntax(message) => ApiError::InvalidJson(message),
        JsonFault::Shape(error) => ApiError::InvalidEdit(vec![error]),
    })?;
    let mut faults = Faults(Vec::new());
    if asked.run_at.is_some() && asked.delay_ms.is_some() {
        faults.0.push(FieldError::new("run_at", "must not be given together with delay_ms"));
    }
    let delayed = faults.keep("delay_ms", request::delay(asked.delay_ms, now)).flatten();
    let timed = faults.keep("run_at", request::run_at(asked.run_at.as_deref())).flatten();
    let number = |given: Option<i64>, max| given.map(|given| request::within(given, 1, max)).transpose();
    let max_attempts = faults.keep("max_attempts", number(asked.max_attempts, MAX_ATTEMPTS_MAX.into())).flatten();
    let timeout = faults.keep("timeout_ms", number(asked.timeout_ms, TIMEOUT_MS_MAX)).flatten();
    let edit = Edit {
        run_at: timed.or(delayed),
        args: faults.keep("args", args(asked.args)).flatten(),
        queue: faults.keep("queue", request::queue(asked.queue.as_deref())).flatten(),
        priority: faults.keep("priority", priority(asked.priority.as_deref())).flatten(),
        max_attempts: max_attempts.map(|most| i32::try_from(most).unwrap_or(MAX_ATTEMPTS_MAX)),
        timeout: timeout.map(|ms| Duration::from_millis(ms.unsigned_abs())),
    };
    if faults.0.is_empty() && edit == Edit::default() {
        let all = "must have at least one of run_at, delay_ms, args, queue, priority, max_attempts, timeout_ms";
        faults.0.push(FieldError::new("", all));
    }
    if faults.0.is_empty() { Ok(edit) } else { Err(ApiError::InvalidEdit(faults.0)) }
}

fn args(raw: Option<Box<RawValue>>) -> Result<Option<Json>, String> {
    raw.map(request::checked_args).transpose()
}

fn priority(name: Option<&str>) -> Result<Option<Priority>, String> {
    name.map(|name| request::priority(Some(name))).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Edit, Vec<String>> {
        match edit(body.as_bytes(), Timestamp::UNIX_EPOCH) {
            Ok(edit) => Ok(edit),
            Err(ApiError::InvalidEdit(faults)) => Err(faults.into_iter().map(|fault| fault.path).collect()),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_given_is_changed() {
        let edit =
            read(r#"{"delay_ms":1500,"args":null,"queue":"q","priority":"low","max_attempts":3,"timeout_ms":250}"#)
                .unwrap();
        assert_eq!(edit.run_at.unwrap().as_millisecond(), 1_500);
        assert_eq!(edit.args, Some(Json::null()), "null are args like any others");
        assert_eq!((edit.queue.unwrap().as_str(), edit.max_attempts), ("q", Some(3)));
        assert_eq!((edit.priority, edit.timeout), (Some(Priority::Low), Some(Duration::from_millis(250))));
        let edit = read(r#"{"run_at":"2030-01-31T08:00:00Z","queue":null}"#).unwrap();
        assert_eq!((edit.run_at.unwrap().to_string().as_str(), edit.queue), ("2030-01-31T08:00:00Z", None));
    }

    #[test]
    fn all_faults_are_named() {
        assert_eq!(read("{}").unwrap_err(), [""]);
        assert_eq!(read(r#"{"run_at":null}"#).unwrap_err(), [""]);
        assert_eq!(
            read(r#"{"run_at":"soon","delay_ms":-1,"args":1e999,"queue":"A","priority":"top","max_attempts":0,"timeout_ms":0}"#)
                .unwrap_err(),
            ["run_at", "delay_ms", "run_at", "max_attempts", "timeout_ms", "args", "queue", "priority"]
        );
        assert_eq!(read(r#"{"kind":"b"}"#).unwrap_err(), ["kind"], "it is what it is");
    }
}
