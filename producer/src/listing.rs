//! From a query string to a page of the ledger, and to the next one.

use tasklane_common::ledger::ListQuery;
use tasklane_common::state::State;
use tasklane_common::task::{GroupId, Kind, QueueName, TaskId};
use uuid::Uuid;

use crate::error::ApiError;
use crate::extract::Params;

/// The most tasks on one page.
pub const LIMIT_MAX: u32 = 1_000;
/// How many tasks a page has when the request does not say.
pub const LIMIT_DEFAULT: u32 = 50;

const KNOWN: [&str; 7] = ["state", "kind", "queue", "tag", "group", "limit", "cursor"];
/// Tells this form of cursor from later ones.
const CURSOR_VERSION: char = '1';

/// Reads the filters of a list.
///
/// # Errors
/// [`ApiError::InvalidQuery`] naming every parameter that does not fit.
pub fn query(text: Option<&str>) -> Result<ListQuery, ApiError> {
    let mut params = Params::parse(text, &KNOWN);
    let query = ListQuery {
        state: params.read("state", |name| name.parse::<State>().map_err(|error| error.to_string())),
        kind: params.read("kind", |name| Kind::parse(name).map_err(|error| error.to_string())),
        queue: params.read("queue", |name| QueueName::parse(name).map_err(|error| error.to_string())),
        tag: params.read("tag", tag),
        group: params.read("group", group),
        before: params.read("cursor", before),
        limit: params.integer("limit", 1, LIMIT_MAX).unwrap_or(LIMIT_DEFAULT),
    };
    params.finish()?;
    Ok(query)
}

/// A filter as the log tells it.
#[must_use]
pub fn told(query: &ListQuery) -> String {
    let ListQuery { state, kind, queue, tag, group, before: _, limit: _ } = query;
    let parts = [
        state.map(|state| format!("state={state}")),
        kind.as_ref().map(|kind| format!("kind={kind}")),
        queue.as_ref().map(|queue| format!("queue={queue}")),
        tag.as_ref().map(|(key, value)| format!("tag={key}:{value}")),
        group.map(|group| format!("group={group}")),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
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
        let text = format!("state=queued&kind=a.b&queue=q&tag=k%3Av:w&limit=2&cursor={cursor}");
        let query = query(Some(&text)).unwrap();
        assert_eq!((query.state, query.limit), (Some(State::Queued), 2));
        assert_eq!(query.tag, Some(("k".to_owned(), "v:w".to_owned())));
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
