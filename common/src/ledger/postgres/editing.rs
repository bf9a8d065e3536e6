//! What a person changes of a task that waits.

use super::connections::Connections;
use super::fault::Fault;
use super::rows::{codes_for, state_of};
use crate::clock::millis;
use crate::ledger::{Caller, Edit, Edited};
use crate::state::{Event, State, next};
use crate::task::{ChangeCall, Priority, QueueName, TaskId};

/// The row is judged as it was locked. The raised fence voids the late mark of a publication under way, and what was
/// published before says what held before.
const EDIT: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
found AS MATERIALIZED (SELECT id, state, attempt FROM tasklane.tasks WHERE id = $1 FOR UPDATE),
changed AS (
    UPDATE tasklane.tasks t
    SET state = $3, fence = t.fence + 1, void_below = t.fence + 1, queued_at = NULL,
        first_due_at = CASE WHEN $4::bigint IS NULL THEN t.first_due_at END,
        run_at = CASE WHEN $4::bigint IS NULL THEN t.run_at ELSE GREATEST($4, clock.now) END,
        due_at = GREATEST(COALESCE($4, t.run_at), clock.now),
        args = COALESCE($5::text, t.args), queue = COALESCE($6::text, t.queue), priority = COALESCE($9::smallint, t.priority),
        args_digest = COALESCE($11::bigint, t.args_digest),
        max_attempts = COALESCE($7::integer, t.max_attempts), timeout_ms = COALESCE($8::bigint, t.timeout_ms),
        last_change = ($10::jsonb || jsonb_build_object('at', clock.now))::text
    FROM found f, clock
    WHERE t.id = f.id AND f.state = ANY($2) AND COALESCE($7 > f.attempt, true)
)
SELECT state, attempt FROM found";

pub(super) async fn edit(connections: &Connections, id: TaskId, edit: &Edit, caller: &Caller) -> Result<Edited, Fault> {
    let mut lent = connections.lend().await?;
    let found: Option<(i16, i32)> = sqlx::query_as(EDIT)
        .bind(id.0)
        .bind(codes_for(Event::Edit))
        .bind(State::Scheduled.code())
        .bind(edit.run_at.map(|at| at.as_millisecond()))
        .bind(edit.args.as_ref().map(|args| args.as_str()))
        .bind(edit.queue.as_ref().map(QueueName::as_str))
        .bind(edit.max_attempts)
        .bind(edit.timeout.map(millis))
        .bind(edit.priority.map(Priority::code))
        .bind(caller.change(ChangeCall::Edit, None))
        .bind(edit.args.as_ref().map(|args| args.digest().0))
        .fetch_optional(&mut *lent)
        .await?;
    lent.keep();
    let Some((code, attempt)) = found else { return Ok(Edited::Unknown) };
    let state = state_of(code)?;
    let waits = next(state, Event::Edit).is_some();
    Ok(match edit.max_attempts {
        Some(most) if waits && most <= attempt => Edited::NoAttemptLeft(attempt),
        _ => Edited::From(state),
    })
}
