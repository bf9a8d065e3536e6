//! Schedules: their definitions, and the one write that fires their ticks.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::read::{id_of, parsed};
use super::record;
use crate::clock::{timestamp, wall_ms};
use crate::ledger::scheduling::{AHEAD_MS, parted};
use crate::ledger::{
    Changed, DueSchedules, Fired, Firing, NextTick, Paused, ScheduleChange, SchedulePage, Submission, Unreadable,
};
use crate::schedule::{Definition, Overlap, SCHEDULES_MAX, Schedule, ScheduleName, TickCounts};
use crate::task::TaskId;

/// The newest task by the unique index of ticks: it may have been pruned.
const COLUMNS: &str = "name, definition, revision, next_at, last_tick,
    (SELECT t.id FROM tasks t WHERE t.schedule = name AND t.tick = last_tick), last_skipped, fired, skipped, missed,
    created_at, updated_at, paused_at, paused_by, skipped_in_a_row,
    (SELECT t.id FROM tasks t INDEXED BY tasks_schedule_open WHERE t.schedule = name AND t.state < 5 LIMIT 1)";

/// The column of the definition.
const DEFINITION: usize = 1;

fn schedule_of(row: &Row<'_>) -> rusqlite::Result<Schedule> {
    let time = |column| row.get::<_, Option<i64>>(column).map(|at| at.map(timestamp));
    let task = |column| row.get::<_, Option<[u8; 16]>>(column)?.map(|_| id_of(row, column)).transpose();
    let definition: Definition = parsed(row, DEFINITION, |text| serde_json::from_str(text))?;
    Ok(Schedule {
        name: parsed(row, 0, ScheduleName::parse)?,
        revision: Uuid::from_bytes(row.get(2)?),
        next_at: time(3)?,
        last_tick: time(4)?,
        last_task_id: task(5)?,
        last_skipped: time(6)?,
        skipped_in_a_row: row.get(14)?,
        blocked_by: if definition.overlap == Overlap::Skip { task(15)? } else { None },
        ticks: TickCounts { fired: row.get(7)?, skipped: row.get(8)?, missed: row.get(9)? },
        paused: time(12)?.map(|at| Ok::<_, rusqlite::Error>(Paused { at, by: row.get(13)? })).transpose()?,
        created_at: timestamp(row.get(10)?),
        updated_at: timestamp(row.get(11)?),
        definition,
    })
}

pub(super) fn one(db: &Connection, name: &ScheduleName) -> rusqlite::Result<Option<Schedule>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM schedules WHERE name = ?1"))?
        .query_row([name.as_str()], schedule_of)
        .optional()
}

pub(super) fn page(db: &Connection, after: Option<&ScheduleName>, limit: u32) -> rusqlite::Result<SchedulePage> {
    let sql = format!("SELECT {COLUMNS} FROM schedules WHERE name > ?1 ORDER BY name LIMIT ?2");
    let after = after.map_or("", ScheduleName::as_str);
    // One more than asked for tells whether this is the end.
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map(params![after, i64::from(limit) + 1], read)?;
    let mut found = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| more).map(|last| match last {
        Ok(Schedule { name, .. }) | Err(Unreadable { name, .. }) => name.clone(),
    });
    let (schedules, unreadable) = parted(found);
    Ok(SchedulePage { now: timestamp(wall_ms()), schedules, unreadable, next })
}

/// The schedule, or who it is.
fn read(row: &Row<'_>) -> rusqlite::Result<Result<Schedule, Unreadable>> {
    let unreadable = |problem: String| {
        let (name, revision) = (parsed(row, 0, ScheduleName::parse)?, Uuid::from_bytes(row.get(2)?));
        Ok(Err(Unreadable { name, revision, problem }))
    };
    match schedule_of(row) {
        Err(rusqlite::Error::FromSqlConversionFailure(DEFINITION, _, error)) => unreadable(error.to_string()),
        other => other.map(Ok),
    }
}

pub(super) fn due(db: &Connection, limit: u32) -> rusqlite::Result<DueSchedules> {
    let now = wall_ms();
    let next: Option<i64> = db
        .prepare_cached("SELECT min(next_at) FROM schedules WHERE next_at IS NOT NULL")?
        .query_row([], |row| row.get(0))?;
    let wait = next.map(|next| Duration::from_millis(u64::try_from(next - now).unwrap_or(0)));
    let mut found = Vec::new();
    if wait.is_some_and(|wait| wait.is_zero()) {
        let sql = format!("SELECT {COLUMNS} FROM schedules WHERE next_at <= ?1 ORDER BY next_at LIMIT ?2");
        found = db.prepare_cached(&sql)?.query_map(params![now, limit], read)?.collect::<rusqlite::Result<_>>()?;
    }
    let (due, unreadable) = parted(found);
    // What this build cannot read another one computes again.
    let (ahead, _) = parted(ahead(db, now, limit)?);
    Ok(DueSchedules { now: timestamp(now), wait, due, ahead, unreadable })
}

fn ahead(db: &Connection, now: i64, limit: u32) -> rusqlite::Result<Vec<Result<Schedule, Unreadable>>> {
    let sql = format!("SELECT {COLUMNS} FROM schedules WHERE planned_at > ?1 AND next_at > ?2 LIMIT ?3");
    db.prepare_cached(&sql)?.query_map(params![now + AHEAD_MS, now, limit], read)?.collect()
}

pub(super) fn change(
    db: &Connection,
    change: &ScheduleChange,
    definition: &str,
    revision: Uuid,
) -> rusqlite::Result<Changed> {
    let next_at = change.next.millis();
    let name = change.name.as_str();
    let written = match change.replaces {
        Some(replaced) => db
            .prepare_cached(
                "UPDATE schedules SET definition = ?3, revision = ?4, next_at = iif(?7, next_at, ?5), updated_at = ?6,
                     planned_at = iif(?7, planned_at, ?6), missed = missed + ?9, paused_by = iif(?10, iif(paused_at IS NULL, ?11, paused_by), NULL),
                     paused_at = iif(?10, coalesce(paused_at, ?6), NULL)
                 WHERE name = ?1 AND revision = ?2 AND (?8 IS NULL OR next_at = ?8)",
            )?
            .execute(params![
                name,
                replaced.as_bytes().as_slice(),
                definition,
                revision.as_bytes().as_slice(),
                next_at,
                wall_ms(),
                change.next == NextTick::Stays,
                change.given_up.map(|given_up| given_up.tick.as_millisecond()),
                change.given_up.map_or(0, |given_up| given_up.ticks),
                change.definition.paused,
                change.caller.actor,
            ])?,
        None => {
            let count: i64 = db.prepare_cached("SELECT count(*) FROM schedules")?.query_row([], |row| row.get(0))?;
            if count >= SCHEDULES_MAX {
                return Ok(Changed::Full);
            }
            db.prepare_cached(
                "INSERT INTO schedules (name, definition, revision, next_at, created_at, updated_at, planned_at, paused_at,
                     paused_by)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?5, ?5, iif(?6, ?5, NULL), iif(?6, ?7, NULL)) ON CONFLICT (name) DO NOTHING",
            )?
            .execute(params![
                name,
                definition,
                revision.as_bytes().as_slice(),
                next_at,
                wall_ms(),
                change.definition.paused,
                change.caller.actor
            ])?
        }
    };
    let written = if written == 0 { None } else { one(db, &change.name)? };
    Ok(written.map_or(Changed::Overtaken, |schedule| Changed::Applied(Box::new(schedule))))
}

pub(super) fn delete(db: &Connection, name: &ScheduleName) -> rusqlite::Result<bool> {
    Ok(db.prepare_cached("DELETE FROM schedules WHERE name = ?1")?.execute([name.as_str()])? > 0)
}

pub(super) fn fire(db: &Connection, firing: &Firing) -> rusqlite::Result<Fired> {
    let (name, tick) = (firing.name.as_str(), firing.tick.as_millisecond());
    // The revision tells a schedule from one that was replaced, or deleted and made again, and stands at the same tick.
    let moved = db
        .prepare_cached(
            "UPDATE schedules SET next_at = ?4, missed = missed + ?5, planned_at = ?6
             WHERE name = ?1 AND revision = ?2 AND next_at = ?3",
        )?
        .execute(params![
            name,
            firing.revision.as_bytes().as_slice(),
            tick,
            firing.next.as_millisecond(),
            firing.missed,
            wall_ms()
        ])?;
    if moved == 0 {
        return Ok(Fired::Overtaken);
    }
    let Some((newest, _)) = firing.tasks.last() else { return Ok(Fired::Recorded(0)) };
    let newest = newest.as_millisecond();
    if firing.overlap == Overlap::Skip
        && let Some(obstacle) = unfinished(db, name)?
    {
        db.prepare_cached(
            "UPDATE schedules SET skipped = skipped + ?2, skipped_in_a_row = skipped_in_a_row + ?2, last_skipped = ?3
             WHERE name = ?1",
        )?
        .execute(params![name, firing.tasks.len() as i64, newest])?;
        return Ok(Fired::Skipped(obstacle));
    }
    let recorded = record(db, firing)?;
    db.prepare_cached("UPDATE schedules SET fired = fired + ?2, skipped_in_a_row = 0, last_tick = ?3 WHERE name = ?1")?
        .execute(params![name, recorded, newest])?;
    Ok(Fired::Recorded(recorded))
}

/// An unfinished task of the schedule. By name: the index of ticks would do as well for the planner, and has all those that
/// have finished.
fn unfinished(db: &Connection, name: &str) -> rusqlite::Result<Option<TaskId>> {
    db.prepare_cached("SELECT id FROM tasks INDEXED BY tasks_schedule_open WHERE schedule = ?1 AND state < 5 LIMIT 1")?
        .query_row([name], |row| id_of(row, 0))
        .optional()
}

/// Records the tasks of the ticks that have none; how many.
fn record(db: &Connection, firing: &Firing) -> rusqlite::Result<u32> {
    let name = firing.name.as_str();
    // A tick can come back when the clock is set back and the schedule made anew.
    let mut known = db.prepare_cached("SELECT EXISTS (SELECT 1 FROM tasks WHERE schedule = ?1 AND tick = ?2)")?;
    let mut mark = db.prepare_cached("UPDATE tasks SET schedule = ?2, tick = ?3 WHERE id = ?1")?;
    let mut recorded = 0;
    for (tick, task) in &firing.tasks {
        let tick = tick.as_millisecond();
        if known.query_row(params![name, tick], |row| row.get(0))? {
            continue;
        }
        // Nobody keeps the publication to himself: the next relay has it.
        let submission =
            Submission { tasks: vec![task.clone()], idempotency: None, reserve: Duration::ZERO, group: None };
        record::record(db, &submission)?;
        mark.execute(params![task.id.0.as_bytes().as_slice(), name, tick])?;
        recorded += 1;
    }
    Ok(recorded)
}
