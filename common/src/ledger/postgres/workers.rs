//! Who is alive, what they run, and who went.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use crate::clock::timestamp;
use crate::ledger::looking::{RUNS_READ_MAX, by_worker};
use crate::ledger::{Fleet, GONE_TOLD_MAX, GoneWorker, Run, Worker, WorkerEnd};
use crate::task::{Kind, QueueName, TaskId, WorkerId};

const ALIVE: &str = "
SELECT w.*, clock.now - renewed_at AS lease_age_ms
FROM tasklane.workers w, (SELECT tasklane.now_ms() AS now) clock
WHERE NOT dead AND expires_at > clock.now
ORDER BY id";

const RUNS: &str = "
SELECT worker_id, id, kind, attempt, started_at
FROM (SELECT worker_id, id, kind, attempt, started_at FROM tasklane.tasks WHERE state = 3 LIMIT $1) running
WHERE worker_id IS NOT NULL AND started_at IS NOT NULL
ORDER BY started_at";

/// Also those whose lease has ended and whom nobody has declared dead yet.
const GONE: &str = "
SELECT *, CASE WHEN dead THEN ended ELSE $1 END AS how FROM tasklane.workers
WHERE dead OR expires_at <= tasklane.now_ms()
ORDER BY dead, ended_at DESC NULLS LAST, id DESC
LIMIT $2";

pub(super) async fn alive(connections: &Connections) -> Result<Vec<Worker>, Fault> {
    let mut lent = connections.lend().await?;
    let workers = alive_within(&mut lent).await?;
    lent.keep();
    Ok(workers)
}

pub(super) async fn fleet(connections: &Connections) -> Result<Fleet, Fault> {
    let mut lent = connections.lend().await?;
    let workers = alive_within(&mut lent).await?;
    let runs: Vec<(Uuid, Uuid, String, i32, i64)> =
        sqlx::query_as(RUNS).bind(i64::from(RUNS_READ_MAX)).fetch_all(&mut *lent).await?;
    let gone = sqlx::query(GONE).bind(WorkerEnd::LeaseEnded.code()).bind(i64::from(GONE_TOLD_MAX));
    let gone = gone.fetch_all(&mut *lent).await?;
    lent.keep();
    let runs = runs.into_iter().map(|(worker, id, kind, attempt, since)| {
        let kind = Kind::parse(&kind).map_err(Fault::corrupt)?;
        Ok((WorkerId(worker), Run { task_id: TaskId(id), kind, attempt, since: timestamp(since) }))
    });
    let runs = by_worker(runs.collect::<Result<Vec<_>, Fault>>()?);
    Ok(Fleet { workers, runs, gone: gone.iter().map(gone_of).collect::<Result<_, _>>()? })
}

async fn alive_within(connection: &mut PgConnection) -> Result<Vec<Worker>, Fault> {
    sqlx::query(ALIVE).fetch_all(connection).await?.iter().map(worker_of).collect()
}

fn worker_of(row: &PgRow) -> Result<Worker, Fault> {
    let names = |column: &str| row.try_get::<Vec<String>, _>(column);
    let queues: Result<_, _> = names("queues")?.iter().map(|queue| QueueName::parse(queue)).collect();
    let kinds: Result<_, _> = names("kinds")?.iter().map(|kind| Kind::parse(kind)).collect();
    Ok(Worker {
        id: WorkerId(row.try_get("id")?),
        name: row.try_get("name")?,
        host: row.try_get("host")?,
        pid: pid_of(row)?,
        queues: queues.map_err(Fault::corrupt)?,
        kinds: kinds.map_err(Fault::corrupt)?,
        concurrency: row.try_get("concurrency")?,
        running: row.try_get("running")?,
        version: row.try_get("version")?,
        started_at: timestamp(row.try_get("started_at")?),
        lease_age_ms: row.try_get("lease_age_ms")?,
    })
}

fn gone_of(row: &PgRow) -> Result<GoneWorker, Fault> {
    Ok(GoneWorker {
        id: WorkerId(row.try_get("id")?),
        name: row.try_get("name")?,
        host: row.try_get("host")?,
        pid: pid_of(row)?,
        version: row.try_get("version")?,
        started_at: timestamp(row.try_get("started_at")?),
        ended_at: row.try_get::<Option<i64>, _>("ended_at")?.map(timestamp),
        ended: row.try_get::<Option<i16>, _>("how")?.and_then(WorkerEnd::from_code),
    })
}

fn pid_of(row: &PgRow) -> Result<Option<u32>, Fault> {
    Ok(row.try_get::<Option<i64>, _>("pid")?.and_then(|pid| u32::try_from(pid).ok()))
}
