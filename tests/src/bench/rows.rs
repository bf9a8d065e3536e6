//! The rows: what is started, what is submitted, and from when to when it counts.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::http::Connection;
use super::raw::Raw;
use super::{Plan, Row, percentile};
use crate::ledger::LedgerKind;
use crate::metrics::Metrics;
use crate::port::free_port;
use crate::stack::{Producer, Stack, Start, Worker};
use crate::wait::eventually;

/// How long one measurement may take.
const LIMIT: Duration = Duration::from_secs(300);
/// How many tasks one batch has.
const BATCH: usize = 1_000;
/// How many connections submit batches.
const BATCHERS: usize = 2;
/// How many connections submit single tasks.
const SINGLES: usize = 64;
/// How many workers run.
const WORKERS: usize = 2;
/// How many tasks are run before anything counts.
const WARM: usize = 2_000;
/// How many times a latency is measured.
const LATENCIES: usize = 300;

/// The 256 bytes of every task.
fn args() -> Value {
    json!({"work_ms": 0, "answer": "x".repeat(226)})
}

fn task() -> Value {
    json!({"kind": "test.work", "args": args()})
}

/// The broker alone: both directions at once, draining, and latency.
pub async fn raw(plan: Plan) -> Result<[Row; 3]> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let raw = Raw::on(&stack.vhost).await?;
    let body = serde_json::to_vec(&args())?;
    raw.both(WARM, &body).await?;
    let (mut both, mut drain, mut latency) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.repeats {
        both.push(raw.both(plan.tasks, &body).await?);
        drain.push(raw.drain(plan.tasks, &body).await?);
        latency.push(raw.latency(LATENCIES, &body).await?);
    }
    let row = |name, unit, measured| Row::of(name, None, unit, measured);
    Ok([row("raw", "/s", both), row("raw drain", "/s", drain), row("raw latency", "ms p50", latency)])
}

/// A producer, its address, and workers that do nothing.
struct World {
    addr: SocketAddr,
    producer: Producer,
    workers: Vec<Worker>,
    stack: Stack,
}

impl World {
    async fn new(ledger: LedgerKind, workers: usize) -> Result<Self> {
        let stack = Stack::new(ledger).await?;
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let producer = stack.producer().at(addr).env("TASKLANE_LOG", "warn").start().await?;
        let mut world = Self { addr, producer, workers: Vec::new(), stack };
        world.hire(workers).await?;
        Ok(world)
    }

    fn worker(&self) -> Start<Worker> {
        self.stack.worker().binary("test-worker").env("TASKLANE_LOG", "warn")
    }

    async fn hire(&mut self, count: usize) -> Result<()> {
        let started = try_join_all((0..count).map(|_| self.worker().start())).await?;
        self.workers.extend(started);
        Ok(())
    }

    /// How many tasks the workers have completed.
    async fn completed(&self) -> Result<f64> {
        let metrics: Vec<Metrics> = try_join_all(self.workers.iter().map(Worker::metrics)).await?;
        Ok(metrics.iter().map(|metrics| metrics.sum("tasklane_tasks_settled_total", &[("outcome", "completed")])).sum())
    }

    async fn until_completed(&self, count: f64) -> Result<()> {
        eventually(LIMIT, &format!("{count} tasks to complete"), async || {
            Ok((self.completed().await? >= count).then_some(()))
        })
        .await
    }

    /// Submits in batches over a few connections.
    async fn batches(&self, tasks: usize) -> Result<()> {
        let body = serde_json::to_vec(&json!({"tasks": vec![task(); BATCH]}))?;
        let left = AtomicUsize::new(tasks.div_ceil(BATCH));
        self.submit(BATCHERS, "/v1/tasks/batch", &body, &left).await
    }

    /// Submits one by one over many connections.
    async fn singles(&self, tasks: usize) -> Result<()> {
        let body = serde_json::to_vec(&task())?;
        self.submit(SINGLES, "/v1/tasks", &body, &AtomicUsize::new(tasks)).await
    }

    async fn submit(&self, connections: usize, path: &str, body: &[u8], left: &AtomicUsize) -> Result<()> {
        let take = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        let submit = async || {
            let mut connection = Connection::open(self.addr).await?;
            while take() {
                let status = connection.post(path, body).await?;
                ensure!(status == 202, "a submission was answered with {status}");
            }
            anyhow::Ok(())
        };
        try_join_all((0..connections).map(|_| submit())).await?;
        Ok(())
    }

    /// Tasks a second, from the first submission to the last completion.
    async fn end_to_end(&self, tasks: usize, single: bool) -> Result<f64> {
        let before = self.completed().await?;
        let begun = Instant::now();
        let submit = async { if single { self.singles(tasks).await } else { self.batches(tasks).await } };
        tokio::try_join!(submit, self.until_completed(before + tasks as f64))?;
        Ok(tasks as f64 / begun.elapsed().as_secs_f64())
    }

    /// The times of single tasks that somebody waits for, in milliseconds: the median and the 99th percentile.
    async fn latency(&self) -> Result<[f64; 2]> {
        let body = serde_json::to_vec(&task())?;
        let mut connection = Connection::open(self.addr).await?;
        let mut times = Vec::with_capacity(LATENCIES);
        for _ in 0..LATENCIES {
            let begun = Instant::now();
            let status = connection.post("/v1/tasks?wait_ms=10000", &body).await?;
            ensure!(status == 200, "a task that was waited for was answered with {status}");
            times.push(begun.elapsed());
        }
        times.sort_unstable();
        Ok([percentile(&times, 0.5), percentile(&times, 0.99)])
    }
}

/// End to end, by batch and one by one, and the latency of an idle system.
pub async fn end_to_end(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let world = World::new(ledger, WORKERS).await?;
    world.end_to_end(WARM, false).await?;
    let (mut batch, mut single) = (Vec::new(), Vec::new());
    let mut latency = [Vec::new(), Vec::new()];
    for _ in 0..plan.repeats {
        batch.push(world.end_to_end(plan.tasks, false).await?);
        single.push(world.end_to_end(plan.tasks / 2, true).await?);
        for (all, measured) in latency.iter_mut().zip(world.latency().await?) {
            all.push(measured);
        }
    }
    let [median, tail] = latency;
    let row = |title, unit, measured| Row::of(title, Some(name), unit, measured);
    Ok(vec![
        row("e2e batch", "/s", batch),
        row("e2e single", "/s", single),
        row("latency", "ms p50", median),
        row("latency", "ms p99", tail),
    ])
}

/// What is taken in without a worker, and how fast two workers work the backlog off.
pub async fn drain(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let (mut accept, mut drain) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeats {
        let mut world = World::new(ledger, 0).await?;
        let begun = Instant::now();
        world.batches(plan.tasks).await?;
        accept.push(plan.tasks as f64 / begun.elapsed().as_secs_f64());
        let queue = "tasklane.q.default";
        eventually(LIMIT, "the backlog to be in the broker", async || {
            let depth = world.stack.vhost.depth(queue).await?;
            Ok((depth == Some(u32::try_from(plan.tasks)?)).then_some(()))
        })
        .await?;
        let begun = Instant::now();
        world.hire(WORKERS).await?;
        world.until_completed(plan.tasks as f64).await?;
        drain.push(plan.tasks as f64 / begun.elapsed().as_secs_f64());
    }
    Ok(vec![Row::of("accept", Some(name), "/s", accept), Row::of("drain", Some(name), "/s", drain)])
}

/// How late tasks start that are due one after the other, in an idle system: the median and the 99th percentile.
pub async fn delays(ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let world = World::new(ledger, 1).await?;
    world.end_to_end(100, true).await?;
    let tasks: Vec<Value> = (0..LATENCIES).map(|n| json!({"kind": "test.work", "delay_ms": 1_000 + 17 * n})).collect();
    let accepted = world.producer.api.submit_batch(&tasks).await?;
    world.until_completed(100.0 + tasks.len() as f64).await?;
    let mut late = Vec::new();
    for task in accepted {
        let task = world.producer.api.get(&task.id).await?;
        let time = |text: Option<String>| -> Result<i64> {
            Ok(text.context("a completed task has its times")?.parse::<jiff::Timestamp>()?.as_millisecond())
        };
        late.push(Duration::from_millis((time(task.started_at)? - time(task.run_at)?).max(0).unsigned_abs()));
    }
    late.sort_unstable();
    let row = |unit, part| Row::of("due to start", Some(name), unit, vec![percentile(&late, part)]);
    Ok(vec![row("ms p50", 0.5), row("ms p99", 0.99)])
}

/// Tasks that are all due at the same second: how many a second start, the most that wait in the broker at once, and the
/// most memory that producer and worker take, in MB.
pub async fn due_at_once(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let world = World::new(ledger, 1).await?;
    world.end_to_end(WARM, false).await?;
    let at = jiff::Timestamp::now() + Duration::from_secs(20 + plan.tasks as u64 / 5_000);
    let body = json!({"tasks": vec![json!({"kind": "test.work", "args": args(), "run_at": at.to_string()}); BATCH]});
    let body = serde_json::to_vec(&body)?;
    world.submit(BATCHERS, "/v1/tasks/batch", &body, &AtomicUsize::new(plan.tasks.div_ceil(BATCH))).await?;
    let before = [memory(world.producer.process.pid())?, memory(world.workers[0].process.pid())?];
    ensure!(jiff::Timestamp::now() < at, "they were due before all were submitted");
    let (mut deepest, mut producer, mut worker) = (0, before[0], before[1]);
    eventually(LIMIT, "the tasks that are due to complete", async || {
        deepest = deepest.max(world.stack.vhost.depth("tasklane.q.default").await?.unwrap_or_default());
        producer = producer.max(memory(world.producer.process.pid())?);
        worker = worker.max(memory(world.workers[0].process.pid())?);
        let done = world.completed().await? >= (WARM + plan.tasks) as f64;
        Ok(done.then_some(()))
    })
    .await?;
    let took = jiff::Timestamp::now().duration_since(at).as_secs_f64();
    let row = |title, unit, measured| Row::of(title, Some(name), unit, vec![measured]);
    Ok(vec![
        row("due at once", "/s", plan.tasks as f64 / took),
        row("- in the broker", "most", deepest.into()),
        row("- producer", "MB more", producer - before[0]),
        row("- worker", "MB more", worker - before[1]),
    ])
}

/// The memory of a producer that takes ever more submissions, and of an idle worker, in MB.
pub async fn memory_row(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let world = World::new(ledger, 1).await?;
    let row = |title: &str, measured| Row::of(title, Some(name), "MB", vec![measured]);
    let mut rows = vec![row("idle worker", memory(world.workers[0].process.pid())?)];
    let pid = world.producer.process.pid();
    rows.push(row("idle producer", memory(pid)?));
    let body = serde_json::to_vec(&json!({"tasks": vec![task(); 10 * BATCH]}))?;
    for (done, until) in [(0, plan.tasks), (plan.tasks, 10 * plan.tasks)] {
        let batches = (until - done).div_ceil(10 * BATCH);
        world.submit(1, "/v1/tasks/batch", &body, &AtomicUsize::new(batches)).await?;
        rows.push(row(&format!("after {until}"), memory(pid)?));
    }
    Ok(rows)
}

/// A process's resident memory in MB (of 1024 × 1024 bytes).
fn memory(pid: i32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
