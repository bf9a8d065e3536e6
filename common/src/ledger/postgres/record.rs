//! Recording: the first durable trace of a task.

use std::collections::HashMap;

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::connections::Connections;
use super::fault::Fault;
use super::lane::{Answers, Bulk, Size, TRIES};
use crate::clock::{millis, timestamp};
use crate::ledger::{Idempotency, Recorded, Submission};
use crate::task::{NewTask, TaskId};

/// Equal keys meet in the unique index: the later statement waits there for the earlier one to commit, then leaves
/// its row out. Rows go in by the order of their keys, so that two statements never wait for each other.
const INSERT: &str = r#"
WITH clock AS MATERIALIZED (SELECT tasklane_now() AS now)
INSERT INTO tasks (id, kind, queue, state, args, tags, max_attempts, created_at, run_at, due_at, timeout_ms,
                   idempotency_key, idempotency_hash, traceparent)
SELECT n.id, n.kind, n.queue,
       CASE WHEN n.run_at > clock.now THEN 1 ELSE 0 END,  -- scheduled, accepted
       n.args, n.tags, n.max_attempts, clock.now,
       GREATEST(n.run_at, clock.now),
       CASE WHEN n.run_at > clock.now THEN n.run_at ELSE clock.now + n.reserve_ms END,
       n.timeout_ms, n.key, n.hash, n.traceparent
FROM clock, UNNEST($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::integer[], $7::bigint[],
                   $8::bigint[], $9::bigint[], $10::text[], $11::bytea[], $12::text[])
     AS n (id, kind, queue, args, tags, max_attempts, run_at, reserve_ms, timeout_ms, key, hash, traceparent)
ORDER BY n.key COLLATE "C", n.id
ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id, created_at"#;

const BY_KEY: &str = "
SELECT idempotency_key, id, idempotency_hash FROM tasks
WHERE idempotency_key = ANY($1) AND idempotency_key IS NOT NULL";

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
                let new = created_at(submission, &created).map(|at| Recorded::New { at: timestamp(at) });
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

/// Records several tasks under one key, alone in a transaction: when one row is left out, all are.
pub(super) async fn record_keyed_batch(connections: &Connections, submission: &Submission) -> Result<Recorded, Fault> {
    let mut lent = connections.lend().await?;
    for _ in 0..TRIES {
        let mut transaction = lent.begin().await?;
        let created = insert(&mut transaction, [submission]).await?;
        if let Some(at) = created_at(submission, &created) {
            transaction.commit().await?;
            lent.keep();
            return Ok(Recorded::New { at: timestamp(at) });
        }
        transaction.rollback().await?;
        let earlier = find_earlier(&mut lent, [submission], &HashMap::new()).await?;
        if let Some(replayed) = replayed(submission, &earlier) {
            lent.keep();
            return Ok(replayed);
        }
    }
    Err(vanishing())
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

async fn insert(
    connection: &mut PgConnection,
    submissions: impl IntoIterator<Item = &Submission>,
) -> Result<HashMap<Uuid, i64>, Fault> {
    let mut columns = Columns::default();
    for submission in submissions {
        for (index, task) in submission.tasks.iter().enumerate() {
            columns.push(task, index, submission)?;
        }
    }
    let rows: Vec<(Uuid, i64)> = columns.bind().fetch_all(connection).await?;
    Ok(rows.into_iter().collect())
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
    let rows: Vec<(String, Uuid, Vec<u8>)> = sqlx::query_as(BY_KEY).bind(keys).fetch_all(connection).await?;
    Ok(rows.into_iter().map(|(key, id, hash)| (key, (TaskId(id), hash))).collect())
}

fn row_keys(submission: &Submission) -> Vec<String> {
    let keys = |given: &Idempotency| (0..submission.tasks.len()).map(|index| row_key(&given.key, index)).collect();
    submission.idempotency.as_ref().map(keys).unwrap_or_default()
}

/// What the rows recorded before under the submission's key say; `None` when there are none.
fn replayed(submission: &Submission, earlier: &Earlier) -> Option<Recorded> {
    let given = submission.idempotency.as_ref()?;
    let found: Vec<_> = row_keys(submission).iter().filter_map(|key| earlier.get(key)).collect();
    if found.is_empty() {
        return None;
    }
    if found.iter().any(|(_, hash)| hash != given.fingerprint.as_slice()) {
        return Some(Recorded::KeyReused);
    }
    // Tasks of the batch that finished long ago may have been pruned: the rest still proves the repetition.
    Some(Recorded::Replayed(found.iter().map(|(id, _)| *id).collect()))
}
