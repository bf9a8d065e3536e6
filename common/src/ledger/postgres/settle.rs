//! Settling: the outcome of a run, if the fence still holds.

use std::collections::HashMap;

use sqlx::PgConnection;
use uuid::Uuid;

use super::fault::Fault;
use super::lane::{Answers, Bulk, Size};
use super::rows::storable;
use crate::clock::millis;
use crate::ledger::{Settled, Settlement, Transition};
use crate::state::{State, next};
use crate::task::{ERROR_BYTES_MAX, ERRORS_KEPT, ErrorKind, TaskId, truncate};

/// A stale holder's fence is lower than the row's, and a second settlement finds the row no longer running: either
/// way no row matches, and nothing changes. A claim cannot come between the look and the write: the row is locked.
///
/// Where the task's cancellation was requested a run leads to no other start: it `stops` instead. A request that comes at
/// this moment is before the lock, and seen, or after it, and finds the task no longer running.
///
/// The new error is put together by hand: jsonb would refuse an escaped NUL, and json never looks inside strings.
const SETTLE: &str = r#"
WITH clock AS MATERIALIZED (
    SELECT now, to_char(to_timestamp(now / 1000.0) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') AS text
    FROM (SELECT tasklane.now_ms() AS now) once
),
locked AS MATERIALIZED (
    SELECT o.*, o.delay_ms IS NOT NULL AND t.cancel_requested_at IS NOT NULL AS stops,
           CASE WHEN t.cancel_requested_at IS NULL THEN o.delay_ms END AS wait_ms
    FROM UNNEST($1::uuid[], $2::bigint[], $3::smallint[], $4::integer[], $5::bigint[], $6::text[], $7::text[],
                $8::text[], $9::integer[])
         AS o (id, fence, state, attempts, delay_ms, result, reason, error, crashes)
    JOIN tasklane.tasks t ON t.id = o.id
    WHERE t.fence = o.fence AND t.state = $10
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasklane.tasks t
SET state = CASE WHEN l.stops THEN $12 ELSE l.state END,
    attempt = t.attempt + CASE WHEN l.stops THEN 0 ELSE l.attempts END, crashes = t.crashes + l.crashes,
    result = l.result,
    reason = CASE WHEN t.cancel_requested_at IS NOT NULL AND (l.stops OR l.state = $12) THEN t.reason ELSE l.reason END,
    run_at = COALESCE(clock.now + l.wait_ms, t.run_at),
    due_at = clock.now + l.wait_ms,
    queued_at = CASE WHEN l.wait_ms IS NULL THEN t.queued_at END,
    finished_at = CASE WHEN l.wait_ms IS NULL THEN clock.now END,
    errors = CASE WHEN l.error IS NULL THEN t.errors ELSE (
        SELECT json_agg(kept.error ORDER BY kept.place)::text
        FROM (
            SELECT known.error, known.place
            FROM json_array_elements(COALESCE(t.errors, '[]')::json) WITH ORDINALITY AS known (error, place)
            UNION ALL
            SELECT ('{"attempt":' || t.attempt || ',"at":"' || clock.text || '",' || l.error || '}')::json, $11 + 1
            ORDER BY 2 DESC
            LIMIT $11
        ) kept
    ) END
FROM clock, locked l
WHERE t.id = l.id
RETURNING t.id, l.stops"#;

/// Settlements of different tasks share a statement.
pub(super) struct Settling;

impl Bulk for Settling {
    type Item = Settlement;
    type Answer = Settled;

    fn size(settlement: &Settlement) -> Size {
        let bytes = match &settlement.transition {
            Transition::Complete { result } => result.as_str().len(),
            Transition::Retry { .. }
            | Transition::Snooze { .. }
            | Transition::Interrupt
            | Transition::Cancel { .. }
            | Transition::Discard { .. } => 0,
        };
        Size { rows: 1, bytes }
    }

    fn only(settlement: &Settlement) -> Option<TaskId> {
        Some(settlement.id)
    }

    async fn write(connection: &mut PgConnection, items: &[Settlement]) -> Answers<Settled> {
        let outcomes = items.iter().map(|item| outcome(&item.transition)).collect::<Result<Vec<_>, _>>()?;
        let applied: Vec<(Uuid, bool)> = sqlx::query_as(SETTLE)
            .bind(items.iter().map(|item| item.id.0).collect::<Vec<_>>())
            .bind(items.iter().map(|item| item.fence.0).collect::<Vec<_>>())
            .bind(outcomes.iter().map(|outcome| outcome.state.code()).collect::<Vec<_>>())
            .bind(outcomes.iter().map(|outcome| outcome.attempts).collect::<Vec<_>>())
            .bind(outcomes.iter().map(|outcome| outcome.delay_ms).collect::<Vec<_>>())
            .bind(outcomes.iter().map(|outcome| outcome.result).collect::<Vec<_>>())
            .bind(outcomes.iter().map(|outcome| outcome.reason.as_deref()).collect::<Vec<_>>())
            .bind(outcomes.iter().map(|outcome| outcome.error.as_deref()).collect::<Vec<_>>())
            .bind(outcomes.iter().map(|outcome| outcome.crashes).collect::<Vec<_>>())
            .bind(State::Running.code())
            .bind(i64::try_from(ERRORS_KEPT).unwrap_or(i64::MAX - 1))
            .bind(State::Cancelled.code())
            .fetch_all(connection)
            .await?;
        let applied: HashMap<Uuid, bool> = applied.into_iter().collect();
        let answer = |item: &Settlement| match applied.get(&item.id.0) {
            Some(false) => Settled::Applied,
            Some(true) => Settled::Cancelled,
            None => Settled::Fenced,
        };
        Ok(items.iter().map(|item| Ok(answer(item))).collect())
    }
}

/// A transition in columns.
struct Outcome<'a> {
    state: State,
    /// Added to the attempt: −1 gives it back.
    attempts: i32,
    /// How long until it may start again; `None` when it is over.
    delay_ms: Option<i64>,
    result: Option<&'a str>,
    reason: Option<String>,
    /// The members of the error's JSON object that the row does not know itself.
    error: Option<String>,
    crashes: i32,
}

fn outcome(transition: &Transition) -> Result<Outcome<'_>, Fault> {
    let state = next(State::Running, transition.event())
        .ok_or_else(|| Fault::Refused(format!("no way leads out of running by {:?}", transition.event())))?;
    let mut outcome =
        Outcome { state, attempts: 0, delay_ms: None, result: None, reason: None, error: None, crashes: 0 };
    match transition {
        Transition::Complete { result } => outcome.result = Some(result.as_str()),
        Transition::Retry { delay, .. } => outcome.delay_ms = Some(millis(*delay)),
        Transition::Snooze { delay } => (outcome.attempts, outcome.delay_ms) = (-1, Some(millis(*delay))),
        Transition::Interrupt => (outcome.attempts, outcome.delay_ms) = (-1, Some(0)),
        Transition::Cancel { reason } | Transition::Discard { reason, .. } => outcome.reason = Some(storable(reason)),
    }
    if let Transition::Retry { error, .. } | Transition::Discard { error, .. } = transition {
        let message = serde_json::Value::String(truncate(&error.message, ERROR_BYTES_MAX));
        outcome.error = Some(format!(r#""message":{message},"kind":"{}""#, error.kind.as_str()));
        outcome.crashes = i32::from(error.kind == ErrorKind::Crash);
    }
    Ok(outcome)
}
