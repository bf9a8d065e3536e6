//! Letting held tasks go.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::gates::{Look, Places, hold, scopes_of};
use super::scope_of;
use crate::clock::millis;
use crate::ledger::Released;
use crate::ledger::limiting::KEPT_FOR;
use crate::ledger::postgres::connections::Connections;
use crate::ledger::postgres::fault::Fault;
use crate::limit::Scope;

/// How many scopes one look at the held tasks looks at.
const LOOK_SCOPES_MAX: i64 = 500;

const WRITE_TURN: &str = "
INSERT INTO tasklane.limit_gates (scope, turn) VALUES ($1, $2) ON CONFLICT (scope) DO UPDATE SET turn = excluded.turn";

const ANYTHING_HELD: &str = "SELECT EXISTS (SELECT 1 FROM tasklane.tasks WHERE state = 0 AND due_at IS NULL)";

/// Jumps from scope to scope in the index.
const HOLDING: &str = "
WITH RECURSIVE scopes (scope) AS (
    (SELECT limited_by FROM tasklane.tasks WHERE state = 0 AND due_at IS NULL AND limited_by > $1
     ORDER BY limited_by LIMIT 1)
    UNION ALL
    SELECT (SELECT limited_by FROM tasklane.tasks WHERE state = 0 AND due_at IS NULL AND limited_by > scope
            ORDER BY limited_by LIMIT 1)
    FROM scopes WHERE scope IS NOT NULL)
SELECT scope FROM scopes WHERE scope IS NOT NULL LIMIT $2";

/// Jumps from key to key in the index.
const KEYS: &str = "
WITH RECURSIVE keys (key) AS (
    (SELECT coalesce(concurrency_key, '') FROM tasklane.tasks
     WHERE state = 0 AND due_at IS NULL AND limited_by = $1
       AND (coalesce(concurrency_key, '') > $2 OR $3 AND coalesce(concurrency_key, '') = $2)
     ORDER BY coalesce(concurrency_key, '') LIMIT 1)
    UNION ALL
    SELECT (SELECT coalesce(concurrency_key, '') FROM tasklane.tasks
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
    FROM (SELECT * FROM tasklane.tasks WHERE state = 0 AND due_at IS NULL AND limited_by = $1
            AND coalesce(concurrency_key, '') = k.key ORDER BY priority DESC, id LIMIT $3) t
) held
ORDER BY round, place
LIMIT $4";

const LET_GO: &str = "
UPDATE tasklane.tasks SET due_at = GREATEST($2, run_at), limited_by = NULL
WHERE id IN (SELECT id FROM tasklane.tasks WHERE id = ANY($1) AND state = 0 AND due_at IS NULL ORDER BY id FOR UPDATE)";

/// Lets held tasks go for which there is a place: takes it for them, and makes them due.
pub(in crate::ledger::postgres) async fn release(
    connections: &Connections,
    after: Option<&Scope>,
    limit: u32,
) -> Result<Released, Fault> {
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
        let room = self.gates.by_scope.get(scope).map_or(u32::MAX, |gate| gate.room_to_go(self.gates.now_us));
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
                    let until = |scope| Some(self.gates.let_go_ms(scope) + millis(KEPT_FOR));
                    scopes.iter().for_each(|scope| places.push(scope, id, None, until(scope)));
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
