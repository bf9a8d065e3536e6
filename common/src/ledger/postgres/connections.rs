//! A few connections, kept while they are good.
//!
//! A connection goes back only after its statement was answered. One that failed, timed out, or whose caller went
//! away in the middle is closed, so that nobody inherits a half-read answer or a dead socket.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use url::Url;

use super::fault::Fault;
use crate::ledger::LedgerError;

/// How long a new connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// A connection unused for so long is asked whether it is alive before it gets a statement.
const PROBE_AFTER: Duration = Duration::from_secs(2);
/// How long that question may take.
const PROBE_LIMIT: Duration = Duration::from_secs(1);
/// A connection unused for so long is not trusted any more: firewalls forget silent ones.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// What every session is told at its start.
const SESSION: [(&str, &str); 4] = [
    // Rows locked by a machine that vanished are free again soon.
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    // The conditional writes rely on re-checking a row after waiting for its lock, which only this level does.
    ("default_transaction_isolation", "read committed"),
];

/// What the sessions of the ledger's own statements are told besides.
const OWN: [(&str, &str); 8] = [
    // Shorter than `CALL_TIMEOUT`: the server stops before its caller gives up.
    ("statement_timeout", "4500"),
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
const TRANSACTIONS: [(&str, &str); 2] =
    [("idle_in_transaction_session_timeout", "30000"), ("plan_cache_mode", "force_custom_plan")];

/// At most so many connections to one server, opened when needed.
pub(super) struct Connections {
    options: PgConnectOptions,
    most: usize,
    slots: Semaphore,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: PgConnection,
    since: Instant,
}

/// A connection on loan. [`Lent::keep`] gives it back; dropping it closes it.
pub(super) struct Lent<'a> {
    connection: PgConnection,
    from: &'a Connections,
    slot: SemaphorePermit<'a>,
}

impl Connections {
    pub(super) fn new(options: PgConnectOptions, most: usize) -> Self {
        Self { options, most, slots: Semaphore::new(most), idle: Mutex::default() }
    }

    /// How many there can be.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// A connection for one piece of work, as soon as one is free.
    pub(super) async fn lend(&self) -> Result<Lent<'_>, Fault> {
        let slot = self.slots.acquire().await.map_err(|_| Fault::late("the connections are closed"))?;
        let connection = match self.reuse().await {
            Some(connection) => connection,
            None => self.open().await?,
        };
        Ok(Lent { connection, from: self, slot })
    }

    async fn open(&self) -> Result<PgConnection, Fault> {
        let opened = timeout(CONNECT_LIMIT, self.options.connect()).await;
        Ok(opened.map_err(|_| Fault::late("connecting"))??)
    }

    /// The connection used last, if it is still good. All others have rested longer: they go with a bad one.
    async fn reuse(&self) -> Option<PgConnection> {
        let Idle { mut connection, since } = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        let rested = since.elapsed();
        let good = rested < PROBE_AFTER
            || (rested < IDLE_MAX && matches!(timeout(PROBE_LIMIT, connection.ping()).await, Ok(Ok(()))));
        if good {
            return Some(connection);
        }
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        None
    }
}

impl Lent<'_> {
    /// Gives the connection back: what it was asked has been answered.
    pub(super) fn keep(self) {
        let idle = Idle { connection: self.connection, since: Instant::now() };
        self.from.idle.lock().unwrap_or_else(PoisonError::into_inner).push(idle);
        drop(self.slot);
    }
}

impl Deref for Lent<'_> {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

/// Reads an address as libpq would, and adds what this ledger wants of its own sessions.
pub(super) fn options(url: &str) -> Result<PgConnectOptions, LedgerError> {
    Ok(parse(url)?.options(OWN))
}

/// As [`options`], for sessions in which handlers write.
pub(super) fn for_transactions(url: &str) -> Result<PgConnectOptions, LedgerError> {
    Ok(parse(url)?.options(TRANSACTIONS))
}

fn parse(url: &str) -> Result<PgConnectOptions, LedgerError> {
    // The parser's own words could quote the password, so they are left out unless they are known not to.
    let options: PgConnectOptions = url.parse().map_err(|error: sqlx::Error| {
        let said = error.to_string();
        LedgerError::Address(match Url::parse(url) {
            Ok(url) if url.password().is_none_or(|password| !said.contains(password)) => said,
            _ => "it must look like postgres://user:password@host:5432/database".to_owned(),
        })
    })?;
    let named = match options.get_application_name() {
        Some(_) => options,
        None => options.application_name("tasklane"),
    };
    Ok(named.options(SESSION).disable_statement_logging())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_address_is_explained_without_its_password() {
        for url in [
            "postgres://u:secret@h:port/db",
            "postgres://u:secret@h/db?sslmode=secret",
            "postgres://u:secret@[/db",
            "postgres://u:secret@h/db?port=none",
        ] {
            let error = options(url).unwrap_err();
            assert!(matches!(error, LedgerError::Address(_)), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        assert!(options("postgres://u:secret@h:5432/db?sslmode=require").is_ok());
    }
}
