//! Recording: the first durable trace of a task.

use std::collections::HashMap;

use rusqlite::{CachedStatement, Connection, params};

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
        && let Some(earlier) = recorded_before(db, idempotency)?
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
        if let Some(failed) = task.retried_from {
            db.prepare_cached("UPDATE tasks SET retried_by = ?2 WHERE id = ?1")?
                .execute(params![failed.0.as_bytes().as_slice(), task.id.0.as_bytes().as_slice()])?;
        }
    }
    if let Some(group) = &submission.group {
        groups::insert(db, group, submission.tasks.len(), now)?;
    }
    Ok(())
}

/// Between the client's key and the index of a task of its batch: it cannot be part of a client's key.
const SEPARATOR: char = '\u{1f}';

/// The rows of a keyed batch have keys of their own.
fn row_key(key: &str, index: usize, single: bool) -> String {
    if single { key.to_owned() } else { format!("{key}{SEPARATOR}{index}") }
}

/// What was recorded before under a key, for one task or for a batch.
pub(super) fn recorded_before(db: &Connection, given: &Idempotency) -> rusqlite::Result<Option<Recorded>> {
    // All rows of the key and no other: what follows a longer key of a client's is no less than '!'.
    let mut by_key = db.prepare_cached(
        "SELECT idempotency_key, id, idempotency_hash FROM tasks INDEXED BY tasks_idempotency
         WHERE idempotency_key >= ?1 AND idempotency_key < ?2",
    )?;
    let (mut ids, mut reused) = (Vec::new(), false);
    let mut rows = by_key.query(params![given.key, format!("{}{}", given.key, ' ')])?;
    while let Some(row) = rows.next()? {
        let key: String = row.get(0)?;
        let index = key.rsplit_once(SEPARATOR).and_then(|(_, index)| index.parse::<usize>().ok()).unwrap_or_default();
        ids.push((index, id_of(row, 1)?));
        reused |= row.get_ref(2)?.as_blob_or_null()? != Some(given.fingerprint.as_slice());
    }
    if ids.is_empty() {
        return Ok(None);
    }
    if reused {
        return Ok(Some(Recorded::KeyReused));
    }
    // Tasks of the batch that finished long ago may have been pruned: the rest still proves the repetition.
    ids.sort_unstable();
    Ok(Some(Recorded::Replayed(ids.into_iter().map(|(_, id)| id).collect())))
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
                 retried_from, result_ttl_ms, args_digest)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)",
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
            task.args.digest().0,
        ])?;
        self.args.execute(params![task.id.0.as_bytes().as_slice(), task.args.as_str()])?;
        Ok(())
    }
}
