//! Claiming: the only way into `running`.

use std::sync::LazyLock;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use super::limits::{self, IS_LIMITED};
use super::write::{boot_ms, guarantee_code};
use crate::clock::{timestamp, wall_ms};
use crate::ledger::{Believed, Claim, ClaimRequest, Granted, Refusal};
use crate::state::State;
use crate::task::{Fence, TaskId};

/// Looking and writing apart are cheaper than one statement with RETURNING, which makes a table for its one row; the
/// transaction has the file's lock.
static LOOK: LazyLock<String> = LazyLock::new(|| {
    format!(
        "SELECT state, void_below, run_at,
             EXISTS (SELECT 1 FROM paused_queues) AND EXISTS (SELECT 1 FROM paused_queues WHERE name = tasks.queue),
             crashes, {IS_LIMITED},
             EXISTS (SELECT 1 FROM workers WHERE id = ?2 AND dead = 0 AND boot_id = ?3 AND expires_at > ?4),
             fence, attempt, max_attempts, timeout_ms, coalesce(first_due_at, run_at), queued_at, kind, args_digest
         FROM tasks WHERE id = ?1"
    )
});

pub(super) fn claim(db: &Connection, request: &ClaimRequest, boot_id: &str) -> rusqlite::Result<Claim> {
    let now = wall_ms();
    let Some(looked) = look(db, request, boot_id)? else { return Ok(Claim::Refused(Refusal::Unknown)) };
    match looked.refusal(request, now) {
        Some(Refusal::NotDue) if looked.state == Some(State::Queued) => {
            take_custody(db, request.id)?;
            Ok(Claim::Refused(Refusal::NotDue))
        }
        Some(refusal) => Ok(Claim::Refused(refusal)),
        None if looked.limited => limits::claim(db, request, &looked, now),
        None if !looked.alive => Ok(Claim::Refused(Refusal::LeaseLost)),
        None => Ok(Claim::Granted(grant(db, request, &looked, now)?)),
    }
}

/// The task as a claim finds it.
pub(super) struct Looked {
    state: Option<State>,
    /// What is not true of what the message says.
    untrue: Option<Refusal>,
    run_at: i64,
    paused: bool,
    crashes: i32,
    limited: bool,
    /// Whether the asking worker's lease lives.
    pub(super) alive: bool,
    fence: i64,
    attempt: i32,
    max_attempts: i32,
    timeout_ms: Option<i64>,
    first_due_at: i64,
    queued_at: Option<i64>,
}

impl Looked {
    /// What stands against the claim, but for limits and the worker's lease.
    fn refusal(&self, request: &ClaimRequest, now: i64) -> Option<Refusal> {
        match self.state {
            Some(State::Running) => Some(Refusal::Held),
            Some(state) if state.is_final() => Some(Refusal::Finished),
            // Before all that a message which counts would be told.
            _ if self.untrue.is_some() => self.untrue,
            _ if self.run_at > now => Some(Refusal::NotDue),
            // Before the suspect, which would be tried once more or put back.
            _ if self.paused => Some(Refusal::Paused),
            _ if self.crashes >= request.crashes_below => Some(Refusal::Suspect),
            _ => None,
        }
    }
}

fn look(db: &Connection, request: &ClaimRequest, boot_id: &str) -> rusqlite::Result<Option<Looked>> {
    let (id, worker) = (request.id.0.as_bytes().as_slice(), request.worker.0.as_bytes().as_slice());
    db.prepare_cached(&LOOK)?
        .query_row(params![id, worker, boot_id, boot_ms()], |row| {
            let row_is = Believed {
                kind: row.get_ref(13)?.as_str()?,
                fence: row.get(7)?,
                void_below: row.get(1)?,
                args: row.get(14)?,
            };
            Ok(Looked {
                state: State::from_code(row.get(0)?),
                untrue: request.belief.refusal(&row_is),
                run_at: row.get(2)?,
                paused: row.get(3)?,
                crashes: row.get(4)?,
                limited: row.get(5)?,
                alive: row.get(6)?,
                fence: row.get(7)?,
                attempt: row.get(8)?,
                max_attempts: row.get(9)?,
                timeout_ms: row.get(10)?,
                first_due_at: row.get(11)?,
                queued_at: row.get(12)?,
            })
        })
        .optional()
}

/// Writes the claim, against which nothing stands.
pub(super) fn grant(db: &Connection, request: &ClaimRequest, looked: &Looked, now: i64) -> rusqlite::Result<Granted> {
    let granted = Granted {
        fence: Fence(looked.fence + 1),
        attempt: looked.attempt + 1,
        max_attempts: looked.max_attempts,
        timeout: looked.timeout_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
        first_due_at: timestamp(looked.first_due_at),
        run_at: timestamp(looked.run_at),
        queued_at: looked.queued_at.map(timestamp),
        started_at: timestamp(now),
        limited: looked.limited,
    };
    db.prepare_cached(
        "UPDATE tasks SET state = 3, fence = ?4, attempt = ?5, worker_id = ?2, guarantee = ?3, started_at = ?6,
             due_at = NULL, first_due_at = ?7
         WHERE id = ?1",
    )?
    .execute(params![
        request.id.0.as_bytes().as_slice(),
        request.worker.0.as_bytes().as_slice(),
        guarantee_code(request.guarantee),
        granted.fence.0,
        granted.attempt,
        now,
        looked.first_due_at,
    ])?;
    Ok(granted)
}

/// A task whose message was delivered before its time, by a clock that was set back: the refused delivery is acked, so
/// the row must be published again.
fn take_custody(db: &Connection, id: TaskId) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE tasks SET state = 0, due_at = run_at, queued_at = NULL WHERE id = ?1 AND state = 2")?
        .execute([id.0.as_bytes().as_slice()])?;
    Ok(())
}
