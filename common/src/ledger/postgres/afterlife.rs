//! What ends tasks from outside, and what can still happen to one that is over: it is run again, or forgotten.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::rows::{codes_for, state_of, storable};
use super::{groups, unique};
use crate::clock::millis;
use crate::ledger::Replayed;
use crate::state::{Event, State, next};
use crate::task::TaskId;

/// How many rows one statement of a prune looks at: as many as it may delete, within these bounds.
const SCAN: (i64, i64) = (1_000, 20_000);
/// How long one prune goes on; the next one continues where it stopped.
const PRUNE_BUDGET: Duration = Duration::from_secs(2);

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

/// Completed rows are in no index but the primary key, so this walks along it: ids are in the order of submission,
/// and a row cannot have finished before it was submitted, which bounds the walk. The hour allows for submitters whose
/// clocks, which make the ids, are ahead of the server's.
///
/// A replay in between takes `finished_at` away; the deletion waits for its lock, looks again and leaves the row.
const PRUNE: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane_now() - $4 AS cutoff),
scanned AS MATERIALIZED (
    SELECT id, finished_at, group_id FROM tasks
    WHERE id > $1
      AND id < (SELECT rpad(lpad(to_hex(GREATEST(cutoff + 3600000, 0)), 12, '0'), 32, '0')::uuid FROM clock)
    ORDER BY id
    LIMIT $2
),
doomed AS MATERIALIZED (
    SELECT s.id FROM scanned s, clock
    WHERE s.finished_at < clock.cutoff
      AND (s.group_id IS NULL OR (SELECT COALESCE(g.finished_at < clock.cutoff, false)
                                  FROM task_groups g WHERE g.id = s.group_id) IS NOT FALSE)
    ORDER BY s.id LIMIT $3
),
gone AS (
    DELETE FROM tasks t USING doomed d, clock WHERE t.id = d.id AND t.finished_at < clock.cutoff
    RETURNING t.id, t.unique_key
),
freed AS (DELETE FROM unique_keys u USING gone g WHERE u.key = g.unique_key AND u.task_id = g.id)
SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM scanned), (SELECT count(*) FROM doomed),
       (SELECT id FROM scanned ORDER BY id DESC LIMIT 1), (SELECT id FROM doomed ORDER BY id DESC LIMIT 1)";

/// A replay that is under way holds the row: the deletion waits, looks again and leaves it. A group that has not ended
/// keeps its members, or its counts would be wrong.
const PURGE: &str = "
WITH doomed AS MATERIALIZED (
    SELECT id FROM tasks t
    WHERE id = ANY($1) AND state >= 5
      AND (group_id IS NULL OR NOT EXISTS (
          SELECT 1 FROM task_groups g WHERE g.id = t.group_id AND g.finished_at IS NULL))
    ORDER BY id FOR UPDATE OF t
),
gone AS (DELETE FROM tasks t USING doomed d WHERE t.id = d.id RETURNING t.id, t.unique_key),
freed AS (DELETE FROM unique_keys u USING gone g WHERE u.key = g.unique_key AND u.task_id = g.id)
SELECT count(*) FROM gone";

const PRUNE_WORKERS: &str = "
DELETE FROM workers w
WHERE dead AND expires_at < tasklane_now() - 3600000
  AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.state = 3 AND t.worker_id = w.id)";

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

pub(super) async fn purge(connections: &Connections, ids: &[TaskId]) -> Result<u64, Fault> {
    let mut lent = connections.lend().await?;
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let purged: i64 = sqlx::query_scalar(PURGE).bind(ids).fetch_one(&mut *lent).await?;
    lent.keep();
    Ok(purged.unsigned_abs())
}

/// Where the walk along the primary key has come.
#[derive(Debug, Default)]
pub(super) struct Walk(Mutex<Uuid>);

/// Deletes up to `limit` tasks, within one pass over the rows that are old enough and within its budget of time.
pub(super) async fn prune(
    connections: &Connections,
    walk: &Walk,
    retention: Duration,
    limit: u32,
) -> Result<u64, Fault> {
    let began = Instant::now();
    let mut lent = connections.lend().await?;
    let mut pruned = 0;
    let mut restarted = false;
    while pruned < u64::from(limit) && began.elapsed() < PRUNE_BUDGET {
        let from = *walk.0.lock().unwrap_or_else(PoisonError::into_inner);
        let most = i64::from(limit).saturating_sub(i64::try_from(pruned).unwrap_or(i64::MAX));
        let scan = most.clamp(SCAN.0, SCAN.1);
        let (gone, scanned, doomed, scanned_to, doomed_to): (i64, i64, i64, Option<Uuid>, Option<Uuid>) =
            sqlx::query_as(PRUNE)
                .bind(from)
                .bind(scan)
                .bind(most)
                .bind(millis(retention))
                .fetch_one(&mut *lent)
                .await?;
        pruned += gone.unsigned_abs();
        let (to, at_end) = if doomed == most { (doomed_to, false) } else { (scanned_to, scanned < scan) };
        // At the end the walk begins anew: rows that were passed by because they had not finished may have.
        *walk.0.lock().unwrap_or_else(PoisonError::into_inner) = to.filter(|_| !at_end).unwrap_or(Uuid::nil());
        if at_end && (restarted || from.is_nil()) {
            break;
        }
        restarted |= at_end;
    }
    groups::prune(&mut lent, millis(retention), limit).await?;
    sqlx::query(PRUNE_WORKERS).execute(&mut *lent).await?;
    lent.keep();
    Ok(pruned)
}
