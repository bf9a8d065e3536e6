//! What is read and written of places and rates, under the lock of all limits.

use std::collections::{BTreeSet, HashMap};

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{count_of, rate_of, scope_of};
use crate::clock::millis;
use crate::ledger::limiting::{KEPT_FOR, let_go_us};
use crate::ledger::postgres::fault::Fault;
use crate::ledger::postgres::rows::codes_for;
use crate::limit::Scope;
use crate::limit::admission::{Gate, Gates};
use crate::state::{Event, State};
use crate::task::{Kind, QueueName};

/// Whoever takes or gives places waits here for the transaction before it, and sees in its later statements what that
/// one did. It comes before all other locks.
pub(super) const LOCK: &str = "SELECT pg_advisory_xact_lock(8386110886424704372)";

/// Places whose task neither runs in them nor is on its way to them.
const SWEEP: &str = "
DELETE FROM tasklane.limit_places p
WHERE ($1::text[] IS NULL OR p.scope = ANY($1)) AND NOT EXISTS (
    SELECT 1 FROM tasklane.tasks t WHERE t.id = p.task_id AND (
        t.state = 3 AND t.fence = p.fence
        OR p.fence IS NULL AND t.state IN (0, 1, 2, 4) AND p.kept_until BETWEEN $2 AND $3))";

/// The scopes among these that a limit fits, the closest name first.
const GATES: &str = "
SELECT s.scope, l.max_running, l.rate_tasks, l.rate_per_ms, l.rate_burst, COALESCE(g.next_us, 0), COALESCE(g.turn, ''),
       EXISTS (SELECT 1 FROM tasklane.tasks t WHERE t.state = 0 AND t.due_at IS NULL AND t.limited_by = s.scope),
       p.used, p.kept, p.kept_until
FROM UNNEST($1::text[]) AS s (scope)
CROSS JOIN LATERAL (
    SELECT * FROM tasklane.limits l
    WHERE (l.max_running IS NOT NULL OR l.rate_tasks IS NOT NULL)
      AND (l.scope = s.scope OR right(l.scope, 1) = '*' AND starts_with(s.scope, left(l.scope, -1)))
    ORDER BY l.scope = s.scope DESC, length(l.scope) DESC
    LIMIT 1
) l
CROSS JOIN LATERAL (
    SELECT count(*) AS used, count(*) - count(p.fence) AS kept, max(p.kept_until) FILTER (WHERE p.fence IS NULL) AS kept_until
    FROM tasklane.limit_places p WHERE p.scope = s.scope
) p
LEFT JOIN tasklane.limit_gates g ON g.scope = s.scope";

const TAKE_PLACES: &str = "
INSERT INTO tasklane.limit_places (scope, task_id, fence, kept_until)
SELECT * FROM UNNEST($1::text[], $2::uuid[], $3::bigint[], $4::bigint[])
ON CONFLICT (scope, task_id) DO UPDATE SET fence = excluded.fence, kept_until = excluded.kept_until";

const WRITE_RATES: &str = "
INSERT INTO tasklane.limit_gates (scope, next_us) SELECT * FROM UNNEST($1::text[], $2::bigint[])
ON CONFLICT (scope) DO UPDATE SET next_us = excluded.next_us";

/// The refused delivery is acked, so these are tasks that nobody publishes before a place is free. The raised fence
/// voids the late mark of the publication that is acked.
const HOLD: &str = "
WITH held AS MATERIALIZED (
    SELECT t.id, h.scope FROM UNNEST($1::uuid[], $2::text[]) AS h (id, scope) JOIN tasklane.tasks t ON t.id = h.id
    WHERE t.state = ANY($3)
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasklane.tasks t SET state = $4, due_at = NULL, queued_at = NULL, fence = t.fence + 1, limited_by = h.scope
FROM held h WHERE t.id = h.id";

const LEAVE_PLACES: &str = "DELETE FROM tasklane.limit_places WHERE task_id = ANY($1)";

pub(super) fn scopes_of(row: &PgRow) -> Result<Vec<Scope>, Fault> {
    let queue = QueueName::parse(row.try_get(1)?).map_err(Fault::corrupt)?;
    let kind = Kind::parse(row.try_get(2)?).map_err(Fault::corrupt)?;
    let key: Option<&str> = row.try_get(3)?;
    Ok(Scope::all_of(&queue, &kind, key).collect())
}

pub(super) async fn hold(connection: &mut PgConnection, held: &[(Uuid, Scope)]) -> Result<(), Fault> {
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
pub(super) struct Places {
    scopes: Vec<String>,
    tasks: Vec<Uuid>,
    fences: Vec<Option<i64>>,
    kept_until: Vec<Option<i64>>,
}

impl Places {
    pub(super) fn push(&mut self, scope: &Scope, task: Uuid, fence: Option<i64>, kept_until: Option<i64>) {
        self.scopes.push(scope.to_string());
        self.tasks.push(task);
        self.fences.push(fence);
        self.kept_until.push(kept_until);
    }

    pub(super) async fn take(self, connection: &mut PgConnection) -> Result<(), Fault> {
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
pub(super) struct Look {
    pub(super) now: i64,
    pub(super) gates: Gates,
    pub(super) turns: HashMap<Scope, String>,
    /// Scopes that were asked for.
    known: BTreeSet<Scope>,
    /// Scopes whose bucket stands elsewhere now.
    pub(super) changed: BTreeSet<Scope>,
}

impl Look {
    pub(super) async fn begin(connection: &mut PgConnection) -> Result<Self, Fault> {
        sqlx::query(LOCK).execute(&mut *connection).await?;
        let now: i64 = sqlx::query_scalar("SELECT tasklane.now_ms()").fetch_one(connection).await?;
        let gates = Gates { now_us: now * 1_000, by_scope: HashMap::new() };
        Ok(Self { now, gates, turns: HashMap::new(), known: BTreeSet::new(), changed: BTreeSet::new() })
    }

    pub(super) fn kept_until(&self) -> i64 {
        self.now + millis(KEPT_FOR)
    }

    pub(super) async fn sweep(&self, connection: &mut PgConnection, scopes: Option<Vec<String>>) -> Result<u64, Fault> {
        let query = sqlx::query(SWEEP).bind(scopes).bind(self.now).bind(self.kept_until());
        Ok(query.execute(connection).await?.rows_affected())
    }

    pub(super) async fn load<'s>(
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
                let_go_us: row.try_get::<Option<i64>, _>(10)?.map(let_go_us),
                stood_us: None,
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

    pub(super) async fn write_rates(&self, connection: &mut PgConnection) -> Result<(), Fault> {
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
