//! Programs that are told to stop: they finish, or give back, and lose nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use tasklane_common::clock::since_boot;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::on_both_ledgers;
use tasklane_tests::stack::{Stack, Worker};

use crate::load::{Load, check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// How long a handler that does not listen may take to be stopped, and the worker to end.
const INTERRUPT_LIMIT: Duration = Duration::from_secs(12);

/// Longer than anything waits: whoever runs this to its end the first time has not been stopped.
fn long(kind: &str) -> Value {
    json!({"kind": kind, "args": {"work_ms": 120_000, "work_again_ms": 50}})
}

async fn stopped(worker: &mut Worker, limit: Duration) -> Result<String> {
    let status = worker.process.exited(limit).await?;
    let log = worker.process.log();
    let summary = log.lines().rfind(|line| line.contains("stopped: ")).unwrap_or_default();
    assert!(status.success(), "{status}: {summary}");
    Ok(summary.to_owned())
}

#[tokio::test]
async fn a_worker_told_to_stop_finishes_what_runs_and_takes_nothing_new() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let mut worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 4).start().await?;
    let submitted = ids(&producer.api.submit_batch(&tasks(12, "test.work", &json!({"work_ms": 2000}))).await?);
    log.started(4, LIMIT).await?;
    worker.process.terminate()?;
    worker.process.logged("finishing what runs", LIMIT).await?;
    let begun = log.starts()?.len();
    assert!(begun < submitted.len(), "the test proves nothing");
    let summary = stopped(&mut worker, LIMIT).await?;
    let told = format!("{begun} started: {begun} completed, ");
    assert!(summary.contains(&told) && summary.contains(" 0 interrupted"), "{begun} had begun: {summary}");
    assert_eq!(log.starts()?.len(), begun);
    assert_eq!(producer.api.list_all(&[("state", "completed")]).await?.len(), begun);

    let _next = stack.test_worker(&log).start().await?;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    nothing_left(&stack.vhost).await
}

on_both_ledgers! {
    async fn what_outlasts_the_grace_is_interrupted_and_that_costs_no_attempt(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut worker = stack.test_worker(&log).env("TASKLANE_SHUTDOWN_GRACE_MS", 500).start().await?;
        let again = producer.api.submit(&long("test.work")).await?;
        let once = producer.api.submit(&long("test.once")).await?;
        log.started(2, LIMIT).await?;
        let _other = stack.test_worker(&log).start().await?;
        worker.process.terminate()?;
        let summary = stopped(&mut worker, INTERRUPT_LIMIT).await?;
        let stopped_at = since_boot();
        assert!(summary.contains("1 discarded") && summary.contains("1 interrupted, 0 fenced"), "{summary}");

        let again = producer.api.in_state(&again.id, "completed", LIMIT).await?;
        assert_eq!((again.attempt, again.errors.len()), (1, 0), "{again:#?}");
        let takeover = log.of(&again.id)?.into_iter().find(|entry| entry.fence == again.fence).map(|entry| entry.at);
        assert!(takeover < Some(stopped_at + Duration::from_secs(2)), "{takeover:?}, stopped at {stopped_at:?}");
        let once = producer.api.in_state(&once.id, "discarded", LIMIT).await?;
        assert_eq!(once.reason.as_deref(), Some("interrupted"), "{once:#?}");
        assert_eq!(log.of(&once.id)?.len(), 1, "it never starts again");
        log.check_fences_rise()?;
        log.check_no_overlap()?;
        nothing_left(&stack.vhost).await
    }
}

#[tokio::test]
async fn a_second_signal_interrupts_at_once() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let mut worker = stack.test_worker(&log).env("TASKLANE_SHUTDOWN_GRACE_MS", 100_000).start().await?;
    let task = producer.api.submit(&long("test.work")).await?;
    log.started(1, LIMIT).await?;
    worker.process.terminate()?;
    worker.process.logged("finishing what runs", LIMIT).await?;
    worker.process.terminate()?;
    let summary = stopped(&mut worker, INTERRUPT_LIMIT).await?;
    assert!(summary.contains("1 interrupted"), "{summary}");
    let _other = stack.test_worker(&log).start().await?;
    let done = producer.api.in_state(&task.id, "completed", LIMIT).await?;
    assert_eq!((done.attempt, log.starts()?.len()), (1, 2), "{done:#?}");
    log.check_fences_rise()?;
    Ok(())
}

on_both_ledgers! {
    async fn a_rolling_restart_of_all_workers_under_load_loses_and_repeats_nothing(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut workers = vec![stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        let load = Load::of(&producer.api, json!({"kind": "test.work", "args": {"work_ms": 300}}));
        let mut seen = 0;
        for _ in 0..4 {
            log.started(seen + 20, LIMIT).await?;
            workers.push(stack.test_worker(&log).start().await?);
            let mut oldest = workers.remove(0);
            oldest.process.terminate()?;
            let summary = stopped(&mut oldest, LIMIT).await?;
            assert!(summary.contains(" 0 interrupted, 0 fenced, 0 left running"), "{summary}");
            seen = log.starts()?.len();
        }
        let submitted = load.stop().await?.accepted;
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        let pids: BTreeSet<_> = log.starts()?.iter().map(|start| start.pid).collect();
        assert!(pids.len() >= 5, "only {} workers have had a share", pids.len());
        nothing_left(&stack.vhost).await
    }
}

on_both_ledgers! {
    async fn a_producer_told_to_stop_leaves_nothing_behind(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let next = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let mut submitted = BTreeSet::new();
        let api = producer.api.clone();
        let (stopping, submitting) = tokio::join!(
            async {
                log.started(50, LIMIT).await?;
                producer.process.terminate()?;
                producer.process.exited(LIMIT).await
            },
            async {
                while let Ok(accepted) = api.submit_batch(&tasks(5, "test.work", &json!({}))).await {
                    submitted.extend(ids(&accepted));
                }
            }
        );
        let ((), status) = (submitting, stopping?);
        assert!(status.success(), "{status}");
        check_completed(&next.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        // What was recorded but could not be answered any more is no loss either.
        assert!(log.starts()?.len() >= submitted.len());
        log.check_fences_rise()?;
        nothing_left(&stack.vhost).await
    }
}
