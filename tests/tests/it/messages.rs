//! Messages that are foreign, twofold, misplaced or waiting too long: the ledger sorts them out.

use std::time::Duration;

use anyhow::{Context, Result};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;
use tasklane_common::envelope::{BUNDLE_VERSION, VERSION, VERSION_HEADER};
use tasklane_common::task::TaskId;
use tasklane_common::topology::{CONTROL_EXCHANGE, DEAD_QUEUE, REASON_HEADER, TASKS_EXCHANGE};
use tasklane_tests::api::Api;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::{CommandKind, Step};
use tasklane_tests::proxy::Proxy;
use tasklane_tests::stack::{LEASE_TTL, Stack, Worker};
use tasklane_tests::vhost::Vhost;
use tasklane_tests::wire::{Wire, headers, nested};
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::time::sleep;

use crate::load::{Load, check_completed, ids, nothing_left, started_at, tasks};

const LIMIT: Duration = Duration::from_secs(60);
const DEFAULT_QUEUE: &str = "tasklane.q.default";

/// After how long the tests of long tasks let the ledger alone hold them.
const CUSTODY_AFTER_MS: u64 = 300;
const REFUSED: &str = "tasklane_claims_refused_total";

/// The properties of a task of this version.
fn properties(id: &str, version: i32) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(VERSION_HEADER.into(), AMQPValue::LongInt(version));
    let properties = BasicProperties::default().with_message_id(id.into()).with_type("test.work".into());
    properties.with_headers(headers).with_delivery_mode(2)
}

#[tokio::test]
async fn what_is_no_task_goes_to_the_dead_letters_and_disturbs_nobody() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).start().await?;
    let load = Load::of(&producer.api, json!({"kind": "test.work", "args": {"work_ms": 20}}));
    log.started(5, LIMIT).await?;

    let stranger = TaskId::new().to_string();
    let good = |id: &str| properties(id, VERSION);
    let rubbish: [(&str, BasicProperties, &[u8]); 7] = [
        ("foreign_message", BasicProperties::default(), b"hello"),
        ("unknown_version", properties(&stranger, BUNDLE_VERSION + 1), b"{}"),
        ("bad_message_id", good("seventeen"), b"{}"),
        ("bad_type", good(&stranger).with_type("no kind at all".into()), b"{}"),
        ("bad_body", good(&stranger), b"{\"unfinished\":"),
        ("bad_body", good(&stranger), b"\xff\xfe\x00"),
        ("unknown_task", good(&stranger), b"{}"),
    ];
    for (_, properties, body) in rubbish.clone() {
        stack.vhost.publish("", DEFAULT_QUEUE, body, properties).await?;
    }
    eventually(LIMIT, "the dead letters", async || Ok((stack.vhost.depth(DEAD_QUEUE).await? == Some(7)).then_some(())))
        .await?;
    let mut buried = dead_letters(&stack.vhost).await?;
    let mut expected: Vec<_> = rubbish.map(|(reason, _, body)| (reason.to_owned(), body.to_vec())).into();
    buried.sort();
    expected.sort();
    assert_eq!(buried, expected);

    let submitted = load.stop().await?.accepted;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    assert_eq!(worker.metrics().await?.sum("tasklane_dead_letters_total", &[]), 7.0);
    nothing_left(&stack.vhost).await
}

/// What other programs publish reaches every process: in a task queue, as words to all, and as events.
#[tokio::test]
async fn headers_that_the_amqp_library_cannot_take_end_nobody() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).start().await?;
    let load = Load::of(&producer.api, json!({"kind": "test.work", "args": {"work_ms": 20}}));
    log.started(5, LIMIT).await?;

    let mut wire = Wire::to(&stack.vhost).await?;
    let odd: [(&str, Vec<u8>); 5] = [
        ("headers_too_deep", headers(&nested(2_000)?)),
        ("headers_too_deep", headers(&nested(6_000)?)),
        ("headers_too_large", headers(&nested(26_000)?)),
        ("headers_malformed", headers(b"\x01\xffV")),
        ("headers_malformed", b"\x80\0\x01\xff".to_vec()),
    ];
    for (reason, properties) in &odd {
        wire.publish("", DEFAULT_QUEUE.as_bytes(), properties, b"odd").await.context(*reason)?;
        wire.publish(CONTROL_EXCHANGE, b"", properties, b"odd").await.context(*reason)?;
    }
    let plain = [0, 0];
    wire.publish(TASKS_EXCHANGE, b"default.\xff", &plain, b"odd").await?;
    let reasons = odd.iter().map(|(reason, _)| *reason).chain(["foreign_message"]);
    let expected: Vec<_> = reasons.map(|reason| (reason.to_owned(), b"odd".to_vec())).collect();
    eventually(LIMIT, "the dead letters", async || {
        Ok((stack.vhost.depth(DEAD_QUEUE).await? == Some(u32::try_from(expected.len())?)).then_some(()))
    })
    .await?;
    let mut buried = dead_letters(&stack.vhost).await?;
    buried.sort_by_key(|(reason, _)| expected.iter().position(|(expected, _)| expected == reason));
    assert_eq!(buried, expected);

    let submitted = load.stop().await?.accepted;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    for metrics in [worker.metrics().await?, producer.api.metrics().await?] {
        assert_eq!(metrics.sum("tasklane_broker_reconnects_total", &[]), 0.0);
    }
    nothing_left(&stack.vhost).await
}

/// A peer may fill a frame of 128 KiB, the broker's default, with headers: they are not cut as bodies are.
#[tokio::test]
async fn a_message_with_large_headers_goes_to_the_dead_letters_and_disturbs_nobody() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).start().await?;
    let mut headers = FieldTable::default();
    headers.insert("large".into(), AMQPValue::LongString("x".repeat(100 << 10).into()));
    stack.vhost.publish("", DEFAULT_QUEUE, b"hello", BasicProperties::default().with_headers(headers)).await?;
    eventually(LIMIT, "the dead letter", async || Ok((stack.vhost.depth(DEAD_QUEUE).await? == Some(1)).then_some(())))
        .await?;
    assert_eq!(dead_letters(&stack.vhost).await?, [("headers_too_large".to_owned(), b"hello".to_vec())]);
    let submitted = ids(&producer.api.submit_batch(&tasks(50, "test.work", &json!({}))).await?);
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    let reconnects = worker.metrics().await?.sum("tasklane_broker_reconnects_total", &[("role", "consumer")]);
    assert_eq!(reconnects, 0.0);
    nothing_left(&stack.vhost).await
}

/// Takes the dead letters: reasons and bodies.
async fn dead_letters(vhost: &Vhost) -> Result<Vec<(String, Vec<u8>)>> {
    let letter = |message: lapin::message::BasicGetMessage| {
        let headers = message.properties.headers().clone().context("a dead letter without headers")?;
        match headers.inner().get(REASON_HEADER) {
            Some(AMQPValue::LongString(reason)) => Ok((reason.to_string(), message.data.clone())),
            other => anyhow::bail!("the reason is {other:?}"),
        }
    };
    vhost.take(DEAD_QUEUE).await?.into_iter().map(letter).collect()
}

on_both_ledgers! {
    async fn a_kind_that_no_worker_has_waits_quietly_until_one_has_it(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let other = stack.test_worker(&log).start().await?;
        let submitted = ids(&producer.api.submit_batch(&tasks(10, "test.late", &json!({"n": 1}))).await?);
        eventually(LIMIT, "all ten to be refused once", async || Ok((no_handler(&other).await? >= 10.0).then_some(()))).await?;
        // How quiet it is can only be seen over a time.
        sleep(Duration::from_secs(6)).await;
        let refused = no_handler(&other).await?;
        assert!(refused <= 30.0, "10 tasks were delivered {refused} times in 6 s to a worker that lacks their kind");
        assert_eq!(producer.api.under_way().await?.values().sum::<u64>(), 10, "they wait");

        let command = log.command(&CommandKind::new("test.late").then("cat"))?;
        let _late = stack.worker().config(&command).start().await?;
        let ended = producer.api.all_ended(submitted.len(), Duration::from_secs(20)).await?;
        check_completed(&ended, &submitted)?;
        assert!(ended.iter().all(|task| task.attempt == 1), "waiting has cost attempts: {ended:#?}");
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn workers_with_different_kinds_share_a_queue(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _one = stack.test_worker(&log).start().await?;
        let command = log.command(&CommandKind::new("test.other"))?;
        let _other = stack.worker().config(&command).start().await?;
        let mut batch = tasks(20, "test.work", &json!({}));
        batch.extend(tasks(20, "test.other", &json!({})));
        let submitted = ids(&producer.api.submit_batch(&batch).await?);
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }
}

async fn no_handler(worker: &Worker) -> Result<f64> {
    Ok(worker.metrics().await?.sum(REFUSED, &[("reason", "no_handler")]))
}

on_both_ledgers! {
    async fn a_task_in_two_queues_runs_once_and_a_tap_changes_nothing(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let start_worker = || stack.test_worker(&log).env("TASKLANE_QUEUES", "default,other").start();
        let (first, second) = (start_worker().await?, start_worker().await?);
        stack.vhost.bind("tasklane.q.other", TASKS_EXCHANGE, "default.#").await?;
        let tap = stack.vhost.tap(TASKS_EXCHANGE, "#").await?;
        let submitted = ids(&producer.api.submit_batch(&tasks(50, "test.work", &json!({"work_ms": 30}))).await?);
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        assert_eq!(stack.vhost.take(&tap).await?.len(), 50, "the tap has seen every task");
        assert_eq!(stack.vhost.depth("tasklane.q.other").await?, Some(0));
        let refused = async |worker: &Worker| Ok::<_, anyhow::Error>(worker.metrics().await?.sum(REFUSED, &[]));
        eventually(LIMIT, "every copy to be refused", async || {
            Ok((refused(&first).await? + refused(&second).await? >= 50.0).then_some(()))
        })
        .await?;
        nothing_left(&stack.vhost).await
    }

    async fn a_message_published_again_runs_no_second_time(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _workers = [stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        let tap = stack.vhost.tap(TASKS_EXCHANGE, "default.#").await?;
        let batch = tasks(40, "test.work", &json!({"work_ms": 200, "failures": 1}));
        let submitted = ids(&producer.api.submit_batch(&batch).await?);
        // Copies come while the tasks wait, run, wait for their next attempt, and when they have ended.
        let mut copies = 0;
        let ended = loop {
            for message in stack.vhost.take(&tap).await? {
                if copies < 200 {
                    let key = message.delivery.routing_key.as_str();
                    stack.vhost.publish(TASKS_EXCHANGE, key, &message.data, message.delivery.properties.clone()).await?;
                    copies += 1;
                }
            }
            if producer.api.under_way().await?.is_empty() {
                break producer.api.all_ended(submitted.len(), LIMIT).await?;
            }
        };
        check_completed(&ended, &submitted)?;
        assert!(copies >= submitted.len(), "{copies} copies: not even every first message was published again");
        assert!(ended.iter().all(|task| task.attempt == 2), "{ended:#?}");
        assert_eq!(log.starts()?.len(), 2 * submitted.len());
        log.check_fences_rise()?;
        log.check_no_overlap()?;
        nothing_left(&stack.vhost).await
    }
}

on_both_ledgers! {
    async fn a_long_task_leaves_the_broker_early_and_is_rescued_all_the_same(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut first = stack.test_worker(&log).short_lease().env("TASKLANE_CUSTODY_AFTER_MS", CUSTODY_AFTER_MS).start().await?;
        let task = json!({"kind": "test.work", "args": {"work_ms": 60_000, "work_again_ms": 2000}});
        let long = producer.api.submit(&task).await?;
        log.started(1, LIMIT).await?;
        custody_taken(&producer.api).await?;
        let second = stack.test_worker(&log).env("TASKLANE_CUSTODY_AFTER_MS", CUSTODY_AFTER_MS).start().await?;
        first.process.kill().await?;
        let done = producer.api.in_state(&long.id, "completed", LEASE_TTL * 3 + Duration::from_secs(2)).await?;
        assert_eq!(done.attempt, 2, "{done:#?}");
        assert_eq!(log.of(&long.id)?.iter().filter(|entry| entry.step == Step::Start).count(), 2);
        assert_eq!(held(&second).await?, 0.0, "the broker had nothing left to deliver again");
        nothing_left(&stack.vhost).await
    }
}

#[tokio::test]
async fn a_long_task_that_left_the_broker_early_completes_once() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let wire = Proxy::to(stack.vhost.node().amqp).await?;
    let worker = stack.test_worker(&log).short_lease().env("TASKLANE_AMQP_URL", stack.vhost.url_through(&wire));
    let worker = worker.env("TASKLANE_CUSTODY_AFTER_MS", CUSTODY_AFTER_MS).start().await?;
    // Longer than a lease: renewals keep it.
    let work = json!({"work_ms": (LEASE_TTL * 2).as_millis()});
    let long = ids(&producer.api.submit_batch(&tasks(3, "test.work", &work)).await?);
    log.started(3, LIMIT).await?;
    custody_taken(&producer.api).await?;
    // Whatever the broker still holds for the worker it delivers again now, and before what comes later.
    wire.cut_all();
    let later = producer.api.submit(&json!({"kind": "test.work"})).await?;
    producer.api.in_state(&later.id, "completed", LIMIT).await?;
    assert_eq!(held(&worker).await?, 0.0, "the broker still had the long tasks");

    check_completed(&producer.api.all_ended(5, LIMIT).await?, &long)?;
    assert_eq!(log.starts()?.len(), 5);
    nothing_left(&stack.vhost).await
}

/// Waits until what has begun runs for longer than [`CUSTODY_AFTER_MS`]: for the end of a shorter task that begins now.
async fn custody_taken(api: &Api) -> Result<()> {
    let clock = api.submit(&json!({"kind": "test.work", "args": {"work_ms": 5 * CUSTODY_AFTER_MS}})).await?;
    api.in_state(&clock.id, "completed", LIMIT).await.map(drop)
}

/// How many deliveries a worker has refused because their task was running.
async fn held(worker: &Worker) -> Result<f64> {
    Ok(worker.metrics().await?.sum(REFUSED, &[("reason", "held")]))
}

#[tokio::test]
async fn what_a_busy_worker_cannot_take_goes_to_an_idle_one() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let busy = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 2).start().await?;
    let submitted = ids(&producer.api.submit_batch(&tasks(6, "test.work", &json!({"work_ms": 12_000}))).await?);
    started_at(&log, busy.process.pid(), 2, LIMIT).await?;
    let idle = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 4).start().await?;
    // The busy one has prefetched two more; it gives them back, long before it could have run them.
    started_at(&log, idle.process.pid(), 4, Duration::from_secs(8)).await?;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    nothing_left(&stack.vhost).await
}
