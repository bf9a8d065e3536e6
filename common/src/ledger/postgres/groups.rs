//! Groups: recorded with their members, and the one transaction that closes them.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::record;
use super::rows::state_of;
use crate::clock::timestamp;
use crate::group::{Ended, Group, NewGroup, follow_up};
use crate::ledger::{Closed, EndedGroups, Submission};
use crate::state::State;
use crate::task::{GroupId, TaskId};

const INSERT: &str =
    "INSERT INTO tasklane.task_groups (id, total, then_task, created_at) VALUES ($1, $2, $3, tasklane.now_ms())";

/// A scalar look with a limit is one probe a group; an EXISTS could be planned as one pass over the members of all.
const ENDED: &str = "
SELECT g.id, (SELECT 1 FROM tasklane.tasks t WHERE t.group_id = g.id AND t.state < 5 LIMIT 1) IS NULL
FROM tasklane.task_groups g
WHERE g.finished_at IS NULL AND g.id > $1
ORDER BY g.id
LIMIT $2";

/// Whoever else has the row locked is closing the group: he has overtaken us.
const TAKE: &str = "
SELECT total, then_task FROM tasklane.task_groups WHERE id = $1 AND finished_at IS NULL FOR UPDATE SKIP LOCKED";

const COUNTS: &str = "SELECT state, count(*) FROM tasklane.tasks WHERE group_id = $1 GROUP BY state";

const CLOSE: &str = "
UPDATE tasklane.task_groups SET then_id = $2, completed = $3, cancelled = $4, discarded = $5,
    finished_at = tasklane.now_ms()
WHERE id = $1";

const ONE: &str = "SELECT * FROM tasklane.task_groups WHERE id = $1";

const PRUNE: &str = "
DELETE FROM tasklane.task_groups
WHERE id IN (
    SELECT g.id FROM tasklane.task_groups g
    WHERE g.finished_at IS NOT NULL AND g.finished_at < $1
      AND (SELECT 1 FROM tasklane.tasks t WHERE t.group_id = g.id LIMIT 1) IS NULL
    LIMIT $2
)";

/// In the transaction that records the members.
pub(super) async fn insert(connection: &mut PgConnection, group: &NewGroup, total: usize) -> Result<(), Fault> {
    let then = group.then.to_json().map_err(|error| Fault::Refused(error.to_string()))?;
    let total = i64::try_from(total).unwrap_or(i64::MAX);
    sqlx::query(INSERT).bind(group.id.0).bind(total).bind(then).execute(connection).await?;
    Ok(())
}

pub(super) async fn ended(connections: &Connections, after: Option<GroupId>, limit: u32) -> Result<EndedGroups, Fault> {
    let mut lent = connections.lend().await?;
    let looked: Vec<(Uuid, bool)> = sqlx::query_as(ENDED)
        .bind(after.map_or(Uuid::nil(), |id| id.0))
        .bind(i64::from(limit))
        .fetch_all(&mut *lent)
        .await?;
    lent.keep();
    let next = looked.last().filter(|_| looked.len() == limit as usize).map(|(id, _)| GroupId(*id));
    Ok(EndedGroups { ended: looked.iter().filter(|(_, ended)| *ended).map(|(id, _)| GroupId(*id)).collect(), next })
}

pub(super) async fn close(connections: &Connections, id: GroupId) -> Result<Option<Closed>, Fault> {
    let mut lent = connections.lend().await?;
    let mut transaction = lent.begin().await?;
    let closed = close_in(&mut transaction, id).await?;
    // A process that dies before this has done nothing; afterwards any relay publishes.
    transaction.commit().await?;
    lent.keep();
    Ok(closed)
}

async fn close_in(transaction: &mut PgConnection, id: GroupId) -> Result<Option<Closed>, Fault> {
    let taken: Option<(i64, String)> = sqlx::query_as(TAKE).bind(id.0).fetch_optional(&mut *transaction).await?;
    let Some((total, then)) = taken else { return Ok(None) };
    let then = serde_json::from_str(&then).map_err(Fault::corrupt)?;
    // One statement sees all members at one moment: a replay comes before it, and is unfinished here, or after the end.
    let Some(ended) = Ended::of(&counts(transaction, id).await?) else { return Ok(None) };
    let task = follow_up(id, total, ended, then).map_err(Fault::corrupt)?;
    let then_id = task.id;
    // Nobody keeps the publication to himself: the next relay has it.
    let submission = Submission { tasks: vec![task], idempotency: None, reserve: Duration::ZERO, group: None };
    record::insert(transaction, [&submission]).await?;
    sqlx::query(CLOSE)
        .bind(id.0)
        .bind(then_id.0)
        .bind(ended.completed)
        .bind(ended.cancelled)
        .bind(ended.discarded)
        .execute(transaction)
        .await?;
    Ok(Some(Closed { then_id, ended }))
}

/// Where the members stand, out of the index alone.
async fn counts(connection: &mut PgConnection, id: GroupId) -> Result<BTreeMap<State, u64>, Fault> {
    let rows: Vec<(i16, i64)> = sqlx::query_as(COUNTS).bind(id.0).fetch_all(connection).await?;
    rows.into_iter().map(|(code, count)| Ok((state_of(code)?, count.unsigned_abs()))).collect()
}

pub(super) async fn one(connections: &Connections, id: GroupId) -> Result<Option<Group>, Fault> {
    let mut lent = connections.lend().await?;
    let Some(row) = sqlx::query(ONE).bind(id.0).fetch_optional(&mut *lent).await? else {
        lent.keep();
        return Ok(None);
    };
    let counts = counts(&mut lent, id).await?;
    lent.keep();
    let count = |column: &str| row.try_get::<Option<i64>, _>(column).map(Option::unwrap_or_default);
    let finished_at = row.try_get::<Option<i64>, _>("finished_at")?;
    let ended =
        Ended { completed: count("completed")?, cancelled: count("cancelled")?, discarded: count("discarded")? };
    Ok(Some(Group {
        id,
        total: row.try_get("total")?,
        then: serde_json::from_str(row.try_get("then_task")?).map_err(Fault::corrupt)?,
        then_id: row.try_get::<Option<Uuid>, _>("then_id")?.map(TaskId),
        ended: finished_at.map(|_| ended),
        counts,
        created_at: timestamp(row.try_get("created_at")?),
        finished_at: finished_at.map(timestamp),
    }))
}

/// Forgets up to `limit` groups that were closed longer than the retention ago and have no members left.
pub(super) async fn prune(connection: &mut PgConnection, before: i64, limit: u32) -> Result<(), Fault> {
    sqlx::query(PRUNE).bind(before).bind(i64::from(limit)).execute(connection).await?;
    Ok(())
}
