//! From what a client asks to be cancelled to what the ledger is asked, without any IO.

use serde::Deserialize;
use tasklane_common::ledger::ListQuery;
use tasklane_common::state::{Event, State, next};
use tasklane_common::task::{Kind, QueueName, REASON_BYTES_MAX};
use utoipa::ToSchema;

use crate::error::{ApiError, FieldError};
use crate::extract::{self, JsonFault};
use crate::listing;

/// Why tasks are cancelled whose client did not say.
const REASON_DEFAULT: &str = "requested";

/// Why a task is to be cancelled.
#[derive(Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CancelTask {
    /// Who wants that, or why; shown as the task's `reason`. At most 1,024 bytes without control characters.
    #[schema(max_length = 1024, default = "requested")]
    reason: Option<String>,
}

/// Which tasks are to be cancelled: those that have not ended and meet all that is given of `state`, `kind`, `queue` and
/// `tag`, of which one is needed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CancelTasks {
    /// Only in this state.
    state: Option<String>,
    /// Only of this kind.
    kind: Option<String>,
    /// Only of this queue.
    queue: Option<String>,
    /// Only with this tag, `key:value`.
    tag: Option<String>,
    /// Only counts what would be cancelled.
    #[serde(default)]
    dry_run: bool,
    /// The `next_cursor` of the answer before.
    #[schema(pattern = "^1[0-9a-f]{32}$")]
    cursor: Option<String>,
    /// Who wants that, or why; shown as the tasks' `reason`. At most 1,024 bytes without control characters.
    #[schema(max_length = 1024, default = "requested")]
    reason: Option<String>,
}

/// A checked [`CancelTasks`].
#[derive(Debug)]
pub struct Cancellation {
    /// Where to look.
    pub query: ListQuery,
    /// Why.
    pub reason: String,
    /// Whether to count only.
    pub dry_run: bool,
}

/// Whether a cancellation ends a task in this state at once: it does not run, and has not ended.
pub(crate) fn ends_at_once(state: State) -> bool {
    !state.is_final() && state != State::Running
}

/// Reads the body of a request for one task; without one nobody says why.
///
/// # Errors
/// [`ApiError::InvalidJson`] or [`ApiError::InvalidCancellation`].
pub fn reason(body: &[u8]) -> Result<String, ApiError> {
    let task: CancelTask =
        if body.trim_ascii().is_empty() { CancelTask::default() } else { extract::object(body).map_err(fault)? };
    let mut faults = Vec::new();
    let reason = checked_reason(task.reason, &mut faults);
    if faults.is_empty() { Ok(reason) } else { Err(ApiError::InvalidCancellation(faults)) }
}

/// Reads the body of a request for many tasks, which are looked for `page` at a time.
///
/// # Errors
/// As [`reason`].
pub fn many(body: &[u8], page: u32) -> Result<Cancellation, ApiError> {
    let asked: CancelTasks = extract::object(body).map_err(fault)?;
    let mut faults = Vec::new();
    if asked.state.is_none() && asked.kind.is_none() && asked.queue.is_none() && asked.tag.is_none() {
        faults.push(FieldError::new("", "must have at least one of state, kind, queue, tag"));
    }
    let named = |error: tasklane_common::task::NameError| error.to_string();
    let query = ListQuery {
        state: checked("state", asked.state, unfinished, &mut faults),
        kind: checked("kind", asked.kind, |name| Kind::parse(name).map_err(named), &mut faults),
        queue: checked("queue", asked.queue, |name| QueueName::parse(name).map_err(named), &mut faults),
        tags: checked("tag", asked.tag, listing::tag, &mut faults).into_iter().collect(),
        before: checked("cursor", asked.cursor, listing::before, &mut faults),
        limit: page,
        ..ListQuery::default()
    };
    let reason = checked_reason(asked.reason, &mut faults);
    if faults.is_empty() {
        Ok(Cancellation { query, reason, dry_run: asked.dry_run })
    } else {
        Err(ApiError::InvalidCancellation(faults))
    }
}

/// Reads one field, and notes its fault.
pub(crate) fn checked<T>(
    path: &str,
    given: Option<String>,
    read: impl FnOnce(&str) -> Result<T, String>,
    faults: &mut Vec<FieldError>,
) -> Option<T> {
    read(&given?).map_err(|message| faults.push(FieldError::new(path, message))).ok()
}

fn unfinished(name: &str) -> Result<State, String> {
    let state: State = name.parse().map_err(|error: tasklane_common::state::UnknownState| error.to_string())?;
    match next(state, Event::Cancel) {
        Some(_) => Ok(state),
        None => Err(format!("a {state} task cannot be cancelled")),
    }
}

fn checked_reason(reason: Option<String>, faults: &mut Vec<FieldError>) -> String {
    let reason = reason.unwrap_or_else(|| REASON_DEFAULT.to_owned());
    if reason.trim().is_empty() || reason.len() > REASON_BYTES_MAX || reason.chars().any(char::is_control) {
        let rule = format!("must be 1 to {REASON_BYTES_MAX} bytes without control characters");
        faults.push(FieldError::new("reason", rule));
    }
    reason
}

fn fault(fault: JsonFault) -> ApiError {
    match fault {
        JsonFault::Syntax(message) => ApiError::InvalidJson(message),
        JsonFault::Shape(error) => ApiError::InvalidCancellation(vec![error]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(body: &str) -> Vec<String> {
        match many(body.as_bytes(), 10) {
            Err(ApiError::InvalidCancellation(faults)) => faults.into_iter().map(|fault| fault.path).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_reason_is_optional_and_short() {
        assert_eq!(reason(b" ").unwrap(), REASON_DEFAULT);
        assert_eq!(reason("{\"reason\":\"wegen Umbau\"}".as_bytes()).unwrap(), "wegen Umbau");
        for bad in ["", "  ", "a\\u0000b", &"x".repeat(REASON_BYTES_MAX + 1)] {
            let body = format!("{{\"reason\":\"{bad}\"}}");
            assert!(matches!(reason(body.as_bytes()), Err(ApiError::InvalidCancellation(_))), "{bad:?}");
        }
        assert!(matches!(reason(b"{\"why\":1}"), Err(ApiError::InvalidCancellation(_))));
        assert!(matches!(reason(b"reason"), Err(ApiError::InvalidJson(_))));
    }

    #[test]
    fn nothing_is_cancelled_without_a_filter() {
        assert_eq!(faults("{}"), [""]);
        assert_eq!(faults(r#"{"reason":"all","dry_run":true}"#), [""]);
        assert_eq!(
            faults(r#"{"state":"completed","kind":"","queue":"A","tag":"x","cursor":"0"}"#),
            ["state", "kind", "queue", "tag", "cursor"]
        );
        let asked = many(br#"{"state":"queued","tag":"k:v"}"#, 10).unwrap();
        assert_eq!((asked.query.state, asked.dry_run), (Some(State::Queued), false));
    }
}
