//! Opening the file: the library's version, the pragmas, the migrations.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use uuid::Uuid;

use super::guard;
use super::writer::is_busy;
use crate::ledger::{LedgerError, SCHEMA_VERSION};
use crate::task::LedgerId;

/// One SQL script a schema version, in order; a script is never changed after its release.
const MIGRATIONS: [&str; SCHEMA_VERSION as usize] = [
    include_str!("../migrations/sqlite/0001_ledger.sql"),
    include_str!("../migrations/sqlite/0002_cancel.sql"),
    include_str!("../migrations/sqlite/0003_schedules.sql"),
    include_str!("../migrations/sqlite/0004_unique.sql"),
    include_str!("../migrations/sqlite/0005_queue_control.sql"),
    include_str!("../migrations/sqlite/0006_groups.sql"),
    include_str!("../migrations/sqlite/0007_priority.sql"),
    include_str!("../migrations/sqlite/0008_limits.sql"),
    include_str!("../migrations/sqlite/0009_failures.sql"),
    include_str!("../migrations/sqlite/0010_retention.sql"),
    include_str!("../migrations/sqlite/0011_hardening.sql"),
];

/// The first release without the bug that can corrupt a WAL which two connections reset at once.
pub(super) const SQLITE_MIN: i32 = 3_051_003;

/// How often a writer asks for the lock before it gives up: about 5 s.
const LOCK_TRIES_MAX: i32 = 20_000;

/// Opens the file for writing and brings its schema up to date.
pub(super) fn open_writer(path: &Path) -> Result<Connection, LedgerError> {
    if rusqlite::version_number() < SQLITE_MIN {
        return Err(LedgerError::Unsuitable(format!(
            "SQLite {} has a bug that can corrupt the ledger: 3.51.3 or later is needed",
            rusqlite::version()
        )));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    make_private(path);
    let mut connection = Connection::open_with_flags(path, flags).map_err(|error| cannot_open(path, &error))?;
    connection.busy_handler(Some(wait_for_lock)).map_err(|error| cannot_open(path, &error))?;
    // Before anything is written to a file that may be another application's.
    if let Some(table) = foreign_table(&connection).map_err(|error| cannot_open(path, &error))? {
        return Err(LedgerError::Unsuitable(not_a_ledger(path, table)));
    }
    prepare(&connection).map_err(|error| cannot_open(path, &error))?;
    migrate(&mut connection)?;
    Ok(connection)
}

/// Makes a file that only its owner reads, where there is none: args are nobody else's, and SQLite gives the log the mode of the
/// file. One that is there keeps the mode that somebody may have given it.
fn make_private(path: &Path) {
    // What fails here fails again at the opening, which tells it.
    let _ = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
}

/// Opens the file for reading.
pub(super) fn open_reader(path: &Path) -> Result<Connection, LedgerError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(|error| cannot_open(path, &error))?;
    prepare_reader(&connection).map_err(|error| cannot_open(path, &error))?;
    Ok(connection)
}

pub(super) fn cannot_open(path: &Path, error: &rusqlite::Error) -> LedgerError {
    match guard::fault(error) {
        LedgerError::Damaged(what) => LedgerError::Damaged(format!("{}: {what}", path.display())),
        _ => LedgerError::Unavailable(format!("cannot open {}: {error}", path.display())),
    }
}

/// Which ledger this is.
pub(super) fn id(connection: &Connection) -> rusqlite::Result<LedgerId> {
    connection.query_row("SELECT id FROM ledger", [], |row| row.get(0)).map(|id| LedgerId(Uuid::from_bytes(id)))
}

/// What the clock said when it was last believed.
pub(super) fn believed(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    connection.query_row("SELECT clock_at FROM ledger", [], |row| row.get(0))
}

/// Writes, and changes nothing.
pub(super) fn touch(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute("UPDATE ledger SET clock_at = clock_at", []).map(drop)
}

/// Notes that the clock is believed.
pub(super) fn believe(connection: &Connection, now: i64) -> rusqlite::Result<()> {
    connection.execute("UPDATE ledger SET clock_at = ?1", [now]).map(drop)
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    use_wal(connection)?;
    // FULL syncs the log at every commit: what a caller was told survives a power cut.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "cache_size", -8_000)?;
    // A page that is written again before then is copied and synced once: 32 MiB of log.
    connection.pragma_update(None, "wal_autocheckpoint", 8_000)?;
    connection.set_prepared_statement_cache_capacity(64);
    super::transact::confine(connection)?;
    Ok(())
}

/// Changes a new file to a write-ahead log.
///
/// When several connections try at once, SQLite tells all but one that the file is locked, without asking the busy
/// handler: two that wait for each other would wait for ever.
fn use_wal(connection: &Connection) -> rusqlite::Result<()> {
    let mut tries = 0;
    loop {
        match connection.pragma_update(None, "journal_mode", "WAL") {
            Err(error) if is_busy(&error) && wait_for_lock(tries) => tries += 1,
            done => return done,
        }
    }
}

fn prepare_reader(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "query_only", true)?;
    connection.pragma_update(None, "cache_size", -4_000)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(())
}

/// Waits 100 to 300 µs for the write lock.
///
/// SQLite's own handler sleeps up to 100 ms a step, so that one of three busy processes can wait seconds for its
/// turn: longer than a lease lives.
fn wait_for_lock(tries: i32) -> bool {
    // Unequal steps keep two waiting processes from meeting again and again.
    let micros = 100 + u64::from(tries.unsigned_abs().wrapping_mul(2_654_435_761) >> 16) % 200;
    std::thread::sleep(Duration::from_micros(micros));
    tries < LOCK_TRIES_MAX
}

/// A table whose presence, or absence, shows that the file is another application's: `user_version` is anybody's.
pub(super) fn foreign_table(connection: &Connection) -> rusqlite::Result<Option<&'static str>> {
    const OURS: [(&str, &str); 4] =
        [("tasks", "fence"), ("task_args", "args"), ("workers", "boot_id"), ("queues", "head_at")];
    // One look at one moment: a process that makes the ledger just now makes tables and version together.
    let look = connection.unchecked_transaction()?;
    let version: i64 = look.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version > SCHEMA_VERSION {
        return Ok(None);
    }
    let mut columns = look.prepare("SELECT name FROM pragma_table_info(?1)")?;
    for (table, column) in OURS {
        let found: Vec<String> = columns.query_map([table], |row| row.get(0))?.collect::<Result<_, _>>()?;
        let (there, ours) = (!found.is_empty(), found.iter().any(|name| name == column));
        if (version == 0 && there) || (version > 0 && !ours) {
            return Ok(Some(table));
        }
    }
    Ok(None)
}

/// What such a table says.
pub(super) fn not_a_ledger(path: &Path, table: &str) -> String {
    format!(
        "{} is another application's database and no ledger: its table {table} is missing, or is not the ledger's. \
         Name a file of its own in ledger_url",
        path.display()
    )
}

fn migrate(connection: &mut Connection) -> Result<(), LedgerError> {
    let unavailable = |error: rusqlite::Error| match guard::fault(&error) {
        LedgerError::Damaged(what) => LedgerError::Damaged(what),
        _ => LedgerError::Unavailable(format!("cannot prepare the schema: {error}")),
    };
    // IMMEDIATE: two processes that start at once migrate one after the other, and the second finds nothing to do.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(unavailable)?;
    let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(unavailable)?;
    if found > SCHEMA_VERSION {
        return Err(LedgerError::NewerSchema { found, known: SCHEMA_VERSION });
    }
    let done = usize::try_from(found).unwrap_or(0);
    for script in MIGRATIONS.iter().skip(done) {
        transaction.execute_batch(script).map_err(unavailable)?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(unavailable)?;
    transaction.commit().map_err(unavailable)
}
