//! Pages of tasks: looked for in steps, so that a page can end between two of them, and says where.

use sqlx::{PgConnection, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::rows::task_of;
use crate::ledger::{LIST_SCAN_MAX, LIST_TIME, ListQuery, PAGE_BYTES_MAX, Page, UNFINISHED_SEEN_MAX};
use crate::state::State;
use crate::task::{QueueName, TaskId};

/// How many rows the first step looks at; each following one looks at twice as many.
const STEP_ROWS: usize = 2_000;

/// A page out of the rows that `$scanned` lets through, newest first, at most `$2` of them. `matches` tells whether
/// the page was cut short by its bytes.
macro_rules! page {
    ($scanned:literal) => {
        page!("tasklane.tasks", $scanned)
    };
    ($table:literal, $scanned:literal) => {
        concat!(
            "SELECT * FROM (
                 SELECT found.*, count(*) OVER () AS matches, sum(size) OVER (ORDER BY id DESC) - size AS before
                 FROM (
                     SELECT *, octet_length(args) + COALESCE(octet_length(result), 0) AS size
                     FROM (SELECT * FROM ",
            $table,
            " WHERE id < $1 AND id > $14 AND ",
            $scanned,
            " ORDER BY id DESC LIMIT $2) scanned
                     WHERE ($3::smallint IS NULL OR state = $3) AND ($4::text IS NULL OR kind = $4)
                       AND ($5::text IS NULL OR queue = $5)
                       AND ($10::bigint IS NULL OR created_at >= $10) AND ($11::bigint IS NULL OR created_at < $11)
                       AND ($12::uuid IS NULL OR worker_id = $12) AND ($13::text IS NULL OR reason = $13)
                       AND ($6::text[] IS NULL
                            OR (SELECT bool_and(COALESCE(position(tag IN tags), 0) > 0) FROM unnest($6) tag))
                       AND ($9::text IS NULL OR position($9 IN errors) > 0)
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
        concat!(
            "SELECT id FROM tasklane.tasks WHERE id < $1 AND id > $3 AND ",
            $scanned,
            " ORDER BY id DESC OFFSET $2 - 1 LIMIT 1"
        )
    };
}

/// The members are found before anything else is asked of them: the order of ids would do as well for the planner, and
/// leads past all tasks that ever were.
const MEMBERS: &str = page!("(SELECT * FROM tasklane.tasks WHERE group_id = $15 OFFSET 0) members", "true");
/// The same for tasks whose ids are known.
const KNOWN: &str = page!("(SELECT * FROM tasklane.tasks WHERE id = ANY($15) OFFSET 0) known", "true");
const NEWEST: &str = page!("true");
const NEWEST_END: &str = scan_end!("true");
const FAILED: &str = page!("state IN (6, 7)");
const FAILED_END: &str = scan_end!("state IN (6, 7)");

/// Tasks that are due, each with its state: all that wait, but for what is queued or held.
pub(super) const DUE: &str = "SELECT id, state FROM tasklane.tasks WHERE due_at IS NOT NULL LIMIT $1";
pub(super) const HELD: &str = "SELECT id, 0::smallint FROM tasklane.tasks WHERE state = 0 AND due_at IS NULL LIMIT $1";
pub(super) const QUEUED: &str = "SELECT id, 2::smallint FROM tasklane.tasks WHERE state = 2 LIMIT $1";
pub(super) const RUNNING: &str = "SELECT id, 3::smallint FROM tasklane.tasks WHERE state = 3 LIMIT $1";

/// Where a page's tasks are looked for.
enum Place {
    /// Among the members of a group, of which there are fewer than a scan looks at.
    Members(Uuid),
    /// Among these, newest first; how many were looked at.
    Known(Vec<Uuid>, usize),
    /// Row by row, by this page's statement and that of its end.
    Scan(&'static str, &'static str),
}

/// What one step looks at.
struct Step {
    before: Uuid,
    rows: usize,
}

pub(super) async fn list(connections: &Connections, query: &ListQuery) -> Result<Page, Fault> {
    let mut lent = connections.lend().await?;
    let began = Instant::now();
    let mut place = place(&mut lent, query).await?;
    let mut step = Step { before: query.bounds().0, rows: STEP_ROWS };
    let (mut page, mut bytes, mut looked) = (Page { tasks: Vec::new(), next: None }, 0, 0);
    loop {
        let room = query.limit as usize - page.tasks.len();
        let rows = look(&mut lent, query, &place, &step, (room, PAGE_BYTES_MAX as i64 - bytes)).await?;
        let matches: i64 = rows.first().map_or(Ok(0), |row| row.try_get("matches"))?;
        let (shown, mut last) = (rows.len().min(room), step.before);
        for row in &rows[..shown] {
            bytes += i64::from(row.try_get::<i32, _>("size")?);
            last = row.try_get("id")?;
            page.tasks.push(task_of(row)?);
        }
        page.tasks.retain(|task| query.lets_through(task));
        if matches > i64::try_from(shown).unwrap_or(i64::MAX) {
            page.next = Some(TaskId(last));
            break;
        }
        looked += step.rows;
        let Some(end) = end(&mut lent, query, &mut place, &step).await? else { break };
        step = Step { before: end.min(last), rows: step.rows * 2 };
        let full = page.tasks.len() >= query.limit as usize || bytes >= PAGE_BYTES_MAX as i64;
        if full || looked >= LIST_SCAN_MAX as usize || began.elapsed() >= LIST_TIME {
            page.next = Some(TaskId(step.before));
            break;
        }
    }
    lent.keep();
    Ok(page)
}

async fn look(
    connection: &mut PgConnection,
    query: &ListQuery,
    place: &Place,
    step: &Step,
    (room, bytes): (usize, i64),
) -> Result<Vec<sqlx::postgres::PgRow>, Fault> {
    let sql = match place {
        Place::Members(_) => MEMBERS,
        Place::Known(..) => KNOWN,
        Place::Scan(page, _) => page,
    };
    let rows = match place {
        Place::Members(_) => i64::from(LIST_SCAN_MAX),
        _ => i64::try_from(step.rows).unwrap_or(i64::MAX),
    };
    let tags = query.tags.iter().map(tag_member).collect::<Result<Vec<_>, _>>()?;
    let asked = sqlx::query(sql)
        .bind(step.before)
        .bind(rows)
        .bind(query.state.map(State::code))
        .bind(query.kind.as_ref().map(|kind| kind.as_str()))
        .bind(query.queue.as_ref().map(QueueName::as_str))
        .bind(Some(tags).filter(|tags| !tags.is_empty()))
        // One more than asked for tells whether this is the end.
        .bind(i64::try_from(room).unwrap_or(i64::MAX) + 1)
        .bind(bytes)
        .bind(query.error_in_json())
        .bind(query.since.map(|since| since.as_millisecond()))
        .bind(query.until.map(|until| until.as_millisecond()))
        .bind(query.worker.map(|worker| worker.0))
        .bind(query.reason.as_deref())
        .bind(query.bounds().1);
    let asked = match place {
        Place::Members(group) => asked.bind(*group),
        Place::Known(ids, from) => asked.bind(ids[*from..].iter().take(step.rows).copied().collect::<Vec<_>>()),
        Place::Scan(..) => asked,
    };
    Ok(asked.fetch_all(connection).await?)
}

/// The last row that a step has looked at, if it was not the last of all.
async fn end(
    connection: &mut PgConnection,
    query: &ListQuery,
    place: &mut Place,
    step: &Step,
) -> Result<Option<Uuid>, Fault> {
    Ok(match place {
        Place::Members(_) => None,
        Place::Known(ids, from) => {
            *from += step.rows;
            ids.get(*from).and_then(|_| ids.get(*from - 1)).copied()
        }
        // Tasks recorded between the two looks move this end towards the newer ones.
        Place::Scan(_, end) => {
            let rows = i64::try_from(step.rows).unwrap_or(i64::MAX);
            let asked = sqlx::query_scalar(*end).bind(step.before).bind(rows);
            asked.bind(query.bounds().1).fetch_optional(connection).await?
        }
    })
}

/// Unfinished tasks are found by the indexes that have no finished one, unless there are too many of them.
async fn place(connection: &mut PgConnection, query: &ListQuery) -> Result<Place, Fault> {
    let by: &[&'static str] = match (query.group, query.state) {
        (Some(group), _) => return Ok(Place::Members(group.0)),
        (None, Some(State::Cancelled | State::Discarded)) => return Ok(Place::Scan(FAILED, FAILED_END)),
        (None, None | Some(State::Completed)) => &[],
        (None, Some(State::Accepted)) => &[DUE, HELD],
        (None, Some(State::Scheduled | State::Retryable)) => &[DUE],
        (None, Some(State::Queued)) => &[QUEUED],
        (None, Some(State::Running)) => &[RUNNING],
    };
    let (before, after) = query.bounds();
    let (mut seen, mut found) = (0, Vec::new());
    for sql in by {
        let most = i64::from(UNFINISHED_SEEN_MAX) + 1;
        let rows: Vec<(Uuid, i16)> = sqlx::query_as(*sql).bind(most).fetch_all(&mut *connection).await?;
        seen += rows.len();
        let wanted =
            |(id, state): &(Uuid, i16)| query.state.map(State::code) == Some(*state) && *id < before && *id > after;
        found.extend(rows.into_iter().filter(wanted).map(|(id, _)| id));
    }
    if by.is_empty() || seen > UNFINISHED_SEEN_MAX as usize {
        return Ok(Place::Scan(NEWEST, NEWEST_END));
    }
    found.sort_unstable_by(|one, other| other.cmp(one));
    Ok(Place::Known(found, 0))
}

/// The tag as it stands in a row's JSON: a quick filter, and almost an exact one. Which rows really have the tag is
/// decided after parsing; looking for it as JSON in SQL fails on an escaped NUL anywhere in the row.
fn tag_member((key, value): &(String, String)) -> Result<String, Fault> {
    let written = |text| serde_json::to_string(text).map_err(|error| Fault::Refused(error.to_string()));
    Ok(format!("{}:{}", written(key)?, written(value)?))
}
