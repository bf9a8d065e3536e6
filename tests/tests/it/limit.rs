//! Limits over the API, with real workers: never exceeded, whoever is killed, and nobody else waits for them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_common::clock::since_boot;
use tasklane_tests::api::{Api, Task};
use tasklane_tests::on_both_ledgers;
use tasklane_tests::oplog::{Entry, OperationLog, Step};
use tasklane_tests::stack::Stack;

use crate::load::{check_completed, ids, nothing_left, started_at, tasks};

const LIMIT: Duration = Duration::from_secs(60);

async fn set(api: &Api, limit: &str, bounds: Value) -> Result<Value> {
    api.raw_put(&format!("/v1/limits/{limit}"), &bounds).await?.expect(&[200, 201])
}

/// The runs of a log: from when to when; those of a process that was killed end then.
fn runs(log: &OperationLog, killed: Option<(i32, Duration)>) -> Result<Vec<(String, Duration, Duration)>> {
    let entries = log.entries()?;
    let end_of = |start: &Entry| {
        let same = |entry: &&Entry| entry.step == Step::End && entry.task == start.task && entry.fence == start.fence;
        let logged = entries.iter().find(same).map(|end| end.at);
        logged.or_else(|| killed.filter(|(pid, _)| *pid == start.pid).map(|(_, at)| at)).unwrap_or(Duration::MAX)
    };
    let starts = entries.iter().filter(|entry| entry.step == Step::Start);
    Ok(starts.map(|start| (start.task.clone(), start.at, end_of(start))).collect())
}

/// The most of these runs that were under way at one moment.
fn most_at_once<'r>(runs: impl Iterator<Item = &'r (String, Duration, Duration)> + Clone) -> usize {
    let starts = runs.clone().map(|(_, from, _)| *from);
    starts.map(|at| runs.clone().filter(|(_, from, to)| *from <= at && at < *to).count()).max().unwrap_or_default()
}

on_both_ledgers! {
    async fn no_limit_is_exceeded_whoever_is_killed(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        set(&producer.api, "key/customer:*", json!({"max_running": 2})).await?;
        set(&producer.api, "kind/test.work", json!({"max_running": 5})).await?;
        let mut victim = stack.test_worker(&log).short_lease().env("TASKLANE_CONCURRENCY", 16).start().await?;
        let _survivor = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 16).start().await?;
        let of = |customer: usize| json!({"kind": "test.work", "concurrency_key": format!("customer:{customer}"), "args": {"work_ms": 40}});
        let batch: Vec<Value> = (0..160).map(|index| of(index % 4)).collect();
        let submitted = ids(&producer.api.submit_batch(&batch).await?);
        started_at(&log, victim.process.pid(), 10, LIMIT).await?;
        let pid = victim.process.pid();
        victim.process.kill().await?;
        let killed = (pid, since_boot());

        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        let runs = runs(&log, Some(killed))?;
        let mut keys: BTreeMap<String, String> = BTreeMap::new();
        for task in &ended {
            keys.insert(task.id.clone(), task.concurrency_key.clone().unwrap_or_default());
        }
        let most = most_at_once(runs.iter());
        ensure!((3..=5).contains(&most), "{most} runs of the kind at once");
        for key in (0..4).map(|customer| format!("customer:{customer}")) {
            let most = most_at_once(runs.iter().filter(|(id, ..)| keys[id] == key));
            ensure!(most <= 2, "{most} runs of {key} at once");
        }
        nothing_left(&stack.vhost).await
    }

    async fn a_queues_limit_holds_while_tasks_come_and_go(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        set(&producer.api, "queue/narrow", json!({"max_running": 3})).await?;
        let worker = || stack.test_worker(&log).env("TASKLANE_QUEUES", "default,narrow").env("TASKLANE_CONCURRENCY", 8);
        let _workers = [worker().start().await?, worker().start().await?];
        let of = |queue: &str| json!({"kind": "test.work", "queue": queue, "args": {"work_ms": 40}});
        let batch: Vec<Value> = (0..120).map(|index| of(["narrow", "default"][index % 2])).collect();
        let submitted = ids(&producer.api.submit_batch(&batch).await?);
        // Back and forth, until nothing waits any more.
        let mut moved = 0;
        for [from, to] in [["narrow", "default"], ["default", "narrow"]].iter().cycle() {
            let body = producer.api.raw_post(&format!("/v1/queues/{from}/move"), &json!({"to": to})).await?;
            moved += body.expect::<Value>(&[200])?["moved"].as_u64().unwrap_or_default();
            if producer.api.under_way().await?.is_empty() {
                break;
            }
        }
        ensure!(moved > 0, "nothing was moved");
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        let mut queues: BTreeMap<String, String> = BTreeMap::new();
        for start in log.starts()? {
            queues.insert(start.task, start.queue.unwrap_or_default());
        }
        let runs = runs(&log, None)?;
        let most = most_at_once(runs.iter().filter(|(id, ..)| queues[id] == "narrow"));
        ensure!((1..=3).contains(&most), "{most} runs of the queue at once");
        nothing_left(&stack.vhost).await
    }

    async fn who_has_no_limit_does_not_wait_for_those_who_have(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 2).start().await?;
        set(&producer.api, "key/slow", json!({"max_running": 1})).await?;
        let slow = json!({"kind": "test.work", "concurrency_key": "slow", "args": {"work_ms": 100}});
        let held: Vec<Value> = (0..60).map(|_| slow.clone()).collect();
        let held = ids(&producer.api.submit_batch(&held).await?);
        let free = ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({}))).await?);
        for id in &free {
            producer.api.in_state(id, "completed", LIMIT).await?;
        }
        let waiting = producer.api.under_way().await?;
        ensure!(waiting.values().sum::<u64>() > 20, "they were to be done long before the others: {waiting:?}");
        let all: std::collections::BTreeSet<String> = held.union(&free).cloned().collect();
        check_completed(&producer.api.all_ended(all.len(), LIMIT).await?, &all)?;
        log.check_each_started_once(all.iter().map(String::as_str))?;
        // Every held task was refused once, and not again and again.
        let refused = worker.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "limited")]);
        ensure!(refused <= held.len() as f64 * 1.5, "{refused} refusals of {} tasks", held.len());
        nothing_left(&stack.vhost).await
    }

    async fn a_rate_holds_over_all_workers(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        set(&producer.api, "kind/test.work", json!({"rate": {"tasks": 20, "per_ms": 1000, "burst": 4}})).await?;
        let _workers = [stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        let submitted = ids(&producer.api.submit_batch(&tasks(50, "test.work", &json!({}))).await?);
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        let started = |task: &Task| Some(task.started_at?.as_millisecond());
        let mut starts = ended.iter().map(started).collect::<Option<Vec<_>>>().context("a task without a start")?;
        starts.sort_unstable();
        for (index, from) in starts.iter().enumerate() {
            for (more, until) in starts[index..].iter().enumerate() {
                // The ledger's times are whole milliseconds.
                let allowed = 4.0 + (until - from + 1) as f64 * 20.0 / 1000.0;
                ensure!((more + 1) as f64 <= allowed, "{} starts in {} ms", more + 1, until - from);
            }
        }
        nothing_left(&stack.vhost).await
    }

    async fn a_full_queue_says_when_to_come_again(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        set(&producer.api, "queue/default", json!({"max_queued": 10})).await?;
        let submitted = ids(&producer.api.submit_batch(&tasks(10, "test.work", &json!({}))).await?);
        let refused = producer.api.raw_post("/v1/tasks", &json!({"kind": "test.work"})).await?;
        let problem: Value = refused.expect(&[429])?;
        assert_eq!(problem["code"], "queue_full", "{problem}");
        assert_eq!(producer.api.list_all(&[]).await?.len(), submitted.len(), "nothing was recorded");
        let _worker = stack.test_worker(&log).start().await?;
        producer.api.all_ended(submitted.len(), LIMIT).await?;
        tasklane_tests::eventually(LIMIT, "room in the queue", async || {
            let answer = producer.api.raw_post("/v1/tasks", &json!({"kind": "test.work"})).await?;
            Ok((answer.status == 202).then_some(()))
        })
        .await
    }
}
