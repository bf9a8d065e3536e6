//! What is done to a queue as a whole.

use rusqlite::{Connection, Row, params};

use super::read::parsed;
use crate::clock::{timestamp, wall_ms};
use crate::ledger::{Caller, Paused};
use crate::task::{ChangeCall, QueueName, TaskId};

/// Claims are made in transactions of the same writers, one after the other, so all behind this one see it.
pub(super) fn set_paused(db: &Connection, queue: &QueueName, paused: bool, caller: &Caller) -> rusqlite::Result<()> {
    if paused {
        db.prepare_cached(
            "INSERT INTO paused_queues (name, paused_at, paused_by) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
        )?
        .execute(params![queue.as_str(), wall_ms(), caller.actor])?;
    } else {
        db.prepare_cached("DELETE FROM paused_queues WHERE name = ?1")?.execute([queue.as_str()])?;
    }
    Ok(())
}

pub(super) fn paused(db: &Connection) -> rusqlite::Result<Vec<QueueName>> {
    Ok(pauses(db)?.into_iter().map(|(name, _)| name).collect())
}

pub(super) fn pauses(db: &Connection) -> rusqlite::Result<Vec<(QueueName, Paused)>> {
    let mut statement = db.prepare_cached("SELECT name, paused_at, paused_by FROM paused_queues ORDER BY name")?;
    let read =
        |row: &Row<'_>| Ok((parsed(row, 0, QueueName::parse)?, Paused { at: timestamp(row.get(1)?), by: row.get(2)? }));
    statement.query_map([], read)?.collect()
}

pub(super) fn move_tasks(
    db: &Connection,
    ids: &[TaskId],
    (from, to): (&QueueName, &QueueName),
    caller: &Caller,
) -> rusqlite::Result<u64> {
    // The raised fence voids the late mark of a publication to the old queue, and the messages that are there: one could
    // start its task where it is not any more. So each must be published again.
    let mut statement = db.prepare_cached(
        "UPDATE tasks SET queue = ?3, state = iif(state = 2, 0, state), due_at = max(?4, run_at), queued_at = NULL,
             fence = fence + 1, void_below = fence + 1, last_change = ?5
         WHERE id = ?1 AND queue = ?2 AND state IN (0, 1, 2, 4)",
    )?;
    let now = wall_ms();
    let change = caller.change(ChangeCall::Move, Some(now));
    let mut moved = 0;
    for id in ids {
        moved += statement.execute(params![id.0.as_bytes().as_slice(), from.as_str(), to.as_str(), now, change])?;
    }
    Ok(moved as u64)
}
