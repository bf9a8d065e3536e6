//! A broker that takes its messages back while their tasks run, brings every one of them twice, or has a queue deleted
//! and declared anew behind its consumers' backs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use serde_json::json;
use tasklane_common::topology::TASKS_EXCHANGE;
use tasklane_tests::broker::Broker;
use tasklane_tests::stack::Stack;
use tasklane_tests::vhost::Vhost;
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::{check_completed, ids, nothing_left, started_at, tasks};

const LIMIT: Duration = Duration::from_secs(60);

on_both_ledgers! {
    async fn a_task_longer_than_the_brokers_ack_timeout_runs_once_and_its_worker_goes_on(ledger) {
        let broker = Broker::private().await?;
        // Read by every channel at its start, and looked after at every tick, which is once a minute by default.
        for setting in ["consumer_timeout, 3000", "channel_tick_interval, 500"] {
            broker.ctl(&["eval", &format!("application:set_env(rabbit, {setting}).")]).await?;
        }
        let stack = Stack::on(broker.node(), ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        // Custody comes after ten minutes: the ack timeout of this broker hits the delivery before.
        let mut worker = stack.test_worker(&log).start().await?;
        let mut submitted = ids(&producer.api.submit_batch(&tasks(3, "test.work", &json!({"work_ms": 12_000}))).await?);
        log.started(3, LIMIT).await?;
        worker.process.logged("the broker ended the consumer", LIMIT).await?;
        assert_eq!(log.entries()?.len(), 3, "the timeout has hit while they ran");
        // Consuming again, beside the long ones.
        submitted.extend(ids(&producer.api.submit_batch(&tasks(5, "test.work", &json!({}))).await?));
        started_at(&log, worker.process.pid(), 8, Duration::from_secs(8)).await?;

        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        assert!(ended.iter().all(|task| task.attempt == 1), "{ended:#?}");
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        let log = worker.process.log();
        assert!(log.contains("PRECONDITION_FAILED") || log.contains("PRECONDITION-FAILED"), "another reason:\n{log}");
        assert_eq!(log.matches("the worker has entered the ledger").count(), 1, "{log}");
        assert_eq!(worker.process.has_exited()?, None);
        nothing_left(&stack.vhost).await
    }

    async fn a_queue_declared_anew_before_a_consumers_channel_hears_of_its_end_is_consumed_all_the_same(ledger) {
        let broker = Broker::private().await?;
        let stack = Stack::on(broker.node(), ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut worker = stack.test_worker(&log).start().await?;
        let before = ids(&producer.api.submit_batch(&tasks(3, "test.work", &json!({}))).await?);
        producer.api.all_ended(before.len(), LIMIT).await?;

        // As if the process of the channel was given no time.
        let (vhost, queue) = (&stack.vhost, "tasklane.q.default");
        let suspend = format!(
            "[sys:suspend(P) || R <- ets:tab2list(consumer_created), \
             {{{{resource, <<\"{}\">>, queue, <<\"{queue}\">>}}, P, _}} <- [element(1, R)]].",
            vhost.name()
        );
        ensure!(broker.ctl(&["eval", &suspend]).await?.trim() == "[ok]", "one channel consumes {queue}");
        vhost.delete_queue(queue).await?;
        vhost.bind(queue, TASKS_EXCHANGE, "default.#").await?;
        broker.ctl(&["eval", "[sys:resume(P) || P <- rabbit_channel:list_local()]."]).await?;

        let submitted = ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({}))).await?);
        worker.process.logged("messages were lost", LIMIT).await?;
        let all: BTreeSet<_> = before.union(&submitted).cloned().collect();
        check_completed(&producer.api.all_ended(all.len(), LIMIT).await?, &all)?;
        log.check_each_started_once(all.iter().map(String::as_str))?;
        // What nobody has acked comes back with the end of the worker.
        worker.process.terminate()?;
        worker.process.exited(LIMIT).await?;
        nothing_left(vhost).await
    }

    async fn tasks_run_once_though_every_message_comes_twice(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let workers = [stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        let echo = Echo::start(&stack.vhost).await?;
        let mut submitted = BTreeSet::new();
        for _ in 0..10 {
            submitted.extend(ids(&producer.api.submit_batch(&tasks(50, "test.work", &json!({"work_ms": 50}))).await?));
        }
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        eventually(LIMIT, "every message to be published twice", async || {
            Ok((echo.echoed.load(Ordering::Relaxed) >= submitted.len()).then_some(()))
        })
        .await?;
        check_completed(&ended, &submitted)?;
        assert!(ended.iter().all(|task| task.attempt == 1), "{ended:#?}");
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        eventually(LIMIT, "every second message to be refused", async || {
            let mut refused = 0.0;
            for worker in &workers {
                refused += worker.metrics().await?.sum("tasklane_claims_refused_total", &[]);
            }
            ensure!(refused >= submitted.len() as f64, "{refused} have been refused");
            Ok(Some(()))
        })
        .await?;
        nothing_left(&stack.vhost).await
    }
}

/// Publishes every message that passes the exchange once more, straight into the queue.
struct Echo {
    echoed: Arc<AtomicUsize>,
    _connection: lapin::Connection,
}

impl Echo {
    async fn start(vhost: &Vhost) -> Result<Self> {
        let tap = vhost.tap(TASKS_EXCHANGE, "default.#").await?;
        let connection = vhost.connect().await?;
        let channel = connection.create_channel().await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut messages = channel.basic_consume(tap.into(), "echo".into(), options, none).await?;
        let echoed = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&echoed);
        tokio::spawn(async move {
            // The stream ends with the connection.
            while let Some(Ok(message)) = messages.next().await {
                let (to, options) = ("tasklane.q.default", BasicPublishOptions::default());
                let properties = message.properties.clone();
                channel.basic_publish("".into(), to.into(), options, &message.data, properties).await?;
                message.ack(BasicAckOptions::default()).await?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, anyhow::Error>(())
        });
        Ok(Self { echoed, _connection: connection })
    }
}
