//! What a file says of itself, for the doctor: its write lock is taken and given back, and nothing is changed.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior, params};

use super::read::id_of;
use super::schema::{self, SQLITE_MIN, foreign_table, not_a_ledger};
use crate::clock::{self, millis};
use crate::doctor::runs::{RunsOf, SETTLED_MS};
use crate::ledger::SCHEMA_VERSION;
use crate::task::LedgerId;

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
    /// Which ledger it is, where it has the present schema.
    pub(crate) id: Option<LedgerId>,
    /// What runs, by worker.
    pub(crate) runs: Vec<RunsOf>,
}

/// Opens a file that is there, without making or changing anything.
pub(crate) fn look(path: &Path) -> Result<Vitals, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(LOCK_LIMIT)?;
    // SQLite opens what it may not write for reading, and only a writer finds out.
    connection.transaction_with_behavior(TransactionBehavior::Immediate)?.rollback()?;
    let version = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let journal_mode = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    let foreign = foreign_table(&connection)?.map(|table| not_a_ledger(path, table));
    let (id, runs) = match version {
        SCHEMA_VERSION if foreign.is_none() => (Some(schema::id(&connection)?), runs(&connection)?),
        _ => (None, Vec::new()),
    };
    Ok(Vitals { schema: version, journal_mode, foreign, id, runs })
}

/// What runs for a while, by worker; only the present schema is asked. A lease of another boot has ended.
fn runs(connection: &Connection) -> rusqlite::Result<Vec<RunsOf>> {
    let mut statement = connection.prepare(
        "SELECT t.worker_id, iif(w.dead = 0 AND w.boot_id = ?1 AND w.expires_at > ?2, w.running, NULL), count(*)
         FROM tasks t INDEXED BY tasks_running LEFT JOIN workers w ON w.id = t.worker_id
         WHERE t.state = 3 AND t.worker_id IS NOT NULL AND t.started_at < ?3 GROUP BY 1",
    )?;
    let boot_id = clock::boot_id().unwrap_or_default();
    let rows = statement
        .query_map(params![boot_id, millis(clock::since_boot()), clock::wall_ms() - SETTLED_MS], |row| {
            Ok(RunsOf { worker: id_of(row, 0)?.to_string(), told: row.get(1)?, running: row.get(2)? })
        })?;
    rows.collect()
}
