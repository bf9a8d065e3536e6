//! What is done to a queue as a whole.

use sqlx::{Connection, PgConnection};

use super::connections::Connections;
use super::fault::Fault;
use crate::task::QueueName;

/// The other side of `tasklane_paused()`, with the same number: it waits for every claim that may have looked at the
/// paused queues before this one is among them, and claims that come meanwhile wait for the commit. So after the
/// answer no claim is granted that had not seen it.
const KEEP_CLAIMS_OUT: &str = "SELECT pg_advisory_xact_lock(8386110886424704371)";

const PAUSE: &str =
    "INSERT INTO paused_queues (name, paused_at) VALUES ($1, tasklane_now()) ON CONFLICT (name) DO NOTHING";

const RESUME: &str = "DELETE FROM paused_queues WHERE name = $1";

const PAUSED: &str = "SELECT name FROM paused_queues ORDER BY name";

pub(super) async fn set_paused(connections: &Connections, queue: &QueueName, paused: bool) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    if paused {
        sqlx::query(KEEP_CLAIMS_OUT).execute(&mut *transaction).await?;
    }
    let statement = if paused { PAUSE } else { RESUME };
    sqlx::query(statement).bind(queue.as_str()).execute(&mut *transaction).await?;
    transaction.commit().await?;
    lent.keep();
    Ok(())
}

pub(super) async fn paused(connections: &Connections) -> Result<Vec<QueueName>, Fault> {
    let mut lent = connections.lend().await?;
    let paused = paused_within(&mut lent).await?;
    lent.keep();
    Ok(paused)
}

pub(super) async fn paused_within(connection: &mut PgConnection) -> Result<Vec<QueueName>, Fault> {
    let names: Vec<String> = sqlx::query_scalar(PAUSED).fetch_all(connection).await?;
    names.iter().map(|name| QueueName::parse(name).map_err(Fault::corrupt)).collect()
}
