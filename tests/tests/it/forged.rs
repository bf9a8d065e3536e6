//! Messages that say of a task what is not true: whoever may publish can write them, and the ledger believes none.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use lapin::types::AMQPValue;
use serde_json::json;
use tasklane_common::envelope::{Envelope, Message};
use tasklane_common::task::{Fence, Json, Kind};
use tasklane_common::topology::{DEAD_QUEUE, REASON_HEADER};
use tasklane_tests::stack::Stack;
use tasklane_tests::vhost::Vhost;
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::nothing_left;

/// A lost message is missed after 15 s.
const LIMIT: Duration = Duration::from_secs(90);
const DEFAULT_QUEUE: &str = "tasklane.q.default";

async fn publish(vhost: &Vhost, envelope: &Envelope) -> Result<()> {
    vhost.publish("", DEFAULT_QUEUE, envelope.args.as_str().as_bytes(), envelope.properties()).await
}

/// Takes the only message out of the queue.
async fn take(vhost: &Vhost) -> Result<Envelope> {
    eventually(LIMIT, "the message", async || Ok((vhost.depth(DEFAULT_QUEUE).await? == Some(1)).then_some(()))).await?;
    let message = vhost.take(DEFAULT_QUEUE).await?.pop().context("one message")?;
    Ok(Envelope::decode(&message.properties, &message.data)?)
}

/// How many dead letters there are for each reason.
async fn dead_letters(vhost: &Vhost) -> Result<BTreeMap<String, usize>> {
    let mut reasons = BTreeMap::new();
    for letter in vhost.take(DEAD_QUEUE).await? {
        let headers = letter.properties.headers().clone().context("a dead letter has headers")?;
        let Some(AMQPValue::LongString(reason)) = headers.inner().get(REASON_HEADER) else { continue };
        *reasons.entry(reason.to_string()).or_default() += 1;
    }
    Ok(reasons)
}

fn lies(truth: &Envelope, of_before: &Envelope) -> Result<Vec<Envelope>> {
    let far = Some(Fence(1 << 62));
    Ok(vec![
        Envelope { kind: Kind::parse("test.once")?, ..truth.clone() },
        Envelope { kind: Kind::parse("test.nobody")?, ..truth.clone() },
        Envelope { kind: Kind::parse("test.nobody")?, fence: None, ..truth.clone() },
        Envelope { fence: far, ..truth.clone() },
        Envelope { fence: far, ..of_before.clone() },
        Envelope { args: Json::of(&json!({"answer": "forged"}))?, ..truth.clone() },
        Envelope { args: of_before.args.clone(), ..truth.clone() },
    ])
}

on_both_ledgers! {
    async fn a_forged_message_starts_nothing_and_its_task_runs_all_the_same(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut submitted = Vec::new();
        for _ in 0..2 {
            let id = producer.api.submit(&json!({"kind": "test.work", "args": {"answer": "old"}})).await?.id;
            let before = take(&stack.vhost).await?;
            let edit = json!({"args": {"answer": "new"}});
            let answer = producer.api.raw_patch(&format!("/v1/tasks/{id}"), &edit).await?;
            assert_eq!(answer.status, 200);
            submitted.push((id, before, take(&stack.vhost).await?));
        }
        let [(robbed, before, truth), (kept, kept_before, kept_truth)] = &submitted[..] else { unreachable!() };
        for lie in lies(truth, before)?.iter().chain(&lies(kept_truth, kept_before)?) {
            publish(&stack.vhost, lie).await?;
        }
        let forged = Envelope { args: Json::of(&json!({"answer": "forged"}))?, ..truth.clone() };
        let (properties, body) = Message::bundle(vec![forged, kept_truth.clone()])?;
        stack.vhost.publish("", DEFAULT_QUEUE, &body, properties).await?;

        // One after the other.
        let worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 1).start().await?;
        for id in [kept, robbed] {
            let done = producer.api.in_state(id, "completed", LIMIT).await?;
            assert_eq!((done.attempt, done.errors.len(), &done.result), (1, 0, &json!("new")), "{done:#?}");
        }
        let expected = [("wrong_kind", 6), ("wrong_fence", 4), ("wrong_args", 5)].map(|(reason, n)| (reason.to_owned(), n));
        assert_eq!(dead_letters(&stack.vhost).await?, expected.into());
        assert_eq!(worker.metrics().await?.sum("tasklane_dead_letters_total", &[]), 15.0);
        log.check_each_started_once([kept.as_str(), robbed.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn messages_of_a_ledger_that_was_restored_are_published_anew(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        // A relay publishes it, under a fence above that of its recording.
        let id = producer.api.submit(&json!({"kind": "test.work", "delay_ms": 100})).await?.id;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        stack.ledger.execute("UPDATE tasks SET fence = 0").await?;
        let _worker = stack.test_worker(&log).start().await?;
        let done = producer.api.in_state(&id, "completed", LIMIT).await?;
        assert_eq!(done.attempt, 1, "{done:#?}");
        assert_eq!(dead_letters(&stack.vhost).await?, [("wrong_fence".to_owned(), 1)].into());
        log.check_each_started_once([id.as_str()])?;
        nothing_left(&stack.vhost).await
    }
}
