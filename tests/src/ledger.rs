//! A fresh ledger for each test, on either engine.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use tasklane_common::rusqlite;
use tempfile::TempDir;

use crate::postgres::Database;
use crate::services;

/// How long a turn at a SQLite file that is in use may take.
const TURN_LIMIT: Duration = Duration::from_secs(1);

/// The two engines of the ledger; a promise holds on both or it is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerKind {
    /// One SQLite file.
    Sqlite,
    /// One PostgreSQL database.
    Postgres,
}

impl fmt::Display for LedgerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sqlite => "SQLite",
            Self::Postgres => "PostgreSQL",
        })
    }
}

/// An empty ledger, not yet migrated, which goes away with this guard.
#[derive(Debug)]
pub enum Ledger {
    /// A file in a folder of its own.
    Sqlite(TempDir),
    /// A database on the shared server.
    Postgres(Database),
}

impl Ledger {
    /// Makes an empty ledger of a kind.
    pub async fn fresh(kind: LedgerKind) -> Result<Self> {
        Ok(match kind {
            LedgerKind::Sqlite => Self::Sqlite(tempfile::Builder::new().prefix("tasklane-ledger-").tempdir()?),
            LedgerKind::Postgres => Self::Postgres(Database::create(&services::shared().await?.postgres_url).await?),
        })
    }

    /// What `TASKLANE_LEDGER_URL` is to be.
    pub fn url(&self) -> String {
        match self {
            Self::Sqlite(dir) => format!("sqlite://{}", Self::file(dir).display()),
            Self::Postgres(database) => database.url().to_owned(),
        }
    }

    /// Runs some SQL in the ledger's database, past everybody.
    pub async fn execute(&self, sql: &'static str) -> Result<()> {
        match self {
            Self::Sqlite(dir) => rusqlite::Connection::open(Self::file(dir))?.execute_batch(sql)?,
            Self::Postgres(database) => {
                sqlx::raw_sql(sql).execute(&mut database.connect().await?).await?;
            }
        }
        Ok(())
    }

    /// Runs one statement with two numbers in a PostgreSQL ledger's database, past everybody.
    pub async fn fill(&self, sql: &'static str, numbers: [i64; 2]) -> Result<()> {
        let Self::Postgres(database) = self else { anyhow::bail!("not a PostgreSQL ledger") };
        let mut connection = database.connect().await?;
        sqlx::query(sql).bind(numbers[0]).bind(numbers[1]).execute(&mut connection).await?;
        Ok(())
    }

    /// The one number that a query answers.
    pub async fn number(&self, sql: &'static str) -> Result<i64> {
        Ok(match self {
            Self::Sqlite(dir) => rusqlite::Connection::open(Self::file(dir))?.query_row(sql, [], |row| row.get(0))?,
            Self::Postgres(database) => sqlx::query_scalar(sql).fetch_one(&mut database.connect().await?).await?,
        })
    }

    /// Whether it takes writes at this moment: a process that stands still in the middle of one keeps SQLite's lock.
    pub fn takes_writes(&self) -> Result<bool> {
        let Self::Sqlite(dir) = self else { return Ok(true) };
        let connection = rusqlite::Connection::open(Self::file(dir))?;
        connection.busy_timeout(TURN_LIMIT)?;
        match connection.execute_batch("BEGIN IMMEDIATE; ROLLBACK") {
            Ok(()) => Ok(true),
            Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The SQLite file, of a ledger that has one.
    pub fn sqlite_file(&self) -> Option<PathBuf> {
        match self {
            Self::Sqlite(dir) => Some(Self::file(dir)),
            Self::Postgres(_) => None,
        }
    }

    fn file(dir: &TempDir) -> PathBuf {
        dir.path().join("ledger.db")
    }
}

/// Makes two tests of each scenario, one on each engine:
///
/// ```
/// tasklane_tests::on_both_ledgers! {
///     /// What is promised.
///     async fn every_task_runs_once(ledger) {
///         let stack = tasklane_tests::stack::Stack::new(ledger).await?;
///         // …
///         Ok(())
///     }
/// }
/// ```
#[macro_export]
macro_rules! on_both_ledgers {
    ($($(#[$about:meta])* async fn $name:ident($ledger:ident) $body:block)+) => {$(
        $(#[$about])*
        mod $name {
            #[allow(unused_imports, reason = "a scenario need not use what its module imports")]
            use super::*;

            async fn scenario($ledger: $crate::ledger::LedgerKind) -> ::anyhow::Result<()> $body

            #[tokio::test]
            async fn on_sqlite() -> ::anyhow::Result<()> {
                scenario($crate::ledger::LedgerKind::Sqlite).await
            }

            #[tokio::test]
            async fn on_postgres() -> ::anyhow::Result<()> {
                scenario($crate::ledger::LedgerKind::Postgres).await
            }
        }
    )+};
}
