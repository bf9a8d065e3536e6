//! Pages of tasks. A row's columns are looked at first, one row after the other, and only what is wanted is read whole: so
//! a page can end at any row, and says where.

use std::time::{Duration, Instant};

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, params_from_iter};

use super::read::{id_of, one, state_of};
use crate::ledger::{LIST_SCAN_MAX, LIST_TIME, ListQuery, PAGE_BYTES_MAX, Page, UNFINISHED_SEEN_MAX};
use crate::state::State;
use crate::task::{Task, TaskId};

/// Tasks that are due, each with its state: all that wait, but for what is queued or held.
pub(super) const DUE: &str = "SELECT id, state FROM tasks INDEXED BY tasks_due WHERE due_at IS NOT NULL LIMIT ?1";
pub(super) const HELD: &str =
    "SELECT id, 0 FROM tasks INDEXED BY tasks_held WHERE state = 0 AND due_at IS NULL LIMIT ?1";
pub(super) const QUEUED: &str = "SELECT id, 2 FROM tasks INDEXED BY tasks_queued WHERE state = 2 LIMIT ?1";
pub(super) const RUNNING: &str = "SELECT id, 3 FROM tasks INDEXED BY tasks_running WHERE state = 3 LIMIT ?1";

/// The columns' part of a query: `?1` and `?2` are ids, the values of the rest begin at `?3`.
struct Filters {
    sql: String,
    values: Vec<Value>,
}

impl Filters {
    fn of(query: &ListQuery) -> Self {
        let mut filters = Self { sql: "1".to_owned(), values: Vec::new() };
        let text = |text: &str| Value::from(text.to_owned());
        // First, since the scan by a group's index names it as `?3`.
        filters.add("t.group_id = ??", query.group.map(|id| Value::Blob(id.0.as_bytes().to_vec())));
        filters.add("t.state = ??", query.state.map(|state| i64::from(state.code()).into()));
        filters.add("t.kind = ??", query.kind.as_ref().map(|kind| text(kind.as_str())));
        filters.add("t.queue = ??", query.queue.as_ref().map(|queue| text(queue.as_str())));
        filters.add("t.created_at >= ??", query.since.map(|since| since.as_millisecond().into()));
        filters.add("t.created_at < ??", query.until.map(|until| until.as_millisecond().into()));
        filters.add("t.worker_id = ??", query.worker.map(|id| Value::Blob(id.0.as_bytes().to_vec())));
        filters.add("t.reason = ??", query.reason.as_deref().map(text));
        for (key, value) in &query.tags {
            // A value and not EXISTS, which would become a join behind the tables that hold args.
            let has = "(SELECT 1 FROM json_each(t.tags) e WHERE e.key = json_extract(??, '$[0]') \
                       AND e.value = json_extract(??, '$[1]') LIMIT 1) IS NOT NULL";
            filters.add(has, Some(serde_json::json!([key, value]).to_string().into()));
        }
        filters.add("instr(t.errors, ??) > 0", query.error_in_json().map(Value::from));
        filters
    }

    fn add(&mut self, condition: &str, value: Option<Value>) {
        let Some(value) = value else { return };
        self.values.push(value);
        let number = format!("?{}", self.values.len() + 2);
        self.sql.push_str(&format!(" AND {}", condition.replace("??", &number)));
    }

    fn bound(&self, ids: [&[u8]; 2]) -> impl Iterator<Item = Value> {
        ids.map(|id| Value::Blob(id.to_vec())).into_iter().chain(self.values.clone())
    }
}

/// The statement that looks at all rows of one index, or of the newest tasks.
pub(super) fn scan(query: &ListQuery) -> String {
    let (by, scanned) = match (query.group, query.state) {
        // A group has fewer members than a scan looks at.
        (Some(_), _) => ("INDEXED BY tasks_group", "t.group_id = ?3"),
        (None, Some(State::Cancelled | State::Discarded)) => ("INDEXED BY tasks_failed", "t.state IN (6, 7)"),
        (None, _) => ("", "true"),
    };
    let filters = Filters::of(query).sql;
    format!(
        "SELECT t.id, coalesce({filters}, 0) FROM tasks t {by}
         WHERE t.id < ?1 AND t.id > ?2 AND {scanned} ORDER BY t.id DESC LIMIT {LIST_SCAN_MAX}"
    )
}

pub(super) fn list(db: &Connection, query: &ListQuery) -> rusqlite::Result<Page> {
    list_within(db, query, LIST_TIME)
}

/// A page that ends at the first row after this time.
pub(super) fn list_within(db: &Connection, query: &ListQuery, time: Duration) -> rusqlite::Result<Page> {
    let (filters, (before, after)) = (Filters::of(query), query.bounds());
    let mut filling = Filling::new(query, time);
    if let Some(ids) = unfinished(db, query)? {
        let sql = format!("SELECT coalesce({}, 0) FROM tasks t WHERE t.id = ?1 AND t.id > ?2", filters.sql);
        let mut statement = db.prepare_cached(&sql)?;
        for id in ids {
            let values = filters.bound([id.0.as_bytes(), after.as_bytes()]);
            let wanted = statement.query_row(params_from_iter(values), |row| row.get(0)).optional()?;
            if filling.look(db, id, wanted.unwrap_or(false))? {
                break;
            }
        }
        return Ok(filling.page());
    }
    let mut statement = db.prepare_cached(&scan(query))?;
    let mut rows = statement.query(params_from_iter(filters.bound([before.as_bytes(), after.as_bytes()])))?;
    while let Some(row) = rows.next()? {
        if filling.look(db, id_of(row, 0)?, row.get(1)?)? {
            break;
        }
    }
    Ok(filling.page())
}

/// The tasks in an unfinished state, newest first, found without a look at finished ones; `None` where that is not asked
/// for, or there are too many.
fn unfinished(db: &Connection, query: &ListQuery) -> rusqlite::Result<Option<Vec<TaskId>>> {
    let by: &[&str] = match query.state.filter(|_| query.group.is_none()) {
        Some(State::Accepted) => &[DUE, HELD],
        Some(State::Scheduled | State::Retryable) => &[DUE],
        Some(State::Queued) => &[QUEUED],
        Some(State::Running) => &[RUNNING],
        _ => return Ok(None),
    };
    let (before, after) = query.bounds();
    let (mut seen, mut found) = (0, Vec::new());
    for sql in by {
        let mut statement = db.prepare_cached(sql)?;
        let mut rows = statement.query([UNFINISHED_SEEN_MAX + 1])?;
        while let Some(row) = rows.next()? {
            let (id, state) = (id_of(row, 0)?, state_of(row, 1)?);
            seen += 1;
            if Some(state) == query.state && id.0 < before && id.0 > after {
                found.push(id);
            }
        }
    }
    found.sort_unstable_by(|one, other| other.cmp(one));
    Ok((seen <= UNFINISHED_SEEN_MAX).then_some(found))
}

/// A page that is being filled.
struct Filling<'q> {
    query: &'q ListQuery,
    tasks: Vec<Task>,
    bytes: usize,
    looked: u32,
    began: Instant,
    time: Duration,
    /// The row at which it has ended before all were looked at.
    ended: Option<TaskId>,
}

impl<'q> Filling<'q> {
    fn new(query: &'q ListQuery, time: Duration) -> Self {
        Self { query, tasks: Vec::new(), bytes: 0, looked: 0, began: Instant::now(), time, ended: None }
    }

    /// Takes one row; whether it is the page's last.
    fn look(&mut self, db: &Connection, id: TaskId, wanted: bool) -> rusqlite::Result<bool> {
        self.looked += 1;
        let task = if wanted { one(db, id)? } else { None };
        if let Some(task) = task.filter(|task| self.query.lets_through(task)) {
            self.bytes += task.args.as_str().len() + task.result.as_ref().map_or(0, |result| result.as_str().len());
            self.tasks.push(task);
        }
        // A task that alone has more than a page is a page.
        let full = self.tasks.len() >= self.query.limit as usize || self.bytes >= PAGE_BYTES_MAX;
        let last = full || self.looked >= LIST_SCAN_MAX || self.began.elapsed() >= self.time;
        self.ended = last.then_some(id);
        Ok(last)
    }

    fn page(self) -> Page {
        Page { tasks: self.tasks, next: self.ended }
    }
}
