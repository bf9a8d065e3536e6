//! Claiming: the only way into `running`.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use super::limits::{self, IS_LIMITED};
use super::write::{boot_ms, guarantee_code};
use crate::clock::{timestamp, wall_ms};
use crate::ledger::{Claim, ClaimRequest, Granted, Refusal};
use crate::state::State;
use crate::task::{Fence, TaskId};

pub(super) fn claim(db: &Connection, request: &ClaimRequest, boot_id: &str) -> rusqlite::Result<Claim> {
    let now = wall_ms();
    if let Some(granted) = grant(db, request, boot_id, now, false)? {
        return Ok(Claim::Granted(granted));
    }
    match refusal(db, request, now)? {
        Refusal::Limited => limits::claim(db, request, boot_id),
        refusal => Ok(Claim::Refused(refusal)),
    }
}

/// The claim, if nothing stands against it; a limit does not when the task is `admitted` by it.
pub(super) fn grant(
    db: &Connection,
    request: &ClaimRequest,
    boot_id: &str,
    now: i64,
    admitted: bool,
) -> rusqlite::Result<Option<Granted>> {
    db.prepare_cached(&format!(
        "UPDATE tasks SET state = 3, fence = fence + 1, attempt = attempt + 1, worker_id = ?2, guarantee = ?3,
                 started_at = ?4, due_at = NULL, first_due_at = coalesce(first_due_at, run_at)
             WHERE id = ?1 AND state IN (0, 1, 2, 4) AND run_at <= ?4 AND crashes < ?7
                 AND (void_below IS NULL OR void_below <= ?9)
                 AND NOT EXISTS (SELECT 1 FROM paused_queues WHERE name = tasks.queue)
                 AND EXISTS (SELECT 1 FROM workers WHERE id = ?2 AND dead = 0 AND boot_id = ?5 AND expires_at > ?6)
                 AND (?8 OR NOT {IS_LIMITED})
             RETURNING fence, attempt, max_attempts, timeout_ms, first_due_at, run_at, queued_at",
    ))?
    .query_row(
        params![
            request.id.0.as_bytes().as_slice(),
            request.worker.0.as_bytes().as_slice(),
            guarantee_code(request.guarantee),
            now,
            boot_id,
            boot_ms(),
            request.crashes_below,
            admitted,
            request.published_under(),
        ],
        |row| {
            Ok(Granted {
                fence: Fence(row.get(0)?),
                attempt: row.get(1)?,
                max_attempts: row.get(2)?,
                timeout: row.get::<_, Option<i64>>(3)?.map(|ms| Duration::from_millis(ms.unsigned_abs())),
                first_due_at: timestamp(row.get(4)?),
                run_at: timestamp(row.get(5)?),
                queued_at: row.get::<_, Option<i64>>(6)?.map(timestamp),
                started_at: timestamp(now),
                limited: admitted,
            })
        },
    )
    .optional()
}

/// What a refusal looks at, in this order.
struct Looked {
    state: Option<State>,
    outdated: bool,
    run_at: i64,
    paused: bool,
    crashes: i32,
    limited: bool,
}

fn refusal(db: &Connection, request: &ClaimRequest, now: i64) -> rusqlite::Result<Refusal> {
    let looked = db
        .prepare_cached(&format!(
            "SELECT state, coalesce(void_below > ?2, 0), run_at,
                 EXISTS (SELECT 1 FROM paused_queues WHERE name = tasks.queue), crashes, {IS_LIMITED}
             FROM tasks WHERE id = ?1"
        ))?
        .query_row(params![request.id.0.as_bytes().as_slice(), request.published_under()], |row| {
            Ok(Looked {
                state: State::from_code(row.get(0)?),
                outdated: row.get(1)?,
                run_at: row.get(2)?,
                paused: row.get(3)?,
                crashes: row.get(4)?,
                limited: row.get(5)?,
            })
        })
        .optional()?;
    let Some(looked) = looked else { return Ok(Refusal::Unknown) };
    Ok(match looked.state {
        Some(State::Running) => Refusal::Held,
        Some(state) if state.is_final() => Refusal::Finished,
        // Before all that a message which counts would be told.
        _ if looked.outdated => Refusal::Outdated,
        Some(state) if looked.run_at > now => {
            if state == State::Queued {
                take_custody(db, request.id)?;
            }
            Refusal::NotDue
        }
        // Before the suspect, which would be tried once more or put back.
        _ if looked.paused => Refusal::Paused,
        _ if looked.crashes >= request.crashes_below => Refusal::Suspect,
        _ if looked.limited => Refusal::Limited,
        _ => Refusal::LeaseLost,
    })
}

/// A task whose message was delivered before its time, by a clock that was set back: the refused delivery is acked, so
/// the row must be published again.
fn take_custody(db: &Connection, id: TaskId) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE tasks SET state = 0, due_at = run_at, queued_at = NULL WHERE id = ?1 AND state = 2")?
        .execute([id.0.as_bytes().as_slice()])?;
    Ok(())
}
