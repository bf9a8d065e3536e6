//! Workers and their leases, judged by the server's clock.

use std::time::Duration;

use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::rows::{guarantee_of, storable};
use crate::clock::hostname;
use crate::clock::millis;
use crate::ledger::{Abandoned, Renewal, Renewed, WorkerEnd, WorkerRecord};
use crate::task::{Fence, Kind, QueueName, TaskId, WorkerId};

/// Entering twice happens when the first answer was lost. The lease then counts from the second time, as the
/// worker does, which is at least as long as it believes.
const REGISTER: &str = "
INSERT INTO tasklane.workers (id, host, queues, kinds, concurrency, version, started_at, renewed_at, expires_at, name, pid)
SELECT $1, $2, $3, $4, $5, $6, now, now, now + $7, $8, $9 FROM (SELECT tasklane.now_ms() AS now) clock
ON CONFLICT (id) DO UPDATE SET renewed_at = excluded.renewed_at, expires_at = excluded.expires_at
WHERE NOT workers.dead";

/// The clock is read where the row is judged: a renewal that had to wait for the row's lock, which `END_LEASES` may
/// hold, sees the time after the wait and the row as it was left. Watermarks only rise.
const RENEW: &str = "
WITH renewed AS (
    UPDATE tasklane.workers SET renewed_at = tasklane.now_ms(), expires_at = tasklane.now_ms() + $2, running = $3
    WHERE id = $1 AND NOT dead AND expires_at > tasklane.now_ms()
    RETURNING id
),
heads AS (
    INSERT INTO tasklane.queues (name, high_at, head_at, low_at)
    SELECT h.name, max(CASE h.priority WHEN 1 THEN h.at ELSE 0 END), max(CASE h.priority WHEN 0 THEN h.at ELSE 0 END),
           max(CASE h.priority WHEN -1 THEN h.at ELSE 0 END)
    FROM renewed, UNNEST($4::text[], $5::bigint[], $6::smallint[]) AS h (name, at, priority)
    GROUP BY h.name
    ORDER BY h.name
    ON CONFLICT (name) DO UPDATE SET high_at = GREATEST(queues.high_at, excluded.high_at),
        head_at = GREATEST(queues.head_at, excluded.head_at), low_at = GREATEST(queues.low_at, excluded.low_at)
    WHERE queues.high_at < excluded.high_at OR queues.head_at < excluded.head_at OR queues.low_at < excluded.low_at
)
SELECT count(*) FROM renewed";

/// Whose lease had ended before has not stopped in time.
const RETIRE: &str = "
UPDATE tasklane.workers
SET dead = true, expires_at = LEAST(expires_at, tasklane.now_ms()), ended_at = tasklane.now_ms(), ended = $2
WHERE id = $1 AND NOT dead";

/// Ended leases end for good before their tasks are looked at. A renewal that is under way holds the row: this waits,
/// looks again, and leaves the lease alone when the renewal was in time. One that comes later finds it dead. So no
/// worker can be told that its lease lives on while its tasks go to somebody else.
const END_LEASES: &str = "
UPDATE tasklane.workers SET dead = true, ended_at = tasklane.now_ms(), ended = $1
WHERE NOT dead AND expires_at <= tasklane.now_ms()";

/// A claim that commits after this look is found by the next one.
const ABANDONED: &str = "
SELECT t.id, t.kind, t.fence, t.worker_id, t.attempt, t.max_attempts, t.crashes, t.guarantee,
       t.cancel_requested_at IS NOT NULL, t.queue, CASE WHEN w.host = $2 THEN tasklane.now_ms() - w.expires_at END
FROM tasklane.tasks t LEFT JOIN tasklane.workers w ON w.id = t.worker_id
WHERE t.state = 3 AND (w.id IS NULL OR w.dead)
LIMIT $1";

pub(super) const RUNNING: &str = "
SELECT id, kind, fence, worker_id, attempt, max_attempts, crashes, guarantee, cancel_requested_at IS NOT NULL, queue,
       NULL::bigint
FROM tasklane.tasks WHERE worker_id = $1 AND state = 3";

/// Asked all the time, so it has an index of its own, which is empty nearly always.
pub(super) const CANCELLING: &str = "
SELECT id, fence FROM tasklane.tasks WHERE worker_id = $1 AND state = 3 AND cancel_requested_at IS NOT NULL";

pub(super) async fn register(connections: &Connections, worker: &WorkerRecord, ttl: Duration) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    let entered = sqlx::query(REGISTER)
        .bind(worker.id.0)
        .bind(storable(&worker.host))
        .bind(worker.queues.iter().map(QueueName::as_str).collect::<Vec<_>>())
        .bind(worker.kinds.iter().map(Kind::as_str).collect::<Vec<_>>())
        .bind(worker.concurrency)
        .bind(storable(&worker.version))
        .bind(millis(ttl))
        .bind(worker.name.as_deref().map(storable))
        .bind(i64::from(worker.pid))
        .execute(&mut *lent)
        .await?;
    lent.keep();
    match entered.rows_affected() {
        0 => Err(Fault::Refused(format!("worker {} has ended before", worker.id))),
        _ => Ok(()),
    }
}

pub(super) async fn renew(connections: &Connections, renewal: &Renewal) -> Result<Renewed, Fault> {
    let mut lent = connections.lend().await?;
    let renewed: i64 = sqlx::query_scalar(RENEW)
        .bind(renewal.worker.0)
        .bind(millis(renewal.ttl))
        .bind(renewal.running)
        .bind(renewal.heads.iter().map(|(lane, _)| lane.queue.as_str()).collect::<Vec<_>>())
        .bind(renewal.heads.iter().map(|(_, head)| head.as_millisecond()).collect::<Vec<_>>())
        .bind(renewal.heads.iter().map(|(lane, _)| lane.priority.code()).collect::<Vec<_>>())
        .fetch_one(&mut *lent)
        .await?;
    lent.keep();
    Ok(if renewed == 1 { Renewed::Held } else { Renewed::Lost })
}

pub(super) async fn retire(connections: &Connections, worker: WorkerId) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    sqlx::query(RETIRE).bind(worker.0).bind(WorkerEnd::Stopped.code()).execute(&mut *lent).await?;
    lent.keep();
    Ok(())
}

pub(super) async fn cancelling(connections: &Connections, worker: WorkerId) -> Result<Vec<(TaskId, Fence)>, Fault> {
    let mut lent = connections.lend().await?;
    let rows: Vec<(Uuid, i64)> = sqlx::query_as(CANCELLING).bind(worker.0).fetch_all(&mut *lent).await?;
    lent.keep();
    Ok(rows.into_iter().map(|(id, fence)| (TaskId(id), Fence(fence))).collect())
}

type AbandonedRow = (Uuid, String, i64, Uuid, i32, i32, i32, i16, bool, String, Option<i64>);

pub(super) async fn abandoned(connections: &Connections, limit: u32) -> Result<Vec<Abandoned>, Fault> {
    let mut lent = connections.lend().await?;
    sqlx::query(END_LEASES).bind(WorkerEnd::LeaseEnded.code()).execute(&mut *lent).await?;
    let rows: Vec<AbandonedRow> =
        sqlx::query_as(ABANDONED).bind(i64::from(limit)).bind(storable(&hostname())).fetch_all(&mut *lent).await?;
    lent.keep();
    rows.into_iter().map(running_of).collect()
}

pub(super) async fn running(connections: &Connections, worker: WorkerId) -> Result<Vec<Abandoned>, Fault> {
    let mut lent = connections.lend().await?;
    let rows: Vec<AbandonedRow> = sqlx::query_as(RUNNING).bind(worker.0).fetch_all(&mut *lent).await?;
    lent.keep();
    rows.into_iter().map(running_of).collect()
}

fn running_of(row: AbandonedRow) -> Result<Abandoned, Fault> {
    let (id, kind, fence, worker, attempt, max_attempts, crashes, guarantee, cancel_requested, queue, ended_ms) = row;
    Ok(Abandoned {
        id: TaskId(id),
        kind: Kind::parse(&kind).map_err(Fault::corrupt)?,
        queue: QueueName::parse(&queue).map_err(Fault::corrupt)?,
        fence: Fence(fence),
        worker: WorkerId(worker),
        attempt,
        max_attempts,
        crashes,
        guarantee: guarantee_of(guarantee)?,
        cancel_requested,
        lease_ended: ended_ms.map(|ms| Duration::from_millis(ms.max(0).unsigned_abs())),
    })
}
