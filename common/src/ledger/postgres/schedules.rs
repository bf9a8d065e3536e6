//! Schedules: their definitions, and the one transaction that fires their ticks.

use std::collections::HashSet;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::record;
use crate::clock::timestamp;
use crate::ledger::scheduling::{AHEAD_MS, parted};
use crate::ledger::{
    Changed, DueSchedules, Fired, Firing, NextTick, Paused, ScheduleChange, SchedulePage, Submission, Unreadable,
};
use crate::schedule::{Definition, Overlap, SCHEDULES_MAX, Schedule, ScheduleName, TickCounts};
use crate::task::TaskId;

/// The newest task by the unique index of ticks: it may have been pruned.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT s.*,
                 (SELECT t.id FROM tasklane.tasks t WHERE t.schedule = s.name AND t.tick = s.last_tick) AS last_task,
                 (SELECT t.id FROM tasklane.tasks t WHERE t.schedule = s.name AND t.state < 5 LIMIT 1) AS unfinished
             FROM tasklane.schedules s ",
            $rest
        )
    };
}

const ONE: &str = select!("WHERE s.name = $1");
const PAGE: &str = select!("WHERE s.name > $1 ORDER BY s.name LIMIT $2");
const DUE: &str = select!("WHERE s.next_at <= $1 ORDER BY s.next_at LIMIT $2");
const AHEAD: &str = select!("WHERE s.planned_at > $1 AND s.next_at > $2 LIMIT $3");
const NOW: &str = "SELECT tasklane.now_ms()";
const NEXT: &str = "SELECT clock.now, (SELECT min(next_at) FROM tasklane.schedules WHERE next_at IS NOT NULL)
FROM (SELECT tasklane.now_ms() AS now) clock";

/// Two that are made at the same moment may both find room for one.
const INSERT: &str = "
INSERT INTO tasklane.schedules (name, definition, revision, next_at, created_at, updated_at, planned_at, paused_at,
    paused_by)
SELECT $1, $2, $3, $4, clock.now, clock.now, clock.now, CASE WHEN $5 THEN clock.now END, CASE WHEN $5 THEN $6 END
FROM (SELECT tasklane.now_ms() AS now) clock
ON CONFLICT (name) DO NOTHING";
const REPLACE: &str = "
UPDATE tasklane.schedules
SET definition = $2, revision = $3, next_at = CASE WHEN $6 THEN next_at ELSE $4 END, updated_at = tasklane.now_ms(),
    planned_at = CASE WHEN $6 THEN planned_at ELSE tasklane.now_ms() END, missed = missed + $8, paused_by = CASE WHEN NOT $9 THEN NULL WHEN paused_at IS NULL THEN $10 ELSE paused_by END,
    paused_at = CASE WHEN $9 THEN COALESCE(paused_at, tasklane.now_ms()) END
WHERE name = $1 AND revision = $5 AND ($7::bigint IS NULL OR next_at = $7)";

/// Whoever else has the row locked is firing this tick, or changing the definition: he has overtaken us. The revision
/// tells a schedule from one that was replaced, or deleted and made again, and stands at the same tick.
const TAKE: &str = "
SELECT 1 FROM tasklane.schedules WHERE name = $1 AND revision = $2 AND next_at = $3 FOR UPDATE SKIP LOCKED";
const MOVE: &str = "
UPDATE tasklane.schedules
SET next_at = $2, planned_at = tasklane.now_ms(), missed = missed + $3, fired = fired + $4, last_tick = COALESCE($5, last_tick),
    skipped = skipped + $6, last_skipped = COALESCE($7, last_skipped),
    skipped_in_a_row = CASE WHEN $5::bigint IS NOT NULL THEN 0 ELSE skipped_in_a_row + $6 END
WHERE name = $1";
const UNFINISHED: &str = "SELECT id FROM tasklane.tasks WHERE schedule = $1 AND state < 5 LIMIT 1";
const KNOWN: &str = "SELECT tick FROM tasklane.tasks WHERE schedule = $1 AND tick = ANY($2)";
const MARK: &str = "
UPDATE tasklane.tasks t SET schedule = $1, tick = n.tick
FROM UNNEST($2::uuid[], $3::bigint[]) AS n (id, tick) WHERE t.id = n.id";

/// The schedule, or who it is.
fn read(row: &PgRow) -> Result<Result<Schedule, Unreadable>, Fault> {
    match serde_json::from_str(row.try_get("definition")?) {
        Ok(definition) => schedule_of(row, definition).map(Ok),
        Err(error) => {
            let revision = row.try_get("revision")?;
            Ok(Err(Unreadable { name: name_of(row)?, revision, problem: error.to_string() }))
        }
    }
}

fn name_of(row: &PgRow) -> Result<ScheduleName, Fault> {
    ScheduleName::parse(row.try_get("name")?).map_err(Fault::corrupt)
}

fn schedule_of(row: &PgRow, definition: Definition) -> Result<Schedule, Fault> {
    let time = |column: &str| row.try_get::<i64, _>(column).map(timestamp);
    let optional_time = |column: &str| row.try_get::<Option<i64>, _>(column).map(|at| at.map(timestamp));
    let task = |column: &str| row.try_get::<Option<Uuid>, _>(column).map(|id| id.map(TaskId));
    Ok(Schedule {
        name: name_of(row)?,
        revision: row.try_get("revision")?,
        next_at: optional_time("next_at")?,
        last_tick: optional_time("last_tick")?,
        last_task_id: task("last_task")?,
        last_skipped: optional_time("last_skipped")?,
        skipped_in_a_row: row.try_get("skipped_in_a_row")?,
        blocked_by: if definition.overlap == Overlap::Skip { task("unfinished")? } else { None },
        ticks: TickCounts {
            fired: row.try_get("fired")?,
            skipped: row.try_get("skipped")?,
            missed: row.try_get("missed")?,
        },
        paused: match optional_time("paused_at")? {
            Some(at) => Some(Paused { at, by: row.try_get("paused_by")? }),
            None => None,
        },
        definition,
        created_at: time("created_at")?,
        updated_at: time("updated_at")?,
    })
}

async fn find(connection: &mut PgConnection, name: &ScheduleName) -> Result<Option<Schedule>, Fault> {
    let row = sqlx::query(ONE).bind(name.as_str()).fetch_optional(connection).await?;
    let found = row.as_ref().map(read).transpose()?;
    found.transpose().map_err(|Unreadable { problem, .. }| Fault::corrupt(problem))
}

pub(super) async fn one(
    connections: &Connections,
    name: &ScheduleName,
) -> Result<(jiff::Timestamp, Option<Schedule>), Fault> {
    let mut lent = connections.lend().await?;
    let schedule = find(&mut lent, name).await?;
    let now: i64 = sqlx::query_scalar(NOW).fetch_one(&mut *lent).await?;
    lent.keep();
    Ok((timestamp(now), schedule))
}

pub(super) async fn page(
    connections: &Connections,
    after: Option<&ScheduleName>,
    limit: u32,
) -> Result<SchedulePage, Fault> {
    let mut lent = connections.lend().await?;
    // One more than asked for tells whether this is the end.
    let rows = sqlx::query(PAGE)
        .bind(after.map_or("", ScheduleName::as_str))
        .bind(i64::from(limit) + 1)
        .fetch_all(&mut *lent)
        .await?;
    let now: i64 = sqlx::query_scalar(NOW).fetch_one(&mut *lent).await?;
    lent.keep();
    let shown = &rows[..rows.len().min(limit as usize)];
    let next = shown.last().filter(|_| rows.len() > shown.len()).map(name_of).transpose()?;
    let found = shown.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let (schedules, unreadable) = parted(found);
    Ok(SchedulePage { now: timestamp(now), schedules, unreadable, next })
}

pub(super) async fn due(connections: &Connections, limit: u32) -> Result<DueSchedules, Fault> {
    let mut lent = connections.lend().await?;
    let (now, next): (i64, Option<i64>) = sqlx::query_as(NEXT).fetch_one(&mut *lent).await?;
    let wait = next.map(|next| Duration::from_millis(u64::try_from(next - now).unwrap_or(0)));
    let mut rows = Vec::new();
    if wait.is_some_and(|wait| wait.is_zero()) {
        rows = sqlx::query(DUE).bind(now).bind(i64::from(limit)).fetch_all(&mut *lent).await?;
    }
    let ahead = sqlx::query(AHEAD).bind(now + AHEAD_MS).bind(now).bind(i64::from(limit)).fetch_all(&mut *lent).await?;
    lent.keep();
    let found = |rows: &[PgRow]| rows.iter().map(read).collect::<Result<Vec<_>, _>>().map(parted);
    let (due, unreadable) = found(&rows)?;
    // What this build cannot read another one computes again.
    let (ahead, _) = found(&ahead)?;
    Ok(DueSchedules { now: timestamp(now), wait, due, ahead, unreadable })
}

pub(super) async fn change(
    connections: &Connections,
    change: &ScheduleChange,
    definition: &str,
    revision: Uuid,
) -> Result<Changed, Fault> {
    let mut lent = connections.lend().await?;
    let sql = if change.replaces.is_some() { REPLACE } else { INSERT };
    if change.replaces.is_none() {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM tasklane.schedules").fetch_one(&mut *lent).await?;
        if count >= SCHEDULES_MAX {
            lent.keep();
            return Ok(Changed::Full);
        }
    }
    let query = sqlx::query(sql).bind(change.name.as_str()).bind(definition).bind(revision).bind(change.next.millis());
    let query = match change.replaces {
        Some(replaced) => query
            .bind(replaced)
            .bind(change.next == NextTick::Stays)
            .bind(change.given_up.map(|given_up| given_up.tick.as_millisecond()))
            .bind(change.given_up.map_or(0, |given_up| i64::from(given_up.ticks))),
        None => query,
    };
    let query = query.bind(change.definition.paused).bind(&change.caller.actor);
    let written = query.execute(&mut *lent).await?.rows_affected() > 0;
    // Whoever changes it at once after this has overtaken us: what is answered must be what was written.
    let found = if written { find(&mut lent, &change.name).await? } else { None };
    lent.keep();
    let ours = found.filter(|schedule| schedule.revision == revision);
    Ok(ours.map_or(Changed::Overtaken, |schedule| Changed::Applied(Box::new(schedule))))
}

pub(super) async fn delete(connections: &Connections, name: &ScheduleName) -> Result<bool, Fault> {
    let mut lent = connections.lend().await?;
    let deleted =
        sqlx::query("DELETE FROM tasklane.schedules WHERE name = $1").bind(name.as_str()).execute(&mut *lent).await?;
    lent.keep();
    Ok(deleted.rows_affected() > 0)
}

pub(super) async fn fire(connections: &Connections, firing: &Firing) -> Result<Fired, Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    let fired = fire_in(&mut transaction, firing).await?;
    // A process that dies before this has done nothing; afterwards any relay publishes.
    transaction.commit().await?;
    lent.keep();
    Ok(fired)
}

async fn fire_in(transaction: &mut PgConnection, firing: &Firing) -> Result<Fired, Fault> {
    let name = firing.name.as_str();
    let taken = sqlx::query(TAKE).bind(name).bind(firing.revision).bind(firing.tick.as_millisecond());
    if taken.fetch_optional(&mut *transaction).await?.is_none() {
        return Ok(Fired::Overtaken);
    }
    // From here on this is the only firing of the schedule: a statement sees all that earlier ones have committed.
    let newest = firing.tasks.last().map(|(tick, _)| tick.as_millisecond());
    let obstacle: Option<Uuid> = match newest.is_some() && firing.overlap == Overlap::Skip {
        true => sqlx::query_scalar(UNFINISHED).bind(name).fetch_optional(&mut *transaction).await?,
        false => None,
    };
    let fired = match obstacle {
        Some(id) => Fired::Skipped(TaskId(id)),
        None => Fired::Recorded(record_ticks(transaction, firing).await?),
    };
    let (recorded, last_tick, skipped, last_skipped) = match fired {
        Fired::Recorded(count) => (i64::from(count), newest, 0, None),
        Fired::Skipped(_) | Fired::Overtaken => (0, None, firing.tasks.len() as i64, newest),
    };
    sqlx::query(MOVE)
        .bind(name)
        .bind(firing.next.as_millisecond())
        .bind(i64::from(firing.missed))
        .bind(recorded)
        .bind(last_tick)
        .bind(skipped)
        .bind(last_skipped)
        .execute(&mut *transaction)
        .await?;
    Ok(fired)
}

/// Records the tasks of the ticks that have none; how many.
async fn record_ticks(transaction: &mut PgConnection, firing: &Firing) -> Result<u32, Fault> {
    let name = firing.name.as_str();
    let ticks: Vec<i64> = firing.tasks.iter().map(|(tick, _)| tick.as_millisecond()).collect();
    if ticks.is_empty() {
        return Ok(0);
    }
    // A tick can come back when the clock is set back and the schedule made anew.
    let known: Vec<i64> = sqlx::query_scalar(KNOWN).bind(name).bind(ticks).fetch_all(&mut *transaction).await?;
    let known: HashSet<i64> = known.into_iter().collect();
    let new = firing.tasks.iter().filter(|(tick, _)| !known.contains(&tick.as_millisecond()));
    let (ticks, tasks): (Vec<_>, Vec<_>) = new.map(|(tick, task)| (tick.as_millisecond(), task.clone())).unzip();
    if tasks.is_empty() {
        return Ok(0);
    }
    let ids: Vec<Uuid> = tasks.iter().map(|task| task.id.0).collect();
    // Nobody keeps the publication to himself: the next relay has it.
    let submission = Submission { tasks, idempotency: None, reserve: Duration::ZERO, group: None };
    record::insert(transaction, [&submission]).await?;
    sqlx::query(MARK).bind(name).bind(ids).bind(ticks).execute(transaction).await?;
    Ok(u32::try_from(submission.tasks.len()).unwrap_or(u32::MAX))
}
