//! What is done to a queue as a whole.

use sqlx::{Connection, PgConnection};

use super::connections::Connections;
use super::fault::Fault;
use super::rows::codes_for;
use crate::clock::timestamp;
use crate::ledger::{Caller, Paused};
use crate::state::{Event, State};
use crate::task::{ChangeCall, QueueName, TaskId};

/// The other side of `tasklane.gates()`, with the same number: it waits for every claim that may have looked at the
/// paused queues before this one is among them, and claims that come meanwhile wait for the commit. So after the
/// answer no claim is granted that had not seen it.
pub(super) const KEEP_CLAIMS_OUT: &str = "SELECT pg_advisory_xact_lock(8386110886424704371)";

const PAUSE: &str = "
INSERT INTO tasklane.paused_queues (name, paused_at, paused_by) VALUES ($1, tasklane.now_ms(), $2)
ON CONFLICT (name) DO NOTHING";

const RESUME: &str = "DELETE FROM tasklane.paused_queues WHERE name = $1";

const PAUSES: &str = "SELECT name, paused_at, paused_by FROM tasklane.paused_queues ORDER BY name";

/// The raised fence voids the late mark of a publication to the old queue, and the messages that are there: one could start
/// its task where it is not any more. So each must be published again.
const MOVE: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
locked AS MATERIALIZED (
    SELECT id FROM tasklane.tasks WHERE id = ANY($1) AND queue = $2 AND state = ANY($4) ORDER BY id FOR UPDATE
)
UPDATE tasklane.tasks t
SET queue = $3, state = CASE WHEN t.state = $5 THEN $6 ELSE t.state END, due_at = GREATEST(clock.now, t.run_at),
    queued_at = NULL, fence = t.fence + 1, void_below = t.fence + 1,
    last_change = ($7::jsonb || jsonb_build_object('at', clock.now))::text
FROM clock, locked l
WHERE t.id = l.id";

pub(super) async fn move_tasks(
    connections: &Connections,
    ids: &[TaskId],
    (from, to): (&QueueName, &QueueName),
    caller: &Caller,
) -> Result<u64, Fault> {
    let mut lent = connections.lend().await?;
    let moved = sqlx::query(MOVE)
        .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(from.as_str())
        .bind(to.as_str())
        .bind(codes_for(Event::Move))
        .bind(State::Queued.code())
        .bind(State::Accepted.code())
        .bind(caller.change(ChangeCall::Move, None))
        .execute(&mut *lent)
        .await?;
    lent.keep();
    Ok(moved.rows_affected())
}

pub(super) async fn set_paused(
    connections: &Connections,
    queue: &QueueName,
    paused: bool,
    caller: &Caller,
) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    if paused {
        sqlx::query(KEEP_CLAIMS_OUT).execute(&mut *transaction).await?;
        sqlx::query(PAUSE).bind(queue.as_str()).bind(&caller.actor).execute(&mut *transaction).await?;
    } else {
        sqlx::query(RESUME).bind(queue.as_str()).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    lent.keep();
    Ok(())
}

pub(super) async fn paused(connections: &Connections) -> Result<Vec<QueueName>, Fault> {
    let mut lent = connections.lend().await?;
    let paused = pauses_within(&mut lent).await?;
    lent.keep();
    Ok(paused.into_iter().map(|(name, _)| name).collect())
}

pub(super) async fn pauses_within(connection: &mut PgConnection) -> Result<Vec<(QueueName, Paused)>, Fault> {
    let pauses: Vec<(String, i64, Option<String>)> = sqlx::query_as(PAUSES).fetch_all(connection).await?;
    let read = |(name, at, by): (String, _, _)| {
        let name = QueueName::parse(&name).map_err(Fault::corrupt)?;
        Ok((name, Paused { at: timestamp(at), by }))
    };
    pauses.into_iter().map(read).collect()
}
