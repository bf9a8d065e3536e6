//! What ends tasks from outside, and how those that are over are run again.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::rows::{codes_for, state_of, storable};
use super::unique;
use crate::clock::millis;
use crate::ledger::{Caller, Replayed};
use crate::state::{Event, State, next};
use crate::task::{ChangeCall, TaskId};

/// The raised fence voids what was published of one that waits: a message, or the late mark of one.
const REPLAY: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
found AS MATERIALIZED (
    SELECT t.id, t.state, r.delay_ms
    FROM UNNEST($1::uuid[], $2::bigint[]) AS r (id, delay_ms) JOIN tasklane.tasks t ON t.id = r.id
    ORDER BY t.id
    FOR UPDATE OF t
),
moved AS (
    UPDATE tasklane.tasks t
    SET state = $4, run_at = clock.now + f.delay_ms, due_at = clock.now + f.delay_ms, queued_at = NULL, crashes = 0,
        max_attempts = GREATEST(t.max_attempts, t.attempt + 1), finished_at = NULL, reason = NULL,
        cancel_requested_at = NULL, first_due_at = NULL,
        fence = CASE WHEN f.state < 5 THEN t.fence + 1 ELSE t.fence END,
        void_below = CASE WHEN f.state < 5 THEN t.fence + 1 ELSE t.void_below END,
        last_change = ($5::jsonb || jsonb_build_object('at', clock.now))::text
    FROM found f, clock
    WHERE t.id = f.id AND f.state = ANY($3)
)
SELECT id, state FROM found";

/// The rows are judged as they were locked. The first request for a run counts, and its worker may have heard of it.
const CANCEL: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
found AS MATERIALIZED (
    SELECT id, state, state = $4 AND cancel_requested_at IS NOT NULL AS requested
    FROM tasklane.tasks WHERE id = ANY($1) ORDER BY id FOR UPDATE
),
moved AS (
    UPDATE tasklane.tasks t
    SET state = CASE WHEN f.state = $4 THEN f.state ELSE $5 END, due_at = NULL, reason = $2,
        finished_at = CASE WHEN f.state = $4 THEN NULL ELSE clock.now END, cancel_requested_at = clock.now,
        last_change = ($6::jsonb || jsonb_build_object('at', clock.now))::text
    FROM found f, clock
    WHERE t.id = f.id AND f.state = ANY($3) AND NOT f.requested
)
SELECT id, state FROM found";

pub(super) async fn replay(
    connections: &Connections,
    replays: &[(TaskId, Duration)],
    caller: &Caller,
) -> Result<Vec<(TaskId, Replayed)>, Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    let mut replayed = without_key(&mut transaction, replays).await?;
    let free: Vec<_> = replays.iter().filter(|(id, _)| !replayed.contains_key(id)).collect();
    let before: Vec<(Uuid, i16)> = sqlx::query_as(REPLAY)
        .bind(free.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
        .bind(free.iter().map(|(_, delay)| millis(*delay)).collect::<Vec<_>>())
        .bind(codes_for(Event::Replay))
        .bind(State::Accepted.code())
        .bind(caller.change(ChangeCall::Retry, None))
        .fetch_all(&mut *transaction)
        .await?;
    transaction.commit().await?;
    lent.keep();
    for (id, code) in before {
        replayed.insert(TaskId(id), Replayed::From(state_of(code)?));
    }
    Ok(replayed.into_iter().collect())
}

/// Takes back the unique keys of those that have failed; answers the others, and those whose key another task holds.
///
/// What has not failed at this look must not be replayed at the next: it may have ended in between, and has no key.
async fn without_key(
    connection: &mut PgConnection,
    replays: &[(TaskId, Duration)],
) -> Result<HashMap<TaskId, Replayed>, Fault> {
    const LOOK: &str = "SELECT id, state, unique_key FROM tasklane.tasks WHERE id = ANY($1) ORDER BY id";
    let found: Vec<(Uuid, i16, Option<String>)> = sqlx::query_as(LOOK)
        .bind(replays.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
        .fetch_all(&mut *connection)
        .await?;
    let (mut without, mut keyed) = (HashMap::new(), Vec::new());
    for (id, code, key) in &found {
        let (id, state) = (TaskId(*id), state_of(*code)?);
        match key {
            _ if next(state, Event::Replay).is_none() => drop(without.insert(id, Replayed::From(state))),
            // What has not ended holds its key still, or until the key's time was over.
            Some(key) if state.is_final() => keyed.push((id, key.as_str())),
            _ => {}
        }
    }
    if keyed.is_empty() {
        return Ok(without);
    }
    let keys: Vec<&str> = keyed.iter().map(|(_, key)| *key).collect();
    unique::lock(connection, &keys).await?;
    let found = unique::holders(connection, &keys).await?;
    let mut holders: HashMap<&str, TaskId> = found.iter().map(|(key, holder)| (key.as_str(), holder.id)).collect();
    let mut taken = Vec::new();
    for (id, key) in keyed {
        match holders.get(key) {
            Some(holder) if *holder != id => drop(without.insert(id, Replayed::KeyHeld(*holder))),
            Some(_) => {}
            // Of several with one key the first has it from here on.
            None => {
                holders.insert(key, id);
                taken.push((key, id, None));
            }
        }
    }
    unique::take(connection, &taken).await?;
    Ok(without)
}

pub(super) async fn cancel(
    connections: &Connections,
    ids: &[TaskId],
    reason: &str,
    caller: &Caller,
) -> Result<Vec<(TaskId, State)>, Fault> {
    let mut lent = connections.lend().await?;
    let before: Vec<(Uuid, i16)> = sqlx::query_as(CANCEL)
        .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(storable(reason))
        .bind(codes_for(Event::Cancel))
        .bind(State::Running.code())
        .bind(State::Cancelled.code())
        .bind(caller.change(ChangeCall::Cancel, None))
        .fetch_all(&mut *lent)
        .await?;
    lent.keep();
    before.into_iter().map(|(id, code)| Ok((TaskId(id), state_of(code)?))).collect()
}
