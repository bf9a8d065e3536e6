//! Claiming: the only way into `running`.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::fault::Fault;
use super::lane::{Answers, Bulk, Size, TRIES};
use super::limits;
use super::rows::{codes_for, guarantee_code};
use crate::clock::timestamp;
use crate::ledger::{Belief, Believed, Claim, ClaimRequest, Granted, Refusal};
use crate::state::{Event, State};
use crate::task::{Fence, TaskId};

/// Two claims of one task: the second waits for the row's lock, looks at the row again and finds it running.
///
/// A lease may end between the look at `workers` and the commit. Then the grant goes to a worker that is dead or about
/// to notice: it stops by its own clock before the ledger's runs out, and the next look at abandoned tasks, which
/// comes after this commit, finds the task. Rows are locked in the order of ids by every grouped write, so that none
/// waits in a circle.
const CLAIM: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now),
gates AS MATERIALIZED (SELECT * FROM tasklane.gates()),
asked AS (
    SELECT a.*
    FROM clock, UNNEST($1::uuid[], $2::uuid[], $3::smallint[], $6::int[], $7::bigint[], $9::text[], $10::bigint[])
         AS a (id, worker, guarantee, crashes_below, published, kind, args_digest)
    JOIN tasklane.workers w ON w.id = a.worker
    WHERE NOT w.dead AND w.expires_at > clock.now
),
locked AS MATERIALIZED (
    SELECT t.id, a.worker, a.guarantee
    FROM clock, gates g, asked a JOIN tasklane.tasks t ON t.id = a.id
    WHERE t.state = ANY($4) AND t.run_at <= clock.now AND t.crashes < a.crashes_below
      AND t.kind = a.kind AND a.published BETWEEN COALESCE(t.void_below, -1) AND t.fence
      AND (t.args_digest IS NULL OR t.args_digest = a.args_digest)
      AND t.queue <> ALL(g.paused)
      AND ($8 OR NOT ('queue:' || t.queue = ANY(g.limited) OR 'kind:' || t.kind = ANY(g.limited)
                      OR t.concurrency_key IS NOT NULL AND g.keys))
    ORDER BY t.id
    FOR UPDATE OF t
)
UPDATE tasklane.tasks t
SET state = $5, fence = t.fence + 1, attempt = t.attempt + 1, worker_id = l.worker, guarantee = l.guarantee,
    started_at = clock.now, due_at = NULL, first_due_at = COALESCE(t.first_due_at, t.run_at)
FROM clock, locked l
WHERE t.id = l.id
RETURNING t.id, t.fence, t.attempt, t.max_attempts, t.timeout_ms, t.first_due_at, t.run_at, t.queued_at,
          t.started_at";

const WHY_NOT: &str = "
WITH clock AS MATERIALIZED (SELECT tasklane.now_ms() AS now)
SELECT t.id, t.state, t.run_at <= clock.now,
       EXISTS (SELECT 1 FROM tasklane.workers w WHERE w.id = a.worker AND NOT w.dead AND w.expires_at > clock.now),
       t.crashes >= a.crashes_below, EXISTS (SELECT 1 FROM tasklane.paused_queues p WHERE p.name = t.queue),
       EXISTS (SELECT 1 FROM tasklane.limits l WHERE (l.scope IN ('queue:' || t.queue, 'kind:' || t.kind)
                                             OR t.concurrency_key IS NOT NULL AND starts_with(l.scope, 'key:'))
                                        AND (l.max_running IS NOT NULL OR l.rate_tasks IS NOT NULL)),
       t.kind, t.fence, t.void_below, t.args_digest
FROM clock, UNNEST($1::uuid[], $2::uuid[], $3::int[]) AS a (id, worker, crashes_below)
JOIN tasklane.tasks t ON t.id = a.id";

/// A task whose message was delivered before its time, by a clock that was set back: the refused delivery is
/// acked, so the row must be published again.
const TAKE_CUSTODY: &str = "
UPDATE tasklane.tasks SET state = $3, due_at = run_at, queued_at = NULL
WHERE id IN (SELECT id FROM tasklane.tasks WHERE id = ANY($1) AND state = ANY($2) ORDER BY id FOR UPDATE)
  AND run_at > tasklane.now_ms()
RETURNING id";

type GrantedRow = (Uuid, i64, i32, i32, Option<i64>, i64, i64, Option<i64>, i64);

/// Of [`WHY_NOT`]: the task, its state, what is due, alive, suspect, paused and limited about the claim, and what its message
/// is believed by.
type LookedRow = (Uuid, i16, bool, bool, bool, bool, bool, String, i64, Option<i64>, Option<i64>);

/// Claims of different tasks share a statement.
pub(super) struct Claiming;

impl Bulk for Claiming {
    type Item = ClaimRequest;
    type Answer = Claim;

    fn size(_: &ClaimRequest) -> Size {
        Size { rows: 1, bytes: 0 }
    }

    fn only(request: &ClaimRequest) -> Option<TaskId> {
        Some(request.id)
    }

    async fn write(connection: &mut PgConnection, items: &[ClaimRequest]) -> Answers<Claim> {
        let mut answers: HashMap<Uuid, Claim> = HashMap::with_capacity(items.len());
        // A refused task can become claimable before it is asked why: its holder settled, or its time came.
        // Then the answer would be a lie, and the claim is tried again.
        for _ in 0..TRIES {
            let open: Vec<&ClaimRequest> = items.iter().filter(|item| !answers.contains_key(&item.id.0)).collect();
            if open.is_empty() {
                break;
            }
            answers.extend(grant(connection, &open, false).await?);
            let refused: Vec<&ClaimRequest> =
                open.into_iter().filter(|item| !answers.contains_key(&item.id.0)).collect();
            if !refused.is_empty() {
                answers.extend(refuse(connection, &refused).await?);
            }
        }
        let restless = || Fault::Collided("the task changes too fast to be claimed".to_owned());
        Ok(items.iter().map(|item| answers.remove(&item.id.0).ok_or_else(restless)).collect())
    }
}

/// The claims that nothing stands against; a limit does not when the tasks are `admitted` by it.
pub(super) async fn grant(
    connection: &mut PgConnection,
    asked: &[&ClaimRequest],
    admitted: bool,
) -> Result<Vec<(Uuid, Claim)>, Fault> {
    let rows: Vec<GrantedRow> = sqlx::query_as(CLAIM)
        .bind(asked.iter().map(|request| request.id.0).collect::<Vec<_>>())
        .bind(asked.iter().map(|request| request.worker.0).collect::<Vec<_>>())
        .bind(asked.iter().map(|request| guarantee_code(request.guarantee)).collect::<Vec<_>>())
        .bind(codes_for(Event::Claim))
        .bind(State::Running.code())
        .bind(asked.iter().map(|request| request.crashes_below).collect::<Vec<_>>())
        .bind(asked.iter().map(|request| request.belief.published_under()).collect::<Vec<_>>())
        .bind(admitted)
        .bind(asked.iter().map(|request| request.belief.kind.as_str()).collect::<Vec<_>>())
        .bind(asked.iter().map(|request| request.belief.args.0).collect::<Vec<_>>())
        .fetch_all(connection)
        .await?;
    Ok(rows.into_iter().map(|row| (row.0, Claim::Granted(granted(row, admitted)))).collect())
}

fn granted(row: GrantedRow, limited: bool) -> Granted {
    let (_, fence, attempt, max_attempts, timeout_ms, first_due_at, run_at, queued_at, started_at) = row;
    Granted {
        fence: Fence(fence),
        attempt,
        max_attempts,
        timeout: timeout_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
        first_due_at: timestamp(first_due_at),
        run_at: timestamp(run_at),
        queued_at: queued_at.map(timestamp),
        started_at: timestamp(started_at),
        limited,
    }
}

/// Finds out why, and asks the limits where only they stand against it; leaves out the tasks that could be claimed now.
async fn refuse(connection: &mut PgConnection, refused: &[&ClaimRequest]) -> Result<Vec<(Uuid, Claim)>, Fault> {
    let ids: Vec<Uuid> = refused.iter().map(|request| request.id.0).collect();
    let rows: Vec<LookedRow> = sqlx::query_as(WHY_NOT)
        .bind(&ids)
        .bind(refused.iter().map(|request| request.worker.0).collect::<Vec<_>>())
        .bind(refused.iter().map(|request| request.crashes_below).collect::<Vec<_>>())
        .fetch_all(&mut *connection)
        .await?;
    let beliefs: HashMap<Uuid, &Belief> = refused.iter().map(|request| (request.id.0, &request.belief)).collect();
    let mut reasons: HashMap<Uuid, Option<Refusal>> = ids.into_iter().map(|id| (id, Some(Refusal::Unknown))).collect();
    let mut early = Vec::new();
    let mut limited = Vec::new();
    for (id, code, due, alive, suspect, paused, limits, kind, fence, void_below, args) in rows {
        let state = State::from_code(code).ok_or_else(|| Fault::corrupt(format!("task {id} has state {code}")))?;
        let row = Believed { kind: &kind, fence, void_below, args };
        let untrue = beliefs.get(&id).and_then(|belief| belief.refusal(&row));
        let looked = Looked { untrue, due, paused, suspect, alive, limited: limits };
        let reason = reason(state, looked);
        match reason {
            Some(Refusal::NotDue) if state == State::Queued => early.push(id),
            Some(Refusal::Limited) => limited.push(id),
            _ => {}
        }
        reasons.insert(id, reason);
    }
    if !early.is_empty() {
        let taken = take_custody(connection, &early).await?;
        // What was cancelled, published or fell due in between has another answer by now: its claim is tried again.
        for id in early.into_iter().filter(|id| !taken.contains(id)) {
            reasons.insert(id, None);
        }
    }
    let mut answers = Vec::new();
    if !limited.is_empty() {
        reasons.retain(|id, _| !limited.contains(id));
        let asked: Vec<_> = refused.iter().copied().filter(|request| limited.contains(&request.id.0)).collect();
        answers = limits::claim(connection, &asked).await?;
    }
    answers.extend(reasons.into_iter().filter_map(|(id, reason)| Some((id, Claim::Refused(reason?)))));
    Ok(answers)
}

/// What may stand against a claim of a waiting task.
struct Looked {
    /// What is not true of what the message says.
    untrue: Option<Refusal>,
    due: bool,
    paused: bool,
    suspect: bool,
    alive: bool,
    limited: bool,
}

fn reason(state: State, Looked { untrue, due, paused, suspect, alive, limited }: Looked) -> Option<Refusal> {
    match state {
        State::Running => Some(Refusal::Held),
        State::Completed | State::Cancelled | State::Discarded => Some(Refusal::Finished),
        // Before all that a message which counts would be told.
        _ if untrue.is_some() => untrue,
        _ if !due => Some(Refusal::NotDue),
        // Before the suspect, which would be tried once more or put back.
        _ if paused => Some(Refusal::Paused),
        _ if suspect => Some(Refusal::Suspect),
        _ if !alive => Some(Refusal::LeaseLost),
        _ if limited => Some(Refusal::Limited),
        _ => None,
    }
}

async fn take_custody(connection: &mut PgConnection, early: &[Uuid]) -> Result<Vec<Uuid>, Fault> {
    let taken = sqlx::query_scalar(TAKE_CUSTODY)
        .bind(early)
        .bind(codes_for(Event::Strand))
        .bind(State::Accepted.code())
        .fetch_all(connection)
        .await?;
    Ok(taken)
}
