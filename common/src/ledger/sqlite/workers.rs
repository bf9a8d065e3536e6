//! Who is alive, what they run, and who went.

use rusqlite::{Connection, Row, params};

use super::read::{id_of, parsed};
use crate::clock::{millis, since_boot, timestamp};
use crate::ledger::looking::{RUNS_READ_MAX, by_worker};
use crate::ledger::{Fleet, GONE_TOLD_MAX, GoneWorker, Run, Worker, WorkerEnd};
use crate::task::{Kind, WorkerId};

pub(super) fn alive(db: &Connection, boot_id: &str) -> rusqlite::Result<Vec<Worker>> {
    let now = millis(since_boot());
    let mut statement = db.prepare_cached(
        "SELECT id, host, queues, kinds, concurrency, running, version, started_at, ?1 - renewed_at, name, pid FROM workers
         WHERE dead = 0 AND boot_id = ?2 AND expires_at > ?1 ORDER BY id",
    )?;
    let workers = statement.query_map(params![now, boot_id], |row| {
        Ok(Worker {
            id: worker_id(row)?,
            name: row.get(9)?,
            host: row.get(1)?,
            pid: row.get(10)?,
            queues: parsed(row, 2, |text| serde_json::from_str(text))?,
            kinds: parsed(row, 3, |text| serde_json::from_str(text))?,
            concurrency: row.get(4)?,
            running: row.get(5)?,
            version: row.get(6)?,
            started_at: timestamp(row.get(7)?),
            lease_age_ms: row.get(8)?,
        })
    })?;
    workers.collect()
}

pub(super) fn fleet(db: &Connection, boot_id: &str) -> rusqlite::Result<Fleet> {
    Ok(Fleet { workers: alive(db, boot_id)?, runs: by_worker(runs(db)?), gone: gone(db, boot_id)? })
}

fn runs(db: &Connection) -> rusqlite::Result<Vec<(WorkerId, Run)>> {
    let mut statement = db.prepare_cached(
        "SELECT worker_id, id, kind, attempt, started_at FROM (SELECT * FROM tasks WHERE state = 3 LIMIT ?1)
         WHERE worker_id IS NOT NULL AND started_at IS NOT NULL ORDER BY started_at",
    )?;
    let run = |row: &Row<'_>| {
        let since = timestamp(row.get(4)?);
        Ok((
            worker_id(row)?,
            Run { task_id: id_of(row, 1)?, kind: parsed(row, 2, Kind::parse)?, attempt: row.get(3)?, since },
        ))
    };
    statement.query_map([RUNS_READ_MAX], run)?.collect()
}

/// Also those whose lease has ended and whom nobody has declared dead yet.
fn gone(db: &Connection, boot_id: &str) -> rusqlite::Result<Vec<GoneWorker>> {
    let mut statement = db.prepare_cached(
        "SELECT id, name, host, pid, version, started_at, ended_at, iif(dead, ended, ?3) FROM workers
         WHERE dead = 1 OR boot_id <> ?1 OR expires_at <= ?2
         ORDER BY dead, ended_at DESC, id DESC LIMIT ?4",
    )?;
    let worker = |row: &Row<'_>| {
        Ok(GoneWorker {
            id: worker_id(row)?,
            name: row.get(1)?,
            host: row.get(2)?,
            pid: row.get(3)?,
            version: row.get(4)?,
            started_at: timestamp(row.get(5)?),
            ended_at: row.get::<_, Option<i64>>(6)?.map(timestamp),
            ended: row.get::<_, Option<i16>>(7)?.and_then(WorkerEnd::from_code),
        })
    };
    let now = millis(since_boot());
    statement.query_map(params![boot_id, now, WorkerEnd::LeaseEnded.code(), GONE_TOLD_MAX], worker)?.collect()
}

fn worker_id(row: &Row<'_>) -> rusqlite::Result<WorkerId> {
    Ok(WorkerId(id_of(row, 0)?.0))
}
