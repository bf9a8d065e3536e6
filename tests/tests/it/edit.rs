//! Editing over the API: whatever message of before is still in the broker, no run has what was changed away.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tasklane_tests::api::{Api, Task};
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::nothing_left;

const LIMIT: Duration = Duration::from_secs(30);

/// A task that answers with what its args said.
fn answering(answer: &str) -> Value {
    json!({"kind": "test.work", "args": {"answer": answer}})
}

async fn edit(api: &Api, id: &str, changes: &Value) -> Result<Task> {
    api.raw_patch(&format!("/v1/tasks/{id}"), changes).await?.expect(&[200])
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
        assert_eq!(stack.vhost.depth("tasklane.q.default").await?, Some(1), "the old message is there");
        let worker = stack.test_worker(&log).start().await?;
        let refused = async || {
            let metrics = worker.metrics().await?;
            Ok((metrics.sum("tasklane_claims_refused_total", &[("reason", "not_due")]) >= 1.0).then_some(()))
        };
        eventually(LIMIT, "the old message to be refused", refused).await?;
        let done = producer.api.in_state(&id, "completed", LIMIT).await?;
        assert_eq!(done.result, json!("new"));
        assert!(done.started_at >= task.run_at, "started at {:?}, due at {:?}", done.started_at, task.run_at);
        log.check_each_started_once([id.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn a_message_of_before_may_start_the_task_but_with_the_new_args(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut ids = Vec::new();
        for _ in 0..20 {
            ids.push(producer.api.submit(&answering("old")).await?.id);
        }
        for id in &ids {
            producer.api.in_state(id, "queued", LIMIT).await?;
            edit(&producer.api, id, &json!({"args": {"answer": "new"}})).await?;
        }
        // Both messages of each are in the queue, the old ones first.
        for id in &ids {
            producer.api.in_state(id, "queued", LIMIT).await?;
        }
        assert_eq!(stack.vhost.depth("tasklane.q.default").await?, Some(40));
        let _worker = stack.test_worker(&log).start().await?;
        for id in &ids {
            assert_eq!(producer.api.in_state(id, "completed", LIMIT).await?.result, json!("new"));
        }
        log.check_each_started_once(ids.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }

    async fn a_moved_task_is_run_by_a_worker_of_its_new_queue(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let id = producer.api.submit(&answering("done")).await?.id;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        edit(&producer.api, &id, &json!({"queue": "other"})).await?;
        let old = stack.test_worker(&log).start().await?;
        let refused = async || {
            let metrics = old.metrics().await?;
            Ok((metrics.sum("tasklane_claims_refused_total", &[("reason", "moved")]) >= 1.0).then_some(()))
        };
        eventually(LIMIT, "the message in the old queue to be refused", refused).await?;
        producer.api.in_state(&id, "queued", LIMIT).await?;
        assert!(log.of(&id)?.is_empty(), "a worker of the old queue has started it");
        let _new = stack.test_worker(&log).env("TASKLANE_QUEUES", "other").start().await?;
        assert_eq!(producer.api.in_state(&id, "completed", LIMIT).await?.result, json!("done"));
        log.check_each_started_once([id.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn an_edit_that_was_answered_holds_for_every_start_after_it(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 4).start().await?;
        let tasks = vec![json!({"kind": "test.work", "args": {"answer": "old", "work_ms": 20}}); 120];
        let ids: Vec<String> = producer.api.submit_batch(&tasks).await?.into_iter().map(|task| task.id).collect();
        // From the last to the first, so that edits and claims meet.
        let edits = ids.iter().rev().map(|id| async {
            let answer = producer.api.raw_patch(&format!("/v1/tasks/{id}"), &json!({"args": {"answer": "new"}})).await?;
            ensure!([200, 409].contains(&answer.status), "{}", answer.text());
            anyhow::Ok((id.clone(), if answer.status == 200 { "new" } else { "old" }))
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
}
