//! From what a client sends to a [`NewTask`]: pure, and all faults of a submission at once.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tasklane_common::clock;
use tasklane_common::limit::{self, KEY_BYTES_MAX};
use tasklane_common::task::{
    Json, Kind, NewTask, OnConflict, Priority, QueueName, TaskId, UNIQUE_KEY_BYTES_MAX, Unique,
};
use utoipa::ToSchema;

use crate::args::{self, ARGS_BYTES_MAX};
use crate::error::FieldError;
use crate::routing::Routes;

/// The most attempts a submission may ask for.
pub const MAX_ATTEMPTS_MAX: i32 = 1_000;
/// The longest run a submission may ask for: a day.
pub const TIMEOUT_MS_MAX: i64 = 86_400_000;
/// The longest delay a submission may ask for: 365 days.
pub const DELAY_MS_MAX: i64 = 365 * 86_400_000;
/// The longest time for which a submission may have its result kept: 365 days.
pub const RESULT_TTL_MS_MAX: i64 = 365 * 86_400_000;
/// The most tags a task may have.
pub const TAGS_MAX: usize = 32;
/// The longest key of a tag.
pub const TAG_KEY_BYTES_MAX: usize = 64;
/// The longest value of a tag.
pub const TAG_VALUE_BYTES_MAX: usize = 256;

/// A task to be done, as a client asks for it. `null` stands for a field left out, but for `args`.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SubmitTask {
    /// The work to do: dot-separated words of `A-Z a-z 0-9 _ -`, such as `report.build`. Required.
    #[schema(required, value_type = String, max_length = 128, pattern = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", examples("report.build"))]
    pub kind: Option<String>,
    /// The handler's input: any JSON, 1 MiB at most. Defaults to `{}`.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<serde_json::Value>, examples(json!({"month": "2026-11"})))]
    pub args: Option<Box<RawValue>>,
    /// The queue that carries it. Defaults to the first route of the producer's settings that matches the kind,
    /// else to `default`.
    #[schema(max_length = 64, pattern = "^[a-z0-9_-]+$", examples("default"))]
    pub queue: Option<String>,
    /// How often it may start. Defaults to the producer's `max_attempts`, which is 20.
    #[schema(minimum = 1, maximum = 1000, default = 20, examples(5))]
    pub max_attempts: Option<i64>,
    /// How long one run may take. Left out, the handler decides.
    #[schema(minimum = 1, maximum = 86_400_000, examples(60_000))]
    pub timeout_ms: Option<i64>,
    /// How long after the task's end its result is kept; then it is cleared, and the task stays until its retention is over.
    /// Defaults to what the producer's settings say for the kind, else to as long as the task.
    #[schema(minimum = 1, maximum = 31_536_000_000_i64, examples(3_600_000))]
    pub result_ttl_ms: Option<i64>,
    /// How long it waits before its first start. Not together with `run_at`.
    #[schema(minimum = 0, maximum = 31_536_000_000_i64, examples(60_000))]
    pub delay_ms: Option<i64>,
    /// When it may start, RFC 3339; a time in the past means at once. Not together with `delay_ms`.
    #[schema(format = DateTime, examples("2026-12-24T06:00:00.000Z"))]
    pub run_at: Option<String>,
    /// How urgent it is among the tasks of its queue: `high`, `normal` or `low`. Defaults to `normal`.
    #[schema(value_type = Option<Priority>)]
    pub priority: Option<String>,
    /// Labels of the client's own, to find tasks by: 32 at most, keys of 64 bytes without colons, values of 256 bytes.
    #[serde(default, deserialize_with = "few")]
    #[schema(examples(json!({"customer": "4711"})))]
    pub tags: Option<BTreeMap<String, String>>,
    /// What it shares limits with, besides its queue and its kind, such as a customer: 255 bytes at most, no asterisks.
    #[schema(min_length = 1, max_length = 255, examples("customer:4711"))]
    pub concurrency_key: Option<String>,
    /// Makes it the only task with this key, of all kinds and queues, until it has finished: 255 bytes at most.
    #[schema(min_length = 1, max_length = 255, examples("report.build 2026-11"))]
    pub unique_key: Option<String>,
    /// For how long the key is taken instead, finished or not; a task that is not kept any more holds no key.
    #[schema(minimum = 1, maximum = 31_536_000_000_i64)]
    pub unique_for_ms: Option<i64>,
    /// What happens when another task has the key: `reject` (409), `return_existing`, which answers with that task, or
    /// `replace_waiting`, which cancels it if it waits and is refused if it runs or has finished.
    #[schema(value_type = Option<OnConflict>)]
    pub on_conflict: Option<String>,
}

/// What the settings add to a submission.
#[derive(Debug, Clone)]
pub struct Rules {
    /// How often a task may start when its submission does not say.
    pub max_attempts: i32,
    /// Which queue a kind goes to when its submission does not say.
    pub routes: Routes,
}

/// What a submission does not say itself.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances<'c> {
    /// The time that delays count from.
    pub now: Timestamp,
    /// W3C trace context of the request.
    pub traceparent: Option<&'c str>,
}

/// Keeps `null` apart from a field left out.
pub(crate) fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(Some)
}

/// Reads no more tags than one too many: millions take little of a body, and much memory.
fn few<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    struct Few;
    impl<'de> Visitor<'de> for Few {
        type Value = Option<BTreeMap<String, String>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of strings")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut tags = BTreeMap::new();
            while let Some((key, value)) = map.next_entry()? {
                tags.insert(key, value);
                if tags.len() > TAGS_MAX {
                    return Err(A::Error::custom(format!("must be at most {TAGS_MAX}")));
                }
            }
            Ok(Some(tags))
        }
    }
    deserializer.deserialize_any(Few)
}

impl SubmitTask {
    /// Checks every field.
    ///
    /// # Errors
    /// All faults, each with the field's path.
    pub fn validate(self, rules: &Rules, circumstances: Circumstances<'_>) -> Result<NewTask, Vec<FieldError>> {
        let mut faults = Faults(Vec::new());
        let kind = faults.keep("kind", kind(self.kind.as_deref()));
        let queue = faults.keep("queue", queue(self.queue.as_deref()));
        let args = faults.keep("args", args(self.args));
        let attempts = self.max_attempts.unwrap_or(rules.max_attempts.into());
        let max_attempts = faults.keep("max_attempts", within(attempts, 1, MAX_ATTEMPTS_MAX.into()));
        let timeout = self.timeout_ms.map(|ms| within(ms, 1, TIMEOUT_MS_MAX)).transpose();
        let timeout = faults.keep("timeout_ms", timeout);
        let own_ttl = self.result_ttl_ms.map(|ms| within(ms, 1, RESULT_TTL_MS_MAX)).transpose();
        let own_ttl = faults.keep("result_ttl_ms", own_ttl).flatten();
        if self.delay_ms.is_some() && self.run_at.is_some() {
            faults.0.push(FieldError::new("run_at", "must not be given together with delay_ms"));
        }
        let delayed = faults.keep("delay_ms", delay(self.delay_ms, circumstances.now));
        let timed = faults.keep("run_at", run_at(self.run_at.as_deref()));
        let priority = faults.keep("priority", priority(self.priority.as_deref()));
        let tags = self.tags.unwrap_or_default();
        check_tags(&tags, &mut faults.0);
        let concurrency_key = faults.keep("concurrency_key", concurrency_key(self.concurrency_key)).flatten();
        let unique = unique(self.unique_key, self.unique_for_ms, self.on_conflict.as_deref(), &mut faults);
        match (kind, queue, args, max_attempts, timeout, priority) {
            (Some(kind), Some(queue), Some(args), Some(max_attempts), Some(timeout), Some(priority))
                if faults.0.is_empty() =>
            {
                let run_at = delayed.flatten().or(timed.flatten()).filter(|run_at| *run_at > circumstances.now);
                let result_ttl = own_ttl.or_else(|| rules.routes.result_ttl_ms_of(&kind));
                let duration = |ms: i64| Duration::from_millis(ms.unsigned_abs());
                Ok(NewTask {
                    id: TaskId::new(),
                    queue: queue.unwrap_or_else(|| rules.routes.queue_of(&kind)),
                    kind,
                    args,
                    priority,
                    max_attempts: i32::try_from(max_attempts).unwrap_or(MAX_ATTEMPTS_MAX),
                    timeout: timeout.map(duration),
                    run_at,
                    tags,
                    traceparent: circumstances.traceparent.map(str::to_owned),
                    unique,
                    concurrency_key,
                    retried_from: None,
                    result_ttl: result_ttl.map(duration),
                })
            }
            _ => Err(faults.0),
        }
    }
}

/// The faults found so far.
pub(crate) struct Faults(pub(crate) Vec<FieldError>);

impl Faults {
    /// The checked value; a fault is noted under its path.
    pub(crate) fn keep<T>(&mut self, path: &str, checked: Result<T, String>) -> Option<T> {
        checked.map_err(|message| self.0.push(FieldError::new(path, message))).ok()
    }
}

fn kind(name: Option<&str>) -> Result<Kind, String> {
    Kind::parse(name.ok_or("is required")?).map_err(|error| error.to_string())
}

pub(crate) fn queue(name: Option<&str>) -> Result<Option<QueueName>, String> {
    name.map(QueueName::parse).transpose().map_err(|error| error.to_string())
}

fn args(raw: Option<Box<RawValue>>) -> Result<Json, String> {
    raw.map_or_else(|| Json::parse("{}".to_owned()).map_err(|error| error.to_string()), checked_args)
}

pub(crate) fn checked_args(raw: Box<RawValue>) -> Result<Json, String> {
    match raw.get().len() {
        bytes if bytes > ARGS_BYTES_MAX => {
            Err(format!("must be at most {ARGS_BYTES_MAX} bytes of JSON, but has {bytes}"))
        }
        _ => args::check(raw.get()).map(|()| Json::from(raw)),
    }
}

pub(crate) fn within(number: i64, min: i64, max: i64) -> Result<i64, String> {
    if (min..=max).contains(&number) {
        Ok(number)
    } else {
        Err(format!("must be from {min} to {max}, but is {number}"))
    }
}

pub(crate) fn delay(delay_ms: Option<i64>, now: Timestamp) -> Result<Option<Timestamp>, String> {
    let Some(delay_ms) = delay_ms else { return Ok(None) };
    within(delay_ms, 0, DELAY_MS_MAX).map(|ms| Some(clock::timestamp(now.as_millisecond().saturating_add(ms))))
}

/// In whole milliseconds, which is what ledgers keep.
pub(crate) fn run_at(text: Option<&str>) -> Result<Option<Timestamp>, String> {
    let Some(text) = text else { return Ok(None) };
    let time: Timestamp =
        text.parse().map_err(|_| "must be an RFC 3339 time such as 2030-01-31T08:00:00Z".to_owned())?;
    Ok(Some(clock::timestamp(time.as_millisecond())))
}

fn concurrency_key(key: Option<String>) -> Result<Option<String>, String> {
    match key {
        Some(key) if !limit::is_key(&key) => {
            Err(format!("must be 1 to {KEY_BYTES_MAX} bytes without control characters and asterisks"))
        }
        key => Ok(key),
    }
}

pub(crate) fn priority(name: Option<&str>) -> Result<Priority, String> {
    let parse = |name| Priority::from_name(name).ok_or_else(|| "must be one of high, normal, low".to_owned());
    name.map_or(Ok(Priority::default()), parse)
}

fn unique(
    key: Option<String>,
    window_ms: Option<i64>,
    on_conflict: Option<&str>,
    faults: &mut Faults,
) -> Option<Unique> {
    let given_conflict = on_conflict.is_some();
    let window = faults.keep("unique_for_ms", window_ms.map(|ms| within(ms, 1, DELAY_MS_MAX)).transpose());
    let on_conflict = faults.keep("on_conflict", on_conflict.map_or(Ok(OnConflict::default()), self::on_conflict));
    let Some(key) = key else {
        for (path, given) in [("unique_for_ms", window_ms.is_some()), ("on_conflict", given_conflict)] {
            if given {
                faults.0.push(FieldError::new(path, "needs a unique_key"));
            }
        }
        return None;
    };
    if key.is_empty() || key.len() > UNIQUE_KEY_BYTES_MAX || has_control(&key) {
        let rule = format!("must be 1 to {UNIQUE_KEY_BYTES_MAX} bytes without control characters");
        faults.0.push(FieldError::new("unique_key", rule));
    }
    let window = window?.map(|ms| Duration::from_millis(ms.unsigned_abs()));
    Some(Unique { key, window, on_conflict: on_conflict? })
}

fn on_conflict(name: &str) -> Result<OnConflict, String> {
    match name {
        "reject" => Ok(OnConflict::Reject),
        "return_existing" => Ok(OnConflict::ReturnExisting),
        "replace_waiting" => Ok(OnConflict::ReplaceWaiting),
        _ => Err("must be one of reject, return_existing, replace_waiting".to_owned()),
    }
}

fn check_tags(tags: &BTreeMap<String, String>, faults: &mut Vec<FieldError>) {
    if tags.len() > TAGS_MAX {
        faults.push(FieldError::new("tags", format!("must be at most {TAGS_MAX}")));
        return;
    }
    for (key, value) in tags {
        let path = || format!("tags.{}", tasklane_common::task::truncate(key, TAG_KEY_BYTES_MAX));
        if key.is_empty() || key.len() > TAG_KEY_BYTES_MAX || key.contains(':') || has_control(key) {
            let rule = format!("the key must be 1 to {TAG_KEY_BYTES_MAX} bytes without colons and control characters");
            faults.push(FieldError::new(path(), rule));
        }
        if value.len() > TAG_VALUE_BYTES_MAX || has_control(value) {
            let rule = format!("the value must be at most {TAG_VALUE_BYTES_MAX} bytes without control characters");
            faults.push(FieldError::new(path(), rule));
        }
    }
}

fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests;
