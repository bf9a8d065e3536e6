//! Who holds a unique key.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::rows::state_of;
use crate::clock::millis;
use crate::ledger::unique::Holder;
use crate::task::TaskId;

/// Whoever wants one of the keys waits here for the transaction that has it, and sees its outcome in the statements
/// that follow. The order keeps two transactions from waiting for each other; keys with equal hashes share a lock.
const LOCK: &str = "
SELECT pg_advisory_xact_lock(hash)
FROM (SELECT DISTINCT hashtextextended('tasklane unique ' || key, 0) AS hash FROM UNNEST($1::text[]) AS k (key)
      ORDER BY hash) ordered";

/// One that is not kept any more holds nothing.
const HOLDERS: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now)
SELECT u.key, t.id, t.state
FROM clock, tasklane.unique_keys u JOIN tasklane.tasks t ON t.id = u.task_id
WHERE u.key = ANY($1) AND CASE WHEN u.until_at IS NULL THEN t.state < 5 ELSE u.until_at > clock.now END";

const TAKE: &str = "
INSERT INTO tasklane.unique_keys (key, task_id, until_at)
SELECT key, task_id, tasklane.now_ms() + window_ms
FROM UNNEST($1::text[], $2::uuid[], $3::bigint[]) AS n (key, task_id, window_ms)
ON CONFLICT (key) DO UPDATE SET task_id = excluded.task_id, until_at = excluded.until_at";

/// Keeps others from these keys until the transaction ends.
pub(super) async fn lock(connection: &mut PgConnection, keys: &[&str]) -> Result<(), Fault> {
    sqlx::query(LOCK).bind(keys).execute(connection).await?;
    Ok(())
}

/// The tasks that hold these keys now.
pub(super) async fn holders(connection: &mut PgConnection, keys: &[&str]) -> Result<HashMap<String, Holder>, Fault> {
    let rows: Vec<(String, Uuid, i16)> = sqlx::query_as(HOLDERS).bind(keys).fetch_all(connection).await?;
    let holder = |(key, id, code)| Ok((key, Holder { id: TaskId(id), state: state_of(code)? }));
    rows.into_iter().map(holder).collect()
}

/// As [`holders`], outside of a transaction.
pub(super) async fn held(connections: &Connections, keys: &[String]) -> Result<Vec<(String, Holder)>, Fault> {
    let mut lent = connections.lend().await?;
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let found = holders(&mut lent, &keys).await?;
    lent.keep();
    Ok(found.into_iter().collect())
}

/// Gives keys to tasks, for a time or until they have finished.
pub(super) async fn take(
    connection: &mut PgConnection,
    taken: &[(&str, TaskId, Option<Duration>)],
) -> Result<(), Fault> {
    sqlx::query(TAKE)
        .bind(taken.iter().map(|(key, ..)| *key).collect::<Vec<_>>())
        .bind(taken.iter().map(|(_, id, _)| id.0).collect::<Vec<_>>())
        .bind(taken.iter().map(|(.., window)| window.map(millis)).collect::<Vec<_>>())
        .execute(connection)
        .await?;
    Ok(())
}
