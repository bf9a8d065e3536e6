//! The rows: what is started, what is submitted, and from when to when it counts.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::raw::Raw;
use super::world::{BATCH, BATCHERS, LATENCIES, LIMIT, WARM, WORKERS, World, args, megabytes};
use super::{Plan, Row, percentile};
use crate::ledger::LedgerKind;
use crate::stack::Stack;
use crate::wait::eventually;

/// How long one place may take for the tasks that share a message, where they do.
const BUNDLE_MS: u64 = 1_000;

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

/// End to end, by batch and one by one, and the latency of an idle system.
pub async fn end_to_end(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let world = World::new(ledger, WORKERS).await?;
    let bundling = World::bundling(ledger, WORKERS, BUNDLE_MS).await?;
    for world in [&world, &bundling] {
        world.end_to_end(WARM, false).await?;
    }
    let (mut batch, mut bundled, mut single) = (Vec::new(), Vec::new(), Vec::new());
    let mut latency = [Vec::new(), Vec::new()];
    for _ in 0..plan.repeats {
        batch.push(world.end_to_end(plan.tasks, false).await?);
        single.push(world.end_to_end(plan.tasks / 2, true).await?);
        bundled.push(bundling.end_to_end(plan.tasks, false).await?);
        for (all, measured) in latency.iter_mut().zip(world.latency().await?) {
            all.push(measured);
        }
    }
    let [median, tail] = latency;
    let row = |title, unit, measured| Row::of(title, Some(name), unit, measured);
    Ok(vec![
        row("e2e batch", "/s", batch),
        row("e2e bundled", "/s", bundled),
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
        let (due, started) = task.run_at.zip(task.started_at).context("a completed task has its times")?;
        late.push(started.duration_since(due).try_into().unwrap_or_default());
    }
    late.sort_unstable();
    let row = |unit, part| Row::of("due to start", Some(name), unit, vec![percentile(&late, part)]);
    Ok(vec![row("ms p50", 0.5), row("ms p99", 0.99)])
}

/// Tasks that are all due at the same second: how many a second start, the most that wait in the broker at once, and the
/// most memory that producer and worker take, in MB.
pub async fn due_at_once(tasks: usize, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let world = World::new(ledger, 1).await?;
    world.end_to_end(WARM, false).await?;
    let at = jiff::Timestamp::now() + Duration::from_secs(20 + tasks as u64 / 5_000);
    let body = json!({"tasks": vec![json!({"kind": "test.work", "args": args(), "run_at": at.to_string()}); BATCH]});
    let body = serde_json::to_vec(&body)?;
    world.submit(BATCHERS, "/v1/tasks/batch", &body, &AtomicUsize::new(tasks.div_ceil(BATCH))).await?;
    let before = [megabytes(&world.producer.process)?, megabytes(&world.workers[0].process)?];
    ensure!(jiff::Timestamp::now() < at, "they were due before all were submitted");
    let (mut deepest, mut producer, mut worker) = (0, before[0], before[1]);
    eventually(LIMIT, "the tasks that are due to complete", async || {
        deepest = deepest.max(world.stack.vhost.depth("tasklane.q.default").await?.unwrap_or_default());
        producer = producer.max(megabytes(&world.producer.process)?);
        worker = worker.max(megabytes(&world.workers[0].process)?);
        let done = world.completed().await? >= (WARM + tasks) as f64;
        Ok(done.then_some(()))
    })
    .await?;
    let took = jiff::Timestamp::now().duration_since(at).as_secs_f64();
    let row = |title, unit, measured| Row::of(title, Some(name), unit, vec![measured]);
    Ok(vec![
        row("due at once", "/s", tasks as f64 / took),
        row("- in the broker", "most", deepest.into()),
        row("- producer", "MB more", producer - before[0]),
        row("- worker", "MB more", worker - before[1]),
    ])
}
