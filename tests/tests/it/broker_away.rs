//! A broker that is away, loses what it held, or takes nothing: the ledger knows every task, so none is lost.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::{Accepted, Api};
use tasklane_tests::broker::Broker;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::metrics::Metrics;
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::stack::{Producer, Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::time::{Instant, sleep_until};

use crate::load::{Load, check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(90);

/// Less than the time for which a relay has tasks to itself, and less than it takes to miss a message.
const AT_ONCE: Duration = Duration::from_secs(12);

/// How long the broker is away.
const AWAY: Duration = Duration::from_secs(20);

/// The longest that a submission may take whatever the broker does.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A producer, two workers and a load on a broker that will be away; both ledgers share the time of waiting.
struct World {
    stack: Stack,
    log: OperationLog,
    producer: Producer,
    workers: [Worker; 2],
    load: Load,
}

impl World {
    async fn new(broker: &Broker, ledger: LedgerKind, task: Value) -> Result<Self> {
        let stack = Stack::on(broker.node(), ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let workers = [stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        let load = Load::of(&producer.api, task);
        Ok(Self { stack, log, producer, workers, load })
    }

    async fn on_both(broker: &Broker, task: Value) -> Result<[Self; 2]> {
        let on = |ledger| Self::new(broker, ledger, task.clone());
        Ok([on(LedgerKind::Sqlite).await?, on(LedgerKind::Postgres).await?])
    }

    /// Tasks pile up in the ledger.
    async fn piles_up(&self, least: u64) -> Result<()> {
        let waiting = self.producer.api.under_way().await?;
        ensure!(waiting.values().sum::<u64>() > least, "few submissions in the ledger: {waiting:?}");
        Ok(())
    }

    /// Every submission was answered soon, every task has run once, and every program still runs; answers what the
    /// programs counted.
    async fn check(mut self, mut submitted: BTreeSet<String>) -> Result<[Metrics; 3]> {
        let loaded = self.load.stop().await?;
        ensure!(loaded.slowest < ANSWER_LIMIT, "a submission took {:?}", loaded.slowest);
        submitted.extend(loaded.accepted);
        check_completed(&self.producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        self.log.check_each_started_once(submitted.iter().map(String::as_str))?;
        for process in [&mut self.producer.process].into_iter().chain(self.workers.iter_mut().map(|w| &mut w.process)) {
            ensure!(process.has_exited()?.is_none(), "a program has ended");
        }
        nothing_left(&self.stack.vhost).await?;
        let [one, other] = &self.workers;
        Ok([self.producer.api.metrics().await?, one.metrics().await?, other.metrics().await?])
    }
}

#[tokio::test]
async fn a_broker_that_is_stopped_for_20_s_costs_time_and_nothing_else() -> Result<()> {
    let mut broker = Broker::private().await?;
    let worlds = World::on_both(&broker, json!({"kind": "test.work", "args": {"work_ms": 20}})).await?;
    for world in &worlds {
        world.log.started(80, LIMIT).await?;
    }
    let mut running = Vec::new();
    for world in &worlds {
        let long = ids(&world.producer.api.submit_batch(&tasks(20, "test.work", &json!({"work_ms": 6000}))).await?);
        eventually(LIMIT, "the long ones to begin", async || {
            let begun: BTreeSet<_> = world.log.starts()?.into_iter().map(|start| start.task).collect();
            Ok(long.is_subset(&begun).then_some(()))
        })
        .await?;
        running.push(long);
    }

    broker.stop().await?;
    let back_at = Instant::now() + AWAY;
    for (world, running) in worlds.iter().zip(&running) {
        for id in running {
            world.producer.api.in_state(id, "completed", AWAY / 2).await?;
        }
    }
    sleep_until(back_at).await;
    for world in &worlds {
        world.piles_up(100).await?;
    }
    broker.start().await?;
    for (world, running) in worlds.into_iter().zip(running) {
        world.check(running).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_killed_brokers_backlog_completes_when_it_is_back_even_without_its_disk() -> Result<()> {
    let mut broker = Broker::private().await?;
    let stack = Stack::on(broker.node(), LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 4).start().await?;
    let mut submitted = BTreeSet::new();
    for disk_is_lost in [false, true] {
        let begun = submitted.len();
        let batch = tasks(300, "test.work", &json!({"work_ms": 100}));
        submitted.extend(ids(&producer.api.submit_batch(&batch).await?));
        // A node that dies in the first half second of a quorum queue may never elect its leader again (3.10 does
        // not): four at a time these take three seconds.
        log.started(begun + 120, LIMIT).await?;
        broker.kill().await?;
        if disk_is_lost {
            broker.lose_disk()?;
        }
        broker.start().await?;
        if disk_is_lost {
            stack.vhost.create().await?;
        }
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await?;
    }
    Ok(())
}

on_both_ledgers! {
    async fn what_an_operator_purges_is_published_again(ledger) {
        lose_and_heal(ledger, async |stack, queue| stack.vhost.purge(queue).await).await
    }

    async fn what_an_operator_deletes_with_its_queue_is_published_again(ledger) {
        lose_and_heal(ledger, async |stack, queue| stack.vhost.delete_queue(queue).await).await
    }
}

on_both_ledgers! {
    async fn what_a_relay_sends_to_a_deleted_queue_is_sent_again_at_once(ledger) {
        let stack = Stack::new(ledger).await?;
        let producer = stack.producer().start().await?;
        let first = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        producer.api.in_state(&first, "queued", LIMIT).await?;
        assert_eq!(stack.vhost.delete_queue("tasklane.q.default").await?, 1);
        // Its time comes when nobody has declared the queue anew, and the relay takes it for 30 s.
        let later = producer.api.submit(&json!({"kind": "test.work", "delay_ms": 500})).await?.id;
        producer.api.in_state(&later, "queued", AT_ONCE).await?;
        let depth = stack.vhost.depth("tasklane.q.default").await?;
        assert!(depth >= Some(1), "{depth:?}");
        let refused = producer.api.metrics().await?.sum("tasklane_publications_total", &[("outcome", "refused")]);
        assert!(refused >= 1.0, "the test proves nothing");
        Ok(())
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
    let mut submitted = ids(&submit_to(&producer.api, "idle", 30, 0).await?);
    eventually(LIMIT, "30 tasks to wait in the broker", async || {
        Ok((waiting(&producer.api, "idle").await? == 30).then_some(()))
    })
    .await?;
    submitted.extend(ids(&submit_to(&producer.api, "busy", 30, 300).await?));
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

#[tokio::test]
async fn a_broker_with_an_alarm_delays_tasks_and_no_submission() -> Result<()> {
    let broker = Broker::private().await?;
    let worlds = World::on_both(&broker, json!({"kind": "test.work"})).await?;
    for world in &worlds {
        world.log.started(20, LIMIT).await?;
    }
    broker.raise_memory_alarm().await?;
    for world in &worlds {
        eventually(LIMIT, "the producer to hear of the alarm", async || {
            Ok((readiness(&world.producer.api).await?["broker"] == false).then_some(()))
        })
        .await?;
    }
    let until = Instant::now() + ALARM;
    let mut look = Instant::now();
    while look < until {
        for world in &worlds {
            let told = readiness(&world.producer.api).await?;
            assert_eq!((&told["ready"], &told["broker"]), (&json!(true), &json!(false)), "{told}");
        }
        look += Duration::from_secs(1);
        sleep_until(look).await;
    }
    for world in &worlds {
        world.piles_up(200).await?;
    }
    broker.clear_memory_alarm().await?;
    for world in worlds {
        for metrics in world.check(BTreeSet::new()).await? {
            let unknown = metrics.sum("tasklane_publications_total", &[("outcome", "unknown")]);
            let reconnects = metrics.sum("tasklane_broker_reconnects_total", &[]);
            let stranded = metrics.sum("tasklane_stranded_total", &[]);
            assert_eq!((unknown, reconnects, stranded), (0.0, 0.0, 0.0), "an alarm is no failure");
        }
    }
    Ok(())
}

on_both_ledgers! {
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

        assert_eq!(stranded().await?, 1.0, "nobody else's message was missed");
        let _helper = stack.test_worker(&log).start().await?;
        submitted.insert(lost);
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }
}

on_both_ledgers! {
    /// The first message of a task that was published twice comes when its row tells of the second.
    async fn a_message_of_before_does_not_make_those_behind_it_count_as_lost(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let twice = producer.api.submit(&json!({"kind": "test.once"})).await?.id;
        producer.api.in_state(&twice, "queued", LIMIT).await?;
        let submitted = ids(&producer.api.submit_batch(&tasks(80, "test.work", &json!({"work_ms": 300}))).await?);
        let queued = async |count: u64| {
            let all = async || Ok((waiting(&producer.api, "default").await? == count).then_some(()));
            eventually(LIMIT, &format!("{count} tasks to be queued"), all).await
        };
        queued(81).await?;
        // As if they had been queued a minute ago, and the first of them had then been taken for lost.
        stack.ledger.execute("UPDATE tasks SET queued_at = queued_at - 60000").await?;
        let strand = "UPDATE tasks SET state = 0, due_at = queued_at, queued_at = NULL WHERE kind = 'test.once'";
        stack.ledger.execute(strand).await?;
        eventually(LIMIT, "a second message", async || {
            Ok((stack.vhost.depth("tasklane.q.default").await? == Some(82)).then_some(()))
        })
        .await?;
        queued(81).await?;

        let worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 1).start().await?;
        // In so many times 300 ms every process has looked twice.
        log.started(45, LIMIT).await?;
        let depth = stack.vhost.depth("tasklane.q.default").await?;
        assert!(depth > Some(10), "{depth:?} were left: the test proves nothing");
        for metrics in [producer.api.metrics().await?, worker.metrics().await?] {
            assert_eq!(metrics.sum("tasklane_stranded_total", &[]), 0.0, "nothing was lost");
        }
        let all = submitted.into_iter().chain([twice]).collect();
        check_completed(&producer.api.all_ended(81, LIMIT).await?, &all)?;
        log.check_each_started_once(all.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }
}

/// What the producer says of itself.
async fn readiness(api: &Api) -> Result<Value> {
    api.raw_get("/readyz").await?.json()
}
