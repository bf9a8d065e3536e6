//! Groups: recorded with their members, and the one write that closes them.

use std::collections::BTreeMap;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use super::read::{id_of, parsed, state_of};
use super::record;
use crate::clock::{timestamp, wall_ms};
use crate::group::{Ended, Group, NewGroup, follow_up};
use crate::ledger::{Closed, EndedGroups, Submission};
use crate::state::State;
use crate::task::GroupId;
use crate::template::TaskTemplate;

/// In the transaction that records the members.
pub(super) fn insert(db: &Connection, group: &NewGroup, total: usize, now: i64) -> rusqlite::Result<()> {
    let then = group.then.to_json().map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
    db.prepare_cached("INSERT INTO task_groups (id, total, then_task, created_at) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![group.id.0.as_bytes().as_slice(), total as i64, then, now])?;
    Ok(())
}

pub(super) fn ended(db: &Connection, after: Option<GroupId>, limit: u32) -> rusqlite::Result<EndedGroups> {
    let after = after.map_or([0; 16], |id| *id.0.as_bytes());
    // By name: the planner knows no numbers, and the tables have all groups and all tasks that ever were.
    let mut statement = db.prepare_cached(
        "SELECT id, EXISTS (SELECT 1 FROM tasks INDEXED BY tasks_group WHERE group_id = g.id AND state < 5)
         FROM task_groups g INDEXED BY groups_open WHERE finished_at IS NULL AND id > ?1 ORDER BY id LIMIT ?2",
    )?;
    let looked = statement
        .query_map(params![after.as_slice(), limit], |row| Ok((GroupId(id_of(row, 0)?.0), row.get::<_, bool>(1)?)))?;
    let looked = looked.collect::<rusqlite::Result<Vec<_>>>()?;
    let next = looked.last().filter(|_| looked.len() == limit as usize).map(|(id, _)| *id);
    Ok(EndedGroups { ended: looked.iter().filter(|(_, open)| !open).map(|(id, _)| *id).collect(), next })
}

/// The write lock is held: no member changes between the look at them and the record of what follows.
pub(super) fn close(db: &Connection, id: GroupId) -> rusqlite::Result<Option<Closed>> {
    let key = id.0.as_bytes().as_slice();
    let found: Option<(i64, TaskTemplate)> = db
        .prepare_cached("SELECT total, then_task FROM task_groups WHERE id = ?1 AND finished_at IS NULL")?
        .query_row([key], |row| Ok((row.get(0)?, parsed(row, 1, |text| serde_json::from_str(text))?)))
        .optional()?;
    let Some((total, then)) = found else { return Ok(None) };
    let Some(ended) = Ended::of(&counts(db, id)?) else { return Ok(None) };
    let task =
        follow_up(id, total, ended, then).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
    let then_id = task.id;
    // Nobody keeps the publication to himself: the next relay has it.
    let submission = Submission { tasks: vec![task], idempotency: None, reserve: Duration::ZERO, group: None };
    record::record(db, &submission)?;
    db.prepare_cached(
        "UPDATE task_groups SET then_id = ?2, completed = ?3, cancelled = ?4, discarded = ?5, finished_at = ?6
         WHERE id = ?1",
    )?
    .execute(params![
        key,
        then_id.0.as_bytes().as_slice(),
        ended.completed,
        ended.cancelled,
        ended.discarded,
        wall_ms()
    ])?;
    Ok(Some(Closed { then_id, ended }))
}

/// Where the members stand, out of the index alone.
fn counts(db: &Connection, id: GroupId) -> rusqlite::Result<BTreeMap<State, u64>> {
    let mut statement = db.prepare_cached(
        "SELECT state, count(*) FROM tasks INDEXED BY tasks_group WHERE group_id = ?1 GROUP BY state",
    )?;
    let counts = statement
        .query_map([id.0.as_bytes().as_slice()], |row| Ok((state_of(row, 0)?, row.get::<_, i64>(1)?.unsigned_abs())))?;
    counts.collect()
}

pub(super) fn one(db: &Connection, id: GroupId) -> rusqlite::Result<Option<Group>> {
    let group = db
        .prepare_cached(
            "SELECT total, then_task, then_id, completed, cancelled, discarded, created_at, finished_at
             FROM task_groups WHERE id = ?1",
        )?
        .query_row([id.0.as_bytes().as_slice()], |row| {
            let finished_at: Option<i64> = row.get(7)?;
            let ended = |_| -> rusqlite::Result<Ended> {
                Ok(Ended { completed: row.get(3)?, cancelled: row.get(4)?, discarded: row.get(5)? })
            };
            Ok(Group {
                id,
                total: row.get(0)?,
                then: parsed(row, 1, |text| serde_json::from_str(text))?,
                then_id: finished_at.map(|_| id_of(row, 2)).transpose()?,
                ended: finished_at.map(ended).transpose()?,
                counts: BTreeMap::new(),
                created_at: timestamp(row.get(6)?),
                finished_at: finished_at.map(timestamp),
            })
        })
        .optional()?;
    group.map(|group| Ok(Group { counts: counts(db, id)?, ..group })).transpose()
}

/// Forgets up to `limit` groups that were closed before the cutoff and have no members left.
pub(super) fn prune(db: &Connection, cutoff: i64, limit: u32) -> rusqlite::Result<()> {
    db.prepare_cached(
        "DELETE FROM task_groups WHERE id IN (
             SELECT id FROM task_groups g INDEXED BY groups_closed
             WHERE finished_at IS NOT NULL AND finished_at < ?1
                 AND NOT EXISTS (SELECT 1 FROM tasks INDEXED BY tasks_group WHERE group_id = g.id)
             LIMIT ?2)",
    )?
    .execute(params![cutoff, limit])?;
    Ok(())
}
