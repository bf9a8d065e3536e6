//! Who holds a unique key.

use rusqlite::{Connection, OptionalExtension, params};

use super::read::{id_of, state_of};
use crate::clock::wall_ms;
use crate::ledger::unique::Holder;
use crate::task::TaskId;

/// The task that holds a key now; one that is not kept any more holds nothing.
pub(super) fn holder(db: &Connection, key: &str, now: i64) -> rusqlite::Result<Option<Holder>> {
    db.prepare_cached(
        "SELECT t.id, t.state FROM unique_keys u JOIN tasks t ON t.id = u.task_id
         WHERE u.key = ?1 AND iif(u.until_at IS NULL, t.state < 5, u.until_at > ?2)",
    )?
    .query_row(params![key, now], |row| Ok(Holder { id: id_of(row, 0)?, state: state_of(row, 1)? }))
    .optional()
}

/// The tasks that hold these keys now.
pub(super) fn holders(db: &Connection, keys: &[String]) -> rusqlite::Result<Vec<(String, Holder)>> {
    let now = wall_ms();
    let held = keys.iter().map(|key| Ok(holder(db, key, now)?.map(|holder| (key.clone(), holder))));
    held.filter_map(Result::transpose).collect()
}

/// Gives a key to a task, until a time or until it has finished.
pub(super) fn take(db: &Connection, key: &str, id: TaskId, until_at: Option<i64>) -> rusqlite::Result<()> {
    db.prepare_cached("INSERT OR REPLACE INTO unique_keys (key, task_id, until_at) VALUES (?1, ?2, ?3)")?
        .execute(params![key, id.0.as_bytes().as_slice(), until_at])?;
    Ok(())
}

/// Lets go of a key if this task holds it, or held it last.
pub(super) fn forget(db: &Connection, key: &str, id: TaskId) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM unique_keys WHERE key = ?1 AND task_id = ?2")?
        .execute(params![key, id.0.as_bytes().as_slice()])?;
    Ok(())
}
