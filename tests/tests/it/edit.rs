//! Editing over the API: whatever message of before is still in the broker, and whichever process dies, a task runs once,
//! with what was changed last.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use futures::future::{join_all, try_join_all};
use futures::stream;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use rustix::process::Signal;
use serde_json::{Value, json};
use tasklane_common::envelope::{VERSION, VERSION_HEADER};
use tasklane_tests::api::{Api, Task};
use tasklane_tests::stack::{Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::{ids, nothing_left};

const LIMIT: Duration = Duration::from_secs(30);
const DEFAULT_QUEUE: &str = "tasklane.q.default";

/// A task that answers with what its args said.
fn answering(answer: &str) -> Value {
    json!({"kind": "test.work", "args": {"answer": answer}})
}

async fn edit(api: &Api, id: &str, changes: &Value) -> Result<Task> {
    api.raw_patch(&format!("/v1/tasks/{id}"), changes).await?.expect(&[200])
}

/// Waits until the worker has refused so many messages of before.
async fn refused(worker: &Worker, count: f64) -> Result<()> {
    eventually(LIMIT, "the messages of before to be refused", async || {
        let refused = worker.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "outdated")]);
        Ok((refused >= count).then_some(()))
    })
    .await
}

on_both_ledgers! {
    async fn a_message_of_before_brings_neither_old_args_nor_an_early_start(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let id = producer.api.submit(&answering("old")).await?.id;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        let task = edit(&producer.api, &id, &json!({"args": {"answer": "new"}, "delay_ms": 8_000})).await?;
        assert_eq!((task.state.as_str(), &task.args["answer"]), ("scheduled", &json!("new")));
        assert_eq!(stack.vhost.depth(DEFAULT_QUEUE).await?, Some(1), "the old message is there");
        let worker = stack.test_worker(&log).start().await?;
        refused(&worker, 1.0).await?;
        let done = producer.api.in_state(&id, "completed", LIMIT).await?;
        assert_eq!(done.result, json!("new"));
        assert!(done.started_at >= task.run_at, "started at {:?}, due at {:?}", done.started_at, task.run_at);
        log.check_each_started_once([id.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn of_many_messages_the_newest_starts_the_task(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let ids = ids(&producer.api.submit_batch(&vec![answering("old"); 20]).await?);
        for answer in ["newer", "newest"] {
            for id in &ids {
                producer.api.in_state(id, "queued", LIMIT).await?;
                edit(&producer.api, id, &json!({"args": {"answer": answer}})).await?;
            }
        }
        for id in &ids {
            producer.api.in_state(id, "queued", LIMIT).await?;
        }
        // All messages of each are in the queue, the oldest first.
        assert_eq!(stack.vhost.depth(DEFAULT_QUEUE).await?, Some(60));
        let _worker = stack.test_worker(&log).start().await?;
        for id in &ids {
            assert_eq!(producer.api.in_state(id, "completed", LIMIT).await?.result, json!("newest"));
        }
        log.check_each_started_once(ids.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn a_task_edited_to_another_queue_is_run_by_a_worker_of_that(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let id = producer.api.submit(&answering("done")).await?.id;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        edit(&producer.api, &id, &json!({"queue": "other"})).await?;
        let old = stack.test_worker(&log).start().await?;
        refused(&old, 1.0).await?;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        assert!(log.of(&id)?.is_empty(), "a worker of the old queue has started it");
        let _new = stack.test_worker(&log).env("TASKLANE_QUEUES", "other").start().await?;
        assert_eq!(producer.api.in_state(&id, "completed", LIMIT).await?.result, json!("done"));
        log.check_each_started_once([id.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn a_task_edited_to_be_urgent_goes_before_the_others(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let ids = ids(&producer.api.submit_batch(&vec![json!({"kind": "test.work", "args": {"work_ms": 100}}); 60]).await?);
        for id in &ids {
            producer.api.in_state(id, "queued", LIMIT).await?;
        }
        let last = ids.last().context("tasks")?;
        let task = edit(&producer.api, last, &json!({"priority": "high"})).await?;
        assert_eq!(task.priority, "high");
        producer.api.in_state(last, "queued", LIMIT).await?;
        let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 2).start().await?;
        producer.api.all_ended(ids.len(), LIMIT).await?;
        let place = log.starts()?.iter().position(|start| start.task == *last);
        // Before it are those that were taken before the urgent lane was looked at; unedited it would be the last.
        assert!(place.is_some_and(|place| place < 30), "it was started as the {place:?}th of 60");
        log.check_each_started_once(ids.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn an_edit_that_was_answered_holds_for_every_start_after_it(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 4).start().await?;
        let tasks = vec![json!({"kind": "test.work", "args": {"answer": "old", "work_ms": 100}}); 120];
        let ids = ids(&producer.api.submit_batch(&tasks).await?);
        // From the last to the first, so that edits and claims meet.
        let edits = ids.iter().rev().map(async |id| {
            let answer = producer.api.raw_patch(&format!("/v1/tasks/{id}"), &json!({"args": {"answer": "new"}})).await?;
            ensure!([200, 409].contains(&answer.status), "{}", answer.text());
            anyhow::Ok((id, if answer.status == 200 { "new" } else { "old" }))
        });
        let expected = try_join_all(edits).await?;
        assert!(expected.iter().any(|(_, answer)| *answer == "new"), "no edit came in time");
        for (id, answer) in &expected {
            let task = producer.api.in_state(id, "completed", LIMIT).await?;
            assert_eq!((&task.result, &task.args["answer"]), (&json!(answer), &json!(answer)), "{task:#?}");
        }
        log.check_each_started_once(ids.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn what_is_edited_and_moved_under_load_runs_once_with_its_newest_args(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _workers = [
            stack.test_worker(&log).env("TASKLANE_QUEUES", "default").env("TASKLANE_CONCURRENCY", 4).start().await?,
            stack.test_worker(&log).env("TASKLANE_QUEUES", "other").env("TASKLANE_CONCURRENCY", 4).start().await?,
        ];
        let tasks = vec![json!({"kind": "test.work", "args": {"answer": 0, "work_ms": 100}}); 200];
        let ids = ids(&producer.api.submit_batch(&tasks).await?);
        let mut newest: BTreeMap<&str, u64> = ids.iter().map(|id| (id.as_str(), 0)).collect();
        let mut edited = 0;
        for round in 1..=4u64 {
            let (from, to) = if round % 2 == 1 { ("default", "other") } else { ("other", "default") };
            let path = format!("/v1/queues/{from}/move");
            let body = json!({"to": to});
            let moving = producer.api.raw_post(&path, &body);
            let args = json!({"args": {"answer": round, "work_ms": 100}});
            let editing = ids.iter().rev().map(async |id| {
                (id, producer.api.raw_patch(&format!("/v1/tasks/{id}"), &args).await)
            });
            let (moved, answers) = tokio::join!(moving, join_all(editing));
            moved?.expect::<Value>(&[200])?;
            for (id, answer) in answers {
                let answer = answer?;
                ensure!([200, 409].contains(&answer.status), "{}", answer.text());
                if answer.status == 200 {
                    newest.insert(id, round);
                    edited += 1;
                }
            }
        }
        assert!(edited > 50, "the test proves nothing: {edited} edits");
        for task in producer.api.all_ended(ids.len(), LIMIT).await? {
            assert_eq!((task.state.as_str(), &task.result), ("completed", &json!(newest[task.id.as_str()])), "{task:#?}");
        }
        log.check_each_started_once(ids.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn an_edit_that_was_answered_survives_its_producer(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let id = producer.api.submit(&answering("old")).await?.id;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        edit(&producer.api, &id, &json!({"args": {"answer": "new"}})).await?;
        producer.process.kill().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let next = stack.producer().start().await?;
        assert_eq!(next.api.in_state(&id, "completed", LIMIT).await?.result, json!("new"));
        let late = next.api.raw_patch(&format!("/v1/tasks/{id}"), &json!({"delay_ms": 0})).await?;
        assert_eq!((late.status, late.problem()?["code"].as_str()), (409, Some("not_editable")));
        log.check_each_started_once([id.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn edits_cut_off_by_a_kill_are_made_as_a_whole_or_not_at_all(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let ids = ids(&producer.api.submit_batch(&vec![answering("old"); 200]).await?);
        for id in &ids {
            producer.api.in_state(id, "queued", LIMIT).await?;
        }
        let changes = json!({"args": {"answer": "new"}, "queue": "other"});
        let mut edits = stream::iter(&ids)
            .map(async |id| (id, producer.api.raw_patch(&format!("/v1/tasks/{id}"), &changes).await))
            .buffer_unordered(16);
        let mut answered = Vec::new();
        while let Some((id, answer)) = edits.next().await {
            // The others are cut off, or find nobody.
            if let Ok(answer) = answer {
                ensure!(answer.status == 200, "{}", answer.text());
                answered.push(id);
            }
            if answered.len() == 40 {
                producer.process.signal(Signal::KILL)?;
            }
        }
        drop(edits);
        assert!(answered.len() < ids.len(), "the kill came too late");
        producer.process.kill().await?;
        let next = stack.producer().start().await?;
        let mut made = BTreeMap::new();
        for task in next.api.list_all(&[]).await? {
            let seen = (task.args["answer"].clone(), task.queue.as_str());
            let whole = [(json!("old"), "default"), (json!("new"), "other")];
            ensure!(whole.contains(&seen), "half an edit: {task:#?}");
            made.insert(task.id.clone(), seen.0);
        }
        for id in answered {
            assert_eq!(made[id], json!("new"), "{id} was answered");
        }
        let _workers = stack.test_worker(&log).env("TASKLANE_QUEUES", "default,other").start().await?;
        for task in next.api.all_ended(ids.len(), LIMIT).await? {
            assert_eq!((task.state.as_str(), &task.result), ("completed", &made[&task.id]), "{task:#?}");
        }
        log.check_each_started_once(ids.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn an_edited_task_is_published_anew_when_its_message_does_not_say_of_when_it_is(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let id = producer.api.submit(&answering("old")).await?.id;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        edit(&producer.api, &id, &json!({"args": {"answer": "new"}})).await?;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        // As if a process of an earlier release had published it, last of all.
        assert_eq!(stack.vhost.purge(DEFAULT_QUEUE).await?, 2);
        let mut headers = FieldTable::default();
        headers.insert(VERSION_HEADER.into(), AMQPValue::LongInt(VERSION));
        let properties = BasicProperties::default().with_message_id(id.as_str().into()).with_type("test.work".into());
        let properties = properties.with_headers(headers).with_delivery_mode(2);
        stack.vhost.publish("", DEFAULT_QUEUE, br#"{"answer":"unknown"}"#, properties).await?;
        let worker = stack.test_worker(&log).start().await?;
        assert_eq!(producer.api.in_state(&id, "completed", LIMIT).await?.result, json!("new"));
        refused(&worker, 1.0).await?;
        log.check_each_started_once([id.as_str()])?;
        nothing_left(&stack.vhost).await
    }
}
