//! Recording: the first durable trace of a task.

use std::collections::HashMap;

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::lane::{Answers, Bulk, Size, TRIES};
use super::rows::codes_for;
use super::{groups, unique};
use crate::clock::{millis, timestamp};
use crate::ledger::unique::{Plan, decide, keys, replaced_by};
use crate::ledger::{Idempotency, Recorded, Submission};
use crate::state::{Event, State};
use crate::task::{NewTask, TaskId};

/// Equal keys meet in the unique index: the later statement waits there for the earlier one to commit, then leaves
/// its row out. Rows go in by the order of their keys, so that two statements never wait for each other.
const INSERT: &str = r#"
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now)
INSERT INTO tasklane.tasks (id, kind, queue, state, args, tags, max_attempts, created_at, run_at, due_at, timeout_ms,
                   idempotency_key, idempotency_hash, traceparent, unique_key, group_id, priority,
                   concurrency_key, retried_from, result_ttl_ms, args_digest)
SELECT n.id, n.kind, n.queue,
       CASE WHEN n.run_at > clock.now THEN 1 ELSE 0 END,  -- scheduled, accepted
       n.args, n.tags, n.max_attempts, clock.now,
       GREATEST(n.run_at, clock.now),
       CASE WHEN n.run_at > clock.now THEN n.run_at ELSE clock.now + n.reserve_ms END,
       n.timeout_ms, n.key, n.hash, n.traceparent, n.unique_key, n.group_id, n.priority,
       n.concurrency_key, n.retried_from, n.result_ttl_ms, n.args_digest
FROM clock, UNNEST($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::integer[], $7::bigint[],
                   $8::bigint[], $9::bigint[], $10::text[], $11::bytea[], $12::text[], $13::text[], $14::uuid[],
                   $15::smallint[], $16::text[], $17::uuid[], $18::bigint[], $19::bigint[])
     AS n (id, kind, queue, args, tags, max_attempts, run_at, reserve_ms, timeout_ms, key, hash, traceparent,
           unique_key, group_id, priority, concurrency_key, retried_from, result_ttl_ms, args_digest)
ORDER BY n.key COLLATE "C", n.id
ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id, created_at"#;

const RETRIED_BY: &str = "
UPDATE tasklane.tasks t SET retried_by = n.by
FROM UNNEST($1::uuid[], $2::uuid[]) AS n (of, by) WHERE t.id = n.of";

const BY_KEY: &str = "
SELECT idempotency_key, id, idempotency_hash FROM tasklane.tasks
WHERE idempotency_key = ANY($1) AND idempotency_key IS NOT NULL";

const REPLACE: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
locked AS MATERIALIZED (
    SELECT t.id, r.reason
    FROM UNNEST($1::uuid[], $2::text[]) AS r (id, reason) JOIN tasklane.tasks t ON t.id = r.id
    WHERE t.state = ANY($3)
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasklane.tasks t
SET state = $4, due_at = NULL, reason = l.reason, finished_at = clock.now, cancel_requested_at = clock.now
FROM clock, locked l
WHERE t.id = l.id";

/// Submissions of any size without a key, and single tasks with one, share a statement.
pub(super) struct Record;

impl Bulk for Record {
    type Item = Submission;
    type Answer = Recorded;

    fn size(submission: &Submission) -> Size {
        let bytes = submission.tasks.iter().map(|task| task.args.as_str().len()).sum();
        Size { rows: submission.tasks.len(), bytes }
    }

    fn only(_: &Submission) -> Option<TaskId> {
        None
    }

    async fn write(connection: &mut PgConnection, items: &[Submission]) -> Answers<Recorded> {
        let mut answers: Vec<Option<Recorded>> = items.iter().map(|_| None).collect();
        for _ in 0..TRIES {
            let open: Vec<usize> = (0..items.len()).filter(|&index| answers[index].is_none()).collect();
            if open.is_empty() {
                break;
            }
            let created = insert(connection, open.iter().map(|&index| &items[index])).await?;
            let earlier = find_earlier(connection, open.iter().map(|&index| &items[index]), &created).await?;
            for index in open {
                let submission = &items[index];
                let new = created_at(submission, &created).map(new);
                answers[index] = new.or_else(|| replayed(submission, &earlier));
            }
        }
        Ok(answers.into_iter().map(|answer| answer.ok_or_else(vanishing)).collect())
    }
}

/// A key was taken at each insertion and free at each look: earlier tasks are being pruned at this moment.
fn vanishing() -> Fault {
    Fault::Collided("the idempotency key's earlier task is being deleted".to_owned())
}

fn new(at: i64) -> Recorded {
    Recorded::New { at: timestamp(at), existing: Vec::new() }
}

/// Records a submission alone in a transaction: several tasks under one key, of which all are left out when one is,
/// tasks that must be the only ones of their unique keys, or the members of a group.
pub(super) async fn record_alone(connections: &Connections, submission: &Submission) -> Result<Recorded, Fault> {
    let mut lent = connections.lend().await?;
    for _ in 0..TRIES {
        let mut transaction = lent.begin().await?;
        let recorded = try_to_record(&mut transaction, submission).await?;
        match recorded {
            Some(Recorded::New { .. }) => transaction.commit().await?,
            _ => transaction.rollback().await?,
        }
        if let Some(recorded) = recorded {
            lent.keep();
            return Ok(recorded);
        }
    }
    Err(vanishing())
}

/// `None` when others came in between. Only what is `New` is to be committed.
async fn try_to_record(connection: &mut PgConnection, submission: &Submission) -> Result<Option<Recorded>, Fault> {
    let unique_keys = keys(submission);
    if !unique_keys.is_empty() {
        unique::lock(connection, &unique_keys).await?;
    }
    // Before the unique keys are judged: a repeated request must not stand in its own way.
    let earlier = find_earlier(connection, [submission], &HashMap::new()).await?;
    if let Some(replayed) = replayed(submission, &earlier) {
        return Ok(Some(replayed));
    }
    if unique_keys.is_empty() {
        let created = insert(connection, [submission]).await?;
        insert_group(connection, submission).await?;
        return Ok(created_at(submission, &created).map(new));
    }
    let holders = unique::holders(connection, &unique_keys).await?;
    let Plan { fresh, existing, replaced } = match decide(submission, &holders) {
        Ok(plan) => plan,
        Err(conflicts) => return Ok(Some(Recorded::NotUnique(conflicts))),
    };
    if !replace(connection, &replaced).await? {
        return Ok(None);
    }
    let created = insert(connection, [&fresh]).await?;
    insert_group(connection, &fresh).await?;
    let unique = fresh.tasks.iter().filter_map(|task| task.unique.as_ref().map(|unique| (task.id, unique)));
    let taken: Vec<_> = unique.map(|(id, unique)| (unique.key.as_str(), id, unique.window)).collect();
    unique::take(connection, &taken).await?;
    let nothing_fresh = fresh.tasks.is_empty().then(crate::clock::wall_ms);
    let at = created_at(&fresh, &created).or(nothing_fresh);
    Ok(at.map(|at| Recorded::New { at: timestamp(at), existing }))
}

async fn insert_group(connection: &mut PgConnection, submission: &Submission) -> Result<(), Fault> {
    match &submission.group {
        Some(group) => groups::insert(connection, group, submission.tasks.len()).await,
        None => Ok(()),
    }
}

/// Cancels waiting tasks in favour of others; false when one of them has started or ended in the meantime.
async fn replace(connection: &mut PgConnection, replaced: &[(TaskId, TaskId)]) -> Result<bool, Fault> {
    if replaced.is_empty() {
        return Ok(true);
    }
    let cancelled = sqlx::query(REPLACE)
        .bind(replaced.iter().map(|(old, _)| old.0).collect::<Vec<_>>())
        .bind(replaced.iter().map(|(_, new)| replaced_by(*new)).collect::<Vec<_>>())
        .bind(codes_for(Event::Claim))
        .bind(State::Cancelled.code())
        .execute(connection)
        .await?;
    Ok(cancelled.rows_affected() == replaced.len() as u64)
}

/// The first row of a keyed submission has the client's key itself, so that a single task and a batch under the same
/// key meet; the further rows of a batch have keys that no client can send, since 0x1f cannot be part of a header.
fn row_key(key: &str, index: usize) -> String {
    if index == 0 { key.to_owned() } else { format!("{key}\u{1f}{index}") }
}

/// When the submission's rows were created, if all of them were.
fn created_at(submission: &Submission, created: &HashMap<Uuid, i64>) -> Option<i64> {
    let all = submission.tasks.iter().all(|task| created.contains_key(&task.id.0));
    submission.tasks.first().filter(|_| all).and_then(|task| created.get(&task.id.0).copied())
}

pub(super) async fn insert(
    connection: &mut PgConnection,
    submissions: impl IntoIterator<Item = &Submission>,
) -> Result<HashMap<Uuid, i64>, Fault> {
    let mut columns = Columns::default();
    for submission in submissions {
        for (index, task) in submission.tasks.iter().enumerate() {
            columns.push(task, index, submission)?;
        }
    }
    let again: Vec<_> =
        columns.ids.iter().zip(&columns.retried_from).filter_map(|(id, of)| Some((*id, (*of)?))).collect();
    let rows: Vec<(Uuid, i64)> = columns.bind().fetch_all(&mut *connection).await?;
    let created: HashMap<Uuid, i64> = rows.into_iter().collect();
    let (by, of): (Vec<Uuid>, Vec<Uuid>) = again.into_iter().filter(|(id, _)| created.contains_key(id)).unzip();
    if !of.is_empty() {
        sqlx::query(RETRIED_BY).bind(of).bind(by).execute(connection).await?;
    }
    Ok(created)
}

/// The rows to be inserted, by column.
#[derive(Default)]
struct Columns<'a> {
    ids: Vec<Uuid>,
    kinds: Vec<&'a str>,
    queues: Vec<&'a str>,
    args: Vec<&'a str>,
    tags: Vec<Option<String>>,
    max_attempts: Vec<i32>,
    run_at: Vec<Option<i64>>,
    reserves_ms: Vec<i64>,
    timeouts_ms: Vec<Option<i64>>,
    keys: Vec<Option<String>>,
    hashes: Vec<Option<&'a [u8]>>,
    traceparents: Vec<Option<&'a str>>,
    unique_keys: Vec<Option<&'a str>>,
    group_ids: Vec<Option<Uuid>>,
    priorities: Vec<i16>,
    concurrency_keys: Vec<Option<&'a str>>,
    retried_from: Vec<Option<Uuid>>,
    result_ttls_ms: Vec<Option<i64>>,
    args_digests: Vec<i64>,
}

type Insertion<'q> = sqlx::query::QueryAs<'q, sqlx::Postgres, (Uuid, i64), sqlx::postgres::PgArguments>;

impl<'a> Columns<'a> {
    fn push(&mut self, task: &'a NewTask, index: usize, submission: &'a Submission) -> Result<(), Fault> {
        let tags = (!task.tags.is_empty()).then(|| serde_json::to_string(&task.tags)).transpose();
        let idempotency = submission.idempotency.as_ref();
        self.ids.push(task.id.0);
        self.kinds.push(task.kind.as_str());
        self.queues.push(task.queue.as_str());
        self.args.push(task.args.as_str());
        self.tags.push(tags.map_err(|error| Fault::Refused(error.to_string()))?);
        self.max_attempts.push(task.max_attempts);
        self.run_at.push(task.run_at.map(|at| at.as_millisecond()));
        self.reserves_ms.push(millis(submission.reserve));
        self.timeouts_ms.push(task.timeout.map(millis));
        self.keys.push(idempotency.map(|given| row_key(&given.key, index)));
        self.hashes.push(idempotency.map(|given| given.fingerprint.as_slice()));
        self.traceparents.push(task.traceparent.as_deref());
        self.unique_keys.push(task.unique.as_ref().map(|unique| unique.key.as_str()));
        self.group_ids.push(submission.group.as_ref().map(|group| group.id.0));
        self.priorities.push(task.priority.code());
        self.concurrency_keys.push(task.concurrency_key.as_deref());
        self.retried_from.push(task.retried_from.map(|id| id.0));
        self.result_ttls_ms.push(task.result_ttl.map(millis));
        self.args_digests.push(task.args.digest().0);
        Ok(())
    }

    fn bind(self) -> Insertion<'a> {
        sqlx::query_as(INSERT)
            .bind(self.ids)
            .bind(self.kinds)
            .bind(self.queues)
            .bind(self.args)
            .bind(self.tags)
            .bind(self.max_attempts)
            .bind(self.run_at)
            .bind(self.reserves_ms)
            .bind(self.timeouts_ms)
            .bind(self.keys)
            .bind(self.hashes)
            .bind(self.traceparents)
            .bind(self.unique_keys)
            .bind(self.group_ids)
            .bind(self.priorities)
            .bind(self.concurrency_keys)
            .bind(self.retried_from)
            .bind(self.result_ttls_ms)
            .bind(self.args_digests)
    }
}

/// A row that has its key already: its task and the fingerprint of its request.
type Earlier = HashMap<String, (TaskId, Vec<u8>)>;

/// Looks up the keys of the submissions that were left out.
async fn find_earlier(
    connection: &mut PgConnection,
    submissions: impl IntoIterator<Item = &Submission>,
    created: &HashMap<Uuid, i64>,
) -> Result<Earlier, Fault> {
    let left_out = submissions.into_iter().filter(|submission| created_at(submission, created).is_none());
    let keys: Vec<String> = left_out.flat_map(row_keys).collect();
    if keys.is_empty() {
        return Ok(Earlier::new());
    }
    by_key(connection, keys).await
}

async fn by_key(connection: &mut PgConnection, keys: Vec<String>) -> Result<Earlier, Fault> {
    let rows: Vec<(String, Uuid, Vec<u8>)> = sqlx::query_as(BY_KEY).bind(keys).fetch_all(connection).await?;
    Ok(rows.into_iter().map(|(key, id, hash)| (key, (TaskId(id), hash))).collect())
}

/// What was recorded before under a key.
pub(super) async fn recorded_before(
    connections: &Connections,
    given: &Idempotency,
    tasks: usize,
) -> Result<Option<Recorded>, Fault> {
    let mut lent = connections.lend().await?;
    let earlier = by_key(&mut lent, keys_of(given, tasks)).await?;
    lent.keep();
    Ok(repetition(given, tasks, &earlier))
}

fn row_keys(submission: &Submission) -> Vec<String> {
    submission.idempotency.as_ref().map_or_else(Vec::new, |given| keys_of(given, submission.tasks.len()))
}

fn keys_of(given: &Idempotency, tasks: usize) -> Vec<String> {
    (0..tasks).map(|index| row_key(&given.key, index)).collect()
}

/// What the rows recorded before under the submission's key say; `None` when there are none.
fn replayed(submission: &Submission, earlier: &Earlier) -> Option<Recorded> {
    submission.idempotency.as_ref().and_then(|given| repetition(given, submission.tasks.len(), earlier))
}

fn repetition(given: &Idempotency, tasks: usize, earlier: &Earlier) -> Option<Recorded> {
    let found: Vec<_> = keys_of(given, tasks).iter().filter_map(|key| earlier.get(key)).collect();
    if found.is_empty() {
        return None;
    }
    if found.iter().any(|(_, hash)| hash != given.fingerprint.as_slice()) {
        return Some(Recorded::KeyReused);
    }
    // Tasks of the batch that finished long ago may have been pruned: the rest still proves the repetition.
    Some(Recorded::Replayed(found.iter().map(|(id, _)| *id).collect()))
}
