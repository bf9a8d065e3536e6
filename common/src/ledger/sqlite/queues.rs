//! What is done to a queue as a whole.

use rusqlite::{Connection, params};

use super::read::parsed;
use crate::clock::wall_ms;
use crate::task::QueueName;

/// Claims are made in transactions of the same writers, one after the other, so all behind this one see it.
pub(super) fn set_paused(db: &Connection, queue: &QueueName, paused: bool) -> rusqlite::Result<()> {
    if paused {
        db.prepare_cached("INSERT INTO paused_queues (name, paused_at) VALUES (?1, ?2) ON CONFLICT DO NOTHING")?
            .execute(params![queue.as_str(), wall_ms()])?;
    } else {
        db.prepare_cached("DELETE FROM paused_queues WHERE name = ?1")?.execute([queue.as_str()])?;
    }
    Ok(())
}

pub(super) fn paused(db: &Connection) -> rusqlite::Result<Vec<QueueName>> {
    let mut statement = db.prepare_cached("SELECT name FROM paused_queues ORDER BY name")?;
    statement.query_map([], |row| parsed(row, 0, QueueName::parse))?.collect()
}
