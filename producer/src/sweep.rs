//! What is done to all tasks that meet a filter, some thousands a call: they are purged, or moved to another queue.

use std::time::Duration;

use serde::Deserialize;
use tasklane_common::ledger::ListQuery;
use tasklane_common::state::{Event, State, UnknownState, next};
use tasklane_common::task::{Kind, NameError, QueueName, Task, TaskId};
use tokio::time::Instant;
use utoipa::ToSchema;

use crate::app::App;
use crate::caller::{self, Act, Caller};
use crate::cancellation::checked;
use crate::error::{ApiError, FieldError};
use crate::extract::{self, JsonFault};
use crate::listing;

/// How many tasks are looked at and written together.
pub(crate) const PAGE: u32 = 500;
/// How many tasks one call writes.
pub(crate) const TASKS_MAX: u64 = 10_000;
/// How long one call looks for tasks; a rare filter over a long history takes several.
pub(crate) const TIME_MAX: Duration = Duration::from_secs(5);

/// Which tasks are to be purged: those that have finished and meet all that is given of `state`, `kind`, `queue` and `tag`,
/// of which one is needed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PurgeTasks {
    /// Only in this state: `completed`, `cancelled` or `discarded`.
    state: Option<String>,
    /// Only of this kind.
    kind: Option<String>,
    /// Only of this queue.
    queue: Option<String>,
    /// Only with this tag, `key:value`.
    tag: Option<String>,
    /// Only counts what would be purged.
    #[serde(default)]
    dry_run: bool,
    /// The `next_cursor` of the answer before.
    #[schema(pattern = "^1[0-9a-f]{32}$")]
    cursor: Option<String>,
}

/// Where waiting tasks are to go.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveTasks {
    /// The queue that they go to.
    to: String,
    /// Which; without it all.
    #[serde(default, deserialize_with = "extract::part")]
    filter: Option<MoveFilter>,
    /// Only counts what would be moved.
    #[serde(default)]
    dry_run: bool,
    /// The `next_cursor` of the answer before.
    #[schema(pattern = "^1[0-9a-f]{32}$")]
    cursor: Option<String>,
}

/// Which waiting tasks of a queue: those that meet all that is given.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveFilter {
    /// Only of this kind.
    kind: Option<String>,
    /// Only with this tag, `key:value`.
    tag: Option<String>,
}

/// What is to be done to which tasks.
#[derive(Debug)]
pub struct Sweep {
    query: ListQuery,
    deed: Deed,
    dry_run: bool,
}

#[derive(Debug)]
enum Deed {
    Purge,
    Move { from: QueueName, to: QueueName },
}

/// How far it has come.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many tasks; in a dry run, how many it would be.
    pub tasks: u64,
    /// Where the next call goes on; `None` at the end.
    pub next_cursor: Option<String>,
}

/// Reads the body of a request to purge.
///
/// # Errors
/// [`ApiError::InvalidJson`] or [`ApiError::InvalidPurge`].
pub fn purge(body: &[u8]) -> Result<Sweep, ApiError> {
    let asked: PurgeTasks = extract::object(body).map_err(|fault| refused(fault, ApiError::InvalidPurge))?;
    let mut faults = Vec::new();
    if asked.state.is_none() && asked.kind.is_none() && asked.queue.is_none() && asked.tag.is_none() {
        faults.push(FieldError::new("", "must have at least one of state, kind, queue, tag"));
    }
    let query = ListQuery {
        state: checked("state", asked.state, finished, &mut faults),
        kind: checked("kind", asked.kind, kind, &mut faults),
        queue: checked("queue", asked.queue, queue, &mut faults),
        tags: checked("tag", asked.tag, listing::tag, &mut faults).into_iter().collect(),
        before: checked("cursor", asked.cursor, listing::before, &mut faults),
        limit: PAGE,
        ..ListQuery::default()
    };
    match faults.is_empty() {
        true => Ok(Sweep { query, deed: Deed::Purge, dry_run: asked.dry_run }),
        false => Err(ApiError::InvalidPurge(faults)),
    }
}

/// Reads the body of a request to move waiting tasks of the queue `from`.
///
/// # Errors
/// [`ApiError::InvalidJson`] or [`ApiError::InvalidMove`].
pub fn moving(from: QueueName, body: &[u8]) -> Result<Sweep, ApiError> {
    let asked: MoveTasks = extract::object(body).map_err(|fault| refused(fault, ApiError::InvalidMove))?;
    let mut faults = Vec::new();
    let other = |name: &str| match queue(name)? {
        to if to == from => Err("must be another queue".to_owned()),
        to => Ok(to),
    };
    let to = checked("to", Some(asked.to), other, &mut faults);
    let filter = asked.filter.unwrap_or_default();
    let query = ListQuery {
        state: None,
        kind: checked("filter.kind", filter.kind, kind, &mut faults),
        queue: Some(from.clone()),
        tags: checked("filter.tag", filter.tag, listing::tag, &mut faults).into_iter().collect(),
        before: checked("cursor", asked.cursor, listing::before, &mut faults),
        limit: PAGE,
        ..ListQuery::default()
    };
    match to.filter(|_| faults.is_empty()) {
        Some(to) => Ok(Sweep { query, deed: Deed::Move { from, to }, dry_run: asked.dry_run }),
        None => Err(ApiError::InvalidMove(faults)),
    }
}

fn kind(name: &str) -> Result<Kind, String> {
    Kind::parse(name).map_err(|error: NameError| error.to_string())
}

fn queue(name: &str) -> Result<QueueName, String> {
    QueueName::parse(name).map_err(|error: NameError| error.to_string())
}

fn finished(name: &str) -> Result<State, String> {
    let state: State = name.parse().map_err(|error: UnknownState| error.to_string())?;
    if state.is_final() { Ok(state) } else { Err(format!("a {state} task cannot be purged: cancel it first")) }
}

fn refused(fault: JsonFault, invalid: impl FnOnce(Vec<FieldError>) -> ApiError) -> ApiError {
    match fault {
        JsonFault::Syntax(message) => ApiError::InvalidJson(message),
        JsonFault::Shape(error) => invalid(vec![error]),
    }
}

impl Sweep {
    /// Goes from the newest task to the oldest, as far as one call may go.
    ///
    /// # Errors
    /// When the ledger does not answer; what was done before stays done.
    pub(crate) async fn run(mut self, app: &App, caller: &Caller) -> Result<Swept, ApiError> {
        let until = Instant::now() + TIME_MAX;
        let mut swept = Swept::default();
        let mut line = (!self.dry_run).then(|| self.deed.begins(&self.query, caller));
        loop {
            let page = app.gate.look(app.gate.ledger().list(self.query.clone())).await?;
            let found: Vec<TaskId> =
                page.tasks.iter().filter(|task| self.deed.concerns(task)).map(|task| task.id).collect();
            let tasks = match self.dry_run || found.is_empty() {
                true => found.len() as u64,
                false => self.deed.write(app, found, caller).await?,
            };
            swept.tasks += tasks;
            if let Some(line) = &mut line {
                line.count(tasks);
            }
            self.query.before = page.next;
            if page.next.is_none() || swept.tasks >= TASKS_MAX || Instant::now() >= until {
                swept.next_cursor = page.next.map(listing::cursor);
                line.map(caller::Deed::done).unwrap_or_default();
                return Ok(swept);
            }
        }
    }
}

impl Deed {
    fn concerns(&self, task: &Task) -> bool {
        match self {
            Self::Purge => task.state.is_final(),
            Self::Move { .. } => next(task.state, Event::Move).is_some(),
        }
    }

    fn begins(&self, query: &ListQuery, caller: &Caller) -> caller::Deed {
        match self {
            Self::Purge => caller.begins(Act { call: "purge", told: "tasks were deleted" }, listing::told(query)),
            Self::Move { to, .. } => {
                let act = Act { call: "move", told: "tasks were given to another queue" };
                let mut line = caller.begins(act, listing::told(query));
                line.detail(format_args!("to queue {to}"));
                line
            }
        }
    }

    /// The ledger looks at each task again: what has changed in between is left alone.
    async fn write(&self, app: &App, ids: Vec<TaskId>, caller: &Caller) -> Result<u64, ApiError> {
        let ledger = app.gate.ledger();
        match self {
            Self::Purge => app.gate.ask(ledger.purge(ids)).await,
            Self::Move { from, to } => {
                app.gate.ask(ledger.move_tasks(ids, from.clone(), to.clone(), caller.known())).await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(swept: Result<Sweep, ApiError>) -> Vec<String> {
        match swept {
            Err(ApiError::InvalidPurge(faults) | ApiError::InvalidMove(faults)) => {
                faults.into_iter().map(|fault| fault.path).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_has_finished_is_purged_and_never_everything() {
        assert_eq!(faults(purge(b"{}")), [""]);
        assert_eq!(faults(purge(br#"{"dry_run":true}"#)), [""]);
        assert_eq!(faults(purge(br#"{"state":"queued"}"#)), ["state"]);
        assert_eq!(
            faults(purge(br#"{"state":"x","kind":"","queue":"A","tag":"x","cursor":"0"}"#)),
            ["state", "kind", "queue", "tag", "cursor"]
        );
        let sweep = purge(br#"{"state":"discarded","tag":"k:v"}"#).unwrap();
        assert_eq!((sweep.query.state, sweep.dry_run), (Some(State::Discarded), false));
        assert!(matches!(purge(b"x"), Err(ApiError::InvalidJson(_))));
    }

    #[test]
    fn tasks_are_moved_to_another_queue() {
        let asked = |body: &str| moving(QueueName::parse("here").unwrap(), body.as_bytes());
        assert_eq!(faults(asked("{}")), [""], "a field is missing");
        assert_eq!(faults(asked(r#"{"to":"here"}"#)), ["to"]);
        assert_eq!(
            faults(asked(r#"{"to":"A","filter":{"kind":"","tag":"x"},"cursor":"0"}"#)),
            ["to", "filter.kind", "filter.tag", "cursor"]
        );
        assert_eq!(faults(asked(r#"{"to":"there","filter":{"queue":"x"}}"#)), ["filter.queue"]);
        assert_eq!(faults(asked(r#"{"to":"there","filter":["a",null]}"#)), ["filter"], "a list is no filter");
        let sweep = asked(r#"{"to":"there","filter":{"kind":"a"},"dry_run":true}"#).unwrap();
        assert_eq!(sweep.query.queue, Some(QueueName::parse("here").unwrap()));
        assert!(sweep.dry_run && matches!(sweep.deed, Deed::Move { to, .. } if to.as_str() == "there"));
    }
}
