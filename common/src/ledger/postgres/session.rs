//! What a session is told, and what it must be.
//!
//! Settings are set by statements and not as startup parameters, which a pooler may refuse or ignore. Each session also
//! gets a mark: where it is missing later, or is there before it was set, somebody hands sessions around between
//! statements, and nothing that a session was told holds.

use std::fmt::Write as _;

use sqlx::{AssertSqlSafe, PgConnection, Row};
use uuid::Uuid;

use super::fault::Fault;

/// What every session is told.
const SESSION: [(&str, &str); 7] = [
    // Rows locked by a machine that vanished are free again soon.
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    // The conditional writes rely on re-checking a row after waiting for its lock, which only this level does.
    ("default_transaction_isolation", "read committed"),
    // The library says these at the start, where a pooler may drop them.
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("TimeZone", "UTC"),
];

/// What the sessions of the ledger's own statements are told besides.
pub(super) const OWN: &[(&str, &str)] = &[
    // Shorter than `CALL_TIMEOUT`: the server stops before its caller gives up.
    ("statement_timeout", "4500"),
    // A wait for a lock is bounded by that; what a role or database has set would end it as an error of the statement.
    ("lock_timeout", "0"),
    // The ledger never pauses inside a transaction, unless it is gone.
    ("idle_in_transaction_session_timeout", "5000"),
    // One plan for each statement, always through an index. A plan made while the table was small must not
    // scan it when it has grown, and statistics always lag behind a queue. Compiling a plan would cost more than
    // running it, and the switched-off scans look expensive enough to trigger that.
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
    ("max_parallel_workers_per_gather", "0"),
];

/// What the sessions for the transactions of handlers are told besides. How a handler's statements are planned is the
/// server's affair; each gets a plan of its own, so that the completion's never was made for a smaller table.
pub(super) const TRANSACTIONS: &[(&str, &str)] =
    &[("idle_in_transaction_session_timeout", "30000"), ("plan_cache_mode", "force_custom_plan")];

/// What is answered with 2xx is on disk, whatever role or database say; a stronger promise is kept.
const DURABLE: &str = "SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') = 'off';";

/// The mark, and whether the server takes writes.
const LOOK: &str =
    "SELECT COALESCE(current_setting('tasklane.session', true), '') AS mark, pg_is_in_recovery() AS standby,
    current_setting('transaction_read_only')::boolean AS read_only";

/// How many more connections a server takes. Nobody may be counted twice or not at all for want of a right, so this is by
/// database and not by connection.
const ROOM: &str = "
SELECT current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
       - COALESCE(current_setting('reserved_connections', true)::bigint, 0) - sum(numbackends)::bigint
FROM pg_stat_database";

/// Which server will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// One that takes writes.
    Writable,
    /// Any: it is only looked at.
    Any,
}

/// Tells a new session what it must know.
pub(super) async fn begin(
    connection: &mut PgConnection,
    settings: &[(&str, &str)],
    wanted: Wanted,
) -> Result<Uuid, Fault> {
    let mark = Uuid::now_v7();
    let mut sql = format!("{LOOK}; {DURABLE}");
    for (name, value) in SESSION.iter().chain(settings) {
        let _ = write!(sql, "SET {name} = '{value}';");
    }
    let _ = write!(sql, "SET tasklane.session = '{mark}'");
    let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?;
    let look = Look::of(rows.first())?;
    if !look.mark.is_empty() {
        return Err(shared());
    }
    look.suits(wanted)?;
    Ok(mark)
}

/// Makes sure that a session is still there, still this one, and still fit for writes.
pub(super) async fn check(connection: &mut PgConnection, mark: Uuid, wanted: Wanted) -> Result<(), Fault> {
    let row = sqlx::raw_sql(LOOK).fetch_one(connection).await?;
    let look = Look::of(Some(&row))?;
    if look.mark != mark.to_string() {
        return Err(shared());
    }
    look.suits(wanted)
}

/// How many more connections the server would take.
pub(super) async fn room(connection: &mut PgConnection) -> Result<i64, Fault> {
    Ok(sqlx::query_scalar(ROOM).fetch_one(connection).await?)
}

struct Look {
    mark: String,
    standby: bool,
    read_only: bool,
}

impl Look {
    fn of(row: Option<&sqlx::postgres::PgRow>) -> Result<Self, Fault> {
        let row = row.ok_or_else(|| Fault::corrupt("no answer of a session"))?;
        let (mark, standby) = (row.try_get("mark")?, row.try_get("standby")?);
        Ok(Self { mark, standby, read_only: row.try_get("read_only")? })
    }

    fn suits(&self, wanted: Wanted) -> Result<(), Fault> {
        let why = match (wanted, self.standby, self.read_only) {
            (Wanted::Any, ..) | (_, false, false) => return Ok(()),
            (_, true, _) => "it is a standby",
            (_, false, true) => "default_transaction_read_only is on",
        };
        Err(Fault::ReadOnly(format!("the server takes no writes: {why}")))
    }
}

fn shared() -> Fault {
    Fault::Refused(
        "a pooler before it hands sessions around between transactions, and what a session is told is lost: in \
         pgbouncer.ini, give the ledger's database pool_mode=session with server_reset_query = DISCARD ALL, or let \
         ledger_url name the server itself"
            .to_owned(),
    )
}
