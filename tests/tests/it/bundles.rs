//! Tasks that share a message: every promise holds for each of them by itself.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::stack::{Producer, Stack};
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::{check_completed, ids, nothing_left, started_at, tasks};

const LIMIT: Duration = Duration::from_secs(60);

const QUEUE: &str = "tasklane.q.default";

/// So long that tasks of no work share a message on the busiest machine.
const BUNDLE_MS: u64 = 20_000;

/// How many tasks are submitted at once: fewer than a message may have.
const TASKS: usize = 40;

on_both_ledgers! {
    async fn tasks_that_wait_together_share_messages_and_each_runs_once(ledger) {
        let Bundling { stack, log, producer, mut submitted } = Bundling::new(ledger).await?;
        let (messages, bundled) = submit_bundled(&stack, &producer, &json!({"work_ms": 0})).await?;
        assert!(messages <= 10, "{TASKS} tasks in {messages} messages");
        submitted.extend(bundled);

        let _workers = [stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;

        check_completed(&ended, &submitted)?;
        assert_eq!(log.starts()?.len(), submitted.len());
        log.check_no_overlap()?;
        nothing_left(&stack.vhost).await
    }

    async fn a_killed_workers_bundle_starts_again_elsewhere_without_what_had_ended(ledger) {
        let Bundling { stack, log, producer, mut submitted } = Bundling::new(ledger).await?;
        // Two at once, so that some have ended and some not begun when it dies.
        let (_, bundled) = submit_bundled(&stack, &producer, &json!({"work_ms": 300})).await?;
        let mut victim = stack.test_worker(&log).short_lease().env("TASKLANE_CONCURRENCY", 2).start().await?;
        eventually(LIMIT, "four tasks of the bundle to start", async || {
            let started = log.starts()?.into_iter().filter(|start| bundled.contains(&start.task)).count();
            Ok((started >= 4).then_some(()))
        })
        .await?;
        submitted.extend(bundled);
        victim.process.kill().await?;

        let _survivor = stack.test_worker(&log).start().await?;
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;

        check_completed(&ended, &submitted)?;
        log.check_fences_rise()?;
        log.check_no_overlap()?;
        let again = ended.iter().filter(|task| task.attempt > 1).count();
        assert!((1..=4).contains(&again), "{again} tasks ran again, of two that were running");
        nothing_left(&stack.vhost).await
    }

    async fn what_has_no_room_goes_to_a_worker_that_has(ledger) {
        let Bundling { stack, log, producer, mut submitted } = Bundling::new(ledger).await?;
        let (_, bundled) = submit_bundled(&stack, &producer, &json!({"work_ms": 3_000})).await?;
        submitted.extend(bundled);
        let narrow = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 1).start().await?;
        started_at(&log, narrow.process.pid(), 1, LIMIT).await?;
        let wide = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 100).start().await?;
        // One after the other they would take two minutes.
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;

        check_completed(&ended, &submitted)?;
        let starts = log.starts()?;
        assert_eq!(starts.len(), submitted.len());
        let at_wide = starts.iter().filter(|start| start.pid == wide.process.pid()).count();
        assert!(at_wide >= TASKS / 2, "only {at_wide} of {TASKS} went to the worker with room");
        nothing_left(&stack.vhost).await
    }

    async fn a_task_that_the_ledger_does_not_know_leaves_its_bundle_alone(ledger) {
        let Bundling { stack, log, producer, mut submitted } = Bundling::new(ledger).await?;
        let (_, bundled) = submit_bundled(&stack, &producer, &json!({"work_ms": 0, "answer": 7})).await?;
        stack.ledger.execute("DELETE FROM tasks WHERE id = (SELECT id FROM tasks ORDER BY id DESC LIMIT 1)").await?;
        let lost = bundled.last().context("tasks were submitted")?.clone();
        submitted.extend(bundled);
        submitted.remove(&lost);

        let _worker = stack.test_worker(&log).start().await?;
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;

        check_completed(&ended, &submitted)?;
        let letter = eventually(LIMIT, "the dead letter", async || Ok(stack.vhost.take("tasklane.dead").await?.pop()));
        let letter = letter.await?;
        assert_eq!(serde_json::from_slice::<Value>(&letter.data)?["answer"], 7, "it lies there by itself");
        assert_eq!(letter.properties.message_id().as_ref().map(ToString::to_string), Some(lost));
        nothing_left(&stack.vhost).await
    }
}

/// A producer that makes bundles, and knows how short the kind is.
struct Bundling {
    stack: Stack,
    log: OperationLog,
    producer: Producer,
    /// What was submitted for that.
    submitted: BTreeSet<String>,
}

impl Bundling {
    async fn new(ledger: LedgerKind) -> Result<Self> {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().env("TASKLANE_BUNDLE_MS", BUNDLE_MS).start().await?;
        let submitted = learn(&stack, &producer, &log).await?;
        Ok(Self { stack, log, producer, submitted })
    }
}

/// Lets a worker show how short the kind is; the ids of what it ran for that.
async fn learn(stack: &Stack, producer: &Producer, log: &OperationLog) -> Result<BTreeSet<String>> {
    let mut teacher = stack.test_worker(log).start().await?;
    let mut all = ids(&producer.api.submit_batch(&tasks(TASKS, "test.work", &json!({"work_ms": 0}))).await?);
    producer.api.all_ended(TASKS, LIMIT).await?;
    teacher.process.terminate()?;
    teacher.process.exited(LIMIT).await?;
    let known = eventually(LIMIT, "two tasks to share a message", async || {
        let (messages, two) = submit(stack, producer, 2, &json!({"work_ms": 0})).await?;
        all.extend(two);
        Ok((messages == 1).then_some(()))
    });
    known.await?;
    Ok(all)
}

/// Submits tasks of which nobody takes any yet; in how many messages, and their ids.
async fn submit_bundled(stack: &Stack, producer: &Producer, args: &Value) -> Result<(u32, BTreeSet<String>)> {
    let (messages, ids) = submit(stack, producer, TASKS, args).await?;
    ensure!((messages as usize) < TASKS, "no task shares a message");
    Ok((messages, ids))
}

async fn submit(stack: &Stack, producer: &Producer, count: usize, args: &Value) -> Result<(u32, BTreeSet<String>)> {
    let before = stack.vhost.depth(QUEUE).await?.context("the queue is there")?;
    let ids = ids(&producer.api.submit_batch(&tasks(count, "test.work", args)).await?);
    for id in &ids {
        producer.api.in_state(id, "queued", LIMIT).await?;
    }
    let after = stack.vhost.depth(QUEUE).await?.context("the queue is there")?;
    Ok((after - before, ids))
}
