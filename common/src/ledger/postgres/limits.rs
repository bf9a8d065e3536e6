//! Limits: claims that one fits, and what lets held tasks go, come here one transaction after the other.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::claim::grant;
use super::connections::Connections;
use super::fault::Fault;
use super::queues::KEEP_CLAIMS_OUT;
use super::rows::codes_for;
use crate::clock::millis;
use crate::ledger::limiting::KEPT_FOR;
use crate::ledger::{Claim, ClaimRequest, LimitSet, Refusal, Released};
use crate::limit::admission::{Gate, Gates};
use crate::limit::{Bounds, LIMITS_MAX, Limit, Origin, Rate, Scope};
use crate::state::{Event, State};
use crate::task::{Kind, QueueName};

/// How many scopes one look at the held tasks looks at.
const LOOK_SCOPES_MAX: i64 = 500;

/// Whoever takes or gives places waits here for the transaction before it, and sees in its later statements what that
/// one did. It comes before all other locks.
const LOCK: &str = "SELECT pg_advisory_xact_lock(8386110886424704372)";

const ALL: &str =
    "SELECT scope, max_running, rate_tasks, rate_per_ms, rate_burst, max_queued, origin FROM limits ORDER BY scope";

const PUT: &str = "
INSERT INTO limits (scope, max_running, rate_tasks, rate_per_ms, rate_burst, max_queued, origin)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (scope) DO UPDATE SET max_running = excluded.max_running, rate_tasks = excluded.rate_tasks,
    rate_per_ms = excluded.rate_per_ms, rate_burst = excluded.rate_burst, max_queued = excluded.max_queued,
    origin = excluded.origin";

/// What runs already was claimed without a look at this limit, and counts all the same.
const TAKE_PLACES_OF_RUNNING: &str = "
INSERT INTO limit_places (scope, task_id, fence)
SELECT $1 || ':' || name, id, fence
FROM (SELECT CASE $1 WHEN 'queue' THEN queue WHEN 'kind' THEN kind ELSE concurrency_key END AS name, id, fence
      FROM tasks WHERE state = $2) running
WHERE CASE WHEN $4 THEN starts_with(name, $3) ELSE name = $3 END
ON CONFLICT (scope, task_id) DO UPDATE SET fence = excluded.fence, kept_until = NULL";

/// Places whose task neither runs in them nor is on its way to them.
const SWEEP: &str = "
DELETE FROM limit_places p
WHERE ($1::text[] IS NULL OR p.scope = ANY($1)) AND NOT EXISTS (
    SELECT 1 FROM tasks t WHERE t.id = p.task_id AND (
        t.state = 3 AND t.fence = p.fence
        OR p.fence IS NULL AND t.state IN (0, 1, 2, 4) AND p.kept_until BETWEEN $2 AND $3))";

const FORGET_PLACES: &str = "
DELETE FROM limit_places WHERE (scope, task_id) IN (
    SELECT p.scope, p.task_id FROM limit_places p
    WHERE NOT EXISTS (
        SELECT 1 FROM tasks t WHERE t.id = p.task_id AND (
            t.state = 3 AND t.fence = p.fence
            OR p.fence IS NULL AND t.state IN (0, 1, 2, 4) AND p.kept_until BETWEEN $2 AND $3))
    LIMIT $1)";

const FORGET_GATES: &str = "
DELETE FROM limit_gates
WHERE scope IN (SELECT scope FROM limit_gates WHERE next_us < $2 AND turn = '' LIMIT $1)";

/// The scopes among these that a limit fits, the closest name first.
const GATES: &str = "
SELECT s.scope, l.max_running, l.rate_tasks, l.rate_per_ms, l.rate_burst, COALESCE(g.next_us, 0), COALESCE(g.turn, ''),
       EXISTS (SELECT 1 FROM tasks t WHERE t.state = 0 AND t.due_at IS NULL AND t.limited_by = s.scope),
       p.used, p.kept
FROM UNNEST($1::text[]) AS s (scope)
CROSS JOIN LATERAL (
    SELECT * FROM limits l
    WHERE (l.max_running IS NOT NULL OR l.rate_tasks IS NOT NULL)
      AND (l.scope = s.scope OR right(l.scope, 1) = '*' AND starts_with(s.scope, left(l.scope, -1)))
    ORDER BY l.scope = s.scope DESC, length(l.scope) DESC
    LIMIT 1
) l
CROSS JOIN LATERAL (
    SELECT count(*) AS used, count(*) - count(p.fence) AS kept FROM limit_places p WHERE p.scope = s.scope
) p
LEFT JOIN limit_gates g ON g.scope = s.scope";

const ASKED: &str = "
SELECT t.id, t.queue, t.kind, t.concurrency_key,
       ARRAY(SELECT p.scope FROM limit_places p
             WHERE p.task_id = t.id AND p.fence IS NULL AND p.kept_until BETWEEN $3 AND $4)
FROM tasks t
WHERE t.id = ANY($1) AND t.state = ANY($2)
ORDER BY t.id
FOR UPDATE OF t";

const TAKE_PLACES: &str = "
INSERT INTO limit_places (scope, task_id, fence, kept_until)
SELECT * FROM UNNEST($1::text[], $2::uuid[], $3::bigint[], $4::bigint[])
ON CONFLICT (scope, task_id) DO UPDATE SET fence = excluded.fence, kept_until = excluded.kept_until";

const WRITE_RATES: &str = "
INSERT INTO limit_gates (scope, next_us) SELECT * FROM UNNEST($1::text[], $2::bigint[])
ON CONFLICT (scope) DO UPDATE SET next_us = excluded.next_us";

const WRITE_TURN: &str = "
INSERT INTO limit_gates (scope, turn) VALUES ($1, $2) ON CONFLICT (scope) DO UPDATE SET turn = excluded.turn";

/// The refused delivery is acked, so these are tasks that nobody publishes before a place is free. The raised fence
/// voids the late mark of the publication that is acked.
const HOLD: &str = "
WITH held AS MATERIALIZED (
    SELECT t.id, h.scope FROM UNNEST($1::uuid[], $2::text[]) AS h (id, scope) JOIN tasks t ON t.id = h.id
    WHERE t.state = ANY($3)
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasks t SET state = $4, due_at = NULL, queued_at = NULL, fence = t.fence + 1, limited_by = h.scope
FROM held h WHERE t.id = h.id";

const LEAVE_PLACES: &str = "DELETE FROM limit_places WHERE task_id = ANY($1)";

const ANYTHING_HELD: &str = "SELECT EXISTS (SELECT 1 FROM tasks WHERE state = 0 AND due_at IS NULL)";

/// Jumps from scope to scope in the index.
const HOLDING: &str = "
WITH RECURSIVE scopes (scope) AS (
    (SELECT limited_by FROM tasks WHERE state = 0 AND due_at IS NULL AND limited_by > $1 ORDER BY limited_by LIMIT 1)
    UNION ALL
    SELECT (SELECT limited_by FROM tasks WHERE state = 0 AND due_at IS NULL AND limited_by > scope
            ORDER BY limited_by LIMIT 1)
    FROM scopes WHERE scope IS NOT NULL)
SELECT scope FROM scopes WHERE scope IS NOT NULL LIMIT $2";

/// Jumps from key to key in the index.
const KEYS: &str = "
WITH RECURSIVE keys (key) AS (
    (SELECT coalesce(concurrency_key, '') FROM tasks
     WHERE state = 0 AND due_at IS NULL AND limited_by = $1
       AND (coalesce(concurrency_key, '') > $2 OR $3 AND coalesce(concurrency_key, '') = $2)
     ORDER BY coalesce(concurrency_key, '') LIMIT 1)
    UNION ALL
    SELECT (SELECT coalesce(concurrency_key, '') FROM tasks
            WHERE state = 0 AND due_at IS NULL AND limited_by = $1 AND coalesce(concurrency_key, '') > key
            ORDER BY coalesce(concurrency_key, '') LIMIT 1)
    FROM keys WHERE key IS NOT NULL)
SELECT key FROM keys WHERE key IS NOT NULL LIMIT $4";

/// The first of each key, then the second of each, and so on.
const HELD: &str = "
SELECT id, queue, kind, concurrency_key
FROM UNNEST($2::text[]) WITH ORDINALITY AS k (key, place)
CROSS JOIN LATERAL (
    SELECT t.id, t.queue, t.kind, t.concurrency_key, row_number() OVER (ORDER BY t.priority DESC, t.id) AS round
    FROM (SELECT * FROM tasks WHERE state = 0 AND due_at IS NULL AND limited_by = $1
            AND coalesce(concurrency_key, '') = k.key ORDER BY priority DESC, id LIMIT $3) t
) held
ORDER BY round, place
LIMIT $4";

const LET_GO: &str = "
UPDATE tasks SET due_at = GREATEST($2, run_at), limited_by = NULL
WHERE id IN (SELECT id FROM tasks WHERE id = ANY($1) AND state = 0 AND due_at IS NULL ORDER BY id FOR UPDATE)";

const WAITING: &str = "
SELECT count(*) FROM (
    (SELECT 1 FROM tasks WHERE state = 2 AND queue = $1 LIMIT $2)
    UNION ALL
    (SELECT 1 FROM tasks WHERE due_at IS NOT NULL AND due_at < (SELECT tasklane_now() + 60000) AND queue = $1 LIMIT $2)
    UNION ALL
    (SELECT 1 FROM tasks WHERE state = 0 AND due_at IS NULL AND queue = $1 LIMIT $2)
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
    let taken: Vec<String> = sqlx::query_scalar("SELECT scope FROM limits").fetch_all(&mut *transaction).await?;
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
        sqlx::query("DELETE FROM limits WHERE scope = $1").bind(scope.to_string()).execute(&mut *lent).await?;
    lent.keep();
    Ok(deleted.rows_affected() > 0)
}

/// Replaces those of settings files, but for what the API has set.
pub(super) async fn adopt(connections: &Connections, limits: &[(Scope, Bounds)]) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    lock_all(&mut transaction).await?;
    sqlx::query("DELETE FROM limits WHERE origin = 0").execute(&mut *transaction).await?;
    let mut taken: Vec<String> = sqlx::query_scalar("SELECT scope FROM limits").fetch_all(&mut *transaction).await?;
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

/// A task that is to take places.
struct Asked {
    id: Uuid,
    scopes: Vec<Scope>,
    /// Where a place is kept for it.
    kept: BTreeSet<String>,
}

fn scopes_of(row: &PgRow) -> Result<Vec<Scope>, Fault> {
    let queue = QueueName::parse(row.try_get(1)?).map_err(Fault::corrupt)?;
    let kind = Kind::parse(row.try_get(2)?).map_err(Fault::corrupt)?;
    let key: Option<&str> = row.try_get(3)?;
    Ok(Scope::all_of(&queue, &kind, key).collect())
}

/// Claims tasks that some limit fits and that nothing else stood against, or holds them. Leaves out those of which that is
/// not true any more.
pub(super) async fn claim(
    connection: &mut PgConnection,
    requests: &[&ClaimRequest],
) -> Result<Vec<(Uuid, Claim)>, Fault> {
    let mut transaction = connection.begin().await?;
    let mut look = Look::begin(&mut transaction).await?;
    let rows = sqlx::query(ASKED)
        .bind(requests.iter().map(|request| request.id.0).collect::<Vec<_>>())
        .bind(codes_for(Event::Claim))
        .bind(look.now)
        .bind(look.kept_until())
        .fetch_all(&mut *transaction)
        .await?;
    let mut asked = HashMap::with_capacity(rows.len());
    for row in &rows {
        let kept: Vec<String> = row.try_get(4)?;
        let task = Asked { id: row.try_get(0)?, scopes: scopes_of(row)?, kept: kept.into_iter().collect() };
        asked.insert(task.id, task);
    }
    look.load(&mut transaction, asked.values().flat_map(|task| &task.scopes)).await?;
    let (mut admitted, mut held) = (Vec::new(), Vec::new());
    for &request in requests {
        let Some(task) = asked.get_mut(&request.id.0) else { continue };
        task.scopes = look.gates.limited(std::mem::take(&mut task.scopes).into_iter());
        match look.gates.start(&task.scopes, |scope| task.kept.contains(&scope.to_string())) {
            Ok(()) => {
                look.changed.extend(task.scopes.iter().cloned());
                admitted.push(request);
            }
            Err(shut) => held.push((task.id, shut)),
        }
    }
    hold(&mut transaction, &held).await?;
    let mut answers: Vec<(Uuid, Claim)> =
        held.into_iter().map(|(id, _)| (id, Claim::Refused(Refusal::Limited))).collect();
    let granted = grant(&mut transaction, &admitted, true).await?;
    let mut places = Places::default();
    for (id, claim) in &granted {
        if let (Claim::Granted(granted), Some(task)) = (claim, asked.get(id)) {
            task.scopes.iter().for_each(|scope| places.push(scope, *id, Some(granted.fence.0), None));
        }
    }
    places.take(&mut transaction).await?;
    look.write_rates(&mut transaction).await?;
    transaction.commit().await?;
    answers.extend(granted);
    Ok(answers)
}

async fn hold(connection: &mut PgConnection, held: &[(Uuid, Scope)]) -> Result<(), Fault> {
    if held.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = held.iter().map(|(id, _)| *id).collect();
    sqlx::query(HOLD)
        .bind(&ids)
        .bind(held.iter().map(|(_, scope)| scope.to_string()).collect::<Vec<_>>())
        .bind(codes_for(Event::PutBack))
        .bind(State::Accepted.code())
        .execute(&mut *connection)
        .await?;
    sqlx::query(LEAVE_PLACES).bind(&ids).execute(connection).await?;
    Ok(())
}

/// Places to be taken, by column.
#[derive(Default)]
struct Places {
    scopes: Vec<String>,
    tasks: Vec<Uuid>,
    fences: Vec<Option<i64>>,
    kept_until: Vec<Option<i64>>,
}

impl Places {
    fn push(&mut self, scope: &Scope, task: Uuid, fence: Option<i64>, kept_until: Option<i64>) {
        self.scopes.push(scope.to_string());
        self.tasks.push(task);
        self.fences.push(fence);
        self.kept_until.push(kept_until);
    }

    async fn take(self, connection: &mut PgConnection) -> Result<(), Fault> {
        if self.tasks.is_empty() {
            return Ok(());
        }
        let Self { scopes, tasks, fences, kept_until } = self;
        let query = sqlx::query(TAKE_PLACES).bind(scopes).bind(tasks).bind(fences).bind(kept_until);
        query.execute(connection).await?;
        Ok(())
    }
}

/// The gates that were read under the lock.
struct Look {
    now: i64,
    gates: Gates,
    turns: HashMap<Scope, String>,
    /// Scopes that were asked for.
    known: BTreeSet<Scope>,
    /// Scopes whose bucket stands elsewhere now.
    changed: BTreeSet<Scope>,
}

impl Look {
    async fn begin(connection: &mut PgConnection) -> Result<Self, Fault> {
        sqlx::query(LOCK).execute(&mut *connection).await?;
        let now: i64 = sqlx::query_scalar("SELECT tasklane_now()").fetch_one(connection).await?;
        let gates = Gates { now_us: now * 1_000, by_scope: HashMap::new() };
        Ok(Self { now, gates, turns: HashMap::new(), known: BTreeSet::new(), changed: BTreeSet::new() })
    }

    fn kept_until(&self) -> i64 {
        self.now + millis(KEPT_FOR)
    }

    async fn sweep(&self, connection: &mut PgConnection, scopes: Option<Vec<String>>) -> Result<u64, Fault> {
        let query = sqlx::query(SWEEP).bind(scopes).bind(self.now).bind(self.kept_until());
        Ok(query.execute(connection).await?.rows_affected())
    }

    async fn load<'s>(
        &mut self,
        connection: &mut PgConnection,
        scopes: impl Iterator<Item = &'s Scope>,
    ) -> Result<(), Fault> {
        let unknown: BTreeSet<Scope> = scopes.filter(|scope| !self.known.contains(scope)).cloned().collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let texts: Vec<String> = unknown.iter().map(Scope::to_string).collect();
        self.known.extend(unknown);
        let full = self.read(connection, texts).await?;
        // Only who finds no room looks whether all of it is still taken.
        if !full.is_empty() && self.sweep(connection, Some(full.clone())).await? > 0 {
            self.read(connection, full).await?;
        }
        Ok(())
    }

    /// Reads gates; tells which are full.
    async fn read(&mut self, connection: &mut PgConnection, texts: Vec<String>) -> Result<Vec<String>, Fault> {
        let rows = sqlx::query(GATES).bind(texts).fetch_all(connection).await?;
        let mut full = Vec::new();
        for row in &rows {
            let scope = scope_of(row.try_get(0)?)?;
            let mut gate = Gate {
                max_running: count_of(row, 1)?,
                rate: rate_of(row, 2)?,
                next_us: row.try_get(5)?,
                crowded: row.try_get(7)?,
                used: u32::try_from(row.try_get::<i64, _>(8)?).unwrap_or(u32::MAX),
                kept: u32::try_from(row.try_get::<i64, _>(9)?).unwrap_or(u32::MAX),
            };
            if gate.take_back(self.gates.now_us) {
                self.changed.insert(scope.clone());
            }
            if gate.room(self.gates.now_us) == 0 {
                full.push(scope.to_string());
            }
            self.turns.insert(scope.clone(), row.try_get(6)?);
            self.gates.by_scope.insert(scope, gate);
        }
        Ok(full)
    }

    async fn write_rates(&self, connection: &mut PgConnection) -> Result<(), Fault> {
        let gates = self.changed.iter().filter_map(|scope| Some((scope, self.gates.by_scope.get(scope)?)));
        let rates = gates.filter(|(_, gate)| gate.rate.is_some());
        let (scopes, standings): (Vec<String>, Vec<i64>) =
            rates.map(|(scope, gate)| (scope.to_string(), gate.next_us)).unzip();
        if !scopes.is_empty() {
            sqlx::query(WRITE_RATES).bind(scopes).bind(standings).execute(connection).await?;
        }
        Ok(())
    }
}

/// Lets held tasks go for which there is a place: takes it for them, and makes them due.
pub(super) async fn release(connections: &Connections, after: Option<&Scope>, limit: u32) -> Result<Released, Fault> {
    let mut lent = connections.lend().await?;
    let held: bool = sqlx::query_scalar(ANYTHING_HELD).fetch_one(&mut *lent).await?;
    if !held {
        lent.keep();
        return Ok(Released::default());
    }
    let mut transaction = lent.begin().await?;
    let mut look = Look::begin(&mut transaction).await?;
    look.sweep(&mut transaction, None).await?;
    let texts: Vec<String> = sqlx::query_scalar(HOLDING)
        .bind(after.map_or_else(String::new, Scope::to_string))
        .bind(LOOK_SCOPES_MAX)
        .fetch_all(&mut *transaction)
        .await?;
    let scopes = texts.iter().map(|text| scope_of(text)).collect::<Result<Vec<_>, _>>()?;
    look.load(&mut transaction, scopes.iter()).await?;
    let mut released = Released::default();
    for scope in &scopes {
        let budget = limit - released.tasks;
        if budget == 0 {
            break;
        }
        released.tasks += look.release_from(&mut transaction, scope, budget).await?;
        let wait = look.gates.by_scope.get(scope).map_or(0, |gate| gate.wait_us(look.gates.now_us));
        let wait = (wait > 0).then(|| Duration::from_micros(wait.unsigned_abs()));
        released.wait = [released.wait, wait].into_iter().flatten().min();
        released.next = Some(scope.clone());
    }
    if released.next.as_ref() == scopes.last() && (scopes.len() as i64) < LOOK_SCOPES_MAX {
        released.next = None;
    }
    look.write_rates(&mut transaction).await?;
    transaction.commit().await?;
    lent.keep();
    Ok(released)
}

impl Look {
    /// Lets tasks of one scope go, its concurrency keys in turn; tells how many.
    async fn release_from(&mut self, connection: &mut PgConnection, scope: &Scope, budget: u32) -> Result<u32, Fault> {
        // Without a limit any more they all go.
        let room = self.gates.by_scope.get(scope).map_or(u32::MAX, |gate| gate.room(self.gates.now_us));
        let wanted = room.min(budget);
        if wanted == 0 {
            return Ok(0);
        }
        let turn = self.turns.get(scope).cloned().unwrap_or_default();
        let candidates = candidates(connection, scope, &turn, wanted).await?;
        self.load(connection, candidates.iter().flat_map(|task| &task.scopes)).await?;
        let (mut places, mut free, mut held, mut last) = (Places::default(), Vec::new(), Vec::new(), turn.clone());
        for Candidate { id, key, scopes } in candidates {
            let scopes = self.gates.limited(scopes.into_iter());
            match self.gates.let_go(&scopes) {
                Ok(()) => {
                    scopes.iter().for_each(|scope| places.push(scope, id, None, Some(self.kept_until())));
                    free.push(id);
                }
                // It goes on waiting, elsewhere.
                Err(shut) => held.push((id, shut)),
            }
            last = key;
        }
        hold(connection, &held).await?;
        places.take(connection).await?;
        sqlx::query(LET_GO).bind(&free).bind(self.now).execute(&mut *connection).await?;
        // Of a key's own scope there is but one turn.
        if last != turn && !matches!(scope, Scope::Key(_)) {
            sqlx::query(WRITE_TURN).bind(scope.to_string()).bind(last).execute(connection).await?;
        }
        Ok(u32::try_from(free.len()).unwrap_or(u32::MAX))
    }
}

/// A held task whose turn it may be.
struct Candidate {
    id: Uuid,
    key: String,
    scopes: Vec<Scope>,
}

async fn candidates(
    connection: &mut PgConnection,
    scope: &Scope,
    turn: &str,
    wanted: u32,
) -> Result<Vec<Candidate>, Fault> {
    let (scope, wanted) = (scope.to_string(), i64::from(wanted));
    let mut keys = keys(connection, &scope, turn, false, wanted).await?;
    if (keys.len() as i64) < wanted {
        // From the beginning again, to where the others have begun.
        let first = keys.first().cloned();
        let again = self::keys(connection, &scope, "", true, wanted - keys.len() as i64).await?;
        keys.extend(again.into_iter().take_while(|key| first.as_ref().is_none_or(|first| key < first)));
    }
    let each = (wanted + keys.len() as i64 - 1) / (keys.len() as i64).max(1);
    let rows = sqlx::query(HELD).bind(scope).bind(keys).bind(each).bind(wanted).fetch_all(connection).await?;
    let candidate = |row: &PgRow| {
        let key: Option<String> = row.try_get(3)?;
        Ok(Candidate { id: row.try_get(0)?, key: key.unwrap_or_default(), scopes: scopes_of(row)? })
    };
    rows.iter().map(candidate).collect()
}

async fn keys(
    connection: &mut PgConnection,
    scope: &str,
    after: &str,
    itself: bool,
    most: i64,
) -> Result<Vec<String>, Fault> {
    let query = sqlx::query_scalar(KEYS).bind(scope).bind(after).bind(itself).bind(most);
    Ok(query.fetch_all(connection).await?)
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
