//! What a file says of itself, for the doctor: its write lock is taken and given back, and nothing is changed.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::schema::{SQLITE_MIN, foreign_table, not_a_ledger};

/// How long the doctor waits for the write lock.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// The library's version, and whether it is new enough.
pub(crate) fn library() -> (&'static str, bool) {
    (rusqlite::version(), rusqlite::version_number() >= SQLITE_MIN)
}

/// The state of a file that is there.
#[derive(Debug)]
pub(crate) struct Vitals {
    /// 0 where there is no schema yet.
    pub(crate) schema: i64,
    pub(crate) journal_mode: String,
    /// Why it is no ledger, if it is none.
    pub(crate) foreign: Option<String>,
}

/// Opens a file that is there, without making or changing anything.
pub(crate) fn look(path: &Path) -> Result<Vitals, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(LOCK_LIMIT)?;
    // SQLite opens what it may not write for reading, and only a writer finds out.
    connection.transaction_with_behavior(TransactionBehavior::Immediate)?.rollback()?;
    let schema = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let journal_mode = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    let foreign = foreign_table(&connection)?.map(|table| not_a_ledger(path, table));
    Ok(Vitals { schema, journal_mode, foreign })
}
