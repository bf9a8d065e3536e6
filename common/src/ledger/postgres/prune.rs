//! Forgetting: finished tasks when their time is over or somebody says so, and results before their tasks.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::groups;
use crate::clock::millis;
use crate::ledger::Pruned;
use crate::task::{QueueName, TaskId};

/// How long one step goes on from queue to queue; the next one continues where it stopped.
const QUEUES_BUDGET: Duration = Duration::from_secs(2);

pub(super) const NEXT_QUEUE: &str = "
SELECT queue FROM tasklane.tasks
WHERE finished_at IS NOT NULL AND group_id IS NULL AND queue > $1
ORDER BY queue
LIMIT 1";

/// What another process prunes or replays at this moment is left to it. The cutoff is a scalar and the ids are an array, here
/// and below, so that indexes lead to the rows: a join with them could be planned as a pass over all tasks.
pub(super) const PRUNE_QUEUE: &str = "
WITH clock AS MATERIALIZED (
    SELECT $4::bigint
           - COALESCE((SELECT retention_ms FROM tasklane.queue_retention WHERE name = $1), $2) AS cutoff
),
doomed AS MATERIALIZED (
    SELECT id FROM tasklane.tasks
    WHERE finished_at IS NOT NULL AND group_id IS NULL AND queue = $1 AND finished_at < (SELECT cutoff FROM clock)
    ORDER BY finished_at
    LIMIT $3
    FOR UPDATE SKIP LOCKED
),
gone AS (DELETE FROM tasklane.tasks WHERE id = ANY(ARRAY(SELECT id FROM doomed)) RETURNING id, unique_key),
freed AS (DELETE FROM tasklane.unique_keys u USING gone g WHERE u.key = g.unique_key AND u.task_id = g.id)
SELECT count(*) FROM gone";

/// Members of a group count from its end, so this walks along their index, up to the groups that are too young to have
/// ended before any cutoff. The hour allows for submitters whose clocks, which make the ids, are ahead of the server's.
///
/// A replay in between takes `finished_at` away; the deletion waits for its lock, looks again and leaves the row.
pub(super) const PRUNE_MEMBERS: &str = "
WITH clock AS MATERIALIZED (
    SELECT now,
           GREATEST(now - LEAST($5, (SELECT min(retention_ms) FROM tasklane.queue_retention)) + 3600000, 0) AS youngest
    FROM (SELECT $6::bigint AS now) once
),
scanned AS MATERIALIZED (
    SELECT group_id, state, id, queue, finished_at FROM tasklane.tasks
    WHERE group_id IS NOT NULL AND (group_id, state, id) > ($1, $2, $3)
      AND group_id < (SELECT rpad(lpad(to_hex(youngest), 12, '0'), 32, '0')::uuid FROM clock)
    ORDER BY group_id, state, id
    LIMIT $4
),
judged AS MATERIALIZED (
    SELECT s.*,
           clock.now - COALESCE((SELECT retention_ms FROM tasklane.queue_retention WHERE name = s.queue), $5) AS cutoff
    FROM clock, scanned s
),
doomed AS MATERIALIZED (
    SELECT j.id, j.cutoff FROM judged j
    WHERE j.finished_at < j.cutoff
      -- An open group keeps its members; one that is gone does not.
      AND (SELECT COALESCE(g.finished_at < j.cutoff, false)
           FROM tasklane.task_groups g WHERE g.id = j.group_id) IS NOT FALSE
    ORDER BY j.id
),
gone AS (
    DELETE FROM tasklane.tasks
    WHERE id = ANY(ARRAY(SELECT id FROM doomed)) AND finished_at < (SELECT max(cutoff) FROM doomed)
    RETURNING id, unique_key
),
freed AS (DELETE FROM tasklane.unique_keys u USING gone g WHERE u.key = g.unique_key AND u.task_id = g.id),
last AS (SELECT group_id, state, id FROM scanned ORDER BY group_id DESC, state DESC, id DESC LIMIT 1)
SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM scanned), (SELECT group_id FROM last),
       (SELECT state FROM last), (SELECT id FROM last)";

const PRUNE_WORKERS: &str = "
DELETE FROM tasklane.workers w
WHERE dead AND COALESCE(ended_at, expires_at) < $1::bigint - 3600000
  AND NOT EXISTS (SELECT 1 FROM tasklane.tasks t WHERE t.state = 3 AND t.worker_id = w.id)";

pub(super) const EXPIRE_RESULTS: &str = "
UPDATE tasklane.tasks SET result = NULL
WHERE id = ANY(ARRAY(
    SELECT id FROM tasklane.tasks
    WHERE result_ttl_ms IS NOT NULL AND result IS NOT NULL
      AND finished_at + result_ttl_ms <= $2::bigint
    ORDER BY finished_at + result_ttl_ms
    LIMIT $1
    FOR UPDATE SKIP LOCKED
))";

/// Two producers that start at once say it one after the other, and not half of each; the pruner reads all the same.
const KEEP_OTHERS_OUT: &str = "LOCK TABLE tasklane.queue_retention IN SHARE ROW EXCLUSIVE MODE";

const FORGET_RETENTION: &str = "DELETE FROM tasklane.queue_retention WHERE name <> ALL($1)";

const SAY_RETENTION: &str = "
INSERT INTO tasklane.queue_retention (name, retention_ms)
SELECT * FROM UNNEST($1::text[], $2::bigint[])
ON CONFLICT (name) DO UPDATE SET retention_ms = excluded.retention_ms
WHERE queue_retention.retention_ms <> excluded.retention_ms";

/// A replay that is under way holds the row: the deletion waits, looks again and leaves it. A group that has not ended
/// keeps its members, or its counts would be wrong.
const PURGE: &str = "
WITH doomed AS MATERIALIZED (
    SELECT id FROM tasklane.tasks t
    WHERE id = ANY($1) AND state >= 5
      AND (group_id IS NULL OR NOT EXISTS (
          SELECT 1 FROM tasklane.task_groups g WHERE g.id = t.group_id AND g.finished_at IS NULL))
    ORDER BY id FOR UPDATE OF t
),
gone AS (DELETE FROM tasklane.tasks t USING doomed d WHERE t.id = d.id RETURNING t.id, t.unique_key),
freed AS (DELETE FROM tasklane.unique_keys u USING gone g WHERE u.key = g.unique_key AND u.task_id = g.id)
SELECT count(*) FROM gone";

/// Where the next step begins.
#[derive(Debug, Default)]
pub(super) struct Walk(Mutex<Place>);

#[derive(Debug, Clone, Default)]
struct Place {
    /// Behind this queue.
    queue: String,
    /// Behind this entry of the members' index: group, state, task.
    member: (Uuid, i16, Uuid),
}

impl Walk {
    fn place(&self) -> Place {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn leave(&self, place: Place) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }
}

pub(super) async fn prune(
    connections: &Connections,
    walk: &Walk,
    (now, retention): (i64, Duration),
    limit: u32,
) -> Result<Pruned, Fault> {
    let mut lent = connections.lend().await?;
    let (mut place, retention) = (walk.place(), millis(retention));
    let alone = prune_queues(&mut lent, &mut place, (now, retention), limit).await?;
    let members = prune_members(&mut lent, &mut place, (now, retention), limit).await?;
    walk.leave(place);
    groups::prune(&mut lent, now - retention, limit).await?;
    sqlx::query(PRUNE_WORKERS).bind(now).execute(&mut *lent).await?;
    lent.keep();
    Ok(Pruned { tasks: alone.tasks + members.tasks, more: alone.more || members.more })
}

/// One queue after the other, so that one which has always something to prune keeps none waiting.
async fn prune_queues(
    connection: &mut PgConnection,
    place: &mut Place,
    (now, retention): (i64, i64),
    limit: u32,
) -> Result<Pruned, Fault> {
    let (began, from_the_first) = (Instant::now(), place.queue.is_empty());
    let (mut tasks, limit) = (0, i64::from(limit));
    while tasks < limit && began.elapsed() < QUEUES_BUDGET {
        let next: Option<String> =
            sqlx::query_scalar(NEXT_QUEUE).bind(&place.queue).fetch_optional(&mut *connection).await?;
        let Some(queue) = next else {
            place.queue.clear();
            return Ok(Pruned { tasks: tasks.unsigned_abs(), more: !from_the_first });
        };
        tasks += sqlx::query_scalar::<_, i64>(PRUNE_QUEUE)
            .bind(&queue)
            .bind(retention)
            .bind(limit - tasks)
            .bind(now)
            .fetch_one(&mut *connection)
            .await?;
        place.queue = queue;
    }
    Ok(Pruned { tasks: tasks.unsigned_abs(), more: true })
}

async fn prune_members(
    connection: &mut PgConnection,
    place: &mut Place,
    (now, retention): (i64, i64),
    limit: u32,
) -> Result<Pruned, Fault> {
    let from_the_first = place.member == Place::default().member;
    let (group, state, id) = place.member;
    let (gone, scanned, group, state, id): (i64, i64, Option<Uuid>, Option<i16>, Option<Uuid>) =
        sqlx::query_as(PRUNE_MEMBERS)
            .bind(group)
            .bind(state)
            .bind(id)
            .bind(i64::from(limit))
            .bind(retention)
            .bind(now)
            .fetch_one(connection)
            .await?;
    let last = group.zip(state).zip(id).filter(|_| scanned == i64::from(limit));
    // At the end the walk begins anew: members that were passed by because it was too early may be old enough.
    place.member = last.map_or_else(|| Place::default().member, |((group, state), id)| (group, state, id));
    Ok(Pruned { tasks: gone.unsigned_abs(), more: last.is_some() || !from_the_first })
}

pub(super) async fn expire_results(connections: &Connections, now: i64, limit: u32) -> Result<u64, Fault> {
    let mut lent = connections.lend().await?;
    let expired = sqlx::query(EXPIRE_RESULTS).bind(i64::from(limit)).bind(now).execute(&mut *lent).await?;
    lent.keep();
    Ok(expired.rows_affected())
}

pub(super) async fn set_retention(
    connections: &Connections,
    queues: &BTreeMap<QueueName, Duration>,
) -> Result<bool, Fault> {
    let names: Vec<&str> = queues.keys().map(QueueName::as_str).collect();
    let times: Vec<i64> = queues.values().map(|retention| millis(*retention)).collect();
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    sqlx::query(KEEP_OTHERS_OUT).execute(&mut *transaction).await?;
    let forgotten = sqlx::query(FORGET_RETENTION).bind(&names).execute(&mut *transaction).await?;
    let said = sqlx::query(SAY_RETENTION).bind(&names).bind(times).execute(&mut *transaction).await?;
    transaction.commit().await?;
    lent.keep();
    Ok(forgotten.rows_affected() + said.rows_affected() > 0)
}

pub(super) async fn purge(connections: &Connections, ids: &[TaskId]) -> Result<u64, Fault> {
    let mut lent = connections.lend().await?;
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let purged: i64 = sqlx::query_scalar(PURGE).bind(ids).fetch_one(&mut *lent).await?;
    lent.keep();
    Ok(purged.unsigned_abs())
}
