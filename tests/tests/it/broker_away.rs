//! A broker that is away, loses what it held, or takes nothing: the ledger knows every task, so none is lost.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use tasklane_tests::api::{Accepted, Api};
use tasklane_tests::broker::Broker;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::time::{Instant, sleep_until};

use crate::load::{Load, check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(90);

/// How long the broker is away.
const AWAY: Duration = Duration::from_secs(20);

/// The longest that a submission may take whatever the broker does.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

on_both_ledgers! {
    async fn a_broker_that_is_stopped_for_20_s_costs_time_and_nothing_else(ledger) {
        let mut broker = Broker::private().await?;
        let stack = Stack::on(broker.node(), ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let mut workers = [stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        let load = Load::of(&producer.api, json!({"kind": "test.work", "args": {"work_ms": 20}}));
        let mut submitted = ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({"work_ms": 6000}))).await?);
        log.started(100, LIMIT).await?;

        broker.stop().await?;
        let back_at = Instant::now() + AWAY;
        for id in &submitted {
            producer.api.in_state(id, "completed", AWAY / 2).await?;
        }
        sleep_until(back_at).await;
        let waiting = producer.api.under_way().await?;
        assert!(waiting.values().sum::<u64>() > 100, "submissions pile up in the ledger meanwhile: {waiting:?}");
        broker.start().await?;
        let loaded = load.stop().await?;

        assert!(loaded.slowest < ANSWER_LIMIT, "a submission took {:?}", loaded.slowest);
        submitted.extend(loaded.accepted);
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        assert_eq!(producer.process.has_exited()?, None);
        for worker in &mut workers {
            assert_eq!(worker.process.has_exited()?, None);
        }
        nothing_left(&stack.vhost).await
    }
}

#[tokio::test]
async fn a_killed_brokers_backlog_completes_when_it_is_back() -> Result<()> {
    let mut broker = Broker::private().await?;
    let stack = Stack::on(broker.node(), LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 4).start().await?;
    let batch = tasks(300, "test.work", &json!({"work_ms": 100}));
    let submitted = ids(&producer.api.submit_batch(&batch).await?);
    // A node that dies in the first half second of a quorum queue may never elect its leader again (3.10 does not):
    // four at a time these take three seconds.
    log.started(120, LIMIT).await?;
    broker.kill().await?;
    broker.start().await?;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    nothing_left(&stack.vhost).await
}

#[tokio::test]
async fn a_broker_that_has_lost_its_disk_gets_everything_again() -> Result<()> {
    let mut broker = Broker::private().await?;
    let stack = Stack::on(broker.node(), LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 4).start().await?;
    let batch = tasks(100, "test.work", &json!({"work_ms": 100}));
    let submitted = ids(&producer.api.submit_batch(&batch).await?);
    log.started(20, LIMIT).await?;
    broker.kill().await?;
    broker.lose_disk()?;
    broker.start().await?;
    stack.vhost.create().await?;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    nothing_left(&stack.vhost).await
}

on_both_ledgers! {
    async fn what_an_operator_purges_is_published_again(ledger) {
        lose_and_heal(ledger, async |stack, queue| stack.vhost.purge(queue).await).await
    }

    async fn what_an_operator_deletes_with_its_queue_is_published_again(ledger) {
        lose_and_heal(ledger, async |stack, queue| stack.vhost.delete_queue(queue).await).await
    }
}

/// Two queues lose their messages: one whose worker is busy, and one that has no worker at that time.
async fn lose_and_heal(ledger: LedgerKind, lose: impl AsyncFn(&Stack, &str) -> Result<u32>) -> Result<()> {
    let stack = Stack::new(ledger).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let start_worker =
        |queue| stack.test_worker(&log).env("TASKLANE_QUEUES", queue).env("TASKLANE_CONCURRENCY", 2).start();
    let _busy = start_worker("busy").await?;
    let mut submitted = ids(&submit_to(&producer.api, "busy", 30, 150).await?);
    submitted.extend(ids(&submit_to(&producer.api, "idle", 30, 0).await?));
    eventually(LIMIT, "30 tasks to wait in the broker", async || {
        Ok((waiting(&producer.api, "idle").await? == 30).then_some(()))
    })
    .await?;
    log.started(4, LIMIT).await?;
    assert!(lose(&stack, "tasklane.q.busy").await? > 10, "the test proves too little");
    assert_eq!(lose(&stack, "tasklane.q.idle").await?, 30);

    // Where the queue is gone, these go nowhere at first.
    submitted.extend(ids(&submit_to(&producer.api, "idle", 5, 0).await?));
    let _idle = start_worker("idle").await?;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    for queue in ["tasklane.q.busy", "tasklane.q.idle", "tasklane.dead"] {
        assert_eq!(stack.vhost.depth(queue).await?, Some(0), "{queue}");
    }
    Ok(())
}

async fn submit_to(api: &Api, queue: &str, count: usize, work_ms: u64) -> Result<Vec<Accepted>> {
    let task = json!({"kind": "test.work", "queue": queue, "args": {"work_ms": work_ms}});
    api.submit_batch(&vec![task; count]).await
}

/// How many tasks of a queue are known to be in the broker.
async fn waiting(api: &Api, queue: &str) -> Result<u64> {
    let queue: Value = api.raw_get(&format!("/v1/queues/{queue}")).await?.expect(&[200])?;
    Ok(queue["counts"]["queued"].as_u64().unwrap_or_default())
}

/// Longer than a publisher waits for a confirm, and than a publication may take.
const ALARM: Duration = Duration::from_secs(26);

on_both_ledgers! {
    async fn a_broker_with_an_alarm_delays_tasks_and_no_submission(ledger) {
        let broker = Broker::private().await?;
        let stack = Stack::on(broker.node(), ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let mut worker = stack.test_worker(&log).start().await?;
        let load = Load::of(&producer.api, json!({"kind": "test.work"}));
        log.started(20, LIMIT).await?;
        broker.raise_memory_alarm().await?;
        eventually(LIMIT, "the producer to hear of the alarm", async || {
            Ok((readiness(&producer.api).await?["broker"] == false).then_some(()))
        })
        .await?;
        let until = Instant::now() + ALARM;
        let mut look = Instant::now();
        while look < until {
            let told = readiness(&producer.api).await?;
            assert_eq!((&told["ready"], &told["broker"]), (&json!(true), &json!(false)), "{told}");
            look += Duration::from_secs(1);
            sleep_until(look).await;
        }
        let waiting = producer.api.under_way().await?;
        assert!(waiting.values().sum::<u64>() > 200, "submissions pile up in the ledger meanwhile: {waiting:?}");
        broker.clear_memory_alarm().await?;
        let loaded = load.stop().await?;

        assert!(loaded.slowest < ANSWER_LIMIT, "a submission took {:?}", loaded.slowest);
        check_completed(&producer.api.all_ended(loaded.accepted.len(), LIMIT).await?, &loaded.accepted)?;
        log.check_each_started_once(loaded.accepted.iter().map(String::as_str))?;
        for metrics in [producer.api.metrics().await?, worker.metrics().await?] {
            let unknown = metrics.sum("tasklane_publications_total", &[("outcome", "unknown")]);
            let reconnects = metrics.sum("tasklane_broker_reconnects_total", &[]);
            let stranded = metrics.sum("tasklane_stranded_total", &[]);
            assert_eq!((unknown, reconnects, stranded), (0.0, 0.0, 0.0), "an alarm is no failure");
        }
        assert_eq!((producer.process.has_exited()?, worker.process.has_exited()?), (None, None));
        nothing_left(&stack.vhost).await
    }

    /// The queue is never empty, so only its watermark tells.
    async fn a_message_lost_out_of_the_middle_of_a_queue_is_published_again(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let lost = producer.api.submit(&json!({"kind": "test.once"})).await?.id;
        producer.api.in_state(&lost, "queued", LIMIT).await?;
        assert_eq!(stack.vhost.take("tasklane.q.default").await?.len(), 1);
        // As if that had been a minute ago.
        stack.ledger.execute("UPDATE tasks SET queued_at = queued_at - 60000 WHERE kind = 'test.once'").await?;
        let mut submitted = ids(&producer.api.submit_batch(&tasks(100, "test.work", &json!({"work_ms": 300}))).await?);
        let slow = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 1).start().await?;
        let stranded = async || {
            let all = [producer.api.metrics().await?, slow.metrics().await?];
            anyhow::Ok(all.iter().map(|metrics| metrics.sum("tasklane_stranded_total", &[])).sum::<f64>())
        };
        eventually(LIMIT / 4, "the loss to be noticed", async || Ok((stranded().await? > 0.0).then_some(()))).await?;
        let depth = stack.vhost.depth("tasklane.q.default").await?;
        assert!(depth > Some(10), "{depth:?} were left: an empty queue would have told as well");

        let _helper = stack.test_worker(&log).start().await?;
        submitted.insert(lost);
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        assert_eq!(stranded().await?, 1.0, "nobody else's message was missed");
        nothing_left(&stack.vhost).await
    }
}

/// What the producer says of itself.
async fn readiness(api: &Api) -> Result<Value> {
    api.raw_get("/readyz").await?.json()
}
