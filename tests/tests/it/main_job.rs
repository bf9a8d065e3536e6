//! The main job: tasks go through producers, broker and workers to their end, each once, and clients hear of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tasklane_common::clock::since_boot;
use tasklane_tests::api::{Accepted, Api};
use tasklane_tests::oplog::{OperationLog, Step};
use tasklane_tests::stack::{Stack, Worker};
use tasklane_tests::vhost::Vhost;
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::time::Instant;

use crate::load::{check_completed, ids, nothing_left, tasks};

/// How many tasks the main job has.
const TASKS: usize = 10_000;

/// How many of them go into one request.
const BATCH: usize = 1_000;

const LIMIT: Duration = Duration::from_secs(120);

/// How much later than the handler's end a waiting client may hear of it. Idle it takes milliseconds; this bound
/// is for machines that do much else.
const HEARD_WITHIN: Duration = Duration::from_secs(2);

on_both_ledgers! {
    async fn ten_thousand_tasks_run_once_each_over_two_workers(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let workers = [stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];

        let began = Instant::now();
        let submitted = submit(&producer.api, TASKS).await?;
        let submitted_in = began.elapsed();
        let ended = producer.api.all_ended(TASKS, LIMIT).await?;
        let rate = |time: Duration| TASKS as f64 / time.as_secs_f64();
        println!("{ledger}: {:.0} tasks/s submitted, {:.0} tasks/s from POST to end", rate(submitted_in), rate(began.elapsed()));

        assert_eq!(ended.len(), TASKS);
        check_completed(&ended, &submitted)?;
        assert!(ended.iter().all(|task| task.attempt == 1 && task.errors.is_empty()));
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        check_shares(&log, &workers)?;
        nothing_left(&stack.vhost).await?;
        all_acked(&stack.vhost, "tasklane.q.default").await?;
        // What a worker had not acked would come back to the queue with the end of its connection.
        for mut worker in workers {
            worker.process.terminate()?;
            assert!(worker.process.exited(LIMIT).await?.success());
        }
        nothing_left(&stack.vhost).await
    }

    async fn two_producers_side_by_side_answer_for_each_other(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let (one, other) = tokio::try_join!(stack.producer().start(), stack.producer().start())?;
        let _worker = stack.test_worker(&log).start().await?;

        let (by_one, by_other) = tokio::try_join!(submit(&one.api, 500), submit(&other.api, 500))?;
        for (submitted, reader) in [(&by_one, &other.api), (&by_other, &one.api)] {
            for id in submitted.iter().take(20) {
                assert_eq!(reader.get_wait(id, 30_000).await?.state, "completed");
            }
        }
        let all: BTreeSet<String> = by_one.union(&by_other).cloned().collect();
        for api in [&one.api, &other.api] {
            check_completed(&api.all_ended(all.len(), LIMIT).await?, &all)?;
        }

        let task = json!({"kind": "test.work", "args": {"answer": "once"}});
        let (first, again) = (one.api.submit_once("side-by-side", &task).await?, other.api.submit_once("side-by-side", &task).await?);
        assert_eq!((first.status, again.status), (202, 202));
        assert_eq!(first.json()?["id"], again.json()?["id"], "both know one key");
        assert_eq!((first.header("idempotent-replayed"), again.header("idempotent-replayed")), (None, Some("true")));
        one.api.all_ended(all.len() + 1, LIMIT).await?;
        assert_eq!(log.starts()?.len(), all.len() + 1);
        nothing_left(&stack.vhost).await
    }

    async fn a_client_that_waits_hears_of_the_end_at_once(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let task = json!({"kind": "test.work", "args": {"work_ms": 20, "answer": {"n": 7}}});

        let (mut after_post, mut after_get) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            let (ended, in_time) = producer.api.submit_and_wait(&task, 30_000).await?;
            after_post.push(since_end(&log, &ended.id)?);
            assert!(in_time && ended.state == "completed" && ended.result == json!({"n": 7}), "{ended:?}");

            let id = producer.api.submit(&task).await?.id;
            let ended = producer.api.get_wait(&id, 30_000).await?;
            after_get.push(since_end(&log, &id)?);
            assert!(ended.state == "completed" && ended.result == json!({"n": 7}), "{ended:?}");
        }
        for (how, mut latencies) in [("POST", after_post), ("GET", after_get)] {
            latencies.sort();
            let [median, most, max] = [50, 75, 95].map(|percent| latencies[latencies.len() * percent / 100]);
            println!("{ledger}: {how} with wait_ms answered {median:?} (median), {max:?} (max) after the handler's end");
            assert!(most < HEARD_WITHIN, "{how} answered {most:?} after the end, and later each fourth time");
        }

        let long = json!({"kind": "test.work", "args": {"work_ms": 6000}});
        let (under_way, in_time) = producer.api.submit_and_wait(&long, 100).await?;
        assert!(!in_time && !matches!(under_way.state.as_str(), "completed" | "discarded"), "{under_way:?}");
        let still = producer.api.get_wait(&under_way.id, 50).await?;
        assert_eq!(still.finished_at, None, "{still:?}");
        assert_eq!(producer.api.get_wait(&under_way.id, 30_000).await?.state, "completed");
        Ok(())
    }
}

/// Submits tasks that take no time, in batches, as JSON and as NDJSON in turn.
async fn submit(api: &Api, count: usize) -> Result<BTreeSet<String>> {
    let mut submitted: Vec<Accepted> = Vec::new();
    let mut as_lines = false;
    while submitted.len() < count {
        let batch = tasks(BATCH.min(count - submitted.len()), "test.work", &json!({}));
        submitted.extend(if as_lines { api.submit_lines(&batch).await? } else { api.submit_batch(&batch).await? });
        as_lines = !as_lines;
    }
    let ids = ids(&submitted);
    ensure!(ids.len() == count, "{} different ids for {count} tasks", ids.len());
    Ok(ids)
}

/// Both workers did a good part of the tasks.
fn check_shares(log: &OperationLog, workers: &[Worker]) -> Result<()> {
    let mut shares: BTreeMap<i32, usize> = BTreeMap::new();
    for start in log.starts()? {
        *shares.entry(start.pid).or_default() += 1;
    }
    println!("the workers' shares: {shares:?}");
    for worker in workers {
        let share = shares.get(&worker.process.pid()).copied().unwrap_or_default();
        ensure!(share > TASKS / 10, "a worker did only {share} tasks: {shares:?}");
    }
    Ok(())
}

/// The broker's own count of a queue: as many acks as tasks at least, and no delivery unacked. It lags by seconds.
async fn all_acked(vhost: &Vhost, queue: &str) -> Result<()> {
    eventually(Duration::from_secs(30), "the broker to have counted all acks", async || {
        let seen = vhost.node().management.get(&["queues", vhost.name(), queue]).await?;
        let acked = seen["message_stats"]["ack"].as_u64().context("no count of acks yet")?;
        let (unacked, ready) = (&seen["messages_unacknowledged"], &seen["messages_ready"]);
        ensure!(acked >= TASKS as u64 && *unacked == 0 && *ready == 0, "{acked} acked, {unacked} not, {ready} ready");
        Ok(Some(()))
    })
    .await
}

/// How long ago the handler of a task ended.
fn since_end(log: &OperationLog, task: &str) -> Result<Duration> {
    let now = since_boot();
    let entries = log.of(task)?;
    let end = entries.iter().find(|entry| entry.step == Step::End).context("it has not ended")?;
    Ok(now.saturating_sub(end.at))
}
