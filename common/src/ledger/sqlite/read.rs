//! The reads, on connections that never wait for the writer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::guard::Guard;
use super::write::{RUNNING_COLUMNS, running_of};
use super::{queues, schema};
use crate::clock::{millis, since_boot, timestamp, wall_ms};
use crate::ledger::caller::last_change;
use crate::ledger::{Abandoned, CALL_TIMEOUT, LedgerError, QueueCounts, RUNS_LOOKED_AT};
use crate::state::State;
use crate::task::{Fence, GroupId, Json, Kind, Lane, Priority, QueueName, Task, TaskId, WorkerId};

/// How many reads run at once.
const READERS: usize = 2;

/// A small pool of reading connections: one for those who ask, whose reads may be slow, and one for what keeps the whole
/// going.
pub(super) struct Readers {
    path: PathBuf,
    guard: Arc<Guard>,
    idle: Arc<Mutex<Vec<Connection>>>,
    turns: Arc<Semaphore>,
}

impl Readers {
    /// They are opened when they are needed, but for the first.
    pub(super) fn open(path: &Path, guard: Arc<Guard>) -> Result<Self, LedgerError> {
        let first = schema::open_reader(path)?;
        Ok(Self {
            path: path.to_owned(),
            guard,
            idle: Arc::new(Mutex::new(vec![first])),
            turns: Arc::new(Semaphore::new(READERS)),
        })
    }

    /// Runs a query on a thread that may block, with a connection of the pool.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let late = |_| LedgerError::Unavailable(format!("no answer within {} s", CALL_TIMEOUT.as_secs()));
        let gone = || LedgerError::Unavailable("the reader has ended".to_owned());
        let answered = async {
            let turn = Arc::clone(&self.turns).acquire_owned().await.map_err(|_| gone())?;
            let (path, guard, idle) = (self.path.clone(), Arc::clone(&self.guard), Arc::clone(&self.idle));
            let reading = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                guard.check()?;
                let pooled = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let connection = match pooled {
                    Some(connection) => connection,
                    None => schema::open_reader(&path)?,
                };
                let answer = query(&connection).map_err(|error| guard.fault(&error));
                idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
                answer
            });
            reading.await.map_err(|_| gone())?
        };
        timeout(CALL_TIMEOUT, answered).await.map_err(late)?
    }
}

/// Reads an id column.
pub(super) fn id_of(row: &Row<'_>, column: usize) -> rusqlite::Result<TaskId> {
    let bytes: [u8; 16] = row.get(column)?;
    Ok(TaskId(uuid::Uuid::from_bytes(bytes)))
}

/// Reads a text column through a parser.
pub(super) fn parsed<T, E: std::error::Error + Send + Sync + 'static>(
    row: &Row<'_>,
    column: usize,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    parse(&text).map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error)))
}

fn parsed_or<T, E: std::error::Error + Send + Sync + 'static>(
    row: &Row<'_>,
    column: usize,
    absent: T,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> rusqlite::Result<T> {
    match row.get_ref(column)? {
        rusqlite::types::ValueRef::Null => Ok(absent),
        _ => parsed(row, column, parse),
    }
}

/// Reads a state column.
pub(super) fn state_of(row: &Row<'_>, column: usize) -> rusqlite::Result<State> {
    let code: i16 = row.get(column)?;
    State::from_code(code).ok_or(rusqlite::Error::IntegralValueOutOfRange(column, code.into()))
}

/// Reads a priority column.
fn priority_of(row: &Row<'_>, column: usize) -> rusqlite::Result<Priority> {
    let code: i16 = row.get(column)?;
    Priority::from_code(code).ok_or(rusqlite::Error::IntegralValueOutOfRange(column, code.into()))
}

/// Reads the columns of a queue and of a priority.
pub(super) fn lane_of(row: &Row<'_>, queue: usize, priority: usize) -> rusqlite::Result<Lane> {
    Ok(Lane { queue: parsed(row, queue, QueueName::parse)?, priority: priority_of(row, priority)? })
}

const TASK_COLUMNS: &str = "t.id, t.kind, t.queue, t.state, args, t.tags, t.attempt, t.max_attempts, t.fence, \
     t.result, t.errors, t.reason, t.created_at, t.run_at, t.started_at, t.finished_at, t.worker_id, t.timeout_ms, \
     t.unique_key, t.cancel_requested_at, t.group_id, t.priority, t.concurrency_key, \
     iif(t.state = 0 AND t.due_at IS NULL, t.limited_by, NULL), t.retried_from, t.result_ttl_ms, \
     t.last_change, t.retried_by";

fn task_of(row: &Row<'_>) -> rusqlite::Result<Task> {
    let time = |column| row.get::<_, Option<i64>>(column).map(|at| at.map(timestamp));
    let state = state_of(row, 3)?;
    let result = parsed_or(row, 9, None, |text| Json::parse(text.to_owned()).map(Some))?;
    Ok(Task {
        id: id_of(row, 0)?,
        kind: parsed(row, 1, Kind::parse)?,
        queue: parsed(row, 2, QueueName::parse)?,
        state,
        args: parsed(row, 4, |text| Json::parse(text.to_owned()))?,
        tags: parsed_or(row, 5, BTreeMap::new(), |text| serde_json::from_str(text))?,
        priority: priority_of(row, 21)?,
        attempt: row.get(6)?,
        max_attempts: row.get(7)?,
        fence: Fence(row.get(8)?),
        result_expired: state == State::Completed && result.is_none(),
        result,
        errors: parsed_or(row, 10, Vec::new(), |text| serde_json::from_str(text))?,
        reason: row.get(11)?,
        created_at: timestamp(row.get(12)?),
        run_at: timestamp(row.get(13)?),
        started_at: time(14)?,
        finished_at: time(15)?,
        cancel_requested_at: time(19)?,
        worker_id: row.get::<_, Option<[u8; 16]>>(16)?.map(|id| WorkerId(uuid::Uuid::from_bytes(id))),
        timeout_ms: row.get(17)?,
        result_ttl_ms: row.get(25)?,
        unique_key: row.get(18)?,
        group_id: row.get::<_, Option<[u8; 16]>>(20)?.map(|id| GroupId(uuid::Uuid::from_bytes(id))),
        concurrency_key: row.get(22)?,
        limited_by: row.get(23)?,
        retried_from: row.get::<_, Option<[u8; 16]>>(24)?.map(|id| TaskId(uuid::Uuid::from_bytes(id))),
        retried_by: row.get::<_, Option<[u8; 16]>>(27)?.map(|id| TaskId(uuid::Uuid::from_bytes(id))),
        last_change: parsed_or(row, 26, None, |text| last_change(text).map(Some))?,
    })
}

pub(super) fn get(db: &Connection, ids: &[TaskId]) -> rusqlite::Result<Vec<Task>> {
    let found: rusqlite::Result<Vec<_>> = ids.iter().map(|id| one(db, *id)).collect();
    Ok(found?.into_iter().flatten().collect())
}

pub(super) fn states(db: &Connection, ids: &[TaskId]) -> rusqlite::Result<Vec<(TaskId, State)>> {
    let mut statement = db.prepare_cached("SELECT id, state FROM tasks WHERE id = ?1")?;
    let mut read = |id: &TaskId| {
        let row = |row: &Row<'_>| Ok((id_of(row, 0)?, state_of(row, 1)?));
        statement.query_row([id.0.as_bytes().as_slice()], row).optional()
    };
    let found: rusqlite::Result<Vec<_>> = ids.iter().map(&mut read).collect();
    Ok(found?.into_iter().flatten().collect())
}

pub(super) fn one(db: &Connection, id: TaskId) -> rusqlite::Result<Option<Task>> {
    let sql = format!("SELECT {TASK_COLUMNS} FROM tasks t JOIN task_args a ON a.id = t.id WHERE t.id = ?1");
    db.prepare_cached(&sql)?.query_row([id.0.as_bytes().as_slice()], task_of).optional()
}

pub(super) fn queues(db: &Connection) -> rusqlite::Result<Vec<QueueCounts>> {
    // One query an index; none of them holds a completed row.
    const COUNTS: [&str; 5] = [
        "SELECT queue, state, count(*), min(queued_at) FROM tasks WHERE state = 2 GROUP BY queue",
        "SELECT queue, state, count(*), min(run_at) FROM tasks WHERE due_at IS NOT NULL GROUP BY queue, state",
        "SELECT queue, state, count(*), min(run_at) FROM tasks INDEXED BY tasks_held
         WHERE state = 0 AND due_at IS NULL GROUP BY queue",
        "SELECT queue, state, count(*), NULL FROM tasks WHERE state = 3 GROUP BY queue",
        "SELECT queue, state, count(*), NULL FROM tasks WHERE state IN (6, 7) GROUP BY queue, state",
    ];
    let now = wall_ms();
    let mut found: BTreeMap<QueueName, QueueCounts> = BTreeMap::new();
    for name in db.prepare_cached("SELECT name FROM queues")?.query_map([], |row| parsed(row, 0, QueueName::parse))? {
        entry(&mut found, name?);
    }
    for sql in COUNTS {
        let mut statement = db.prepare_cached(sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let queue = entry(&mut found, parsed(row, 0, QueueName::parse)?);
            *queue.counts.entry(state_of(row, 1)?).or_default() += row.get::<_, i64>(2)?.unsigned_abs();
            let waited = row.get::<_, Option<i64>>(3)?.and_then(|since| u64::try_from(now - since).ok());
            queue.oldest_waiting = queue.oldest_waiting.max(waited.map(Duration::from_millis));
        }
    }
    for (name, paused) in queues::pauses(db)? {
        entry(&mut found, name).paused = Some(paused);
    }
    Ok(found.into_values().collect())
}

pub(super) fn queued_lanes(db: &Connection) -> rusqlite::Result<Vec<Lane>> {
    // Jumps from queue to queue in the index instead of reading every row of it.
    let mut statement = db.prepare_cached(
        "WITH RECURSIVE names (name) AS (
             SELECT min(queue) FROM tasks WHERE state = 2
             UNION ALL
             SELECT (SELECT min(queue) FROM tasks WHERE state = 2 AND queue > name) FROM names WHERE name IS NOT NULL)
         SELECT name, code FROM names JOIN (SELECT 1 AS code UNION ALL VALUES (0), (-1)) WHERE name IS NOT NULL
             AND EXISTS (SELECT 1 FROM tasks WHERE state = 2 AND queue = name AND priority = code)",
    )?;
    statement.query_map([], |row| lane_of(row, 0, 1))?.collect()
}

pub(super) fn run_times(db: &Connection, queue: &QueueName) -> rusqlite::Result<Vec<(Kind, Duration)>> {
    let mut statement = db.prepare_cached(
        "SELECT kind, CAST(avg(finished_at - started_at) AS INTEGER) FROM (
             SELECT kind, state, started_at, finished_at FROM tasks
             WHERE queue = ?1 AND finished_at IS NOT NULL AND group_id IS NULL ORDER BY finished_at DESC LIMIT ?2)
         WHERE state = 5 GROUP BY kind",
    )?;
    let times = statement.query_map(params![queue.as_str(), RUNS_LOOKED_AT], |row| {
        let ms: i64 = row.get(1)?;
        Ok((parsed(row, 0, Kind::parse)?, Duration::from_millis(u64::try_from(ms).unwrap_or(0))))
    })?;
    times.collect()
}

fn entry(found: &mut BTreeMap<QueueName, QueueCounts>, queue: QueueName) -> &mut QueueCounts {
    let empty = QueueCounts { queue: queue.clone(), counts: BTreeMap::new(), oldest_waiting: None, paused: None };
    found.entry(queue).or_insert(empty)
}

/// The runs of a worker that shall be cancelled.
pub(super) fn cancelling(db: &Connection, worker: WorkerId) -> rusqlite::Result<Vec<(TaskId, Fence)>> {
    // By name: the planner knows no numbers, and the index of all running tasks would do as well for it.
    let mut statement = db.prepare_cached(
        "SELECT id, fence FROM tasks INDEXED BY tasks_cancelling
         WHERE worker_id = ?1 AND state = 3 AND cancel_requested_at IS NOT NULL",
    )?;
    statement.query_map([worker.0.as_bytes().as_slice()], |row| Ok((id_of(row, 0)?, Fence(row.get(1)?))))?.collect()
}

/// The tasks that run under a worker.
pub(super) fn running(db: &Connection, worker: WorkerId) -> rusqlite::Result<Vec<Abandoned>> {
    let mut statement = db.prepare_cached(&format!(
        "SELECT {RUNNING_COLUMNS}, NULL FROM tasks INDEXED BY tasks_running WHERE worker_id = ?1 AND state = 3"
    ))?;
    statement.query_map([worker.0.as_bytes().as_slice()], running_of)?.collect()
}

/// How long until the next task is due.
pub(super) fn next_due(db: &Connection) -> rusqlite::Result<Option<Duration>> {
    let due: Option<i64> =
        db.prepare_cached("SELECT min(due_at) FROM tasks WHERE due_at IS NOT NULL")?.query_row([], |row| row.get(0))?;
    Ok(due.map(|at| Duration::from_millis(u64::try_from(at - wall_ms()).unwrap_or(0))))
}

/// Whether any lease has ended or any running task has lost its worker: then a write is worth its lock.
pub(super) fn anything_abandoned(db: &Connection, boot_id: &str) -> rusqlite::Result<bool> {
    db.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM workers WHERE dead = 0 AND (boot_id <> ?1 OR expires_at <= ?2))
             OR EXISTS (SELECT 1 FROM tasks WHERE state = 3
                 AND NOT EXISTS (SELECT 1 FROM workers WHERE workers.id = tasks.worker_id AND dead = 0))",
    )?
    .query_row(params![boot_id, millis(since_boot())], |row| row.get(0))
}
