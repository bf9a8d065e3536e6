//! Pausing a queue over the API: nothing of it starts after the answer, whatever dies or is lost, and everything goes on
//! after the resumption.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use lapin::options::ExchangeDeleteOptions;
use serde_json::{Value, json};
use tasklane_common::topology::CONTROL_EXCHANGE;
use tasklane_tests::api::Api;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::stack::{Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::time::{Instant, sleep_until};

use crate::load::{Load, check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// Longer than any test: a lease that is renewed so seldom tells nothing of a pause in time.
const SELDOM_MS: u64 = 60_000;

/// By then a consumer that is handed nothing has been called stalled.
const TOLD_WITHIN: Duration = Duration::from_secs(28);

/// What each worker of these tests runs at once, and so at most what it has prefetched.
const CONCURRENCY: u32 = 8;

/// Pauses or resumes the queue `default`; answers the queue.
async fn set(api: &Api, verb: &str) -> Result<Value> {
    let queue: Value = api.raw_post(&format!("/v1/queues/default/{verb}"), &json!({})).await?.expect(&[200])?;
    assert_eq!(queue["paused"], verb == "pause", "{queue}");
    Ok(queue)
}

async fn queue(api: &Api) -> Result<Value> {
    api.raw_get("/v1/queues/default").await?.expect(&[200])
}

/// Waits until nothing of the queue runs and nobody consumes it.
async fn drained(api: &Api) -> Result<()> {
    eventually(LIMIT, "the paused queue to be drained", async || {
        let queue = queue(api).await?;
        ensure!(queue["counts"]["running"] == 0 && queue["consumers"] == 0, "{queue}");
        Ok(Some(()))
    })
    .await
}

/// Waits until so many tasks of the queue are in the broker, and on their way to nobody.
async fn backlog(api: &Api, count: usize) -> Result<()> {
    eventually(LIMIT, &format!("{count} tasks to wait in the broker"), async || {
        let queue = queue(api).await?;
        let waiting = queue["broker_depth"].as_u64().unwrap_or_default();
        ensure!(queue["counts"]["queued"] == count && waiting >= count as u64, "{queue}");
        Ok(Some(()))
    })
    .await
}

/// How many deliveries the workers gave back because of a pause.
async fn given_back(workers: &[&Worker]) -> Result<f64> {
    let mut sum = 0.0;
    for worker in workers {
        sum += worker.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "paused")]);
    }
    Ok(sum)
}

/// No task of these has been started by a worker since then.
async fn check_started_before(api: &Api, answered: Timestamp) -> Result<()> {
    for task in api.list_all(&[]).await? {
        ensure!(task.started_at.is_none_or(|at| at <= answered), "started after {answered}: {task:#?}");
    }
    Ok(())
}

fn worker(stack: &Stack, log: &OperationLog) -> tasklane_tests::stack::Start<Worker> {
    stack.test_worker(log).env("TASKLANE_CONCURRENCY", CONCURRENCY)
}

on_both_ledgers! {
    async fn nothing_starts_after_a_pause_under_load_and_all_completes_after_it(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let workers = [worker(&stack, &log).start().await?, worker(&stack, &log).start().await?];
        let backlogged = ids(&producer.api.submit_batch(&tasks(300, "test.work", &json!({"work_ms": 200}))).await?);
        let load = Load::of(&producer.api, json!({"kind": "test.work", "args": {"work_ms": 20}}));
        log.started(60, LIMIT).await?;

        set(&producer.api, "pause").await?;
        let answered = Timestamp::now();
        drained(&producer.api).await?;
        // Submissions go on meanwhile, and get as far as the broker.
        let submitted_before = producer.api.list_all(&[]).await?.len();
        eventually(LIMIT, "more to be submitted", async || {
            Ok((producer.api.list_all(&[]).await?.len() >= submitted_before + 20).then_some(()))
        })
        .await?;
        let mut submitted = load.stop().await?.accepted;
        submitted.extend(backlogged);
        let unfinished = producer.api.under_way().await?.values().sum::<u64>();
        assert!(unfinished > 100, "the test proves nothing: {unfinished} wait");
        backlog(&producer.api, usize::try_from(unfinished)?).await?;
        check_started_before(&producer.api, answered).await?;
        for worker in &workers {
            assert_eq!(worker.problem().await?, None, "a worker with a paused queue is ready");
        }
        let refused = given_back(&[&workers[0], &workers[1]]).await?;
        assert!(refused <= f64::from(4 * CONCURRENCY), "no delivery goes round in circles: {refused}");

        set(&producer.api, "resume").await?;
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        assert_eq!(producer.api.metrics().await?.sum("tasklane_stranded_total", &[]), 0.0, "nothing was taken for lost");
        nothing_left(&stack.vhost).await
    }

    async fn a_pause_outlives_a_killed_worker_and_a_killed_producer(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let mut victim = worker(&stack, &log).short_lease().start().await?;
        let cut = producer.api.submit(&json!({"kind": "test.work", "args": {"work_ms": 60_000, "work_again_ms": 1}})).await?.id;
        producer.api.in_state(&cut, "running", LIMIT).await?;
        set(&producer.api, "pause").await?;
        let answered = Timestamp::now();
        let mut submitted = ids(&producer.api.submit_batch(&tasks(40, "test.work", &json!({}))).await?);
        backlog(&producer.api, submitted.len()).await?;

        let survivor = worker(&stack, &log).start().await?;
        victim.process.kill().await?;
        producer.process.kill().await?;
        let producer = stack.producer().start().await?;
        assert_eq!(queue(&producer.api).await?["paused"], true);
        // Its task was taken over, and has come as far as the others.
        submitted.insert(cut.clone());
        backlog(&producer.api, submitted.len()).await?;
        drained(&producer.api).await?;
        let newcomer = worker(&stack, &log).start().await?;
        let due = json!({"kind": "test.work", "delay_ms": 500});
        submitted.insert(producer.api.submit(&due).await?.id);
        backlog(&producer.api, submitted.len()).await?;
        check_started_before(&producer.api, answered).await?;
        assert_eq!(log.starts()?.len(), 1, "only what ran before the pause");
        assert_eq!(given_back(&[&survivor, &newcomer]).await?, 0.0, "who starts during a pause asks for nothing");

        set(&producer.api, "resume").await?;
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        let task = producer.api.get(&cut).await?;
        assert_eq!((task.attempt, task.errors.len()), (2, 1), "{task:#?}");
        nothing_left(&stack.vhost).await
    }

    async fn workers_hear_of_a_pause_and_a_resumption_at_once(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let worker = worker(&stack, &log)
            .env("TASKLANE_LEASE_TTL_MS", 3 * SELDOM_MS)
            .env("TASKLANE_LEASE_RENEW_MS", SELDOM_MS)
            .start()
            .await?;
        let first = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        producer.api.in_state(&first, "completed", LIMIT).await?;
        set(&producer.api, "pause").await?;
        eventually(LIMIT / 3, "the consumer to be gone", async || {
            Ok((queue(&producer.api).await?["consumers"] == 0).then_some(()))
        })
        .await?;
        let id = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        backlog(&producer.api, 1).await?;
        set(&producer.api, "resume").await?;
        producer.api.in_state(&id, "completed", LIMIT / 3).await?;
        assert_eq!(given_back(&[&worker]).await?, 0.0);
        nothing_left(&stack.vhost).await
    }

    async fn a_lost_word_of_a_pause_starts_nothing(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let worker = worker(&stack, &log).start().await?;
        let first = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        producer.api.in_state(&first, "completed", LIMIT).await?;
        // With the exchange go its bindings: the worker hears nothing until it makes sure of its own, in half a minute.
        let connection = stack.vhost.connect().await?;
        let channel = connection.create_channel().await?;
        channel.exchange_delete(CONTROL_EXCHANGE.into(), ExchangeDeleteOptions::default()).await?;
        set(&producer.api, "pause").await?;
        let id = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        drained(&producer.api).await?;
        backlog(&producer.api, 1).await?;
        assert_eq!(log.starts()?.len(), 1);
        assert!(given_back(&[&worker]).await? <= f64::from(CONCURRENCY));
        set(&producer.api, "resume").await?;
        producer.api.in_state(&id, "completed", LIMIT / 3).await?;
        nothing_left(&stack.vhost).await
    }
}

/// A queue of several is paused: the others go on in the same worker, which is not called stalled for what it leaves.
#[tokio::test]
async fn a_paused_queue_accuses_no_worker_and_holds_up_no_other_queue() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = worker(&stack, &log).env("TASKLANE_QUEUES", "default,other").start().await?;
    set(&producer.api, "pause").await?;
    drained(&producer.api).await?;
    let paused = ids(&producer.api.submit_batch(&tasks(3, "test.work", &json!({}))).await?);
    let until = Instant::now() + TOLD_WITHIN;
    let mut look = Instant::now();
    let mut others = BTreeSet::new();
    while look < until {
        let task = json!({"kind": "test.work", "queue": "other"});
        let id = producer.api.submit(&task).await?.id;
        producer.api.in_state(&id, "completed", LIMIT).await.context("the other queue")?;
        others.insert(id);
        assert_eq!(worker.problem().await?, None);
        assert!(!worker.process.log().contains("connecting anew"));
        look += Duration::from_secs(1);
        sleep_until(look).await;
    }
    backlog(&producer.api, paused.len()).await?;
    set(&producer.api, "resume").await?;
    let all: BTreeSet<String> = paused.union(&others).cloned().collect();
    check_completed(&producer.api.all_ended(all.len(), LIMIT).await?, &all)?;
    log.check_each_started_once(all.iter().map(String::as_str))?;
    nothing_left(&stack.vhost).await
}
