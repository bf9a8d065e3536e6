//! What a person changes of a task that waits.

use rusqlite::{Connection, OptionalExtension, params};

use super::read::state_of;
use crate::clock::{millis, wall_ms};
use crate::ledger::{Caller, Edit, Edited};
use crate::state::{Event, next};
use crate::task::{ChangeCall, Priority, QueueName, TaskId};

pub(super) fn edit(db: &Connection, id: TaskId, edit: &Edit, caller: &Caller) -> rusqlite::Result<Edited> {
    let row = db
        .prepare_cached("SELECT state, attempt FROM tasks WHERE id = ?1")?
        .query_row([id.0.as_bytes().as_slice()], |row| Ok((state_of(row, 0)?, row.get::<_, i32>(1)?)))
        .optional()?;
    let Some((state, attempt)) = row else { return Ok(Edited::Unknown) };
    let Some(becomes) = next(state, Event::Edit) else { return Ok(Edited::From(state)) };
    if edit.max_attempts.is_some_and(|most| most <= attempt) {
        return Ok(Edited::NoAttemptLeft(attempt));
    }
    let now = wall_ms();
    // The raised fence voids the late mark of a publication under way, and what was published before says what held before.
    db.prepare_cached(
        "UPDATE tasks SET state = ?2, fence = fence + 1, void_below = fence + 1, queued_at = NULL,
             first_due_at = iif(?4 IS NULL, first_due_at, NULL), run_at = coalesce(max(?4, ?3), run_at), due_at = max(coalesce(?4, run_at), ?3),
             queue = coalesce(?5, queue), priority = coalesce(?8, priority),
             max_attempts = coalesce(?6, max_attempts), timeout_ms = coalesce(?7, timeout_ms), last_change = ?9,
             args_digest = coalesce(?10, args_digest)
         WHERE id = ?1",
    )?
    .execute(params![
        id.0.as_bytes().as_slice(),
        becomes.code(),
        now,
        edit.run_at.map(|at| at.as_millisecond()),
        edit.queue.as_ref().map(QueueName::as_str),
        edit.max_attempts,
        edit.timeout.map(millis),
        edit.priority.map(Priority::code),
        caller.change(ChangeCall::Edit, Some(now)),
        edit.args.as_ref().map(|args| args.digest().0),
    ])?;
    if let Some(args) = &edit.args {
        db.prepare_cached("UPDATE task_args SET args = ?2 WHERE id = ?1")?
            .execute(params![id.0.as_bytes().as_slice(), args.as_str()])?;
    }
    Ok(Edited::From(state))
}
