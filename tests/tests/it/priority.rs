//! Priorities: urgent tasks go first, and the others go on all the same. Judged by the order of starts, not by time.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tasklane_common::topology::TASKS_EXCHANGE;
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::stack::{Producer, Stack};
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::{check_completed, ids, nothing_left};

const LIMIT: Duration = Duration::from_secs(60);
/// How many tasks the worker runs at once, and so the most that it takes from a lane in advance.
const WINDOW: usize = 4;
/// After so many urgent starts each lane that waits has its turn.
const IN_A_ROW: usize = 8;
/// Long beside the settling of a task, during which it still takes a place of its lane's window.
const WORK_MS: u64 = 300;

fn tasks(count: usize, priority: &str, work_ms: u64) -> Vec<Value> {
    vec![json!({"kind": "test.work", "priority": priority, "args": {"work_ms": work_ms}}); count]
}

/// Submits tasks, and waits until the broker has them all.
async fn queued(producer: &Producer, tasks: &[Value]) -> Result<BTreeSet<String>> {
    let ids = ids(&producer.api.submit_batch(tasks).await?);
    eventually(LIMIT, "the broker to have all messages", async || {
        for id in &ids {
            let task = producer.api.get(id).await?;
            ensure!(task.state != "accepted", "{id} is accepted");
        }
        Ok(Some(()))
    })
    .await?;
    Ok(ids)
}

/// The tasks in the order of their starts.
fn order(log: &OperationLog) -> Result<Vec<String>> {
    Ok(log.starts()?.into_iter().map(|start| start.task).collect())
}

on_both_ledgers! {
    async fn urgent_tasks_start_within_a_prefetch_window_whatever_waits(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", WINDOW).start().await?;
        let (all_tap, normal_tap) =
            (stack.vhost.tap(TASKS_EXCHANGE, "#").await?, stack.vhost.tap(TASKS_EXCHANGE, "default.#").await?);
        let mut backlog = tasks(60, "normal", WORK_MS);
        backlog.extend(tasks(60, "low", WORK_MS));
        let mut submitted = ids(&producer.api.submit_batch(&backlog).await?);
        log.started(20, LIMIT).await?;
        let urgent = queued(&producer, &tasks(30, "high", WORK_MS)).await?;
        let before = order(&log)?.len();
        submitted.extend(urgent.iter().cloned());
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        assert_eq!(ended.iter().filter(|task| task.priority == "high").count(), urgent.len());
        log.check_each_started_once(submitted.iter().map(String::as_str))?;

        let order = order(&log)?;
        let last = order.iter().rposition(|task| urgent.contains(task)).unwrap_or(0);
        let overtaken = order.get(before..last).unwrap_or_default();
        let others = overtaken.iter().filter(|task| !urgent.contains(*task)).count();
        let turns = 2 * (urgent.len() / IN_A_ROW + 1);
        assert!(others <= 2 * WINDOW + turns, "{others} others started before the last urgent one");
        // A fair share for each lane would be 60 others, twice as many as would be left here.
        assert!(before < backlog.len() - 30, "the test proves nothing: {before} started before");
        assert_eq!(stack.vhost.take(&all_tap).await?.len(), submitted.len(), "the tap has seen every task");
        assert_eq!(stack.vhost.take(&normal_tap).await?.len(), 60, "the normal lane's key is its own");
        nothing_left(&stack.vhost).await
    }

    async fn lower_tasks_do_not_starve_under_a_stream_of_urgent_ones(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let low = queued(&producer, &tasks(6, "low", WORK_MS)).await?;
        let normal = queued(&producer, &tasks(6, "normal", WORK_MS)).await?;
        let mut submitted = queued(&producer, &tasks(120, "high", WORK_MS)).await?;
        submitted.extend(low.iter().chain(&normal).cloned());
        let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", WINDOW).start().await?;
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;

        let order = order(&log)?;
        for lane in [&low, &normal] {
            let starts: Vec<_> = (0..order.len()).filter(|at| lane.contains(&order[*at])).collect();
            for (turn, at) in starts.iter().enumerate() {
                // Eight urgent starts and the other lane's turn, and what was taken in advance at the beginning.
                let bound = (turn + 1) * (IN_A_ROW + 2) + 2 * WINDOW;
                assert!(*at <= bound, "turn {turn} came at {at}, over {bound}: {starts:?}");
            }
            assert!(starts.last().is_some_and(|last| *last > 2 * IN_A_ROW), "they wait for urgent ones: {starts:?}");
        }
        nothing_left(&stack.vhost).await
    }
}
