//! What the API asks.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row;
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::queues::pauses_within;
use super::rows::{lane_of, state_of, task_of};
use crate::ledger::{LIST_SCAN_MAX, ListQuery, PAGE_BYTES_MAX, Page, QueueCounts, RUNS_LOOKED_AT};
use crate::state::State;
use crate::task::{Kind, Lane, QueueName, Task, TaskId};

const GET: &str = "SELECT * FROM tasklane.tasks WHERE id = ANY($1)";

/// A page out of the rows that `$scanned` lets through, newest first, at most `$2` of them. `matches` tells whether
/// the page was cut short by its bytes.
macro_rules! list {
    ($scanned:literal) => {
        list!("tasklane.tasks", $scanned)
    };
    ($table:literal, $scanned:literal) => {
        concat!(
            "SELECT * FROM (
                 SELECT found.*, count(*) OVER () AS matches, sum(size) OVER (ORDER BY id DESC) - size AS before
                 FROM (
                     SELECT *, octet_length(args) + COALESCE(octet_length(result), 0) AS size
                     FROM (SELECT * FROM ",
            $table,
            " WHERE id < $1 AND ",
            $scanned,
            " ORDER BY id DESC LIMIT $2) scanned
                     WHERE ($3::smallint IS NULL OR state = $3) AND ($4::text IS NULL OR kind = $4)
                       AND ($5::text IS NULL OR queue = $5) AND ($6::text IS NULL OR position($6 IN tags) > 0)
                     ORDER BY id DESC
                     LIMIT $7
                 ) found
             ) page
             WHERE before < $8
             ORDER BY id DESC"
        )
    };
}

/// The last row that a scan of `$2` rows looks at, if there are so many.
macro_rules! scan_end {
    ($scanned:literal) => {
        concat!("SELECT id FROM tasklane.tasks WHERE id < $1 AND ", $scanned, " ORDER BY id DESC OFFSET $2 - 1 LIMIT 1")
    };
}

/// The members are found before anything else is asked of them: the order of ids would do as well for the planner, and
/// leads past all tasks that ever were.
const MEMBERS: &str = list!("(SELECT * FROM tasklane.tasks WHERE group_id = $9 OFFSET 0) members", "true");

/// The page's statement and its scan's end: the newest rows, or those of an index that knows the state.
const fn statements(state: Option<State>) -> (&'static str, &'static str) {
    match state {
        Some(State::Running) => (list!("state = 3"), scan_end!("state = 3")),
        Some(State::Cancelled | State::Discarded) => (list!("state IN (6, 7)"), scan_end!("state IN (6, 7)")),
        _ => (list!("true"), scan_end!("true")),
    }
}

/// One look into each of four partial indexes; completed rows are in none of them.
const QUEUES: &str = "
SELECT name, NULL::smallint, 0::bigint, NULL::bigint, tasklane.now_ms() FROM tasklane.queues
UNION ALL
SELECT queue, 2::smallint, count(*), min(run_at), tasklane.now_ms() FROM tasklane.tasks WHERE state = 2 GROUP BY queue
UNION ALL
SELECT queue, state, count(*), min(run_at), tasklane.now_ms() FROM tasklane.tasks
WHERE due_at IS NOT NULL GROUP BY queue, state
UNION ALL
SELECT queue, 0::smallint, count(*), min(run_at), tasklane.now_ms() FROM tasklane.tasks
WHERE state = 0 AND due_at IS NULL GROUP BY queue
UNION ALL
SELECT queue, 3::smallint, count(*), NULL, tasklane.now_ms() FROM tasklane.tasks WHERE state = 3 GROUP BY queue
UNION ALL
SELECT queue, state, count(*), NULL, tasklane.now_ms() FROM tasklane.tasks WHERE state IN (6, 7) GROUP BY queue, state";

pub(super) async fn get(connections: &Connections, ids: &[TaskId]) -> Result<Vec<Task>, Fault> {
    let mut lent = connections.lend().await?;
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let rows = sqlx::query(GET).bind(ids).fetch_all(&mut *lent).await?;
    lent.keep();
    rows.iter().map(task_of).collect()
}

pub(super) async fn list(connections: &Connections, query: &ListQuery) -> Result<Page, Fault> {
    let (page_sql, scan_end_sql) = statements(query.state);
    let page_sql = query.group.map_or(page_sql, |_| MEMBERS);
    let before = query.before.map_or(Uuid::max(), |id| id.0);
    let limit = i64::from(query.limit);
    let mut lent = connections.lend().await?;
    let page = sqlx::query(page_sql)
        .bind(before)
        .bind(i64::from(LIST_SCAN_MAX))
        .bind(query.state.map(State::code))
        .bind(query.kind.as_ref().map(|kind| kind.as_str()))
        .bind(query.queue.as_ref().map(QueueName::as_str))
        .bind(query.tag.as_ref().map(tag_member).transpose()?)
        // One more than asked for tells whether this is the end.
        .bind(limit + 1)
        .bind(PAGE_BYTES_MAX as i64);
    let page = match query.group {
        Some(group) => page.bind(group.0),
        None => page,
    };
    let rows = page.fetch_all(&mut *lent).await?;
    let matches: i64 = rows.first().map_or(Ok(0), |row| row.try_get("matches"))?;
    let mut tasks = rows.iter().map(task_of).collect::<Result<Vec<_>, _>>()?;
    tasks.truncate(query.limit as usize);
    let last = tasks.last().map(|task| task.id);
    let next = if matches > i64::try_from(tasks.len()).unwrap_or(i64::MAX) {
        last
    } else if query.group.is_some() {
        // A group has fewer members than a scan looks at.
        None
    } else {
        let sql = sqlx::query_scalar(scan_end_sql).bind(before).bind(i64::from(LIST_SCAN_MAX));
        let end: Option<Uuid> = sql.fetch_optional(&mut *lent).await?;
        // Tasks recorded between the two looks move this end towards the newer ones; never go back before a
        // task that this page shows.
        end.map(|end| last.map_or(TaskId(end), |last| last.min(TaskId(end))))
    };
    lent.keep();
    if let Some((key, value)) = &query.tag {
        tasks.retain(|task| task.tags.get(key) == Some(value));
    }
    Ok(Page { tasks, next })
}

/// The tag as it stands in a row's JSON: a quick filter, and almost an exact one. Which rows really have the tag is
/// decided after parsing; looking for it as JSON in SQL fails on an escaped NUL anywhere in the row.
fn tag_member((key, value): &(String, String)) -> Result<String, Fault> {
    let written = |text| serde_json::to_string(text).map_err(|error| Fault::Refused(error.to_string()));
    Ok(format!("{}:{}", written(key)?, written(value)?))
}

/// A queue; a state, how many tasks are in it, since when the oldest could start; the server's time.
type CountRow = (String, Option<i16>, i64, Option<i64>, i64);

pub(super) async fn queues(connections: &Connections) -> Result<Vec<QueueCounts>, Fault> {
    let mut lent = connections.lend().await?;
    let rows: Vec<CountRow> = sqlx::query_as(QUEUES).fetch_all(&mut *lent).await?;
    let paused = pauses_within(&mut lent).await?;
    lent.keep();
    let mut found: BTreeMap<QueueName, QueueCounts> = BTreeMap::new();
    for (name, code, count, since, now) in rows {
        let queue = QueueName::parse(&name).map_err(Fault::corrupt)?;
        let counts = entry(&mut found, queue);
        if let Some(code) = code {
            *counts.counts.entry(state_of(code)?).or_default() += count.unsigned_abs();
        }
        let waited = since.and_then(|since| u64::try_from(now - since).ok()).map(Duration::from_millis);
        counts.oldest_waiting = counts.oldest_waiting.max(waited);
    }
    for (queue, paused) in paused {
        entry(&mut found, queue).paused = Some(paused);
    }
    Ok(found.into_values().collect())
}

fn entry(found: &mut BTreeMap<QueueName, QueueCounts>, queue: QueueName) -> &mut QueueCounts {
    let empty = QueueCounts { queue: queue.clone(), counts: BTreeMap::new(), oldest_waiting: None, paused: None };
    found.entry(queue).or_insert(empty)
}

pub(super) async fn queued_lanes(connections: &Connections) -> Result<Vec<Lane>, Fault> {
    // Jumps from queue to queue in the index instead of reading every row of it, which EXISTS would do, as a join.
    const LANES: &str = "
WITH RECURSIVE names (name) AS (
    SELECT min(queue) FROM tasklane.tasks WHERE state = 2
    UNION ALL
    SELECT (SELECT min(queue) FROM tasklane.tasks WHERE state = 2 AND queue > name) FROM names WHERE name IS NOT NULL)
SELECT name, p.priority FROM names, (VALUES (1::smallint), (0::smallint), (-1::smallint)) AS p (priority)
WHERE (SELECT true FROM tasklane.tasks t WHERE t.state = 2 AND t.queue = name AND t.priority = p.priority LIMIT 1)";
    let mut lent = connections.lend().await?;
    let lanes: Vec<(String, i16)> = sqlx::query_as(LANES).fetch_all(&mut *lent).await?;
    lent.keep();
    lanes.iter().map(|(queue, priority)| lane_of(queue, *priority)).collect()
}

pub(super) async fn run_times(connections: &Connections, queue: &QueueName) -> Result<Vec<(Kind, Duration)>, Fault> {
    const TIMES: &str = "
SELECT kind, avg(finished_at - started_at)::bigint
FROM (SELECT kind, state, started_at, finished_at FROM tasklane.tasks
      WHERE queue = $1 AND finished_at IS NOT NULL AND group_id IS NULL ORDER BY finished_at DESC LIMIT $2) AS last
WHERE state = 5 GROUP BY kind";
    let mut lent = connections.lend().await?;
    let times: Vec<(String, i64)> =
        sqlx::query_as(TIMES).bind(queue.as_str()).bind(RUNS_LOOKED_AT).fetch_all(&mut *lent).await?;
    lent.keep();
    times
        .iter()
        .map(|(kind, ms)| {
            Ok((
                Kind::parse(kind.as_str()).map_err(Fault::corrupt)?,
                Duration::from_millis(u64::try_from(*ms).unwrap_or(0)),
            ))
        })
        .collect()
}
