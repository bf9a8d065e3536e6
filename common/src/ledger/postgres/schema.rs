//! Brings a database's schema up to date, however many processes start at once.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::timeout;

use super::connections::Connections;
use super::fault::Fault;
use super::layout::{self, Layout, SCHEMA};
use crate::ledger::{LedgerError, SCHEMA_VERSION};
use crate::task::LedgerId;

/// Step `n` leads from version `n` to `n + 1`. Never change one that was released: add the next.
pub(super) const MIGRATIONS: &[&str] = &[
    include_str!("../migrations/postgres/0001_ledger.sql"),
    include_str!("../migrations/postgres/0002_cancel.sql"),
    include_str!("../migrations/postgres/0003_schedules.sql"),
    include_str!("../migrations/postgres/0004_unique.sql"),
    include_str!("../migrations/postgres/0005_queue_control.sql"),
    include_str!("../migrations/postgres/0006_groups.sql"),
    include_str!("../migrations/postgres/0007_priority.sql"),
    include_str!("../migrations/postgres/0008_limits.sql"),
    include_str!("../migrations/postgres/0009_failures.sql"),
    include_str!("../migrations/postgres/0010_retention.sql"),
    include_str!("../migrations/postgres/0011_hardening.sql"),
];
const _: () = assert!(MIGRATIONS.len() as i64 == SCHEMA_VERSION, "SCHEMA_VERSION counts the migrations");

/// The advisory lock that one migrating process holds: any number, the same in every release.
const LOCK: i64 = 0x7461_736b_6c61_6e65;
/// How long a start may wait for another process's migration and do its own.
const MIGRATE_LIMIT: Duration = Duration::from_secs(60);
/// The oldest server that has all that the statements use.
pub(super) const SERVER_VERSION_MIN: i32 = 130_000;

/// The functions of versions up to 10 that are moved with their tables, and the version that brought each.
const MOVED_FUNCTIONS: [(&str, i64); 3] = [("tasklane_now()", 1), ("tasklane_paused()", 5), ("tasklane_gates()", 8)];

/// Checks the server and makes the schema that of this build; tells which ledger it is.
pub(super) async fn prepare(connections: &Connections) -> Result<LedgerId, LedgerError> {
    let mut lent = connections.lend().await?;
    check_server(&mut lent).await?;
    if found(&mut lent).await? != (Layout::Current { version: SCHEMA_VERSION }) {
        let migrating = timeout(MIGRATE_LIMIT, migrate(&mut lent)).await;
        migrating.map_err(|_| Fault::late("bringing the schema up to date"))??;
    }
    let id = id(&mut lent).await?;
    lent.keep();
    Ok(id)
}

/// Which ledger this is.
pub(super) async fn id(connection: &mut PgConnection) -> Result<LedgerId, Fault> {
    Ok(LedgerId(sqlx::query_scalar("SELECT id FROM tasklane.ledger").fetch_one(connection).await?))
}

/// The server's time, and what it was when it was last believed.
pub(super) async fn clock(connections: &Connections) -> Result<(i64, Option<i64>), Fault> {
    let mut lent = connections.lend().await?;
    let row = sqlx::query_as("SELECT tasklane.now_ms(), clock_at FROM tasklane.ledger").fetch_one(&mut *lent).await?;
    lent.keep();
    Ok(row)
}

/// Notes that the clock is believed.
pub(super) async fn believe(connections: &Connections, now: i64) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    sqlx::query("UPDATE tasklane.ledger SET clock_at = $1").bind(now).execute(&mut *lent).await?;
    lent.keep();
    Ok(())
}

async fn check_server(connection: &mut PgConnection) -> Result<(), LedgerError> {
    let (version, encoding): (i32, String) =
        sqlx::query_as("SELECT current_setting('server_version_num')::integer, current_setting('server_encoding')")
            .fetch_one(connection)
            .await
            .map_err(Fault::from)?;
    if version < SERVER_VERSION_MIN {
        let (found, least) = (version / 10_000, SERVER_VERSION_MIN / 10_000);
        return Err(LedgerError::Unsuitable(format!(
            "the ledger needs PostgreSQL {least} or newer, and this is {found}"
        )));
    }
    if encoding != "UTF8" {
        return Err(LedgerError::Unsuitable(format!(
            "the ledger's database must be encoded as UTF8, and this one is {encoding}: create it with ENCODING 'UTF8'"
        )));
    }
    Ok(())
}

/// What is there, or an error where it is newer than this build.
async fn found(connection: &mut PgConnection) -> Result<Layout, LedgerError> {
    let found = layout::look(connection).await?;
    if found.version() > SCHEMA_VERSION {
        return Err(LedgerError::NewerSchema { found: found.version(), known: SCHEMA_VERSION });
    }
    Ok(found)
}

/// Runs the missing steps in one transaction: a start that dies in the middle leaves the schema as it was.
async fn migrate(connection: &mut PgConnection) -> Result<(), LedgerError> {
    let mut transaction = connection.begin().await.map_err(Fault::from)?;
    // Two processes may both have seen an old schema: the second one waits here, and then finds nothing to do.
    lock(&mut transaction).await?;
    let found = found(&mut transaction).await?;
    make_place(&mut transaction, &found).await?;
    let from = found.version();
    for (step, sql) in MIGRATIONS.iter().enumerate().skip(usize::try_from(from).unwrap_or(0)) {
        sqlx::raw_sql(*sql).execute(&mut *transaction).await.map_err(Fault::from)?;
        tracing::info!(version = step + 1, "the ledger's schema was brought up to date");
    }
    let entered = sqlx::query("INSERT INTO tasklane.schema_version (version) SELECT $1 WHERE $1 > $2");
    entered.bind(SCHEMA_VERSION).bind(from).execute(&mut *transaction).await.map_err(Fault::from)?;
    transaction.commit().await.map_err(Fault::from)?;
    Ok(())
}

async fn lock(transaction: &mut PgConnection) -> Result<(), Fault> {
    sqlx::query("SET LOCAL statement_timeout = 0").execute(&mut *transaction).await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK).execute(transaction).await?;
    Ok(())
}

/// Makes the schema, moves into it what an earlier release has left elsewhere, and has the steps find it.
async fn make_place(transaction: &mut PgConnection, found: &Layout) -> Result<(), Fault> {
    if sqlx::query_scalar("SELECT to_regnamespace($1) IS NULL").bind(SCHEMA).fetch_one(&mut *transaction).await? {
        // A schema that somebody else has made is enough: then the user need not have the right to make one.
        sqlx::query("CREATE SCHEMA tasklane").execute(&mut *transaction).await?;
    }
    let table = "CREATE TABLE IF NOT EXISTS tasklane.schema_version (version bigint PRIMARY KEY)";
    sqlx::query(table).execute(&mut *transaction).await?;
    if let Layout::Earlier { schema, version } = found
        && schema != SCHEMA
    {
        move_here(transaction, schema, *version).await?;
    }
    sqlx::query("SET LOCAL search_path = tasklane").execute(transaction).await?;
    Ok(())
}

/// Moves a ledger, its indexes and its grants included.
async fn move_here(transaction: &mut PgConnection, schema: &str, version: i64) -> Result<(), Fault> {
    let from = layout::quoted(schema);
    let tables = layout::tables_of(version).map(|table| format!("TABLE {from}.{table}"));
    let functions = MOVED_FUNCTIONS.iter().filter(|(_, since)| *since <= version);
    let functions = functions.map(|(function, _)| format!("FUNCTION {from}.{function}"));
    for moved in tables.chain(functions) {
        let sql = AssertSqlSafe(format!("ALTER {moved} SET SCHEMA tasklane"));
        sqlx::query(sql).execute(&mut *transaction).await?;
    }
    // The table that tells the version stays: an earlier release reads there that it is too old, and does not begin
    // an empty ledger beside this one.
    let sql = AssertSqlSafe(format!("INSERT INTO {from}.schema_version (version) VALUES ($1)"));
    sqlx::query(sql).bind(SCHEMA_VERSION).execute(transaction).await?;
    tracing::info!(schema, "the ledger was moved from this schema to the schema tasklane");
    Ok(())
}
