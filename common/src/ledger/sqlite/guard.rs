//! Sees to it that what is written goes into the file that everybody has: one that was deleted, replaced or damaged under the
//! running process takes nothing more.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::ErrorCode;

use crate::ledger::LedgerError;
use crate::seldom::Seldom;

/// For so long after a write no other is needed to know that the file takes them.
const FRESH: Duration = Duration::from_secs(1);
/// The three files that make one ledger.
const SUFFIXES: [&str; 3] = ["", "-wal", "-shm"];

static TOLD: Seldom = Seldom::once_in(Duration::from_secs(60));

/// What is known of the file that this process has open.
#[derive(Debug)]
pub(super) struct Guard {
    files: Vec<(PathBuf, Option<Identity>)>,
    damage: Mutex<Option<String>>,
    written: Mutex<Option<Instant>>,
}

/// Device and inode.
type Identity = (u64, u64);

impl Guard {
    /// Of a file that has just been opened, with its log.
    pub(super) fn of(path: &Path) -> Self {
        let files = SUFFIXES.map(|suffix| {
            let file = with_suffix(path, suffix);
            let identity = identity(&file);
            (file, identity)
        });
        Self { files: files.into(), damage: Mutex::default(), written: Mutex::default() }
    }

    /// Whether the file may be written to.
    ///
    /// # Errors
    /// [`LedgerError::Replaced`], which is also logged.
    pub(super) fn check(&self) -> Result<(), LedgerError> {
        let gone = self.files.iter().find(|(file, known)| known.is_some() && identity(file) != *known);
        let Some((file, _)) = gone else { return Ok(()) };
        Err(tell(LedgerError::Replaced(file.clone())))
    }

    /// Whether it was written to just now.
    ///
    /// # Errors
    /// As [`Guard::check`], and [`LedgerError::Damaged`] when some call has found it so.
    pub(super) fn is_fresh(&self) -> Result<bool, LedgerError> {
        self.check()?;
        if let Some(what) = &*self.damage.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(LedgerError::Damaged(what.clone()));
        }
        let written = *self.written.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(written.is_some_and(|at| at.elapsed() < FRESH))
    }

    /// Notes a commit that has changed the file.
    pub(super) fn wrote(&self) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// What an error of SQLite's means.
    pub(super) fn fault(&self, error: &rusqlite::Error) -> LedgerError {
        let fault = fault(error);
        if let LedgerError::Damaged(what) = &fault {
            self.damage.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| what.clone());
            return tell(fault);
        }
        fault
    }
}

/// What an error of SQLite's means.
pub(super) fn fault(error: &rusqlite::Error) -> LedgerError {
    match error {
        rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..) => {
            LedgerError::Corrupt(error.to_string())
        }
        _ if matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)) => {
            LedgerError::Damaged(error.to_string())
        }
        _ => LedgerError::Unavailable(error.to_string()),
    }
}

/// Loudly, and once a minute: until a person acts, nothing works.
fn tell(error: LedgerError) -> LedgerError {
    if let Some(left_out) = TOLD.admit() {
        tracing::error!(%error, left_out, "the ledger takes nothing more");
    }
    error
}

/// A path with something behind its last name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn identity(file: &Path) -> Option<Identity> {
    file.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
