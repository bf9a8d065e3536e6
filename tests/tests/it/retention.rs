//! What is kept of a task that is over, and for how long: its row by its queue, its result by its size and its time.

use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::{Value, json};
use tasklane_tests::api::Api;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::CommandKind;
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};

const LIMIT: Duration = Duration::from_secs(30);

/// Submits a task and waits until it has completed.
async fn completed(api: &Api, task: &Value) -> Result<String> {
    let id = api.submit(task).await?.id;
    api.in_state(&id, "completed", LIMIT).await?;
    Ok(id)
}

/// Waits until the task has been over for so long; a process that starts then prunes at once.
async fn over_for(api: &Api, id: &str, time: Duration) -> Result<()> {
    let finished = api.get(id).await?.finished_at.context("it has not ended")?;
    eventually(LIMIT, "the task to be old", async || {
        Ok((Timestamp::now().duration_since(finished).as_millis() > time.as_millis().cast_signed()).then_some(()))
    })
    .await
}

async fn is_forgotten(api: &Api, id: &str) -> Result<()> {
    eventually(LIMIT, "the task to be forgotten", async || {
        Ok((api.raw_get(&format!("/v1/tasks/{id}")).await?.status == 404).then_some(()))
    })
    .await
}

on_both_ledgers! {
    async fn each_queue_keeps_its_tasks_as_long_as_the_producer_says(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let brief = stack.producer().config("queue_retention_ms = { brief = 1000, audit = 3600000 }");
        let mut first = brief.clone().start().await?;
        let worker = || stack.test_worker(&log).env("TASKLANE_QUEUES", "default,brief,audit");
        let _worker = worker().start().await?;
        let mut ids = Vec::new();
        for queue in ["brief", "default", "audit"] {
            ids.push(completed(&first.api, &json!({"kind": "test.work", "queue": queue})).await?);
        }
        over_for(&first.api, &ids[2], Duration::from_millis(1100)).await?;
        let next = brief.start().await?;
        is_forgotten(&next.api, &ids[0]).await?;
        assert_eq!(next.api.get(&ids[1]).await?.state, "completed");
        first.process.kill().await?;
        // The worker knows of no queue by its own settings, and keeps what the producer has said all the same.
        let _other = worker().env("TASKLANE_RETENTION_MS", 1000).start().await?;
        is_forgotten(&next.api, &ids[1]).await?;
        assert_eq!(next.api.get(&ids[2]).await?.state, "completed");
        Ok(())
    }

    async fn an_expired_result_is_gone_and_its_task_says_so(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let route = "[[route]]\nkind = \"test.*\"\nqueue = \"default\"\nresult_ttl_ms = 500\n";
        let producer = stack.producer().config(route).start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let own = completed(&producer.api, &json!({"kind": "test.work", "result_ttl_ms": 3_600_000})).await?;
        let brief = completed(&producer.api, &json!({"kind": "test.work"})).await?;
        assert_eq!(producer.api.get(&brief).await?.result_ttl_ms, Some(500));
        over_for(&producer.api, &brief, Duration::from_millis(600)).await?;
        let next = stack.producer().start().await?;
        let task = eventually(LIMIT, "the result to expire", async || {
            Ok(Some(next.api.get(&brief).await?).filter(|task| task.result_expired))
        })
        .await?;
        assert_eq!((task.state.as_str(), task.result), ("completed", Value::Null));
        let task = next.api.get(&own).await?;
        assert!(!task.result_expired && task.result["fence"] == 1, "{task:#?}");
        Ok(())
    }

    async fn too_large_a_result_is_told_and_not_tried_again(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let print = |kind: &str, bytes: usize| {
            log.command(&CommandKind::new(kind).then(&format!("printf '\"%0{}d\"' 0", bytes - 2)))
        };
        let producer = stack.producer().start().await?;
        let (fits, large) = (print("test.fits", 4096)?, print("test.large", 4097)?);
        let worker = stack.test_worker(&log).config(&fits).config(&large).env("TASKLANE_RESULT_BYTES_MAX", 4096);
        let _worker = worker.start().await?;
        let fits = completed(&producer.api, &json!({"kind": "test.fits"})).await?;
        assert_eq!(producer.api.get(&fits).await?.result.as_str().map(str::len), Some(4094));
        let handled = json!({"kind": "test.work", "args": {"answer": "x".repeat(4095)}});
        for (task, says) in [
            (json!({"kind": "test.large"}), "answered more than the 4096 bytes that a result may have"),
            (handled, "the result has 4097 bytes, but at most 4096 are kept"),
        ] {
            let id = producer.api.submit(&task).await?.id;
            let task = producer.api.in_state(&id, "discarded", LIMIT).await?;
            assert_eq!((task.reason.as_deref(), task.attempt, &task.result), (Some("final_error"), 1, &Value::Null));
            assert!(task.errors[0].message.contains(says), "{task:#?}");
        }
        Ok(())
    }
}

/// All that is wrong with it is said before anything starts.
#[tokio::test]
async fn a_retention_that_makes_no_sense_is_refused() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let (status, log) = stack.producer().config("queue_retention_ms = { audit = 1 }").fail().await?;
    assert_eq!(status.code(), Some(2), "{log}");
    assert!(log.contains("queue_retention_ms: must be from 1000 to 3153600000000, but is 1 for queue audit"), "{log}");
    Ok(())
}
