//! What one task costs the ledger: statements, rows and blocks, which the server counts for one session alone, so that
//! they are the same on every computer at every load.
//!
//! A statement more, an index more on the way of every task, or a look at rows that do not matter shows here. Who means
//! to make it dearer changes the figure.

use std::ops::Sub;
use std::time::Duration;

use futures::future::join_all;
use sqlx::{PgConnection, Row};

use super::super::PostgresLedger;
use super::super::claim::Claiming;
use super::super::lane::Bulk;
use super::super::publish::MarkQueued;
use super::super::record::Record;
use super::super::settle::Settling;
use super::ledger;
use super::server::Database;
use crate::ledger::conformance::{complete, new_task, recorded, submission, worker};
use crate::ledger::{Belief, Claim, ClaimRequest, Ledger, Mark, Settled, Settlement};
use crate::task::{Fence, Guarantee, TaskId, WorkerId};

/// Tasks measured together.
const TASKS: i64 = 100;
/// How far from the figure the blocks may lie, in percent: versions of the server may differ.
const MARGIN: i64 = 5;
/// Commits for as many tasks, written at the same time: those of a full batch, of what came behind it, and of a rest.
const COMMITS_MAX: i64 = 4;

/// What a session has done, so far or meanwhile.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Done {
    /// Kinds of statements sent.
    statements: i64,
    /// Times that all tasks were looked through.
    full_scans: i64,
    /// Tasks looked at by an index.
    read: i64,
    /// Versions of tasks written.
    written: i64,
    /// Blocks of tables and indexes asked for.
    blocks: i64,
}

const DONE: &str = "
SELECT (SELECT count(*) FROM pg_prepared_statements),
       pg_stat_get_xact_numscans('tasklane.tasks'::regclass),
       (SELECT sum(pg_stat_get_xact_tuples_fetched(indexrelid))::bigint FROM pg_index WHERE indrelid = 'tasklane.tasks'::regclass),
       pg_stat_get_xact_tuples_inserted('tasklane.tasks'::regclass) + pg_stat_get_xact_tuples_updated('tasklane.tasks'::regclass),
       sum(pg_stat_get_xact_blocks_fetched(oid))::bigint
FROM pg_class WHERE relnamespace = 'tasklane'::regnamespace AND relkind IN ('r', 'i')";

impl Sub for Done {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            statements: self.statements - before.statements,
            full_scans: self.full_scans - before.full_scans,
            read: self.read - before.read,
            written: self.written - before.written,
            blocks: self.blocks - before.blocks,
        }
    }
}

/// A session as the ledger's own are, in a ledger in use: what has finished and what waits must not matter.
struct Counted {
    session: PgConnection,
    worker: WorkerId,
    _witness: PgConnection,
    _ledger: PostgresLedger,
    _database: Database,
}

impl Counted {
    async fn new() -> Self {
        let (ledger, database) = ledger().await;
        let session = database.session().await;
        let mut witness = database.connect().await;
        // For whoever sees the ledger as it is now, all versions are kept, and looked at, that the server would otherwise
        // clear away, or not, as it finds the time.
        let old = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
        sqlx::raw_sql(old).execute(&mut witness).await.unwrap();
        let worker = worker(&ledger).await;
        Self { session, worker, _witness: witness, _ledger: ledger, _database: database }
    }

    async fn done(&mut self) -> Done {
        // Unprepared, so that it is none of the statements.
        let row = sqlx::raw_sql(DONE).fetch_one(&mut self.session).await.unwrap();
        let [statements, full_scans, read, written, blocks] = [0, 1, 2, 3, 4].map(|column| row.get(column));
        Done { statements, full_scans, read, written, blocks }
    }

    /// What some writes of one kind cost, made together.
    async fn cost_of<B: Bulk>(&mut self, items: Vec<B::Item>) -> (Done, Vec<B::Answer>) {
        // The counters are of a transaction, and move on to the server's own with its end.
        sqlx::raw_sql("BEGIN").execute(&mut self.session).await.unwrap();
        let before = self.done().await;
        let answers = B::write(&mut self.session, &items).await.unwrap();
        let cost = self.done().await - before;
        sqlx::raw_sql("COMMIT").execute(&mut self.session).await.unwrap();
        (cost, answers.into_iter().map(Result::unwrap).collect())
    }

    async fn record(&mut self) -> (Done, Vec<TaskId>) {
        let tasks: Vec<_> = std::iter::repeat_with(new_task).take(TASKS as usize).collect();
        let ids = tasks.iter().map(|task| task.id).collect();
        let (cost, _) = self.cost_of::<Record>(tasks.into_iter().map(|task| submission(vec![task])).collect()).await;
        (cost, ids)
    }

    async fn mark(&mut self, ids: &[TaskId]) -> Done {
        let marks = ids.iter().map(|id| Mark { id: *id, fence: Fence(0), ago: Duration::ZERO }).collect();
        self.cost_of::<MarkQueued>(vec![marks]).await.0
    }

    async fn claim(&mut self, ids: &[TaskId]) -> Done {
        let claims = ids.iter().map(|id| request(*id, self.worker)).collect();
        let (cost, answers) = self.cost_of::<Claiming>(claims).await;
        assert!(answers.iter().all(|answer| matches!(answer, Claim::Granted(_))), "{answers:?}");
        cost
    }

    async fn settle(&mut self, ids: &[TaskId]) -> Done {
        let (cost, answers) = self.cost_of::<Settling>(ids.iter().map(|id| completed(*id)).collect()).await;
        assert!(answers.iter().all(|answer| *answer == Settled::Applied), "{answers:?}");
        cost
    }
}

fn request(id: TaskId, worker: WorkerId) -> ClaimRequest {
    let belief = Belief { kind: new_task().kind, published: Some(Fence(0)), args: new_task().args.digest() };
    ClaimRequest { id, worker, guarantee: Guarantee::AtLeastOnce, belief, crashes_below: 2 }
}

fn completed(id: TaskId) -> Settlement {
    Settlement { id, fence: Fence(1), transition: complete() }
}

/// Rows are as many as they were; blocks are about as many.
#[track_caller]
fn assert_costs(what: &str, measured: Done, known: Done) {
    let far = (measured.blocks - known.blocks).abs() * 100 > known.blocks * MARGIN;
    let blocks = if far { known.blocks } else { measured.blocks };
    assert_eq!(measured, Done { blocks, ..known }, "{what} {TASKS} tasks has become dearer, or cheaper: say so here");
}

#[tokio::test]
async fn no_write_has_become_dearer() {
    let mut counted = Counted::new().await;
    let mut statements = Vec::new();
    for _ in 0..10 {
        let (recording, ids) = counted.record().await;
        let round = [recording, counted.mark(&ids).await, counted.claim(&ids).await, counted.settle(&ids).await];
        statements.push(round.map(|done| done.statements));
        counted.record().await;
    }
    assert_eq!(statements[0], [1; 4], "statements of each write");
    assert_eq!(statements[9], [0; 4], "statements that are sent for the first time");
    let known = Done { statements: 0, full_scans: 0, read: 0, written: TASKS, blocks: 0 };
    let (recording, ids) = counted.record().await;
    assert_costs("recording", recording, Done { blocks: 608, ..known });
    assert_costs("marking", counted.mark(&ids).await, Done { read: 2 * TASKS, blocks: 1_458, ..known });
    assert_costs("claiming", counted.claim(&ids).await, Done { read: 2 * TASKS, blocks: 1_796, ..known });
    assert_costs("settling", counted.settle(&ids).await, Done { read: 2 * TASKS, blocks: 1_828, ..known });
}

/// What comes at the same time is committed together: each commit waits for the server's log.
#[tokio::test]
async fn writes_that_come_together_share_commits() {
    let (ledger, database) = ledger().await;
    let holder = worker(&ledger).await;
    let mut reader = database.connect().await;
    let mut commits = async |ids: &[TaskId]| -> i64 {
        let ids: Vec<_> = ids.iter().map(|id| id.0).collect();
        // A row names the transaction that has written it.
        let sql = "SELECT count(DISTINCT xmin::text) FROM tasks WHERE id = ANY($1)";
        sqlx::query_scalar(sql).bind(ids).fetch_one(&mut reader).await.unwrap()
    };
    let ids = join_all((0..TASKS).map(async |_| recorded(&ledger, 1, |_| {}).await[0])).await;
    let recording = commits(&ids).await;
    join_all(ids.iter().map(async |id| ledger.claim(request(*id, holder)).await.unwrap())).await;
    let claiming = commits(&ids).await;
    join_all(ids.iter().map(async |id| ledger.settle(completed(*id)).await.unwrap())).await;
    let all = [recording, claiming, commits(&ids).await];
    assert!(all.iter().all(|commits| *commits <= COMMITS_MAX), "commits of {TASKS} tasks: {all:?}");
}
