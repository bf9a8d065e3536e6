//! Wires that break at exactly the worst moments: before and behind every step of a task's way.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tasklane_tests::api::Api;
use tasklane_tests::ledger::{Ledger, LedgerKind};
use tasklane_tests::oplog::{OperationLog, Step};
use tasklane_tests::process::Process;
use tasklane_tests::proxy::{Direction, Method, Proxy, Side};
use tasklane_tests::stack::{Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers, services};

use crate::load::{check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// Shorter than the time after which a lost message is noticed by comparing the queues with the ledger: whoever needs
/// that has forgotten a task for a while.
const AT_ONCE: Duration = Duration::from_secs(14);

/// How long a worker or producer may take to see that the other end says nothing: two heartbeats of 10 s at most.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

on_both_ledgers! {
    async fn a_wire_cut_around_a_publication_or_its_confirm_loses_and_repeats_nothing(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let wire = Proxy::to(stack.vhost.node().amqp).await?;
        let producer = stack.producer().env("TASKLANE_AMQP_URL", stack.vhost.url_through(&wire)).start().await?;
        // A worker relays too, so this one stands for all other processes: its own wire is whole.
        let _worker = stack.test_worker(&log).start().await?;
        let mut submitted = BTreeSet::new();
        let cuts = [
            (Direction::ToServer, Side::Before, Method::PUBLISH),
            (Direction::ToServer, Side::Behind, Method::PUBLISH),
            (Direction::ToClient, Side::Before, Method::ACK),
            (Direction::ToClient, Side::Behind, Method::ACK),
        ];
        for (number, (direction, side, method)) in (1..).zip(cuts) {
            submitted.extend(publishes(&producer.api).await?);
            wire.cut_at(direction, side, method);
            submitted.extend(ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({}))).await?));
            wire.cut_made(number, LIMIT).await?;
            completed(&producer.api, &submitted, AT_ONCE).await.with_context(|| format!("cut {side:?} {method:?}"))?;
        }
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn what_a_relay_could_not_publish_is_published_by_whoever_can(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let wire = Proxy::to(stack.vhost.node().amqp).await?;
        let producer = stack.producer().env("TASKLANE_AMQP_URL", stack.vhost.url_through(&wire)).start().await?;
        publishes(&producer.api).await?;
        // Nobody but this producer's relay can publish them when their time has come.
        let later = json!({"kind": "test.work", "delay_ms": 500});
        wire.cut_at(Direction::ToServer, Side::Before, Method::PUBLISH);
        let mut submitted = ids(&producer.api.submit_batch(&vec![later; 20]).await?);
        wire.cut_made(1, LIMIT).await?;
        wire.stall_all();
        let _worker = stack.test_worker(&log).start().await?;
        submitted.extend(producer.api.list_all(&[]).await?.into_iter().map(|task| task.id));
        // A relay keeps its tasks to itself for 30 s, unless it knows that it could not publish them.
        completed(&producer.api, &submitted, AT_ONCE).await?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        wire.resume().await?;
        nothing_left(&stack.vhost).await
    }

    async fn a_wire_cut_around_a_delivery_or_its_ack_loses_and_repeats_nothing(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let wire = Proxy::to(stack.vhost.node().amqp).await?;
        let worker = stack.test_worker(&log).env("TASKLANE_AMQP_URL", stack.vhost.url_through(&wire)).start().await?;
        let mut submitted = BTreeSet::new();
        let cuts = [
            (Direction::ToClient, Side::Before, Method::DELIVER, 0.0),
            (Direction::ToClient, Side::Behind, Method::DELIVER, 0.0),
            (Direction::ToServer, Side::Before, Method::ACK, 1.0),
            (Direction::ToServer, Side::Behind, Method::ACK, 0.0),
        ];
        for (number, (direction, side, method, comes_again)) in (1..).zip(cuts) {
            let refused = finished(&worker).await?;
            wire.cut_at(direction, side, method);
            submitted.extend(ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({"work_ms": 20}))).await?));
            wire.cut_made(number, LIMIT).await?;
            completed(&producer.api, &submitted, AT_ONCE).await.with_context(|| format!("cut {side:?} {method:?}"))?;
            nothing_left(&stack.vhost).await?;
            // An empty queue may have its last messages under way to the worker.
            let again = eventually(LIMIT, "deliveries to come again after their task's end", async || {
                Ok((finished(&worker).await? - refused >= comes_again).then_some(()))
            });
            again.await.with_context(|| format!("cut {side:?} {method:?}"))?;
        }
        // While the handlers run: what is delivered again meanwhile is refused, and the first run counts. After so many cuts
        // the worker waits for seconds before it connects again.
        let running = ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({"work_ms": 6000}))).await?);
        submitted.extend(running);
        log.started(submitted.len(), LIMIT).await?;
        wire.cut_all();
        completed(&producer.api, &submitted, AT_ONCE).await?;
        let held = worker.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "held")]);
        assert!(held >= 20.0, "only {held} deliveries came again while their task was running");
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }
}

/// Submits tasks until the producer itself gets one confirmed: it is connected, and the next one goes the normal way.
async fn publishes(api: &Api) -> Result<BTreeSet<String>> {
    let confirmed = async || {
        let metrics = api.metrics().await?;
        Ok::<_, anyhow::Error>(metrics.sum("tasklane_publications_total", &[("outcome", "confirmed")]))
    };
    let before = confirmed().await?;
    let mut submitted = BTreeSet::new();
    eventually(LIMIT, "the producer to publish", async || {
        submitted.insert(api.submit(&json!({"kind": "test.work"})).await?.id);
        eventually(Duration::from_millis(500), "a confirm", async || Ok((confirmed().await? > before).then_some(())))
            .await?;
        Ok(Some(()))
    })
    .await?;
    Ok(submitted)
}

async fn completed(api: &Api, submitted: &BTreeSet<String>, limit: Duration) -> Result<()> {
    check_completed(&api.all_ended(submitted.len(), limit).await?, submitted)
}

/// How many deliveries a worker has refused because their task had ended.
async fn finished(worker: &Worker) -> Result<f64> {
    Ok(worker.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "finished")]))
}

/// The moments of a worker's conversation with its database around which the wire is cut.
#[derive(Clone, Copy, Debug)]
enum Moment {
    BeforeClaim,
    BehindClaim,
    BeforeSettle,
    BehindSettle,
}

#[tokio::test]
async fn a_wire_to_the_ledger_cut_around_a_claim_or_a_result_loses_and_repeats_nothing() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let wire = Proxy::to(services::shared().await?.postgres_addr()?).await?;
    let Ledger::Postgres(database) = &stack.ledger else { anyhow::bail!("the ledger is in PostgreSQL") };
    let worker = stack.test_worker(&log).env("TASKLANE_LEDGER_URL", database.url_at(wire.addr())?).start().await?;
    let mut submitted = BTreeSet::new();
    for moment in [Moment::BeforeClaim, Moment::BehindClaim, Moment::BeforeSettle, Moment::BehindSettle] {
        // Afterwards its statements are prepared, and its connection counts as alive: the next ones are done when their
        // bytes have gone out.
        let warm = producer.api.submit(&json!({"kind": "test.work"})).await?;
        producer.api.in_state(&warm.id, "completed", LIMIT).await?;
        submitted.insert(warm.id);
        let task = cut_around(moment, &wire, &producer.api, &log).await.with_context(|| format!("{moment:?}"))?;
        wire.cut_all();
        wire.resume().await?;
        // Sooner than its lease ends: nobody needs to rescue it.
        let done = producer.api.in_state(&task, "completed", AT_ONCE).await.with_context(|| format!("{moment:?}"))?;
        assert_eq!(done.attempt, 1, "{moment:?}: {done:#?}");
        submitted.insert(task);
    }
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    let entered = worker.process.log().matches("the worker has entered the ledger").count();
    assert_eq!(entered, 1, "its lease has outlasted all cuts:\n{}", worker.process.log());
    nothing_left(&stack.vhost).await
}

/// Submits a task and stalls the wire at this moment of it.
async fn cut_around(moment: Moment, wire: &Proxy, api: &Api, log: &OperationLog) -> Result<String> {
    let task = json!({"kind": "test.work", "args": {"work_ms": 300}});
    match moment {
        Moment::BeforeClaim => {
            wire.stall(Direction::ToServer);
            let task = api.submit(&task).await?.id;
            // The worker has the message when the broker has it no more; its claim does not come through.
            queued(api, &task).await?;
            Ok(task)
        }
        Moment::BehindClaim => {
            wire.stall(Direction::ToClient);
            let task = api.submit(&task).await?.id;
            api.in_state(&task, "running", LIMIT).await?;
            Ok(task)
        }
        Moment::BeforeSettle | Moment::BehindSettle => {
            let task = api.submit(&task).await?.id;
            started(log, &task, Step::Start).await?;
            wire.stall(if matches!(moment, Moment::BeforeSettle) { Direction::ToServer } else { Direction::ToClient });
            started(log, &task, Step::End).await?;
            if matches!(moment, Moment::BehindSettle) {
                api.in_state(&task, "completed", LIMIT).await?;
            }
            Ok(task)
        }
    }
}

async fn queued(api: &Api, task: &str) -> Result<()> {
    api.in_state(task, "queued", LIMIT).await.map(drop)
}

async fn started(log: &OperationLog, task: &str, step: Step) -> Result<()> {
    eventually(LIMIT, &format!("the {step:?} of {task}"), async || {
        Ok(log.of(task)?.iter().any(|entry| entry.step == step).then_some(()))
    })
    .await
}

on_both_ledgers! {
    async fn a_workers_half_open_connection_is_noticed_and_replaced(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let wire = Proxy::to(stack.vhost.node().amqp).await?;
        let mut worker = stack.test_worker(&log).short_lease().env("TASKLANE_AMQP_URL", stack.vhost.url_through(&wire)).start().await?;
        let mut submitted = ids(&producer.api.submit_batch(&tasks(5, "test.work", &json!({}))).await?);
        completed(&producer.api, &submitted, LIMIT).await?;
        for (number, silent) in (1..).zip([Direction::ToClient, Direction::ToServer]) {
            wire.stall(silent);
            // It finds out though nothing is said; what is submitted meanwhile waits, or was delivered in vain.
            submitted.extend(ids(&producer.api.submit_batch(&tasks(5, "test.work", &json!({}))).await?));
            connection_failed(&worker.process, "consumer", number, SILENCE_LIMIT).await?;
            wire.resume().await?;
            completed(&producer.api, &submitted, AT_ONCE).await.with_context(|| format!("{silent:?}"))?;
        }
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        assert_eq!(worker.process.has_exited()?, None);
        nothing_left(&stack.vhost).await
    }
}

#[tokio::test]
async fn a_producers_half_open_connection_is_noticed_and_costs_no_submission() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let wire = Proxy::to(stack.vhost.node().amqp).await?;
    let producer = stack.producer().env("TASKLANE_AMQP_URL", stack.vhost.url_through(&wire)).start().await?;
    let _worker = stack.test_worker(&log).start().await?;
    let mut submitted = publishes(&producer.api).await?;
    completed(&producer.api, &submitted, LIMIT).await?;
    // Idle, it misses no answer: only heartbeats tell.
    wire.stall(Direction::ToClient);
    connection_failed(&producer.process, "publisher", 1, SILENCE_LIMIT).await?;
    wire.resume().await?;
    submitted.extend(publishes(&producer.api).await?);
    completed(&producer.api, &submitted, LIMIT).await?;
    // In the middle of a publication.
    let failed = failures(&producer.process, "publisher");
    wire.stall(Direction::ToClient);
    submitted.extend(ids(&producer.api.submit_batch(&tasks(5, "test.work", &json!({}))).await?));
    connection_failed(&producer.process, "publisher", failed + 1, SILENCE_LIMIT).await?;
    wire.resume().await?;
    completed(&producer.api, &submitted, LIMIT).await?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    nothing_left(&stack.vhost).await
}

/// How many connections of a role a program has seen failing.
fn failures(process: &Process, role: &str) -> usize {
    let (log, role) = (process.log(), format!("role=\"{role}\""));
    log.lines().filter(|line| line.contains("the broker connection failed") && line.contains(&role)).count()
}

/// Waits until a program has seen so many connections of a role failing.
async fn connection_failed(process: &Process, role: &str, count: usize, limit: Duration) -> Result<()> {
    eventually(limit, &format!("{count} failed connections to be noticed"), async || {
        Ok((failures(process, role) >= count).then_some(()))
    })
    .await
}
