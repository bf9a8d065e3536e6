//! Forgetting: finished tasks when their time is over or somebody says so, and results before their tasks.

use std::collections::BTreeMap;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use super::read::id_of;
use super::{groups, unique};
use crate::clock::millis;
use crate::ledger::Pruned;
use crate::task::{QueueName, TaskId};

/// How much earlier than its tasks a group's id may seem, by a clock that is ahead.
const CLOCKS_DIFFER_MS: i64 = 3_600_000;

/// For how long dead workers are kept.
const WORKERS_KEPT_MS: i64 = 3_600_000;

/// An entry of the members' index: group, state, task.
type Entry = ([u8; 16], i16, [u8; 16]);

/// Where the next step begins.
#[derive(Debug, Clone, Default)]
pub(super) struct Walk {
    /// Behind this queue.
    queue: String,
    /// Behind this member.
    member: Entry,
}

/// What a step goes by.
struct Step {
    now: i64,
    retention: i64,
    limit: u32,
}

pub(super) fn prune(
    db: &Connection,
    (now, retention): (i64, Duration),
    limit: u32,
    mut walk: Walk,
) -> rusqlite::Result<(Pruned, Walk)> {
    let step = Step { now, retention: millis(retention), limit };
    let alone = prune_queues(db, &step, &mut walk)?;
    let members = prune_members(db, &step, &mut walk)?;
    groups::prune(db, step.now - step.retention, limit)?;
    db.prepare_cached(
        "DELETE FROM workers WHERE dead = 1 AND coalesce(ended_at, started_at) < ?1
             AND NOT EXISTS (SELECT 1 FROM tasks WHERE state = 3 AND worker_id = workers.id)",
    )?
    .execute([step.now - WORKERS_KEPT_MS])?;
    Ok((Pruned { tasks: alone.tasks + members.tasks, more: alone.more || members.more }, walk))
}

/// One queue after the other, so that one which has always something to prune keeps none waiting.
fn prune_queues(db: &Connection, step: &Step, walk: &mut Walk) -> rusqlite::Result<Pruned> {
    let from_the_first = walk.queue.is_empty();
    // By name, as below: the planner knows no numbers, and the table has all tasks that ever were.
    let mut next_queue = db.prepare_cached(
        "SELECT queue FROM tasks INDEXED BY tasks_ended
         WHERE finished_at IS NOT NULL AND group_id IS NULL AND queue > ?1 ORDER BY queue LIMIT 1",
    )?;
    let mut tasks = 0;
    for _ in 0..step.limit {
        let next: Option<String> = next_queue.query_row([&walk.queue], |row| row.get(0)).optional()?;
        let Some(queue) = next else {
            walk.queue.clear();
            return Ok(Pruned { tasks, more: !from_the_first });
        };
        tasks += prune_queue(db, step, &queue, u64::from(step.limit) - tasks)?;
        walk.queue = queue;
        if tasks >= u64::from(step.limit) {
            break;
        }
    }
    Ok(Pruned { tasks, more: true })
}

fn prune_queue(db: &Connection, step: &Step, queue: &str, limit: u64) -> rusqlite::Result<u64> {
    let own: Option<i64> = db
        .prepare_cached("SELECT retention_ms FROM queue_retention WHERE name = ?1")?
        .query_row([queue], |row| row.get(0))
        .optional()?;
    let mut find = db.prepare_cached(
        "SELECT id, unique_key FROM tasks INDEXED BY tasks_ended
         WHERE finished_at IS NOT NULL AND group_id IS NULL AND queue = ?1 AND finished_at < ?2
         ORDER BY finished_at LIMIT ?3",
    )?;
    let doomed = find.query_map(params![queue, step.now - own.unwrap_or(step.retention), limit as i64], |row| {
        Ok((id_of(row, 0)?, row.get::<_, Option<String>>(1)?))
    })?;
    let doomed: Vec<_> = doomed.collect::<rusqlite::Result<_>>()?;
    for (id, key) in &doomed {
        delete(db, *id, key.as_deref())?;
    }
    Ok(doomed.len() as u64)
}

/// Among the next members of groups that are old enough to have ended before any cutoff.
fn prune_members(db: &Connection, step: &Step, walk: &mut Walk) -> rusqlite::Result<Pruned> {
    let from_the_first = walk.member == Walk::default().member;
    let least: Option<i64> =
        db.prepare_cached("SELECT min(retention_ms) FROM queue_retention")?.query_row([], |row| row.get(0))?;
    let least = least.unwrap_or(step.retention).min(step.retention);
    let youngest = first_id_of((step.now - least).saturating_add(CLOCKS_DIFFER_MS));
    let (group, state, member) = walk.member;
    let mut find = db.prepare_cached(
        "SELECT group_id, state, id, unique_key, finished_at < cutoff AND (group_end IS NULL OR group_end < cutoff)
         FROM (
             SELECT t.group_id, t.state, t.id, t.unique_key, t.finished_at,
                 -- An open group keeps its members; one that is gone does not.
                 iif(g.id IS NULL, NULL, coalesce(g.finished_at, ?5)) AS group_end,
                 ?5 - coalesce((SELECT retention_ms FROM queue_retention WHERE name = t.queue), ?6) AS cutoff
             FROM tasks t INDEXED BY tasks_group LEFT JOIN task_groups g ON g.id = t.group_id
             WHERE t.group_id IS NOT NULL AND (t.group_id, t.state, t.id) > (?1, ?2, ?3) AND t.group_id < ?4
             ORDER BY t.group_id, t.state, t.id LIMIT ?7)",
    )?;
    let from =
        params![group.as_slice(), state, member.as_slice(), youngest.as_slice(), step.now, step.retention, step.limit];
    let rows = find.query_map(from, |row| {
        let entry = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok((entry, row.get::<_, Option<String>>(3)?, row.get::<_, Option<bool>>(4)?.unwrap_or(false)))
    })?;
    let rows: Vec<(Entry, _, bool)> = rows.collect::<rusqlite::Result<_>>()?;
    let mut tasks = 0;
    for ((_, _, id), key, _) in rows.iter().filter(|(.., doomed)| *doomed) {
        delete(db, TaskId(uuid::Uuid::from_bytes(*id)), key.as_deref())?;
        tasks += 1;
    }
    let last = rows.last().filter(|_| rows.len() == step.limit as usize);
    walk.member = last.map_or_else(|| Walk::default().member, |(entry, ..)| *entry);
    Ok(Pruned { tasks, more: last.is_some() || !from_the_first })
}

/// The first id of version 7 that can be made at a time.
fn first_id_of(ms: i64) -> [u8; 16] {
    let mut id = [0; 16];
    id[..6].copy_from_slice(&ms.max(0).to_be_bytes()[2..]);
    id
}

pub(super) fn expire_results(db: &Connection, now: i64, limit: u32) -> rusqlite::Result<u64> {
    let expired = db
        .prepare_cached(
            "UPDATE tasks SET result = NULL WHERE id IN (
                 SELECT id FROM tasks INDEXED BY tasks_expiring
                 WHERE result_ttl_ms IS NOT NULL AND result IS NOT NULL AND finished_at + result_ttl_ms <= ?1
                 ORDER BY finished_at + result_ttl_ms LIMIT ?2)",
        )?
        .execute(params![now, limit])?;
    Ok(expired as u64)
}

pub(super) fn set_retention(db: &Connection, queues: &BTreeMap<QueueName, Duration>) -> rusqlite::Result<bool> {
    let names = serde_json::json!(queues.keys().collect::<Vec<_>>()).to_string();
    let mut changed = db
        .prepare_cached("DELETE FROM queue_retention WHERE name NOT IN (SELECT value FROM json_each(?1))")?
        .execute([names])?;
    let mut say = db.prepare_cached(
        "INSERT INTO queue_retention (name, retention_ms) VALUES (?1, ?2)
         ON CONFLICT DO UPDATE SET retention_ms = excluded.retention_ms WHERE retention_ms <> excluded.retention_ms",
    )?;
    for (queue, retention) in queues {
        changed += say.execute(params![queue.as_str(), millis(*retention)])?;
    }
    Ok(changed > 0)
}

/// Deletes a task, and lets go of its key.
fn delete(db: &Connection, id: TaskId, key: Option<&str>) -> rusqlite::Result<()> {
    if let Some(key) = key {
        unique::forget(db, key, id)?;
    }
    for delete in ["DELETE FROM tasks WHERE id = ?1", "DELETE FROM task_args WHERE id = ?1"] {
        db.prepare_cached(delete)?.execute([id.0.as_bytes().as_slice()])?;
    }
    Ok(())
}

pub(super) fn purge(db: &Connection, ids: &[TaskId]) -> rusqlite::Result<u64> {
    let mut find = db.prepare_cached(
        "SELECT unique_key FROM tasks WHERE id = ?1 AND state >= 5 AND (group_id IS NULL OR NOT EXISTS (
             SELECT 1 FROM task_groups g WHERE g.id = group_id AND g.finished_at IS NULL))",
    )?;
    let mut purged = 0;
    for id in ids {
        let found = find.query_row([id.0.as_bytes().as_slice()], |row| row.get::<_, Option<String>>(0)).optional()?;
        if let Some(key) = found {
            delete(db, *id, key.as_deref())?;
            purged += 1;
        }
    }
    Ok(purged)
}
