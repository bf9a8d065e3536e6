//! What is measured: a producer, workers that do nothing or wait, and what is submitted to them.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::http::Connection;
use super::percentile;
use crate::collector::Collector;
use crate::ledger::LedgerKind;
use crate::metrics::Metrics;
use crate::port::free_port;
use crate::process::Process;
use crate::stack::{Producer, Stack, Start, Worker};
use crate::wait::eventually;

/// How long one measurement may take.
pub(super) const LIMIT: Duration = Duration::from_secs(900);
/// How many tasks one batch has.
pub(super) const BATCH: usize = 1_000;
/// How many connections submit batches.
pub(super) const BATCHERS: usize = 2;
/// How many connections submit single tasks.
pub(super) const SINGLES: usize = 64;
/// How many workers run.
pub(super) const WORKERS: usize = 2;
/// How many tasks are run before anything counts.
pub(super) const WARM: usize = 2_000;
/// How many times a latency is measured.
pub(super) const LATENCIES: usize = 300;

/// How many bytes of args every task has; 256 where nobody says otherwise.
pub(super) static BYTES: OnceLock<usize> = OnceLock::new();

/// How many tasks a worker runs at once; 256 where nobody says otherwise.
pub(super) static PLACES: OnceLock<usize> = OnceLock::new();

/// The args of every task: their answer comes back as the result.
pub(super) fn args() -> Value {
    let bytes = BYTES.get().copied().unwrap_or(256);
    let around = json!({"work_ms": 0, "answer": ""}).to_string().len();
    json!({"work_ms": 0, "answer": "x".repeat(bytes.saturating_sub(around))})
}

pub(super) fn task() -> Value {
    json!({"kind": "test.work", "args": args()})
}

/// A producer, its address, and workers that do nothing.
pub(super) struct World {
    pub(super) addr: SocketAddr,
    pub(super) producer: Producer,
    pub(super) workers: Vec<Worker>,
    pub(super) stack: Stack,
    bundle_ms: u64,
}

impl World {
    pub(super) async fn new(ledger: LedgerKind, workers: usize) -> Result<Self> {
        Self::bundling(ledger, workers, 0).await
    }

    /// One whose tasks share messages.
    pub(super) async fn bundling(ledger: LedgerKind, workers: usize, bundle_ms: u64) -> Result<Self> {
        let mut world = Self::with(ledger, |producer| producer.env("TASKLANE_BUNDLE_MS", bundle_ms)).await?;
        world.bundle_ms = bundle_ms;
        world.hire(workers).await?;
        Ok(world)
    }

    /// One whose programs send this part of their traces to the collector.
    pub(super) async fn traced(ledger: LedgerKind, workers: usize, collector: &Collector, ratio: f64) -> Result<Self> {
        let url = format!("http://{}", collector.addr());
        let settings = [("TASKLANE_OTLP_URL", url), ("TASKLANE_TRACE_RATIO", ratio.to_string())];
        let mut world = Self::with(ledger, |producer| {
            settings.iter().fold(producer, |producer, (key, value)| producer.env(key, value))
        })
        .await?;
        let traced =
            |worker| settings.iter().fold(worker, |worker: Start<Worker>, (key, value)| worker.env(key, value));
        world.hire_as(workers, traced).await?;
        Ok(world)
    }

    /// One with a producer of its own settings, and without a worker.
    pub(super) async fn with(
        ledger: LedgerKind,
        with: impl FnOnce(Start<Producer>) -> Start<Producer>,
    ) -> Result<Self> {
        let stack = Stack::new(ledger).await?;
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let producer = with(stack.producer().at(addr).env("TASKLANE_LOG", "warn")).start().await?;
        Ok(Self { addr, producer, workers: Vec::new(), stack, bundle_ms: 0 })
    }

    pub(super) fn worker(&self) -> Start<Worker> {
        let worker = self.stack.worker().binary("test-worker").env("TASKLANE_LOG", "warn");
        let places = PLACES.get().copied().unwrap_or(256);
        worker.env("TASKLANE_BUNDLE_MS", self.bundle_ms).env("TASKLANE_CONCURRENCY", places)
    }

    pub(super) async fn hire(&mut self, count: usize) -> Result<()> {
        self.hire_as(count, |worker| worker).await
    }

    /// Starts workers with settings of their own.
    pub(super) async fn hire_as(&mut self, count: usize, with: impl Fn(Start<Worker>) -> Start<Worker>) -> Result<()> {
        let started = try_join_all((0..count).map(|_| with(self.worker()).start())).await?;
        self.workers.extend(started);
        Ok(())
    }

    /// How many tasks the workers have completed.
    pub(super) async fn completed(&self) -> Result<f64> {
        let metrics: Vec<Metrics> = try_join_all(self.workers.iter().map(Worker::metrics)).await?;
        Ok(metrics.iter().map(|metrics| metrics.sum("tasklane_tasks_settled_total", &[("outcome", "completed")])).sum())
    }

    pub(super) async fn until_completed(&self, count: f64) -> Result<()> {
        eventually(LIMIT, &format!("{count} tasks to complete"), async || {
            Ok((self.completed().await? >= count).then_some(()))
        })
        .await
    }

    /// Submits in batches over a few connections.
    pub(super) async fn batches(&self, tasks: usize) -> Result<()> {
        self.batches_of(&task(), tasks).await
    }

    /// Submits copies of a task in batches over a few connections.
    pub(super) async fn batches_of(&self, task: &Value, tasks: usize) -> Result<()> {
        self.batches_like(&vec![task.clone(); BATCH], tasks).await
    }

    /// Submits copies of a batch over a few connections, until so many tasks or a few more are submitted.
    async fn batches_like(&self, batch: &[Value], tasks: usize) -> Result<()> {
        let body = serde_json::to_vec(&json!({"tasks": batch}))?;
        let left = AtomicUsize::new(tasks.div_ceil(batch.len()));
        self.submit(BATCHERS, "/v1/tasks/batch", &body, &left).await
    }

    /// Submits one by one over many connections.
    pub(super) async fn singles(&self, tasks: usize) -> Result<()> {
        let body = serde_json::to_vec(&task())?;
        self.submit(SINGLES, "/v1/tasks", &body, &AtomicUsize::new(tasks)).await
    }

    pub(super) async fn submit(&self, connections: usize, path: &str, body: &[u8], left: &AtomicUsize) -> Result<()> {
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
    pub(super) async fn end_to_end(&self, tasks: usize, single: bool) -> Result<f64> {
        let before = self.completed().await?;
        let begun = Instant::now();
        let submit = async { if single { self.singles(tasks).await } else { self.batches(tasks).await } };
        tokio::try_join!(submit, self.until_completed(before + tasks as f64))?;
        Ok(tasks as f64 / begun.elapsed().as_secs_f64())
    }

    /// Tasks a second of copies of a batch, about so many.
    pub(super) async fn end_to_end_of(&self, batch: &[Value], tasks: usize) -> Result<f64> {
        let tasks = tasks.next_multiple_of(batch.len());
        let before = self.completed().await?;
        let begun = Instant::now();
        tokio::try_join!(self.batches_like(batch, tasks), self.until_completed(before + tasks as f64))?;
        Ok(tasks as f64 / begun.elapsed().as_secs_f64())
    }

    /// The times of single tasks that somebody waits for, in milliseconds: the median and the 99th percentile.
    pub(super) async fn latency(&self) -> Result<[f64; 2]> {
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

/// A process's resident memory, in MB of 1024 × 1024 bytes.
pub(super) fn megabytes(process: &Process) -> Result<f64> {
    Ok(process.rss_bytes()? as f64 / (1024.0 * 1024.0))
}
