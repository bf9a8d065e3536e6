//! The guarantee `transactional`: a handler's own writes and the completion commit together, whatever is cut where.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tasklane_tests::api::Api;
use tasklane_tests::history::{self, Line, Op};
use tasklane_tests::ledger::{Ledger, LedgerKind};
use tasklane_tests::oplog::{OperationLog, Step};
use tasklane_tests::proxy::Proxy;
use tasklane_tests::stack::{LEASE_TTL, Producer, Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::time::sleep;
use url::Url;

use crate::load::{check_completed, ids, nothing_left, tasks};

/// How many tasks count, each to be counted once.
const TASKS: usize = 10_000;
const BATCH: usize = 1_000;
const WORKERS: usize = 3;
/// No crash makes a task suspect: here none is guilty. The producer rescues, too.
const MAX_CRASHES: i32 = 1000;
/// So many runs must have been cut, or the test has proven too little.
const CUT_MIN: usize = 100;
const LIMIT: Duration = Duration::from_secs(120);

on_both_ledgers! {
    async fn ten_thousand_increments_under_random_kills_make_ten_thousand(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().env("TASKLANE_MAX_CRASHES", MAX_CRASHES).start().await?;
        stack.ledger.execute(COUNTER).await?;
        let mut submitted = BTreeSet::new();
        while submitted.len() < TASKS {
            submitted.extend(ids(&producer.api.submit_batch(&tasks(BATCH, "test.count", &json!({"work_ms": 10}))).await?));
        }
        let ended = tokio::select! {
            ended = producer.api.all_ended(TASKS, LIMIT * 2) => ended?,
            killing = kill_at_random(&stack, &log) => anyhow::bail!("the workers are not killed any more: {killing:?}"),
        };

        check_completed(&ended, &submitted)?;
        let (cut, repeated) = cut_runs(&log)?;
        println!("{ledger}: {cut} runs were cut, and {repeated} tasks started more than once");
        ensure!(cut >= CUT_MIN, "only {cut} runs were cut: the test proves too little");
        assert_eq!(stack.ledger.number(COUNTED).await?, TASKS as i64, "every task counts once");
        // Each increment has its own result: the values 1 to 10,000.
        let results: BTreeSet<i64> = ended.iter().filter_map(|task| task.result.as_i64()).collect();
        assert_eq!((results.len(), results.first(), results.last()), (TASKS, Some(&1), Some(&(TASKS as i64))));
        log.check_fences_rise()?;
        log.check_no_overlap()?;
        nothing_left(&stack.vhost).await
    }
}

on_both_ledgers! {
    /// In SQLite it then holds up everybody who writes, and commits first when it goes on; at a server others go on.
    async fn a_worker_frozen_inside_of_its_transaction_counts_once(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().env("TASKLANE_MAX_CRASHES", MAX_CRASHES).start().await?;
        stack.ledger.execute(COUNTER).await?;
        let frozen = stack.test_worker(&log).short_lease().start().await?;
        let (task, before) = freeze_inside(&producer.api, &log, &frozen).await?;
        let _healthy = stack.test_worker(&log).spawn()?;
        if ledger == LedgerKind::Sqlite {
            assert!(!stack.ledger.takes_writes()?, "it holds the file");
            sleep(LEASE_TTL * 2).await;
        } else {
            producer.api.in_state(&task, "completed", LIMIT).await?;
        }
        frozen.process.thaw()?;
        let done = producer.api.in_state(&task, "completed", LIMIT).await?;
        let attempt = if ledger == LedgerKind::Sqlite { 1 } else { 2 };
        assert_eq!((done.attempt, &done.result), (attempt, &json!(before + 1)), "{done:#?}");
        // What it has written by now, it has written for good: it works on, or its next life does.
        let later = ids(&producer.api.submit_batch(&tasks(20, "test.count", &json!({}))).await?);
        check_completed(&producer.api.all_ended(before + 1 + later.len(), LIMIT).await?, &later)?;
        assert_eq!(stack.ledger.number(COUNTED).await?, (before + 1 + later.len()) as i64);
        log.check_fences_rise()?;
        nothing_left(&stack.vhost).await
    }
}

/// Freezes a worker inside of a transaction; answers the task, and how many have ended before it, as a slow machine wanted.
async fn freeze_inside(api: &Api, log: &OperationLog, worker: &Worker) -> Result<(String, usize)> {
    for before in 0..FREEZES_MAX {
        // SQLite allows a transaction a second.
        let task = api.submit(&json!({"kind": "test.count", "args": {"inside_ms": 900}})).await?.id;
        eventually(LIMIT, "the transaction to be under way", async || {
            let begun = |line: &Line| matches!(&line.op, Op::Effect(run) if run.task == task);
            Ok(history::read(log.file())?.iter().any(begun).then_some(()))
        })
        .await?;
        worker.process.freeze()?;
        if log.of(&task)?.len() == 1 {
            return Ok((task, before));
        }
        worker.process.thaw()?;
        api.in_state(&task, "completed", LIMIT).await?;
    }
    anyhow::bail!("the run had ended {FREEZES_MAX} times")
}

/// How often a worker is frozen until it is inside of a transaction.
const FREEZES_MAX: usize = 10;

const COUNTED: &str = "SELECT n FROM counter";

const COUNTER: &str = "CREATE TABLE counter (n BIGINT NOT NULL); INSERT INTO counter VALUES (0)";

/// Kills workers without a warning, each a while after some more runs have begun, and starts others, until it is dropped.
async fn kill_at_random(stack: &Stack, log: &OperationLog) -> Result<()> {
    let seed: u64 = rand::random();
    println!("the seed of the kills is {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let start = || {
        let worker = stack.test_worker(log).short_lease().env("TASKLANE_MAX_CRASHES", MAX_CRASHES);
        worker.env("TASKLANE_CONCURRENCY", 32).spawn()
    };
    let mut workers = (0..WORKERS).map(|_| start()).collect::<Result<Vec<Worker>>>()?;
    let mut begun = 0;
    loop {
        begun += random.random_range(100..600);
        log.started(begun, LIMIT * 2).await?;
        sleep(Duration::from_micros(random.random_range(0..30_000))).await;
        let victim = random.random_range(0..WORKERS);
        workers[victim].process.kill().await?;
        workers[victim] = start()?;
    }
}

/// How many runs have begun and not ended, and how many tasks have begun more than once.
fn cut_runs(log: &OperationLog) -> Result<(usize, usize)> {
    let mut runs: BTreeMap<(String, u64), bool> = BTreeMap::new();
    for entry in log.entries()? {
        *runs.entry((entry.task, entry.fence)).or_default() |= entry.step == Step::End;
    }
    let tasks: BTreeSet<&String> = runs.keys().map(|(task, _)| task).collect();
    Ok((runs.values().filter(|ended| !**ended).count(), runs.len() - tasks.len()))
}

/// The wire breaks between `COMMIT` and its answer, and the server commits.
#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_found_out_and_not_repeated() -> Result<()> {
    let cut = CutAtCommit::new().await?;
    cut.finish_commit().await?;
    let done = cut.producer.api.in_state(&cut.task, "completed", LIMIT).await?;
    assert_eq!((done.attempt, cut.stack.ledger.number(COUNTED).await?), (1, 1), "{done:#?}");
    cut.worker.process.logged("the handler's transaction had committed", LIMIT).await?;
    eventually(LIMIT, "the worker to count it", async || {
        let metrics = cut.worker.metrics().await?;
        let labels = [("kind", "test.count"), ("outcome", "completed")];
        Ok((metrics.sum("tasklane_tasks_settled_total", &labels) == 1.0).then_some(()))
    })
    .await?;
    assert_eq!(cut.worker.metrics().await?.sum("tasklane_results_fenced_total", &[]), 0.0);
    nothing_left(&cut.stack.vhost).await
}

/// The wire breaks between `COMMIT` and its answer, and the server does not come to commit.
#[tokio::test]
async fn a_commit_that_did_not_happen_is_found_out_and_repeated() -> Result<()> {
    let cut = CutAtCommit::new().await?;
    cut.stack
        .ledger
        .execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE query = 'COMMIT' AND wait_event = 'advisory' AND datname = current_database()",
        )
        .await?;
    cut.finish_commit().await?;
    let done = cut.producer.api.in_state(&cut.task, "completed", LIMIT).await?;
    assert_eq!((done.attempt, done.fence, cut.stack.ledger.number(COUNTED).await?), (2, 3, 1), "{done:#?}");
    assert!(done.errors[0].message.contains("the end of the handler's transaction is unknown"), "{done:#?}");
    nothing_left(&cut.stack.vhost).await
}

/// A run whose `COMMIT` has reached the server and waits there, while all wires of its worker have been cut.
struct CutAtCommit {
    task: String,
    worker: Worker,
    producer: Producer,
    /// Its session holds what the commit waits for.
    gate: tokio::sync::Mutex<Option<PgConnection>>,
    _wire: Proxy,
    stack: Stack,
}

impl CutAtCommit {
    async fn new() -> Result<Self> {
        let stack = Stack::new(LedgerKind::Postgres).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        stack.ledger.execute(COUNTER).await?;
        stack.ledger.execute(GATE).await?;
        let mut gate = PgConnection::connect(&stack.ledger.url()).await?;
        sqlx::query("SELECT pg_advisory_lock(7)").execute(&mut gate).await?;
        let (wire, url) = proxy(&stack).await?;
        let worker = stack.test_worker(&log).env("TASKLANE_LEDGER_URL", &url).start().await?;
        let task = producer.api.submit(&json!({"kind": "test.count"})).await?.id;
        eventually(LIMIT, "the commit to wait at the server", async || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE query = 'COMMIT' AND wait_event = 'advisory'
                       AND datname = current_database()";
            let waiting: i64 = sqlx::query_scalar(sql).fetch_one(&mut connect(&stack.ledger).await?).await?;
            Ok((waiting == 1).then_some(()))
        })
        .await?;
        wire.cut_all();
        worker.process.logged("the end of the handler's transaction is unknown", LIMIT).await?;
        Ok(Self { task, worker, producer, gate: Some(gate).into(), _wire: wire, stack })
    }

    /// Lets whatever waits at the gate go on.
    async fn finish_commit(&self) -> Result<()> {
        let gate = self.gate.lock().await.take().context("the gate is closed")?;
        Ok(gate.close().await?)
    }
}

/// A commit of an increment waits for the lock that the test holds.
const GATE: &str = "
CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER gate AFTER UPDATE ON counter DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait_at_gate();";

/// A wire to the ledger's server, and the ledger's address behind it.
async fn proxy(stack: &Stack) -> Result<(Proxy, String)> {
    let Ledger::Postgres(database) = &stack.ledger else { anyhow::bail!("the ledger is on a server") };
    let url: Url = database.url().parse()?;
    let server = url.socket_addrs(|| Some(5432))?;
    let wire = Proxy::to(*server.first().context("the database has an address")?).await?;
    let url = database.url_at(wire.addr())?;
    Ok((wire, url))
}

async fn connect(ledger: &Ledger) -> Result<PgConnection> {
    Ok(PgConnection::connect(&ledger.url()).await?)
}
