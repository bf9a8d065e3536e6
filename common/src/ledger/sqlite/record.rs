//! Recording: the first durable trace of a task.

use std::collections::HashMap;

use rusqlite::{CachedStatement, Connection, OptionalExtension, params};

use super::read::id_of;
use super::write::cancel;
use super::{groups, unique};
use crate::clock::{millis, timestamp, wall_ms};
use crate::ledger::unique::{Plan, decide, keys, replaced_by};
use crate::ledger::{Idempotency, Recorded, Submission};
use crate::state::State;
use crate::task::{NewTask, Unique};

pub(super) fn record(db: &Connection, submission: &Submission) -> rusqlite::Result<Recorded> {
    if let Some(idempotency) = &submission.idempotency
        && let Some(earlier) = recorded_before(db, idempotency, submission.tasks.len())?
    {
        return Ok(earlier);
    }
    let now = wall_ms();
    if submission.tasks.iter().any(|task| task.unique.is_some()) {
        return record_unique(db, submission, now);
    }
    insert_all(db, submission, now)?;
    Ok(Recorded::New { at: timestamp(now), existing: Vec::new() })
}

/// The write lock is held: nobody else takes a key between the look and the insertion.
fn record_unique(db: &Connection, submission: &Submission, now: i64) -> rusqlite::Result<Recorded> {
    let mut holders = HashMap::new();
    for key in keys(submission) {
        if let Some(holder) = unique::holder(db, key, now)? {
            holders.insert(key.to_owned(), holder);
        }
    }
    let Plan { fresh, existing, replaced } = match decide(submission, &holders) {
        Ok(plan) => plan,
        Err(conflicts) => return Ok(Recorded::NotUnique(conflicts)),
    };
    for (old, new) in replaced {
        cancel(db, &[old], &replaced_by(new), None)?;
    }
    insert_all(db, &fresh, now)?;
    for task in &fresh.tasks {
        if let Some(Unique { key, window, .. }) = &task.unique {
            unique::take(db, key, task.id, window.map(|window| now.saturating_add(millis(window))))?;
        }
    }
    Ok(Recorded::New { at: timestamp(now), existing })
}

fn insert_all(db: &Connection, submission: &Submission, now: i64) -> rusqlite::Result<()> {
    let single = submission.tasks.len() == 1;
    let mut insertion = Insertion::on(db)?;
    for (index, task) in submission.tasks.iter().enumerate() {
        let key = submission.idempotency.as_ref().map(|idempotency| row_key(&idempotency.key, index, single));
        insertion.insert(task, now, submission, key)?;
    }
    if let Some(group) = &submission.group {
        groups::insert(db, group, submission.tasks.len(), now)?;
    }
    Ok(())
}

/// The rows of a keyed batch have keys of their own; the separator cannot be part of a client's key.
fn row_key(key: &str, index: usize, single: bool) -> String {
    if single { key.to_owned() } else { format!("{key}\u{1f}{index}") }
}

fn recorded_before(db: &Connection, given: &Idempotency, tasks: usize) -> rusqlite::Result<Option<Recorded>> {
    // The key may have been used for one task or for a batch: look for the first row of either.
    let mut by_key = db.prepare_cached("SELECT id, idempotency_hash FROM tasks WHERE idempotency_key = ?1")?;
    let mut find =
        |key: &str| by_key.query_row([key], |row| Ok((id_of(row, 0)?, row.get::<_, Option<Vec<u8>>>(1)?))).optional();
    let first = match find(&given.key)? {
        Some(single) => Some((single, true)),
        None => find(&row_key(&given.key, 0, false))?.map(|first| (first, false)),
    };
    let Some(((id, hash), single)) = first else { return Ok(None) };
    if hash.as_deref() != Some(given.fingerprint.as_slice()) {
        return Ok(Some(Recorded::KeyReused));
    }
    if single {
        return Ok(Some(Recorded::Replayed(vec![id])));
    }
    let ids = (0..tasks).map(|index| Ok(find(&row_key(&given.key, index, false))?.map(|(id, _)| id)));
    let ids: rusqlite::Result<Vec<_>> = ids.collect();
    Ok(Some(Recorded::Replayed(ids?.into_iter().flatten().collect())))
}

/// The statements for a submission's rows, looked up once for all of them.
struct Insertion<'c> {
    task: CachedStatement<'c>,
    args: CachedStatement<'c>,
}

impl<'c> Insertion<'c> {
    fn on(db: &'c Connection) -> rusqlite::Result<Self> {
        let task = db.prepare_cached(
            "INSERT INTO tasks (id, kind, queue, state, tags, max_attempts, created_at, run_at, due_at, timeout_ms,
                 idempotency_key, idempotency_hash, traceparent, unique_key, group_id, priority, concurrency_key,
                 retried_from, result_ttl_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19)",
        )?;
        Ok(Self { task, args: db.prepare_cached("INSERT INTO task_args (id, args) VALUES (?1, ?2)")? })
    }

    fn insert(
        &mut self,
        task: &NewTask,
        now: i64,
        submission: &Submission,
        key: Option<String>,
    ) -> rusqlite::Result<()> {
        let run_at = task.run_at.map_or(now, |at| at.as_millisecond().max(now));
        let (state, due_at) =
            if run_at > now { (State::Scheduled, run_at) } else { (State::Accepted, now + millis(submission.reserve)) };
        let tags = (!task.tags.is_empty()).then(|| serde_json::json!(task.tags).to_string());
        let hash = submission.idempotency.as_ref().map(|idempotency| idempotency.fingerprint.as_slice());
        self.task.execute(params![
            task.id.0.as_bytes().as_slice(),
            task.kind.as_str(),
            task.queue.as_str(),
            state.code(),
            tags,
            task.max_attempts,
            now,
            run_at,
            due_at,
            task.timeout.map(millis),
            key,
            hash,
            task.traceparent,
            task.unique.as_ref().map(|unique| &unique.key),
            submission.group.as_ref().map(|group| group.id.0.as_bytes().as_slice()),
            task.priority.code(),
            task.concurrency_key,
            task.retried_from.as_ref().map(|id| id.0.as_bytes().as_slice()),
            task.result_ttl.map(millis),
        ])?;
        self.args.execute(params![task.id.0.as_bytes().as_slice(), task.args.as_str()])?;
        Ok(())
    }
}
