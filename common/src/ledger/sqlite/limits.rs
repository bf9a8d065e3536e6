//! Limits: the writer's transaction is the lock, since there is only one at a time.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::claim::{Looked, grant};
use super::read::{id_of, parsed};
use crate::clock::{millis, wall_ms};
use crate::ledger::limiting::{KEPT_FOR, let_go_us};
use crate::ledger::{Claim, ClaimRequest, LimitSet, Refusal, Released};
use crate::limit::admission::{Gate, Gates};
use crate::limit::{Bounds, LIMITS_MAX, Limit, Origin, Rate, Scope};
use crate::task::{Kind, QueueName, TaskId};

/// How many scopes one look at the held tasks looks at.
const LOOK_SCOPES_MAX: usize = 500;

const COLUMNS: &str = "scope, max_running, rate_tasks, rate_per_ms, rate_burst, max_queued, origin";

/// The condition under which a claim must come here, of a row of `tasks`.
pub(super) const IS_LIMITED: &str = "(EXISTS (SELECT 1 FROM limits) AND (EXISTS (SELECT 1 FROM limits
         WHERE scope IN ('queue:' || tasks.queue, 'kind:' || tasks.kind)
             AND (max_running IS NOT NULL OR rate_tasks IS NOT NULL))
     OR tasks.concurrency_key IS NOT NULL AND EXISTS (SELECT 1 FROM limits
         WHERE scope >= 'key:' AND scope < 'key;' AND (max_running IS NOT NULL OR rate_tasks IS NOT NULL))))";

/// Places whose task neither runs in them nor is on its way to them. One kept for longer than can be was kept before the
/// clock was set back.
const FREE: &str = "NOT EXISTS (SELECT 1 FROM tasks t WHERE t.id = limit_places.task_id AND (
         t.state = 3 AND t.fence = limit_places.fence
         OR limit_places.fence IS NULL AND t.state IN (0, 1, 2, 4) AND kept_until BETWEEN ?1 AND ?2))";

fn bounds_of(row: &Row<'_>) -> rusqlite::Result<Bounds> {
    let rate = row.get::<_, Option<u32>>(2)?.map(|tasks| {
        Ok::<_, rusqlite::Error>(Rate { tasks, per_ms: row.get::<_, i64>(3)?.unsigned_abs(), burst: row.get(4)? })
    });
    Ok(Bounds { max_running: row.get(1)?, rate: rate.transpose()?, max_queued: row.get(5)? })
}

pub(super) fn all(db: &Connection) -> rusqlite::Result<Vec<Limit>> {
    let mut statement = db.prepare_cached(&format!("SELECT {COLUMNS} FROM limits ORDER BY scope"))?;
    let limits = statement.query_map([], |row| {
        let origin = if row.get::<_, i16>(6)? == 0 { Origin::File } else { Origin::Api };
        Ok(Limit { scope: parsed(row, 0, str::parse)?, bounds: bounds_of(row)?, origin })
    })?;
    limits.collect()
}

pub(super) fn set(db: &Connection, scope: &Scope, bounds: &Bounds) -> rusqlite::Result<LimitSet> {
    let text = scope.to_string();
    let known: bool = db
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM limits WHERE scope = ?1)")?
        .query_row([&text], |row| row.get(0))?;
    if !known && count(db)? >= LIMITS_MAX as i64 {
        return Ok(LimitSet::TooMany);
    }
    put(db, &text, bounds, Origin::Api)?;
    take_places_of_running(db, scope)?;
    Ok(if known { LimitSet::Replaced } else { LimitSet::Made })
}

fn count(db: &Connection) -> rusqlite::Result<i64> {
    db.prepare_cached("SELECT count(*) FROM limits")?.query_row([], |row| row.get(0))
}

fn put(db: &Connection, scope: &str, bounds: &Bounds, origin: Origin) -> rusqlite::Result<()> {
    let rate = bounds.rate;
    db.prepare_cached(&format!("INSERT OR REPLACE INTO limits ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"))?
        .execute(params![
            scope,
            bounds.max_running,
            rate.map(|rate| rate.tasks),
            rate.map(|rate| i64::try_from(rate.per_ms).unwrap_or(i64::MAX)),
            rate.map(|rate| rate.burst),
            bounds.max_queued,
            i16::from(origin == Origin::Api),
        ])?;
    Ok(())
}

/// What runs already was claimed without a look at this limit, and counts all the same.
fn take_places_of_running(db: &Connection, limit: &Scope) -> rusqlite::Result<()> {
    let (column, name) = match limit {
        Scope::Queue(name) => ("queue", name.as_str().to_owned()),
        Scope::Kind(name) => ("kind", name.as_str().to_owned()),
        Scope::Key(name) => ("concurrency_key", name.to_string()),
    };
    let (condition, name) = match name.strip_suffix('*') {
        Some(start) => ("substr(name, 1, length(?1)) = ?1", start.to_owned()),
        None => ("name = ?1", name),
    };
    db.prepare_cached(&format!(
        "INSERT OR REPLACE INTO limit_places (scope, task_id, fence)
         SELECT ?2 || ':' || name, id, fence FROM (SELECT id, fence, {column} AS name FROM tasks WHERE state = 3)
         WHERE {condition}"
    ))?
    .execute([name.as_str(), limit.word()])?;
    Ok(())
}

pub(super) fn delete(db: &Connection, scope: &Scope) -> rusqlite::Result<bool> {
    Ok(db.prepare_cached("DELETE FROM limits WHERE scope = ?1")?.execute([scope.to_string()])? > 0)
}

/// Replaces those of settings files, but for what the API has set.
pub(super) fn adopt(db: &Connection, limits: &[(Scope, Bounds)]) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM limits WHERE origin = 0")?.execute([])?;
    let mut taken = db.prepare_cached("SELECT EXISTS (SELECT 1 FROM limits WHERE scope = ?1)")?;
    for (scope, bounds) in limits {
        let text = scope.to_string();
        if !taken.query_row([&text], |row| row.get::<_, bool>(0))? && count(db)? < LIMITS_MAX as i64 {
            put(db, &text, bounds, Origin::File)?;
            take_places_of_running(db, scope)?;
        }
    }
    Ok(())
}

/// Claims a task that some limit fits and that nothing else stands against, or holds it.
pub(super) fn claim(db: &Connection, request: &ClaimRequest, looked: &Looked, now: i64) -> rusqlite::Result<Claim> {
    let scopes: Vec<Scope> = db
        .prepare_cached("SELECT queue, kind, concurrency_key FROM tasks WHERE id = ?1")?
        .query_row([request.id.0.as_bytes().as_slice()], scopes_of)?;
    let mut look = Look::new(db, now);
    look.load(&scopes)?;
    let scopes = look.gates.limited(scopes.into_iter());
    let kept: Vec<String> = db
        .prepare_cached(
            "SELECT scope FROM limit_places WHERE task_id = ?1 AND fence IS NULL AND kept_until BETWEEN ?2 AND ?3",
        )?
        .query_map(params![request.id.0.as_bytes().as_slice(), now, now + millis(KEPT_FOR)], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    if let Err(shut) = look.gates.start(&scopes, |scope| kept.contains(&scope.to_string())) {
        hold(db, request.id, &shut)?;
        return Ok(Claim::Refused(Refusal::Limited));
    }
    if !looked.alive {
        return Ok(Claim::Refused(Refusal::LeaseLost));
    }
    let granted = grant(db, request, looked, now)?;
    for scope in &scopes {
        db.prepare_cached("INSERT OR REPLACE INTO limit_places (scope, task_id, fence) VALUES (?1, ?2, ?3)")?
            .execute(params![scope.to_string(), request.id.0.as_bytes().as_slice(), granted.fence.0])?;
    }
    look.write_rates(&scopes)?;
    Ok(Claim::Granted(granted))
}

fn scopes_of(row: &Row<'_>) -> rusqlite::Result<Vec<Scope>> {
    let (queue, kind) = (parsed(row, 0, QueueName::parse)?, parsed(row, 1, Kind::parse)?);
    let key: Option<String> = row.get(2)?;
    Ok(Scope::all_of(&queue, &kind, key.as_deref()).collect())
}

/// The refused delivery is acked, so this is a task that nobody publishes before a place is free. The raised fence voids
/// the late mark of the publication that is acked.
fn hold(db: &Connection, id: TaskId, by: &Scope) -> rusqlite::Result<()> {
    db.prepare_cached(
        "UPDATE tasks SET state = 0, due_at = NULL, queued_at = NULL, fence = fence + 1, limited_by = ?2
         WHERE id = ?1 AND state IN (0, 1, 2, 4)",
    )?
    .execute(params![id.0.as_bytes().as_slice(), by.to_string()])?;
    db.prepare_cached("DELETE FROM limit_places WHERE task_id = ?1")?.execute([id.0.as_bytes().as_slice()])?;
    Ok(())
}

/// The gates that were read in this transaction.
struct Look<'c> {
    db: &'c Connection,
    gates: Gates,
    /// Scopes that no limit fits.
    open: HashSet<Scope>,
}

impl<'c> Look<'c> {
    fn new(db: &'c Connection, now: i64) -> Self {
        let gates = Gates { now_us: now * 1_000, by_scope: HashMap::new() };
        Self { db, gates, open: HashSet::new() }
    }

    fn load(&mut self, scopes: &[Scope]) -> rusqlite::Result<()> {
        for scope in scopes {
            if self.gates.by_scope.contains_key(scope) || self.open.contains(scope) {
                continue;
            }
            match self.gate(scope)? {
                Some(gate) => drop(self.gates.by_scope.insert(scope.clone(), gate)),
                None => drop(self.open.insert(scope.clone())),
            }
        }
        Ok(())
    }

    fn gate(&self, scope: &Scope) -> rusqlite::Result<Option<Gate>> {
        let text = scope.to_string();
        let sql = match scope {
            Scope::Key(_) => format!(
                "SELECT {COLUMNS} FROM limits WHERE (scope = ?1 OR scope >= 'key:' AND scope < 'key;'
                     AND substr(scope, -1) = '*' AND substr(?1, 1, length(scope) - 1) || '*' = scope)
                     AND (max_running IS NOT NULL OR rate_tasks IS NOT NULL)
                 ORDER BY scope = ?1 DESC, length(scope) DESC LIMIT 1"
            ),
            _ => format!(
                "SELECT {COLUMNS} FROM limits WHERE scope = ?1 AND (max_running IS NOT NULL OR rate_tasks IS NOT NULL)"
            ),
        };
        let Some(bounds) = self.db.prepare_cached(&sql)?.query_row([&text], bounds_of).optional()? else {
            return Ok(None);
        };
        let mut gate = Gate { max_running: bounds.max_running, rate: bounds.rate, ..Gate::default() };
        gate.next_us = self
            .db
            .prepare_cached("SELECT next_us FROM limit_gates WHERE scope = ?1")?
            .query_row([&text], |row| row.get(0))
            .optional()?
            .unwrap_or(0);
        if gate.take_back(self.gates.now_us) {
            self.write_rate(&text, gate.next_us)?;
        }
        gate.crowded = self
            .db
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM tasks WHERE state = 0 AND due_at IS NULL AND limited_by = ?1)",
            )?
            .query_row([&text], |row| row.get(0))?;
        self.count_taken(&text, &mut gate)?;
        // Only who finds no room looks whether all of it is still taken.
        if gate.room(self.gates.now_us) == 0 && self.sweep(&text)? > 0 {
            self.count_taken(&text, &mut gate)?;
        }
        Ok(Some(gate))
    }

    /// Counts the places taken and those of them that are kept, and looks when the last of these was.
    fn count_taken(&self, scope: &str, gate: &mut Gate) -> rusqlite::Result<()> {
        let sql = "SELECT count(*), count(*) - count(fence), max(iif(fence IS NULL, kept_until, NULL))
             FROM limit_places WHERE scope = ?1";
        let (used, kept, until): (u32, u32, Option<i64>) =
            self.db.prepare_cached(sql)?.query_row([scope], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        (gate.used, gate.kept, gate.let_go_us) = (used, kept, until.map(let_go_us));
        Ok(())
    }

    fn sweep(&self, scope: &str) -> rusqlite::Result<usize> {
        let now = self.gates.now_us / 1_000;
        self.db.prepare_cached(&format!("DELETE FROM limit_places WHERE scope = ?3 AND {FREE}"))?.execute(params![
            now,
            now + millis(KEPT_FOR),
            scope
        ])
    }

    fn write_rates(&self, scopes: &[Scope]) -> rusqlite::Result<()> {
        for (scope, gate) in scopes.iter().filter_map(|scope| Some((scope, self.gates.by_scope.get(scope)?))) {
            if gate.rate.is_some() {
                self.write_rate(&scope.to_string(), gate.next_us)?;
            }
        }
        Ok(())
    }

    fn write_rate(&self, scope: &str, next_us: i64) -> rusqlite::Result<()> {
        self.db
            .prepare_cached(
                "INSERT INTO limit_gates (scope, next_us) VALUES (?1, ?2)
                 ON CONFLICT DO UPDATE SET next_us = excluded.next_us",
            )?
            .execute(params![scope, next_us])?;
        Ok(())
    }
}

/// Whether any task is held.
pub(super) fn anything_held(db: &Connection) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT EXISTS (SELECT 1 FROM tasks INDEXED BY tasks_held WHERE state = 0 AND due_at IS NULL)")?
        .query_row([], |row| row.get(0))
}

/// Lets held tasks go for which there is a place: takes it for them, and makes them due.
pub(super) fn release(db: &Connection, after: Option<&Scope>, limit: u32) -> rusqlite::Result<Released> {
    let now = wall_ms();
    db.prepare_cached(&format!("DELETE FROM limit_places WHERE {FREE}"))?
        .execute(params![now, now + millis(KEPT_FOR)])?;
    let mut released = Released::default();
    let mut look = Look::new(db, now);
    let mut last = after.map_or_else(String::new, Scope::to_string);
    for _ in 0..LOOK_SCOPES_MAX {
        let budget = limit - released.tasks;
        if budget == 0 {
            break;
        }
        let next: Option<String> = db
            .prepare_cached(
                "SELECT min(limited_by) FROM tasks INDEXED BY tasks_held
                 WHERE state = 0 AND due_at IS NULL AND limited_by > ?1",
            )?
            .query_row([&last], |row| row.get(0))?;
        let Some(scope) = next else { return Ok(released) };
        last = scope;
        let wait = look.release_from(&last, budget, &mut released.tasks)?;
        released.wait = [released.wait, wait].into_iter().flatten().min();
    }
    released.next = last.parse().ok();
    Ok(released)
}

impl Look<'_> {
    /// Lets tasks of one scope go, its concurrency keys in turn; tells when its rate lets the next one start.
    fn release_from(&mut self, text: &str, budget: u32, released: &mut u32) -> rusqlite::Result<Option<Duration>> {
        let Ok(scope) = text.parse::<Scope>() else { return Ok(None) };
        self.load(std::slice::from_ref(&scope))?;
        let first: String = self
            .db
            .prepare_cached("SELECT turn FROM limit_gates WHERE scope = ?1")?
            .query_row([text], |row| row.get(0))
            .optional()?
            .unwrap_or_default();
        let mut turn = first.clone();
        for _ in 0..budget {
            // Without a limit any more they all go.
            let gate = self.gates.by_scope.get(&scope);
            if gate.is_some_and(|gate| gate.room_to_go(self.gates.now_us) == 0) {
                break;
            }
            let Some((id, key, scopes)) = self.next_held(text, &turn)? else { break };
            self.load(&scopes)?;
            let scopes = self.gates.limited(scopes.into_iter());
            match self.gates.let_go(&scopes) {
                Ok(()) => {
                    self.keep_places(id, &scopes)?;
                    *released += 1;
                }
                // It goes on waiting, elsewhere.
                Err(shut) => hold(self.db, id, &shut)?,
            }
            turn = key;
        }
        // Of a key's own scope there is but one turn.
        if turn != first && !matches!(scope, Scope::Key(_)) {
            self.db
                .prepare_cached(
                    "INSERT INTO limit_gates (scope, turn) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET turn = excluded.turn",
                )?
                .execute([text, &turn])?;
        }
        let gate = self.gates.by_scope.get(&scope);
        let wait = gate.map_or(0, |gate| gate.wait_us(self.gates.now_us));
        Ok((wait > 0).then(|| Duration::from_micros(wait.unsigned_abs())))
    }

    /// The next held task: the most urgent, then the oldest, of the concurrency key whose turn comes after that one.
    fn next_held(&self, scope: &str, turn: &str) -> rusqlite::Result<Option<(TaskId, String, Vec<Scope>)>> {
        let next = |condition: &str, turn: &str| {
            self.db
                .prepare_cached(&format!(
                    "SELECT coalesce(concurrency_key, '') FROM tasks INDEXED BY tasks_held
                     WHERE state = 0 AND due_at IS NULL AND limited_by = ?1 AND coalesce(concurrency_key, '') {condition} ?2
                     ORDER BY coalesce(concurrency_key, '') LIMIT 1"
                ))?
                .query_row([scope, turn], |row| row.get::<_, String>(0))
                .optional()
        };
        let key = match next(">", turn)? {
            None => next(">=", "")?,
            after => after,
        };
        let Some(key) = key else { return Ok(None) };
        let held = self
            .db
            .prepare_cached(
                "SELECT queue, kind, concurrency_key, id FROM tasks INDEXED BY tasks_held
                 WHERE state = 0 AND due_at IS NULL AND limited_by = ?1 AND coalesce(concurrency_key, '') = ?2
                 ORDER BY priority DESC, id LIMIT 1",
            )?
            .query_row([scope, &key], |row| Ok((id_of(row, 3)?, scopes_of(row)?)))
            .optional()?;
        Ok(held.map(|(id, scopes)| (id, key, scopes)))
    }

    fn keep_places(&self, id: TaskId, scopes: &[Scope]) -> rusqlite::Result<()> {
        let now = self.gates.now_us / 1_000;
        for scope in scopes {
            let until = self.gates.let_go_ms(scope) + millis(KEPT_FOR);
            self.db
                .prepare_cached("INSERT OR REPLACE INTO limit_places (scope, task_id, kept_until) VALUES (?1, ?2, ?3)")?
                .execute(params![scope.to_string(), id.0.as_bytes().as_slice(), until])?;
        }
        self.db
            .prepare_cached("UPDATE tasks SET due_at = max(?2, run_at), limited_by = NULL WHERE id = ?1")?
            .execute(params![id.0.as_bytes().as_slice(), now])?;
        Ok(())
    }
}

pub(super) fn forget_places(db: &Connection, limit: u32) -> rusqlite::Result<u64> {
    let now = wall_ms();
    let places = db
        .prepare_cached(&format!(
            "DELETE FROM limit_places WHERE (scope, task_id) IN (SELECT scope, task_id FROM limit_places WHERE {FREE} LIMIT ?3)"
        ))?
        .execute(params![now, now + millis(KEPT_FOR), limit])?;
    let gates = db
        .prepare_cached(
            "DELETE FROM limit_gates WHERE scope IN (SELECT scope FROM limit_gates WHERE next_us < ?1 AND turn = '' LIMIT ?2)",
        )?
        .execute(params![now * 1_000, limit])?;
    Ok((places + gates) as u64)
}

/// How many tasks wait in a queue or will within a minute, counted to `most`.
pub(super) fn waiting(db: &Connection, queue: &QueueName, most: u32) -> rusqlite::Result<u32> {
    db.prepare_cached(
        "SELECT count(*) FROM (
             SELECT 1 FROM tasks INDEXED BY tasks_queued WHERE state = 2 AND queue = ?1
             UNION ALL SELECT 1 FROM tasks INDEXED BY tasks_due WHERE due_at IS NOT NULL AND due_at < ?3 AND queue = ?1
             UNION ALL SELECT 1 FROM tasks INDEXED BY tasks_held WHERE state = 0 AND due_at IS NULL AND queue = ?1
             LIMIT ?2)",
    )?
    .query_row(params![queue.as_str(), most, wall_ms() + 60_000], |row| row.get(0))
}
