//! What the API asks.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::queues::pauses_within;
use super::rows::{lane_of, state_of, task_of};
use crate::ledger::{QueueCounts, RUNS_LOOKED_AT};
use crate::state::State;
use crate::task::{Kind, Lane, QueueName, Task, TaskId};

const GET: &str = "SELECT * FROM tasklane.tasks WHERE id = ANY($1)";

/// One look into each of four partial indexes; completed rows are in none of them.
const QUEUES: &str = "
SELECT name, NULL::smallint, 0::bigint, NULL::bigint, tasklane.now_ms() FROM tasklane.queues
UNION ALL
SELECT queue, 2::smallint, count(*), min(run_at), tasklane.now_ms() FROM tasklane.tasks WHERE state = 2 GROUP BY queue
UNION ALL
SELECT queue, state, count(*), min(run_at), tasklane.now_ms() FROM tasklane.tasks
WHERE due_at IS NOT NULL GROUP BY queue, state
UNION ALL
SELECT queue, 0::smallint, count(*), min(run_at), tasklane.now_ms() FROM tasklane.tasks
WHERE state = 0 AND due_at IS NULL GROUP BY queue
UNION ALL
SELECT queue, 3::smallint, count(*), NULL, tasklane.now_ms() FROM tasklane.tasks WHERE state = 3 GROUP BY queue
UNION ALL
SELECT queue, state, count(*), NULL, tasklane.now_ms() FROM tasklane.tasks WHERE state IN (6, 7) GROUP BY queue, state";

pub(super) async fn get(connections: &Connections, ids: &[TaskId]) -> Result<Vec<Task>, Fault> {
    let mut lent = connections.lend().await?;
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let rows = sqlx::query(GET).bind(ids).fetch_all(&mut *lent).await?;
    lent.keep();
    rows.iter().map(task_of).collect()
}

pub(super) async fn states(connections: &Connections, ids: &[TaskId]) -> Result<Vec<(TaskId, State)>, Fault> {
    let mut lent = connections.lend().await?;
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let sql = "SELECT id, state FROM tasklane.tasks WHERE id = ANY($1)";
    let rows: Vec<(Uuid, i16)> = sqlx::query_as(sql).bind(ids).fetch_all(&mut *lent).await?;
    lent.keep();
    rows.into_iter().map(|(id, code)| Ok((TaskId(id), state_of(code)?))).collect()
}

/// A queue; a state, how many tasks are in it, since when the oldest could start; the server's time.
type CountRow = (String, Option<i16>, i64, Option<i64>, i64);

pub(super) async fn queues(connections: &Connections) -> Result<Vec<QueueCounts>, Fault> {
    let mut lent = connections.lend().await?;
    let rows: Vec<CountRow> = sqlx::query_as(QUEUES).fetch_all(&mut *lent).await?;
    let paused = pauses_within(&mut lent).await?;
    lent.keep();
    let mut found: BTreeMap<QueueName, QueueCounts> = BTreeMap::new();
    for (name, code, count, since, now) in rows {
        let queue = QueueName::parse(&name).map_err(Fault::corrupt)?;
        let counts = entry(&mut found, queue);
        if let Some(code) = code {
            *counts.counts.entry(state_of(code)?).or_default() += count.unsigned_abs();
        }
        let waited = since.and_then(|since| u64::try_from(now - since).ok()).map(Duration::from_millis);
        counts.oldest_waiting = counts.oldest_waiting.max(waited);
    }
    for (queue, paused) in paused {
        entry(&mut found, queue).paused = Some(paused);
    }
    Ok(found.into_values().collect())
}

fn entry(found: &mut BTreeMap<QueueName, QueueCounts>, queue: QueueName) -> &mut QueueCounts {
    let empty = QueueCounts { queue: queue.clone(), counts: BTreeMap::new(), oldest_waiting: None, paused: None };
    found.entry(queue).or_insert(empty)
}

pub(super) async fn queued_lanes(connections: &Connections) -> Result<Vec<Lane>, Fault> {
    // Jumps from queue to queue in the index instead of reading every row of it, which EXISTS would do, as a join.
    const LANES: &str = "
WITH RECURSIVE names (name) AS (
    SELECT min(queue) FROM tasklane.tasks WHERE state = 2
    UNION ALL
    SELECT (SELECT min(queue) FROM tasklane.tasks WHERE state = 2 AND queue > name) FROM names WHERE name IS NOT NULL)
SELECT name, p.priority FROM names, (VALUES (1::smallint), (0::smallint), (-1::smallint)) AS p (priority)
WHERE (SELECT true FROM tasklane.tasks t WHERE t.state = 2 AND t.queue = name AND t.priority = p.priority LIMIT 1)";
    let mut lent = connections.lend().await?;
    let lanes: Vec<(String, i16)> = sqlx::query_as(LANES).fetch_all(&mut *lent).await?;
    lent.keep();
    lanes.iter().map(|(queue, priority)| lane_of(queue, *priority)).collect()
}

pub(super) async fn run_times(connections: &Connections, queue: &QueueName) -> Result<Vec<(Kind, Duration)>, Fault> {
    const TIMES: &str = "
SELECT kind, avg(finished_at - started_at)::bigint
FROM (SELECT kind, state, started_at, finished_at FROM tasklane.tasks
      WHERE queue = $1 AND finished_at IS NOT NULL AND group_id IS NULL ORDER BY finished_at DESC LIMIT $2) AS last
WHERE state = 5 GROUP BY kind";
    let mut lent = connections.lend().await?;
    let times: Vec<(String, i64)> =
        sqlx::query_as(TIMES).bind(queue.as_str()).bind(RUNS_LOOKED_AT).fetch_all(&mut *lent).await?;
    lent.keep();
    times
        .iter()
        .map(|(kind, ms)| {
            Ok((
                Kind::parse(kind.as_str()).map_err(Fault::corrupt)?,
                Duration::from_millis(u64::try_from(*ms).unwrap_or(0)),
            ))
        })
        .collect()
}
