//! What ends tasks from outside, and how one that is over is run again.

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::rows::{codes_for, state_of, storable};
use super::unique;
use crate::ledger::Replayed;
use crate::state::{Event, State, next};
use crate::task::TaskId;

const REPLAY: &str = "
WITH found AS MATERIALIZED (SELECT id, state FROM tasks WHERE id = $1 FOR UPDATE),
moved AS (
    UPDATE tasks t
    SET state = $3, run_at = clock.now, due_at = clock.now, queued_at = NULL, crashes = 0,
        max_attempts = GREATEST(t.max_attempts, t.attempt + 1), finished_at = NULL, reason = NULL,
        cancel_requested_at = NULL, first_due_at = NULL
    FROM found f, (SELECT tasklane_now() AS now) clock
    WHERE t.id = f.id AND f.state = ANY($2)
)
SELECT state FROM found";

/// The rows are judged as they were locked. The first request for a run counts, and its worker may have heard of it.
const CANCEL: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane_now() AS now),
found AS MATERIALIZED (
    SELECT id, state, state = $4 AND cancel_requested_at IS NOT NULL AS requested
    FROM tasks WHERE id = ANY($1) ORDER BY id FOR UPDATE
),
moved AS (
    UPDATE tasks t
    SET state = CASE WHEN f.state = $4 THEN f.state ELSE $5 END, due_at = NULL, reason = $2,
        finished_at = CASE WHEN f.state = $4 THEN NULL ELSE clock.now END, cancel_requested_at = clock.now
    FROM found f, clock
    WHERE t.id = f.id AND f.state = ANY($3) AND NOT f.requested
)
SELECT id, state FROM found";

pub(super) async fn replay(connections: &Connections, id: TaskId) -> Result<Replayed, Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    let replayed = replay_within(&mut transaction, id).await?;
    transaction.commit().await?;
    lent.keep();
    Ok(replayed)
}

async fn replay_within(connection: &mut PgConnection, id: TaskId) -> Result<Replayed, Fault> {
    let found: Option<(i16, Option<String>)> = sqlx::query_as("SELECT state, unique_key FROM tasks WHERE id = $1")
        .bind(id.0)
        .fetch_optional(&mut *connection)
        .await?;
    let Some((code, key)) = found else { return Ok(Replayed::Unknown) };
    let state = state_of(code)?;
    if next(state, Event::Replay).is_none() {
        return Ok(Replayed::From(state));
    }
    if let Some(key) = key {
        unique::lock(connection, &[&key]).await?;
        match unique::holders(connection, &[&key]).await?.remove(&key) {
            Some(holder) if holder.id != id => return Ok(Replayed::KeyHeld(holder.id)),
            Some(_) => {}
            None => unique::take(connection, &[(&key, id, None)]).await?,
        }
    }
    let before: Option<i16> = sqlx::query_scalar(REPLAY)
        .bind(id.0)
        .bind(codes_for(Event::Replay))
        .bind(State::Accepted.code())
        .fetch_optional(connection)
        .await?;
    before.map_or(Ok(Replayed::Unknown), |code| state_of(code).map(Replayed::From))
}

pub(super) async fn cancel(
    connections: &Connections,
    ids: &[TaskId],
    reason: &str,
) -> Result<Vec<(TaskId, State)>, Fault> {
    let mut lent = connections.lend().await?;
    let before: Vec<(Uuid, i16)> = sqlx::query_as(CANCEL)
        .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(storable(reason))
        .bind(codes_for(Event::Cancel))
        .bind(State::Running.code())
        .bind(State::Cancelled.code())
        .fetch_all(&mut *lent)
        .await?;
    lent.keep();
    before.into_iter().map(|(id, code)| Ok((TaskId(id), state_of(code)?))).collect()
}
