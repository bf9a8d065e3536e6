//! From what a client asks to be run again to what the ledger is asked, without any IO.

use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use tasklane_common::clock;
use tasklane_common::ledger::ListQuery;
use tasklane_common::rescue::POISON;
use tasklane_common::state::{Event, State, UnknownState, next};
use tasklane_common::task::{Json, Kind, NameError, NewTask, OnConflict, QueueName, Task, TaskId, Unique};
use utoipa::ToSchema;

use crate::cancellation::checked;
use crate::error::{ApiError, FieldError};
use crate::extract::{self, JsonFault};
use crate::listing;
use crate::request::{self, Faults};

/// The most tasks a second over which retries can be spread.
pub const PER_SECOND_MAX: i64 = 10_000;

/// How a failure is to be run again. An empty body is as good as `{}`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetryTask {
    /// Other args: any JSON, 1 MiB at most. With them a new task is recorded, whose `retried_from` names this one; this
    /// one stays as it is.
    #[serde(default, deserialize_with = "request::given")]
    #[schema(value_type = Option<serde_json::Value>)]
    args: Option<Box<RawValue>>,
}

/// Which failures are to be run again: those that meet all that is given of `state`, `kind`, `queue`, `tag` and `reason`,
/// of which one is needed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetryTasks {
    /// `discarded` or `cancelled`; or `retryable` or `scheduled`, to start what waits for its time before it. Defaults to
    /// `discarded`.
    state: Option<String>,
    /// Only of this kind.
    kind: Option<String>,
    /// Only of this queue.
    queue: Option<String>,
    /// Only with this tag, `key:value`.
    tag: Option<String>,
    /// Also those whose work another task does with other args, as `retried_by` says.
    #[serde(default)]
    replaced: bool,
    /// Only with this `reason`. A task that was given up as `poison`, since it took its workers down, is left out unless
    /// this asks for `poison`.
    reason: Option<String>,
    /// Only counts what would be retried.
    #[serde(default)]
    dry_run: bool,
    /// Spreads the starts evenly, so many a second, the newest task first. Left out, all are due at once.
    #[schema(minimum = 1, maximum = 10_000)]
    per_second: Option<i64>,
    /// The `next_cursor` of the answer before.
    #[schema(pattern = "^1[0-9a-f]{32}(-[0-9]{1,13})?$")]
    cursor: Option<String>,
}

/// A checked [`RetryTasks`].
#[derive(Debug)]
pub struct Retries {
    /// Where to look.
    pub query: ListQuery,
    /// When each starts.
    pub pace: Pace,
    /// Whether those are meant, too, whose work another task does.
    pub replaced: bool,
    /// Whether to count only.
    pub dry_run: bool,
}

/// Hands out the times of starts, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    per_second: Option<i64>,
    /// The time from which the starts count, in milliseconds, and how many were handed out.
    begin_ms: i64,
    handed_out: i64,
}

impl Pace {
    /// How long the next one waits.
    pub fn delay(&mut self, now: Timestamp) -> Duration {
        let Some(per_second) = self.per_second else { return Duration::ZERO };
        let at = self.next_ms(per_second);
        self.handed_out += 1;
        Duration::from_millis(u64::try_from(at - now.as_millisecond()).unwrap_or(0))
    }

    fn next_ms(&self, per_second: i64) -> i64 {
        self.begin_ms.saturating_add(self.handed_out.saturating_mul(1000) / per_second)
    }

    /// Where the next call goes on: the list's cursor, and the time of the next start if there is a pace.
    #[must_use]
    pub fn cursor(&self, before: TaskId) -> String {
        let cursor = listing::cursor(before);
        self.per_second.map_or_else(|| cursor.clone(), |per_second| format!("{cursor}-{}", self.next_ms(per_second)))
    }
}

/// Reads the body of a request for one task: its new args, if there are any.
///
/// # Errors
/// [`ApiError::InvalidJson`] or [`ApiError::InvalidRetry`].
pub fn args(body: &[u8]) -> Result<Option<Json>, ApiError> {
    if body.trim_ascii().is_empty() {
        return Ok(None);
    }
    // Taken apart whole: what a field to come changes of the new task belongs into its fingerprint, too.
    let RetryTask { args } = extract::object(body).map_err(fault)?;
    let args = args.map(request::checked_args).transpose();
    args.map_err(|message| ApiError::InvalidRetry(vec![FieldError::new("args", message)]))
}

/// The task that does a failed one's work with other args. It keeps all but time and key of
/// idempotency.
///
/// # Errors
/// [`ApiError::NotRetryable`] when the other one has not failed.
pub fn anew(failed: Task, args: Json, traceparent: Option<&str>) -> Result<NewTask, ApiError> {
    // What only waits would do its work, too.
    if !failed.state.is_final() || next(failed.state, Event::Replay).is_none() {
        return Err(ApiError::NotRetryable(failed.state));
    }
    Ok(NewTask {
        id: TaskId::new(),
        kind: failed.kind,
        queue: failed.queue,
        priority: failed.priority,
        args,
        max_attempts: failed.max_attempts,
        timeout: failed.timeout_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
        run_at: None,
        tags: failed.tags,
        traceparent: traceparent.map(str::to_owned),
        concurrency_key: failed.concurrency_key,
        unique: failed.unique_key.map(|key| Unique { key, window: None, on_conflict: OnConflict::Reject }),
        result_ttl: failed.result_ttl_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
        retried_from: Some(failed.id),
    })
}

/// Reads the body of a request for many tasks, which are looked for `page` at a time. A pace counts from `now`.
///
/// # Errors
/// As [`args`].
pub fn many(body: &[u8], page: u32, now: Timestamp) -> Result<Retries, ApiError> {
    let asked: RetryTasks = extract::object(body).map_err(fault)?;
    let mut faults = Vec::new();
    if [&asked.state, &asked.kind, &asked.queue, &asked.tag, &asked.reason].into_iter().all(Option::is_none) {
        faults.push(FieldError::new("", "must have at least one of state, kind, queue, tag, reason"));
    }
    let named = |error: NameError| error.to_string();
    let state = asked.state.unwrap_or_else(|| State::Discarded.to_string());
    let cursor = checked("cursor", asked.cursor, cursor, &mut faults);
    let query = ListQuery {
        state: checked("state", Some(state), failed, &mut faults),
        kind: checked("kind", asked.kind, |name| Kind::parse(name).map_err(named), &mut faults),
        queue: checked("queue", asked.queue, |name| QueueName::parse(name).map_err(named), &mut faults),
        tags: checked("tag", asked.tag, listing::tag, &mut faults).into_iter().collect(),
        reason: checked("reason", asked.reason, listing::short, &mut faults),
        before: cursor.map(|(before, _)| before),
        limit: page,
        ..ListQuery::default()
    };
    let mut faults = Faults(faults);
    let per_second = asked.per_second.map(|given| request::within(given, 1, PER_SECOND_MAX)).transpose();
    let per_second = faults.keep("per_second", per_second).flatten();
    let now_ms = now.as_millisecond();
    // A cursor that waited for so long that its time has passed goes on from now, at the same pace.
    let begin_ms = cursor.and_then(|(_, begin_ms)| begin_ms).unwrap_or(now_ms).max(now_ms);
    let pace = Pace { per_second, begin_ms, handed_out: 0 };
    if faults.0.is_empty() {
        Ok(Retries { query, pace, replaced: asked.replaced, dry_run: asked.dry_run })
    } else {
        Err(ApiError::InvalidRetry(faults.0))
    }
}

/// Whether a task that the query finds is to be run again: one that took its workers down only if it is asked for by name.
#[must_use]
pub fn is_meant(query: &ListQuery, task: &Task) -> bool {
    query.reason.is_some() || task.reason.as_deref() != Some(POISON)
}

fn failed(name: &str) -> Result<State, String> {
    let state: State = name.parse().map_err(|error: UnknownState| error.to_string())?;
    match next(state, Event::Replay) {
        Some(_) => Ok(state),
        None => Err(format!("must be discarded, cancelled, retryable or scheduled: a {state} task cannot be started")),
    }
}

/// What [`Pace::cursor`] made.
fn cursor(text: &str) -> Result<(TaskId, Option<i64>), String> {
    let (before, begin_ms) = text.split_once('-').map_or((text, None), |(before, at)| (before, Some(at)));
    let foreign = || "is not a cursor of this API".to_owned();
    let last = clock::millis(Duration::from_millis(u64::MAX));
    let begin_ms = begin_ms.map(|at| at.parse().ok().filter(|at| (0..last).contains(at)).ok_or_else(foreign));
    Ok((listing::before(before)?, begin_ms.transpose()?))
}

fn fault(fault: JsonFault) -> ApiError {
    match fault {
        JsonFault::Syntax(message) => ApiError::InvalidJson(message),
        JsonFault::Shape(error) => ApiError::InvalidRetry(vec![error]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: i64 = 1_900_000_000_000;

    fn read(body: &str) -> Result<Retries, ApiError> {
        many(body.as_bytes(), 10, clock::timestamp(NOW))
    }

    fn faults(body: &str) -> Vec<String> {
        match read(body) {
            Err(ApiError::InvalidRetry(faults)) => faults.into_iter().map(|fault| fault.path).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn args_are_optional() {
        assert_eq!(args(b" ").unwrap(), None);
        assert_eq!(args(b"{}").unwrap(), None);
        assert_eq!(args(br#"{"args":null}"#).unwrap(), Some(Json::null()));
        for bad in [r#"{"args":1e999}"#, r#"{"arg":1}"#, "[]"] {
            assert!(matches!(args(bad.as_bytes()), Err(ApiError::InvalidRetry(_))), "{bad}");
        }
        assert!(matches!(args(b"again"), Err(ApiError::InvalidJson(_))));
    }

    #[test]
    fn nothing_is_retried_without_a_filter() {
        assert_eq!(faults("{}"), [""]);
        assert_eq!(faults(r#"{"per_second":10,"dry_run":true}"#), [""]);
        assert_eq!(
            faults(r#"{"state":"running","kind":"","queue":"A","tag":"x","cursor":"1-2","per_second":0}"#),
            ["cursor", "state", "kind", "queue", "tag", "per_second"]
        );
        let asked = read(r#"{"kind":"a"}"#).unwrap();
        assert_eq!((asked.query.state, asked.dry_run), (Some(State::Discarded), false));
        assert_eq!(read(r#"{"reason":"poison"}"#).unwrap().query.reason.as_deref(), Some("poison"));
        assert_eq!(read(r#"{"state":"cancelled"}"#).unwrap().query.state, Some(State::Cancelled));
    }

    proptest! {
        /// However the calls are cut, the starts are those of one call, so many a second and no two together more.
        #[test]
        fn starts_are_spread_evenly(per_second in 1..=PER_SECOND_MAX, calls in proptest::collection::vec(0..40usize, 1..5)) {
            let mut cursor = None;
            let mut starts = Vec::new();
            for count in calls {
                let begin_ms = cursor.as_deref().map_or(NOW, |text| super::cursor(text).unwrap().1.unwrap());
                let mut pace = Pace { per_second: Some(per_second), begin_ms, handed_out: 0 };
                starts.extend((0..count).map(|_| pace.delay(clock::timestamp(NOW)).as_millis() as i64));
                cursor = Some(pace.cursor(TaskId::new()));
            }
            for (index, start) in starts.iter().enumerate() {
                let even = index as i64 * 1000 / per_second;
                // Each call may round down once.
                prop_assert!((even - 5..=even).contains(start), "start {index} at {start} instead of {even}");
            }
            prop_assert!(starts.is_sorted());
        }

        #[test]
        fn any_cursor_is_survived(text in "[0-9a-f-]{0,60}") {
            let body = serde_json::json!({"kind": "a", "per_second": 1, "cursor": text}).to_string();
            if let Ok(mut asked) = read(&body) {
                asked.pace.delay(clock::timestamp(NOW));
            }
        }
    }
}
