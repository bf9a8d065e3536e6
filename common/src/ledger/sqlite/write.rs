//! The conditional writes, one function a kind, each inside the writer's transaction.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::read::id_of;
use super::unique;
use crate::clock::{millis, since_boot, timestamp, wall_ms};
use crate::ledger::{
    Abandoned, Belief, Believed, Caller, Due, Failure, Mark, Refusal, Renewal, Renewed, Replayed, Settled, Settlement,
    Transition, WorkerEnd, WorkerRecord,
};
use crate::state::{Event, State, next};
use crate::task::{
    ChangeCall, ERROR_BYTES_MAX, ERRORS_KEPT, ErrorKind, Fence, Guarantee, Json, Kind, Lane, Priority, QueueName,
    TaskId, WorkerId, truncate,
};

/// The lease clock: it cannot be set, and all processes of one machine agree on it.
pub(super) fn boot_ms() -> i64 {
    millis(since_boot())
}

pub(super) fn mark_queued(db: &Connection, published: &[Mark]) -> rusqlite::Result<()> {
    // The fence refuses the mark of a publication that a claim has overtaken: the row may be retryable again,
    // and marking it queued would hide it from the relay although the broker has no message for it.
    let mut mark = db.prepare_cached(
        "UPDATE tasks SET state = 2, queued_at = ?3, due_at = NULL WHERE id = ?1 AND fence = ?2 AND (state < 2 OR state = 4)",
    )?;
    let now = wall_ms();
    for Mark { id, fence, ago } in published {
        mark.execute(params![id.0.as_bytes().as_slice(), fence.0, now - millis(*ago)])?;
    }
    Ok(())
}

pub(super) fn guarantee_code(guarantee: Guarantee) -> i16 {
    match guarantee {
        Guarantee::AtLeastOnce => 0,
        Guarantee::AtMostOnce => 1,
        Guarantee::Transactional => 2,
    }
}

fn guarantee_of(code: i16) -> Guarantee {
    match code {
        1 => Guarantee::AtMostOnce,
        2 => Guarantee::Transactional,
        _ => Guarantee::AtLeastOnce,
    }
}

/// Where a settlement leads, in columns.
struct Outcome<'a> {
    state: State,
    /// Added to the attempt: −1 gives it back.
    attempt: i32,
    /// When it may start again; `None` when it is final.
    run_at: Option<i64>,
    result: Option<&'a str>,
    reason: Option<&'a str>,
    error: Option<&'a Failure>,
}

impl<'a> Outcome<'a> {
    fn of(transition: &'a Transition, now: i64) -> Self {
        let state = crate::state::next(State::Running, transition.event()).unwrap_or(State::Running);
        let plain = Self { state, attempt: 0, run_at: None, result: None, reason: None, error: None };
        match transition {
            Transition::Complete { result } => Self { result: Some(result.as_str()), ..plain },
            Transition::Retry { delay, error } => {
                Self { run_at: Some(now.saturating_add(millis(*delay))), error: Some(error), ..plain }
            }
            Transition::Snooze { delay } => {
                Self { attempt: -1, run_at: Some(now.saturating_add(millis(*delay))), ..plain }
            }
            Transition::Interrupt => Self { attempt: -1, run_at: Some(now), ..plain },
            Transition::Cancel { reason } => Self { reason: Some(reason), ..plain },
            Transition::Discard { reason, error } => Self { reason: Some(reason), error: Some(error), ..plain },
        }
    }
}

pub(super) fn settle(db: &Connection, settlement: &Settlement) -> rusqlite::Result<Settled> {
    let now = wall_ms();
    let mut outcome = Outcome::of(&settlement.transition, now);
    // Only what would start again is asked for, so that nothing is asked for a task that completes.
    let cancelled = outcome.run_at.is_some() && is_cancel_requested(db, settlement.id)?;
    if cancelled {
        outcome = Outcome { state: State::Cancelled, attempt: 0, run_at: None, ..outcome };
    }
    let crashes = i32::from(outcome.error.is_some_and(|error| error.kind == ErrorKind::Crash));
    let finished_at = outcome.run_at.is_none().then_some(now);
    let changed = db
        .prepare_cached(
            "UPDATE tasks SET state = ?3, attempt = attempt + ?4, run_at = coalesce(?5, run_at), due_at = ?5,
                 finished_at = ?6, result = ?7, crashes = crashes + ?9,
                 reason = iif(?3 = 6 AND cancel_requested_at IS NOT NULL, reason, ?8)
             WHERE id = ?1 AND fence = ?2 AND state = 3",
        )?
        .execute(params![
            settlement.id.0.as_bytes().as_slice(),
            settlement.fence.0,
            outcome.state.code(),
            outcome.attempt,
            outcome.run_at,
            finished_at,
            outcome.result,
            outcome.reason,
            crashes,
        ])?;
    if changed == 0 {
        return Ok(Settled::Fenced);
    }
    if let Some(error) = outcome.error {
        append_error(db, settlement.id, error, now)?;
    }
    Ok(if cancelled { Settled::Cancelled } else { Settled::Applied })
}

fn is_cancel_requested(db: &Connection, id: TaskId) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT EXISTS (SELECT 1 FROM tasks WHERE id = ?1 AND cancel_requested_at IS NOT NULL)")?
        .query_row([id.0.as_bytes().as_slice()], |row| row.get(0))
}

/// Appends to the errors and lets the oldest go, in the same transaction as the fenced write before it.
fn append_error(db: &Connection, id: TaskId, failure: &Failure, now: i64) -> rusqlite::Result<()> {
    let message = truncate(&failure.message, ERROR_BYTES_MAX);
    let error = serde_json::json!({ "at": timestamp(now), "message": message, "kind": failure.kind.as_str() });
    db.prepare_cached(
        "UPDATE tasks SET errors = json_insert(
             iif(json_array_length(coalesce(errors, '[]')) >= ?3, json_remove(errors, '$[0]'), coalesce(errors, '[]')),
             '$[#]', json_set(?2, '$.attempt', attempt))
         WHERE id = ?1",
    )?
    .execute(params![id.0.as_bytes().as_slice(), error.to_string(), ERRORS_KEPT as i64])?;
    Ok(())
}

pub(super) fn put_back(
    db: &Connection,
    id: TaskId,
    belief: &Belief,
    delay: Duration,
) -> rusqlite::Result<Option<Refusal>> {
    let look = "SELECT kind, fence, void_below, args_digest FROM tasks WHERE id = ?1";
    let untrue = db
        .prepare_cached(look)?
        .query_row([id.0.as_bytes().as_slice()], |row| {
            let kind = row.get_ref(0)?.as_str()?;
            Ok(belief.refusal_to_return(&Believed {
                kind,
                fence: row.get(1)?,
                void_below: row.get(2)?,
                args: row.get(3)?,
            }))
        })
        .optional()?
        .unwrap_or(Some(Refusal::Unknown));
    if untrue.is_some() {
        return Ok(untrue);
    }
    // The raised fence voids the late mark of the publication that is given back. A task whose own time is later
    // still waits for it.
    db.prepare_cached(
        "UPDATE tasks SET state = 0, due_at = max(?2, run_at), queued_at = NULL, fence = fence + 1
         WHERE id = ?1 AND state IN (0, 1, 2, 4)",
    )?
    .execute(params![id.0.as_bytes().as_slice(), wall_ms() + millis(delay)])?;
    Ok(None)
}

pub(super) fn register(db: &Connection, worker: &WorkerRecord, ttl: Duration, boot_id: &str) -> rusqlite::Result<()> {
    let boot_ms = boot_ms();
    db.prepare_cached(
        "INSERT INTO workers (id, host, queues, kinds, concurrency, version, started_at, boot_id, renewed_at, expires_at,
             name, pid)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
    )?
    .execute(params![
        worker.id.0.as_bytes().as_slice(),
        worker.host,
        serde_json::json!(worker.queues).to_string(),
        serde_json::json!(worker.kinds).to_string(),
        worker.concurrency,
        worker.version,
        wall_ms(),
        boot_id,
        boot_ms,
        boot_ms + millis(ttl),
        worker.name,
        worker.pid,
    ])?;
    Ok(())
}

pub(super) fn renew(db: &Connection, renewal: &Renewal, boot_id: &str) -> rusqlite::Result<Renewed> {
    let boot_ms = boot_ms();
    let renewed = db
        .prepare_cached(
            "UPDATE workers SET renewed_at = ?2, expires_at = ?3, running = ?4
             WHERE id = ?1 AND dead = 0 AND boot_id = ?5 AND expires_at > ?2",
        )?
        .execute(params![
            renewal.worker.0.as_bytes().as_slice(),
            boot_ms,
            boot_ms + millis(renewal.ttl),
            renewal.running,
            boot_id
        ])?;
    for (lane, head) in &renewal.heads {
        let head_of = |priority| if lane.priority == priority { head.as_millisecond() } else { 0 };
        db.prepare_cached(
            "INSERT INTO queues (name, high_at, head_at, low_at) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (name) DO UPDATE SET high_at = max(high_at, excluded.high_at),
                 head_at = max(head_at, excluded.head_at), low_at = max(low_at, excluded.low_at)",
        )?
        .execute(params![
            lane.queue.as_str(),
            head_of(Priority::High),
            head_of(Priority::Normal),
            head_of(Priority::Low)
        ])?;
    }
    Ok(if renewed == 1 { Renewed::Held } else { Renewed::Lost })
}

pub(super) fn retire(db: &Connection, worker: WorkerId) -> rusqlite::Result<()> {
    // Whose lease had ended before has not stopped in time.
    db.prepare_cached(
        "UPDATE workers SET dead = 1, expires_at = min(expires_at, ?2), ended_at = ?3, ended = ?4
         WHERE id = ?1 AND dead = 0",
    )?
    .execute(params![worker.0.as_bytes().as_slice(), boot_ms(), wall_ms(), WorkerEnd::Stopped.code()])?;
    Ok(())
}

pub(super) fn abandoned(db: &Connection, limit: u32, boot_id: &str) -> rusqlite::Result<Vec<Abandoned>> {
    // Ended leases end for good before their tasks are looked at: a renewal that comes later is refused,
    // so no worker can believe in a lease whose tasks go to somebody else.
    db.prepare_cached(
        "UPDATE workers SET dead = 1, ended_at = ?3, ended = ?4 WHERE dead = 0 AND (boot_id <> ?1 OR expires_at <= ?2)",
    )?
    .execute(params![boot_id, boot_ms(), wall_ms(), WorkerEnd::LeaseEnded.code()])?;
    let mut statement = db.prepare_cached(&format!(
        "SELECT {RUNNING_COLUMNS}, {LEASE_ENDED} FROM tasks
         WHERE state = 3 AND NOT EXISTS (SELECT 1 FROM workers WHERE workers.id = tasks.worker_id AND dead = 0)
         LIMIT ?1"
    ))?;
    statement.query_map(params![limit, boot_id, boot_ms()], running_of)?.collect()
}

/// What [`running_of`] reads.
pub(super) const RUNNING_COLUMNS: &str = "id, kind, fence, worker_id, attempt, max_attempts, crashes, guarantee,
    cancel_requested_at IS NOT NULL, queue";
/// What it reads last, or NULL, of the boot `?2` and at `?3` since then.
const LEASE_ENDED: &str =
    "(SELECT ?3 - expires_at FROM workers WHERE workers.id = tasks.worker_id AND dead = 1 AND boot_id = ?2)";

pub(super) fn running_of(row: &Row<'_>) -> rusqlite::Result<Abandoned> {
    Ok(Abandoned {
        id: id_of(row, 0)?,
        kind: super::read::parsed(row, 1, Kind::parse)?,
        queue: super::read::parsed(row, 9, QueueName::parse)?,
        fence: Fence(row.get(2)?),
        worker: WorkerId(id_of(row, 3)?.0),
        attempt: row.get(4)?,
        max_attempts: row.get(5)?,
        crashes: row.get(6)?,
        guarantee: guarantee_of(row.get(7)?),
        cancel_requested: row.get(8)?,
        lease_ended: row.get::<_, Option<i64>>(10)?.map(|ms| Duration::from_millis(ms.max(0).unsigned_abs())),
    })
}

pub(super) fn fetch_due(db: &Connection, limit: u32, reserve: Duration) -> rusqlite::Result<Vec<Due>> {
    let now = wall_ms();
    let mut statement = db.prepare_cached(
        "SELECT tasks.id, kind, queue, priority, args, fence, traceparent FROM tasks JOIN task_args ON task_args.id = tasks.id
         WHERE due_at IS NOT NULL AND due_at <= ?1 ORDER BY due_at LIMIT ?2",
    )?;
    let due: rusqlite::Result<Vec<Due>> = statement
        .query_map(params![now, limit], |row| {
            Ok(Due {
                id: id_of(row, 0)?,
                kind: super::read::parsed(row, 1, Kind::parse)?,
                lane: super::read::lane_of(row, 2, 3)?,
                args: super::read::parsed(row, 4, |text| Json::parse(text.to_owned()))?,
                fence: Fence(row.get::<_, i64>(5)? + 1),
                traceparent: row.get(6)?,
            })
        })?
        .collect();
    let due = due?;
    // The raised fence tells the message to come from one that was published before.
    let mut reserve_row = db.prepare_cached("UPDATE tasks SET due_at = ?2, fence = fence + 1 WHERE id = ?1")?;
    for task in &due {
        reserve_row.execute(params![task.id.0.as_bytes().as_slice(), now + millis(reserve)])?;
    }
    Ok(due)
}

pub(super) fn release(db: &Connection, unpublished: &[(TaskId, Fence)]) -> rusqlite::Result<()> {
    // What is not due any more was claimed, marked or ended meanwhile.
    let mut release = db.prepare_cached(
        "UPDATE tasks SET due_at = min(due_at, ?3) WHERE id = ?1 AND fence = ?2 AND due_at IS NOT NULL",
    )?;
    let now = wall_ms();
    for (id, fence) in unpublished {
        release.execute(params![id.0.as_bytes().as_slice(), fence.0, now])?;
    }
    Ok(())
}

pub(super) fn strand(db: &Connection, lane: &Lane, empty: bool, slack: Duration, limit: u32) -> rusqlite::Result<u64> {
    let now = wall_ms();
    // What a pause has given back to a paused queue is older than what was claimed before, and not lost.
    let head: Option<i64> = db
        .prepare_cached(
            "SELECT CASE ?2 WHEN 1 THEN high_at WHEN 0 THEN head_at ELSE low_at END FROM queues
             WHERE name = ?1 AND NOT EXISTS (SELECT 1 FROM paused_queues WHERE name = ?1)",
        )?
        .query_row(params![lane.queue.as_str(), lane.priority.code()], |row| row.get(0))
        .optional()?;
    let lost_before = if empty { Some(now) } else { head }.map(|at| at - millis(slack));
    let Some(lost_before) = lost_before else { return Ok(0) };
    let stranded = db
        .prepare_cached(
            "UPDATE tasks SET state = 0, due_at = ?3 WHERE id IN (
                 SELECT id FROM tasks WHERE state = 2 AND queue = ?1 AND priority = ?5 AND queued_at < ?2
                 ORDER BY queued_at LIMIT ?4)",
        )?
        .execute(params![lane.queue.as_str(), lost_before, now, limit, lane.priority.code()])?;
    Ok(stranded as u64)
}

/// `caller` is nobody's where a submission replaces what waits.
pub(super) fn cancel(
    db: &Connection,
    ids: &[TaskId],
    reason: &str,
    caller: Option<&Caller>,
) -> rusqlite::Result<Vec<(TaskId, State)>> {
    let now = wall_ms();
    let change = caller.map(|caller| caller.change(ChangeCall::Cancel, Some(now)));
    let mut find = db.prepare_cached("SELECT state FROM tasks WHERE id = ?1")?;
    // The first request for a run counts, and its worker may have heard of it.
    let mut cancel = db.prepare_cached(
        "UPDATE tasks SET state = iif(state = 3, 3, 6), due_at = NULL, finished_at = iif(state = 3, NULL, ?2),
             reason = ?3, cancel_requested_at = ?2, last_change = coalesce(?4, last_change)
         WHERE id = ?1 AND (state IN (0, 1, 2, 4) OR state = 3 AND cancel_requested_at IS NULL)",
    )?;
    let mut before = Vec::with_capacity(ids.len());
    for id in ids {
        let code: Option<i16> = find.query_row([id.0.as_bytes().as_slice()], |row| row.get(0)).optional()?;
        if let Some(state) = code.and_then(State::from_code) {
            cancel.execute(params![id.0.as_bytes().as_slice(), now, reason, change])?;
            before.push((*id, state));
        }
    }
    Ok(before)
}

pub(super) fn replay(
    db: &Connection,
    replays: &[(TaskId, Duration)],
    caller: &Caller,
) -> rusqlite::Result<Vec<(TaskId, Replayed)>> {
    let replayed = replays.iter().map(|(id, delay)| Ok((*id, replay_one(db, *id, *delay, caller)?)));
    let mut replayed: Vec<_> = replayed.collect::<rusqlite::Result<_>>()?;
    replayed.retain(|(_, replayed)| *replayed != Replayed::Unknown);
    Ok(replayed)
}

fn replay_one(db: &Connection, id: TaskId, delay: Duration, caller: &Caller) -> rusqlite::Result<Replayed> {
    let row: Option<(i16, Option<String>)> = db
        .prepare_cached("SELECT state, unique_key FROM tasks WHERE id = ?1")?
        .query_row([id.0.as_bytes().as_slice()], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((code, key)) = row else { return Ok(Replayed::Unknown) };
    let state = State::from_code(code).ok_or(rusqlite::Error::IntegralValueOutOfRange(0, code.into()))?;
    let now = wall_ms();
    // What has not ended holds its key still, or until the key's time was over.
    if let Some(key) = key.filter(|_| state.is_final() && next(state, Event::Replay).is_some()) {
        match unique::holder(db, &key, now)? {
            Some(holder) if holder.id != id => return Ok(Replayed::KeyHeld(holder.id)),
            Some(_) => {}
            None => unique::take(db, &key, id, None)?,
        }
    }
    // The raised fence voids what was published of one that waits: a message, or the late mark of one.
    db.prepare_cached(
        "UPDATE tasks SET state = 0, run_at = ?2, due_at = ?2, max_attempts = max(max_attempts, attempt + 1),
             crashes = 0, finished_at = NULL, reason = NULL, cancel_requested_at = NULL, first_due_at = NULL,
             last_change = ?3, fence = iif(state < 5, fence + 1, fence),
             void_below = iif(state < 5, fence + 1, void_below), queued_at = NULL
         WHERE id = ?1 AND state IN (1, 4, 6, 7)",
    )?
    .execute(params![
        id.0.as_bytes().as_slice(),
        now.saturating_add(millis(delay)),
        caller.change(ChangeCall::Retry, Some(now)),
    ])?;
    Ok(Replayed::From(state))
}
