//! Limits: claims that one fits, and what lets held tasks go, come here one transaction after the other.

mod claim;
mod gates;
mod release;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};

pub(super) use self::claim::claim;
use self::gates::{LOCK, Look};
pub(super) use self::release::release;
use super::connections::Connections;
use super::fault::Fault;
use super::queues::KEEP_CLAIMS_OUT;
use crate::ledger::LimitSet;
use crate::limit::{Bounds, LIMITS_MAX, Limit, Origin, Rate, Scope};
use crate::state::State;
use crate::task::QueueName;

const ALL: &str = "
SELECT scope, max_running, rate_tasks, rate_per_ms, rate_burst, max_queued, origin
FROM tasklane.limits ORDER BY scope";

const PUT: &str = "
INSERT INTO tasklane.limits (scope, max_running, rate_tasks, rate_per_ms, rate_burst, max_queued, origin)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (scope) DO UPDATE SET max_running = excluded.max_running, rate_tasks = excluded.rate_tasks,
    rate_per_ms = excluded.rate_per_ms, rate_burst = excluded.rate_burst, max_queued = excluded.max_queued,
    origin = excluded.origin";

/// What runs already was claimed without a look at this limit, and counts all the same.
const TAKE_PLACES_OF_RUNNING: &str = "
INSERT INTO tasklane.limit_places (scope, task_id, fence)
SELECT $1 || ':' || name, id, fence
FROM (SELECT CASE $1 WHEN 'queue' THEN queue WHEN 'kind' THEN kind ELSE concurrency_key END AS name, id, fence
      FROM tasklane.tasks WHERE state = $2) running
WHERE CASE WHEN $4 THEN starts_with(name, $3) ELSE name = $3 END
ON CONFLICT (scope, task_id) DO UPDATE SET fence = excluded.fence, kept_until = NULL";

const FORGET_PLACES: &str = "
DELETE FROM tasklane.limit_places WHERE (scope, task_id) IN (
    SELECT p.scope, p.task_id FROM tasklane.limit_places p
    WHERE NOT EXISTS (
        SELECT 1 FROM tasklane.tasks t WHERE t.id = p.task_id AND (
            t.state = 3 AND t.fence = p.fence
            OR p.fence IS NULL AND t.state IN (0, 1, 2, 4) AND p.kept_until BETWEEN $2 AND $3))
    LIMIT $1)";

const FORGET_GATES: &str = "
DELETE FROM tasklane.limit_gates
WHERE scope IN (SELECT scope FROM tasklane.limit_gates WHERE next_us < $2 AND turn = '' LIMIT $1)";

const WAITING: &str = "
SELECT count(*) FROM (
    (SELECT 1 FROM tasklane.tasks WHERE state = 2 AND queue = $1 LIMIT $2)
    UNION ALL
    (SELECT 1 FROM tasklane.tasks
     WHERE due_at IS NOT NULL AND due_at < (SELECT tasklane.now_ms() + 60000) AND queue = $1 LIMIT $2)
    UNION ALL
    (SELECT 1 FROM tasklane.tasks WHERE state = 0 AND due_at IS NULL AND queue = $1 LIMIT $2)
    LIMIT $2) waiting";

fn scope_of(text: &str) -> Result<Scope, Fault> {
    text.parse().map_err(Fault::corrupt)
}

fn rate_of(row: &PgRow, first: usize) -> Result<Option<Rate>, Fault> {
    let Some(tasks) = row.try_get::<Option<i32>, _>(first)? else { return Ok(None) };
    let (per_ms, burst) = (row.try_get::<i64, _>(first + 1)?, row.try_get::<i32, _>(first + 2)?);
    Ok(Some(Rate { tasks: tasks.unsigned_abs(), per_ms: per_ms.unsigned_abs(), burst: burst.unsigned_abs() }))
}

fn count_of(row: &PgRow, column: usize) -> Result<Option<u32>, Fault> {
    Ok(row.try_get::<Option<i32>, _>(column)?.map(i32::unsigned_abs))
}

pub(super) async fn all(connections: &Connections) -> Result<Vec<Limit>, Fault> {
    let mut lent = connections.lend().await?;
    let rows = sqlx::query(ALL).fetch_all(&mut *lent).await?;
    lent.keep();
    let limit = |row: &PgRow| {
        let bounds = Bounds { max_running: count_of(row, 1)?, rate: rate_of(row, 2)?, max_queued: count_of(row, 5)? };
        let origin = if row.try_get::<i16, _>(6)? == 0 { Origin::File } else { Origin::Api };
        Ok(Limit { scope: scope_of(row.try_get(0)?)?, bounds, origin })
    };
    rows.iter().map(limit).collect()
}

/// Waits for the claims that have not seen what is set now, and keeps later ones out until it is.
async fn lock_all(connection: &mut PgConnection) -> Result<(), Fault> {
    sqlx::query(LOCK).execute(&mut *connection).await?;
    sqlx::query(KEEP_CLAIMS_OUT).execute(connection).await?;
    Ok(())
}

pub(super) async fn set(connections: &Connections, scope: &Scope, bounds: &Bounds) -> Result<LimitSet, Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    lock_all(&mut transaction).await?;
    let taken: Vec<String> =
        sqlx::query_scalar("SELECT scope FROM tasklane.limits").fetch_all(&mut *transaction).await?;
    let known = taken.contains(&scope.to_string());
    let done = match known {
        false if taken.len() >= LIMITS_MAX => LimitSet::TooMany,
        false => LimitSet::Made,
        true => LimitSet::Replaced,
    };
    if done != LimitSet::TooMany {
        put(&mut transaction, scope, bounds, Origin::Api).await?;
    }
    transaction.commit().await?;
    lent.keep();
    Ok(done)
}

async fn put(connection: &mut PgConnection, scope: &Scope, bounds: &Bounds, origin: Origin) -> Result<(), Fault> {
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    sqlx::query(PUT)
        .bind(scope.to_string())
        .bind(bounds.max_running.map(number))
        .bind(bounds.rate.map(|rate| number(rate.tasks)))
        .bind(bounds.rate.map(|rate| i64::try_from(rate.per_ms).unwrap_or(i64::MAX)))
        .bind(bounds.rate.map(|rate| number(rate.burst)))
        .bind(bounds.max_queued.map(number))
        .bind(i16::from(origin == Origin::Api))
        .execute(&mut *connection)
        .await?;
    let start = scope.name().strip_suffix('*').filter(|_| matches!(scope, Scope::Key(_)));
    sqlx::query(TAKE_PLACES_OF_RUNNING)
        .bind(scope.word())
        .bind(State::Running.code())
        .bind(start.unwrap_or(scope.name()))
        .bind(start.is_some())
        .execute(connection)
        .await?;
    Ok(())
}

pub(super) async fn delete(connections: &Connections, scope: &Scope) -> Result<bool, Fault> {
    let mut lent = connections.lend().await?;
    let deleted =
        sqlx::query("DELETE FROM tasklane.limits WHERE scope = $1").bind(scope.to_string()).execute(&mut *lent).await?;
    lent.keep();
    Ok(deleted.rows_affected() > 0)
}

/// Replaces those of settings files, but for what the API has set.
pub(super) async fn adopt(connections: &Connections, limits: &[(Scope, Bounds)]) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    lock_all(&mut transaction).await?;
    sqlx::query("DELETE FROM tasklane.limits WHERE origin = 0").execute(&mut *transaction).await?;
    let mut taken: Vec<String> =
        sqlx::query_scalar("SELECT scope FROM tasklane.limits").fetch_all(&mut *transaction).await?;
    for (scope, bounds) in limits {
        let text = scope.to_string();
        if !taken.contains(&text) && taken.len() < LIMITS_MAX {
            put(&mut transaction, scope, bounds, Origin::File).await?;
            taken.push(text);
        }
    }
    transaction.commit().await?;
    lent.keep();
    Ok(())
}

pub(super) async fn forget_places(connections: &Connections, limit: u32) -> Result<u64, Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    let look = Look::begin(&mut transaction).await?;
    let places = sqlx::query(FORGET_PLACES)
        .bind(i64::from(limit))
        .bind(look.now)
        .bind(look.kept_until())
        .execute(&mut *transaction)
        .await?;
    let gates =
        sqlx::query(FORGET_GATES).bind(i64::from(limit)).bind(look.gates.now_us).execute(&mut *transaction).await?;
    transaction.commit().await?;
    lent.keep();
    Ok(places.rows_affected() + gates.rows_affected())
}

pub(super) async fn waiting(connections: &Connections, queue: &QueueName, most: u32) -> Result<u32, Fault> {
    let mut lent = connections.lend().await?;
    let count: i64 =
        sqlx::query_scalar(WAITING).bind(queue.as_str()).bind(i64::from(most)).fetch_one(&mut *lent).await?;
    lent.keep();
    Ok(u32::try_from(count).unwrap_or(u32::MAX))
}
