//! What the publishing side writes: the outbox, its marks, and what comes back from the broker unpublished.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::lane::{Answers, Bulk, Size};
use super::rows::{codes_for, json_of, lane_of};
use crate::clock::millis;
use crate::ledger::{Belief, Believed, Due, Mark, Refusal};
use crate::state::{Event, State};
use crate::task::{Fence, Kind, Lane, TaskId};

/// How many bytes of args one fetch brings along, unless a single task has more.
const DUE_BYTES_MAX: i64 = 8 * 1024 * 1024;

/// The fence refuses the mark of a publication that a claim has overtaken: the row may be waiting again already,
/// and the mark would hide it from the relay although the broker has no message for it.
const MARK_QUEUED: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
locked AS MATERIALIZED (
    SELECT t.id, p.ago_ms
    FROM UNNEST($1::uuid[], $2::bigint[], $3::bigint[]) AS p (id, fence, ago_ms) JOIN tasklane.tasks t ON t.id = p.id
    WHERE t.fence = p.fence AND t.state = ANY($4)
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasklane.tasks t SET state = $5, queued_at = clock.now - l.ago_ms, due_at = NULL
FROM clock, locked l
WHERE t.id = l.id";

/// The raised fence voids a late mark of the publication that is given back. A task whose own time is later
/// still waits for it. Who does not say of when it is may be the newest there is of an edited task.
const PUT_BACK: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
locked AS MATERIALIZED (
    SELECT t.id, p.delay_ms
    FROM UNNEST($1::uuid[], $2::bigint[], $5::text[], $6::bigint[], $7::bigint[])
         AS p (id, delay_ms, kind, published, args_digest)
    JOIN tasklane.tasks t ON t.id = p.id
    WHERE t.state = ANY($3) AND t.kind = p.kind
      AND CASE WHEN p.published < 0 AND t.void_below IS NOT NULL THEN true
               ELSE p.published BETWEEN COALESCE(t.void_below, -1) AND t.fence
                    AND (t.args_digest IS NULL OR t.args_digest = p.args_digest) END
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasklane.tasks t
SET state = $4, fence = t.fence + 1, due_at = GREATEST(clock.now + l.delay_ms, t.run_at), queued_at = NULL
FROM clock, locked l
WHERE t.id = l.id
RETURNING t.id";

const BELIEVED: &str = "SELECT id, kind, fence, void_below, args_digest FROM tasklane.tasks WHERE id = ANY($1)";

/// Two relays: each skips the rows that the other has locked, and after the commit they are not due any more. A relay
/// that dies between this and the mark loses nothing: its rows are due again when the reservation is over. The raised fence
/// tells the message to come from one that was published before.
///
/// Rows that were locked but would make the answer too big are left as they are, due, for the next fetch.
pub(super) const FETCH_DUE: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
locked AS MATERIALIZED (
    SELECT t.id, t.due_at, octet_length(t.args) AS size
    FROM tasklane.tasks t
    WHERE t.due_at <= (SELECT now FROM clock)  -- a subquery bounds the index scan, a join would only filter it
    ORDER BY t.due_at
    LIMIT $1
    FOR UPDATE OF t SKIP LOCKED
),
fitting AS MATERIALIZED (
    SELECT id FROM (SELECT id, sum(size) OVER (ORDER BY due_at, id) - size AS before FROM locked) sized
    WHERE before < $2
)
UPDATE tasklane.tasks t SET due_at = clock.now + $3, fence = t.fence + 1
FROM clock, fitting f
WHERE t.id = f.id
RETURNING t.id, t.kind, t.queue, t.priority, t.args, t.fence, t.traceparent";

/// What is not due any more was claimed, marked or ended meanwhile.
const RELEASE: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
locked AS MATERIALIZED (
    SELECT t.id
    FROM UNNEST($1::uuid[], $2::bigint[]) AS p (id, fence) JOIN tasklane.tasks t ON t.id = p.id
    WHERE t.fence = p.fence AND t.due_at IS NOT NULL
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasklane.tasks t SET due_at = LEAST(t.due_at, clock.now)
FROM clock, locked l
WHERE t.id = l.id";

const NEXT_DUE: &str = "SELECT min(due_at) - tasklane.now_ms() FROM tasklane.tasks WHERE due_at IS NOT NULL";

/// A claim that has the row locked at this moment proves that its message was there: skipped. The fence stays: should
/// the message turn up after all, the claim lets only one of the two through. What a pause has given back to a paused
/// queue is older than what was claimed before, and not lost.
pub(super) const STRAND: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
lost AS MATERIALIZED (
    SELECT GREATEST((SELECT CASE $6::smallint WHEN 1 THEN high_at WHEN 0 THEN head_at ELSE low_at END
                     FROM tasklane.queues
                     WHERE name = $1 AND NOT EXISTS (SELECT 1 FROM tasklane.paused_queues WHERE name = $1)),
                    CASE WHEN $2 THEN clock.now END) - $3 AS before
    FROM clock
),
locked AS MATERIALIZED (
    SELECT t.id
    FROM tasklane.tasks t
    WHERE t.state = 2 AND t.queue = $1 AND t.priority = $6 AND t.queued_at < (SELECT before FROM lost)
    ORDER BY t.queued_at
    LIMIT $4
    FOR UPDATE OF t SKIP LOCKED
)
UPDATE tasklane.tasks t SET state = $5, due_at = clock.now, queued_at = NULL
FROM clock, locked l
WHERE t.id = l.id";

/// Marks of several publishers share a statement.
pub(super) struct MarkQueued;

impl Bulk for MarkQueued {
    type Item = Vec<Mark>;
    type Answer = ();

    fn size(published: &Self::Item) -> Size {
        Size { rows: published.len(), bytes: 0 }
    }

    fn only(_: &Self::Item) -> Option<TaskId> {
        None
    }

    async fn write(connection: &mut PgConnection, items: &[Self::Item]) -> Answers<()> {
        let published = || items.iter().flatten();
        sqlx::query(MARK_QUEUED)
            .bind(published().map(|mark| mark.id.0).collect::<Vec<_>>())
            .bind(published().map(|mark| mark.fence.0).collect::<Vec<_>>())
            .bind(published().map(|mark| millis(mark.ago)).collect::<Vec<_>>())
            .bind(codes_for(Event::MarkQueued))
            .bind(State::Queued.code())
            .execute(connection)
            .await?;
        Ok(items.iter().map(|_| Ok(())).collect())
    }
}

/// Tasks put back at the same time share a statement.
pub(super) struct PutBack;

/// A task that is given back, and what its message says of it.
pub(super) struct Return {
    pub(super) id: TaskId,
    pub(super) belief: Belief,
    pub(super) delay: Duration,
}

impl Bulk for PutBack {
    type Item = Return;
    type Answer = Option<Refusal>;

    fn size(_: &Return) -> Size {
        Size { rows: 1, bytes: 0 }
    }

    fn only(item: &Return) -> Option<TaskId> {
        Some(item.id)
    }

    async fn write(connection: &mut PgConnection, items: &[Return]) -> Answers<Option<Refusal>> {
        let back: Vec<Uuid> = sqlx::query_scalar(PUT_BACK)
            .bind(items.iter().map(|item| item.id.0).collect::<Vec<_>>())
            .bind(items.iter().map(|item| millis(item.delay)).collect::<Vec<_>>())
            .bind(codes_for(Event::PutBack))
            .bind(State::Accepted.code())
            .bind(items.iter().map(|item| item.belief.kind.as_str()).collect::<Vec<_>>())
            .bind(items.iter().map(|item| item.belief.published_under()).collect::<Vec<_>>())
            .bind(items.iter().map(|item| item.belief.args.0).collect::<Vec<_>>())
            .fetch_all(&mut *connection)
            .await?;
        let back: HashSet<Uuid> = back.into_iter().collect();
        let left: Vec<&Return> = items.iter().filter(|item| !back.contains(&item.id.0)).collect();
        let refusals = if left.is_empty() { HashMap::new() } else { refusals(connection, &left).await? };
        Ok(items.iter().map(|item| Ok(refusals.get(&item.id.0).copied().flatten())).collect())
    }
}

type BelievedRow = (Uuid, String, i64, Option<i64>, Option<i64>);

/// Why these were left alone: nothing, where they do not wait any more.
async fn refusals(connection: &mut PgConnection, left: &[&Return]) -> Result<HashMap<Uuid, Option<Refusal>>, Fault> {
    let ids: Vec<Uuid> = left.iter().map(|item| item.id.0).collect();
    let rows: Vec<BelievedRow> = sqlx::query_as(BELIEVED).bind(ids).fetch_all(connection).await?;
    let mut refusals: HashMap<_, _> = left.iter().map(|item| (item.id.0, Some(Refusal::Unknown))).collect();
    for (id, kind, fence, void_below, args) in rows {
        let item = left.iter().find(|item| item.id.0 == id);
        let row = Believed { kind: &kind, fence, void_below, args };
        refusals.insert(id, item.and_then(|item| item.belief.refusal_to_return(&row)));
    }
    Ok(refusals)
}

type DueRow = (Uuid, String, String, i16, String, i64, Option<String>);

pub(super) async fn fetch_due(connections: &Connections, limit: u32, reserve: Duration) -> Result<Vec<Due>, Fault> {
    let mut lent = connections.lend().await?;
    let rows: Vec<DueRow> = sqlx::query_as(FETCH_DUE)
        .bind(i64::from(limit))
        .bind(DUE_BYTES_MAX)
        .bind(millis(reserve))
        .fetch_all(&mut *lent)
        .await?;
    lent.keep();
    let due = rows.into_iter().map(|(id, kind, queue, priority, args, fence, traceparent)| {
        Ok(Due {
            id: TaskId(id),
            kind: Kind::parse(&kind).map_err(Fault::corrupt)?,
            lane: lane_of(&queue, priority)?,
            args: json_of(&args)?,
            fence: Fence(fence),
            traceparent,
        })
    });
    due.collect()
}

pub(super) async fn release(connections: &Connections, unpublished: &[(TaskId, Fence)]) -> Result<(), Fault> {
    let mut lent = connections.lend().await?;
    sqlx::query(RELEASE)
        .bind(unpublished.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
        .bind(unpublished.iter().map(|(_, fence)| fence.0).collect::<Vec<_>>())
        .execute(&mut *lent)
        .await?;
    lent.keep();
    Ok(())
}

pub(super) async fn next_due(connections: &Connections) -> Result<Option<Duration>, Fault> {
    let mut lent = connections.lend().await?;
    let wait_ms: Option<i64> = sqlx::query_scalar(NEXT_DUE).fetch_one(&mut *lent).await?;
    lent.keep();
    Ok(wait_ms.map(|ms| Duration::from_millis(u64::try_from(ms).unwrap_or(0))))
}

/// What the broker no longer holds of a lane.
pub(super) struct Stranded {
    pub(super) lane: Lane,
    pub(super) empty: bool,
    pub(super) slack: Duration,
    pub(super) limit: u32,
}

pub(super) async fn strand(connections: &Connections, stranded: &Stranded) -> Result<u64, Fault> {
    let mut lent = connections.lend().await?;
    let done = sqlx::query(STRAND)
        .bind(stranded.lane.queue.as_str())
        .bind(stranded.empty)
        .bind(millis(stranded.slack))
        .bind(i64::from(stranded.limit))
        .bind(State::Accepted.code())
        .bind(stranded.lane.priority.code())
        .execute(&mut *lent)
        .await?;
    lent.keep();
    Ok(done.rows_affected())
}
