//! What a server says of itself, for the doctor: asked over a session like those of the ledger, and nothing is changed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::PgConnection;
use tokio::time::timeout;

use super::connections;
use super::fault::Fault;
use super::layout::{self, Layout};
use super::schema;
use super::session::Wanted;
use crate::doctor::runs::{RunsOf, SETTLED_MS};
use crate::ledger::{CALL_TIMEOUT, LedgerError, SCHEMA_VERSION};
use crate::task::LedgerId;

/// The settings and state of a server, as a session of ours sees them.
#[derive(Debug)]
pub(crate) struct Vitals {
    /// Where it is, for people.
    pub(crate) place: String,
    /// Major version.
    pub(crate) version: i32,
    pub(crate) version_min: i32,
    pub(crate) encoding: String,
    /// Settings that must be `on`, or in the last one's case anything but `off`.
    pub(crate) fsync: String,
    pub(crate) full_page_writes: String,
    pub(crate) synchronous_commit: String,
    /// A standby, or a session that may only read.
    pub(crate) in_recovery: bool,
    pub(crate) read_only: bool,
    pub(crate) max_connections: i32,
    pub(crate) connections: i64,
    /// How far the server's clock is ahead of ours, in seconds, and how far that may be wrong.
    pub(crate) clock_ahead: f64,
    pub(crate) clock_error: f64,
    /// What is there, or what is in the way.
    pub(crate) layout: Result<Layout, LedgerError>,
    /// Which ledger it is, where it has the present schema.
    pub(crate) id: Option<LedgerId>,
    /// What runs, by worker.
    pub(crate) runs: Vec<RunsOf>,
}

const ASK: &str = "SELECT current_setting('server_version_num')::integer, current_setting('server_encoding'),
    current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit'),
    pg_is_in_recovery(), current_setting('default_transaction_read_only') = 'on',
    current_setting('max_connections')::integer,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')";

/// What runs for a while, by worker; only the present schema is asked.
const RUNS: &str = "
SELECT t.worker_id::text, CASE WHEN NOT w.dead AND w.expires_at > clock.now THEN w.running::bigint END, count(*)
FROM (SELECT tasklane.now_ms() AS now) clock, tasklane.tasks t LEFT JOIN tasklane.workers w ON w.id = t.worker_id
WHERE t.state = 3 AND t.worker_id IS NOT NULL AND t.started_at < clock.now - $1
GROUP BY 1, 2";

/// Asks the server behind an address.
///
/// # Errors
/// [`LedgerError`], whose text never holds the address's password.
pub(crate) async fn look(url: &str) -> Result<Vitals, LedgerError> {
    let source = connections::own(url, Wanted::Any)?;
    let place = source.place();
    let asked = timeout(CALL_TIMEOUT, async { ask(&mut source.connect().await?.0, place).await }).await;
    Ok(asked.unwrap_or_else(|_| Err(Fault::late("the ledger's server")))?)
}

async fn ask(connection: &mut PgConnection, place: String) -> Result<Vitals, Fault> {
    type Row = (i32, String, String, String, String, bool, bool, i32, i64);
    let row: Row = sqlx::query_as(ASK).fetch_one(&mut *connection).await?;
    let (number, encoding, fsync, full_page_writes, synchronous_commit, in_recovery, read_only, ..) = row;
    let (.., max_connections, open_now) = row;
    let layout = layout::look(connection).await;
    let (id, runs) = match &layout {
        Ok(layout) if layout.version() == SCHEMA_VERSION => {
            (Some(schema::id(connection).await?), runs(connection).await?)
        }
        _ => (None, Vec::new()),
    };
    let before = now();
    let theirs: f64 =
        sqlx::query_scalar("SELECT extract(epoch FROM clock_timestamp())::float8").fetch_one(&mut *connection).await?;
    let after = now();
    Ok(Vitals {
        place,
        version: number / 10_000,
        version_min: schema::SERVER_VERSION_MIN / 10_000,
        encoding,
        fsync,
        full_page_writes,
        synchronous_commit,
        in_recovery,
        read_only,
        max_connections,
        connections: open_now,
        clock_ahead: theirs - f64::midpoint(before, after),
        clock_error: (after - before) / 2.0,
        layout,
        id,
        runs,
    })
}

async fn runs(connection: &mut PgConnection) -> Result<Vec<RunsOf>, Fault> {
    let rows: Vec<(String, Option<i64>, i64)> = sqlx::query_as(RUNS).bind(SETTLED_MS).fetch_all(connection).await?;
    Ok(rows.into_iter().map(|(worker, told, running)| RunsOf { worker, told, running }).collect())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
