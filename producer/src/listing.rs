//! From a query string to a page of the ledger, and to the next one.

use jiff::Timestamp;
use tasklane_common::ledger::ListQuery;
use tasklane_common::state::State;
use tasklane_common::task::{GroupId, Kind, QueueName, TaskId, WorkerId};
use uuid::Uuid;

use crate::error::ApiError;
use crate::extract::Params;

/// The most tasks on one page.
pub const LIMIT_MAX: u32 = 1_000;
/// How many tasks a page has when the request does not say.
pub const LIMIT_DEFAULT: u32 = 50;

const KNOWN: [&str; 12] =
    ["state", "kind", "queue", "tag", "group", "error", "since", "until", "worker", "reason", "limit", "cursor"];
/// Those that may be given several times: all of them must be met.
const SEVERAL: [&str; 1] = ["tag"];
/// How many tags one request may ask for.
const TAGS_MAX: usize = 16;
/// The longest text that is looked for in errors, and the longest reason.
const TEXT_BYTES_MAX: usize = 1_024;
/// Tells this form of cursor from later ones.
const CURSOR_VERSION: char = '1';

/// Reads the filters of a list.
///
/// # Errors
/// [`ApiError::InvalidQuery`] naming every parameter that does not fit.
pub fn query(text: Option<&str>) -> Result<ListQuery, ApiError> {
    let mut params = Params::parse(text, &KNOWN, &SEVERAL);
    let query = ListQuery {
        state: params.read("state", |name| name.parse::<State>().map_err(|error| error.to_string())),
        kind: params.read("kind", |name| Kind::parse(name).map_err(|error| error.to_string())),
        queue: params.read("queue", |name| QueueName::parse(name).map_err(|error| error.to_string())),
        tags: params.read_all("tag", TAGS_MAX, tag),
        group: params.read("group", group),
        error: params.read("error", short),
        since: params.read("since", time),
        until: params.read("until", time),
        worker: params.read("worker", worker),
        reason: params.read("reason", short),
        before: params.read("cursor", before),
        limit: params.integer("limit", 1, LIMIT_MAX).unwrap_or(LIMIT_DEFAULT),
    };
    params.finish()?;
    Ok(query)
}

/// A filter as the log tells it.
#[must_use]
pub fn told(query: &ListQuery) -> String {
    let ListQuery { state, kind, queue, tags, group, error, since, until, worker, reason, before: _, limit: _ } = query;
    let tags = tags.iter().map(|(key, value)| format!("tag={key}:{value}"));
    let parts = [
        state.map(|state| format!("state={state}")),
        kind.as_ref().map(|kind| format!("kind={kind}")),
        queue.as_ref().map(|queue| format!("queue={queue}")),
        group.map(|group| format!("group={group}")),
        error.as_ref().map(|text| format!("error={text:?}")),
        since.map(|at| format!("since={at}")),
        until.map(|at| format!("until={at}")),
        worker.map(|worker| format!("worker={worker}")),
        reason.as_ref().map(|reason| format!("reason={reason:?}")),
    ];
    parts.into_iter().flatten().chain(tags).collect::<Vec<_>>().join(" ")
}

/// Where the next page begins, as an opaque text.
#[must_use]
pub fn cursor(before: TaskId) -> String {
    format!("{CURSOR_VERSION}{}", before.0.simple())
}

/// Where a page begins, from the text that [`cursor`] made.
///
/// # Errors
/// What is wrong with it.
pub fn before(cursor: &str) -> Result<TaskId, String> {
    parse_cursor(cursor).ok_or("is not a cursor of this API".to_owned())
}

fn parse_cursor(text: &str) -> Option<TaskId> {
    let hex = text.strip_prefix(CURSOR_VERSION).filter(|hex| hex.len() == 32)?;
    Uuid::try_parse(hex).ok().map(TaskId)
}

fn group(id: &str) -> Result<GroupId, String> {
    id.parse().map_err(|_| "must be a group's id (UUID)".to_owned())
}

fn worker(id: &str) -> Result<WorkerId, String> {
    id.parse().map(WorkerId).map_err(|_| "must be a worker's id (UUID)".to_owned())
}

fn time(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| "must be a time such as 2030-01-31T08:00:00Z".to_owned())
}

/// A text that is looked for.
///
/// # Errors
/// What is wrong with it.
pub fn short(text: &str) -> Result<String, String> {
    match text.len() {
        1..=TEXT_BYTES_MAX => Ok(text.to_owned()),
        _ => Err(format!("must have 1 to {TEXT_BYTES_MAX} bytes")),
    }
}

/// A tag as it stands in filters.
///
/// # Errors
/// What is wrong with it.
pub fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("must be key:value".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_filters_are_read() {
        let cursor = cursor(TaskId(Uuid::from_u128(7)));
        let text = format!(
            "state=queued&kind=a.b&queue=q&tag=k%3Av:w&tag=l:x&limit=2&cursor={cursor}&error=no+space&reason=poison\
             &since=2026-11-30T00:00:00Z&worker=00000000-0000-0000-0000-000000000009"
        );
        let query = query(Some(&text)).unwrap();
        assert_eq!((query.state, query.limit), (Some(State::Queued), 2));
        let tags = [("k", "v:w"), ("l", "x")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(query.tags, tags);
        assert_eq!((query.error.as_deref(), query.reason.as_deref()), (Some("no space"), Some("poison")));
        assert_eq!((query.worker, query.until), (Some(WorkerId(Uuid::from_u128(9))), None));
        assert_eq!(
            told(&query),
            "state=queued kind=a.b queue=q error=\"no space\" since=2026-11-30T00:00:00Z \
             worker=00000000-0000-0000-0000-000000000009 reason=\"poison\" tag=k:v:w tag=l:x"
        );
        assert_eq!(query.before, Some(TaskId(Uuid::from_u128(7))));
    }

    proptest! {
        #[test]
        fn cursors_round_trip(id: u128) {
            let id = TaskId(Uuid::from_u128(id));
            prop_assert_eq!(parse_cursor(&cursor(id)), Some(id));
        }

        #[test]
        fn any_query_is_survived(text in "[a-z=&%0-9:+-]{0,40}") {
            if let Ok(query) = query(Some(&text)) {
                prop_assert!((1..=LIMIT_MAX).contains(&query.limit));
            }
        }
    }
}
