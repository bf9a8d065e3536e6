//! Moving waiting tasks to another queue over the API: each runs once, wherever its messages are.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::Api;
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::{check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// Moves all that waits in `default` to `other`; answers how many tasks that were.
async fn move_all(api: &Api) -> Result<u64> {
    let answer: Value = api.raw_post("/v1/queues/default/move", &json!({"to": "other"})).await?.expect(&[200])?;
    ensure!(answer["next_cursor"].is_null(), "{answer}");
    Ok(answer["moved"].as_u64().unwrap_or_default())
}

async fn queued(api: &Api, queue: &str, count: usize) -> Result<()> {
    eventually(LIMIT, &format!("{count} tasks to be queued in {queue}"), async || {
        let queues = api.queues().await?;
        let found = queues.iter().find(|it| it["name"] == queue).map(|it| it["counts"]["queued"].clone());
        ensure!(found == Some(json!(count)), "{found:?}");
        Ok(Some(()))
    })
    .await
}

async fn started(log: &OperationLog, count: usize) -> Result<()> {
    eventually(LIMIT, &format!("{count} handlers to start"), async || Ok((log.starts()?.len() >= count).then_some(())))
        .await
}

on_both_ledgers! {
    async fn moved_tasks_run_once_in_their_new_queue(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut submitted = ids(&producer.api.submit_batch(&tasks(200, "test.work", &json!({}))).await?);
        queued(&producer.api, "default", submitted.len()).await?;
        let later = json!({"kind": "test.work", "delay_ms": 3000});
        let later = producer.api.submit(&later).await?.id;
        submitted.insert(later);
        assert_eq!(move_all(&producer.api).await?, submitted.len() as u64);
        queued(&producer.api, "other", submitted.len()).await?;
        // The old messages start nothing, although nobody consumes the new queue.
        let left = stack.vhost.depth("tasklane.q.default").await?;
        // On a busy machine a relay may have published some of them twice.
        assert!(left >= Some(200), "{left:?}");
        let old = stack.test_worker(&log).start().await?;
        eventually(LIMIT, "the old messages to be refused", async || {
            let refused = old.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "outdated")]);
            Ok((refused >= 200.0).then_some(()))
        })
        .await?;
        nothing_left(&stack.vhost).await?;
        assert!(log.starts()?.is_empty());
        let moved = stack.test_worker(&log).env("TASKLANE_QUEUES", "other").start().await?;
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        assert_eq!(moved.problem().await?, None);
        Ok(())
    }

    async fn what_is_moved_under_load_back_and_forth_runs_once(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _workers = [
            stack.test_worker(&log).env("TASKLANE_QUEUES", "default").env("TASKLANE_CONCURRENCY", 4).start().await?,
            stack.test_worker(&log).env("TASKLANE_QUEUES", "other").env("TASKLANE_CONCURRENCY", 4).start().await?,
        ];
        let submitted = ids(&producer.api.submit_batch(&tasks(400, "test.work", &json!({"work_ms": 20}))).await?);
        let mut moves = 0;
        for starts in [40, 80, 120, 160, 200] {
            started(&log, starts).await?;
            moves += move_all(&producer.api).await?;
            let back = json!({"to": "default", "filter": {"kind": "test.work"}});
            let answer: Value = producer.api.raw_post("/v1/queues/other/move", &back).await?.expect(&[200])?;
            moves += answer["moved"].as_u64().unwrap_or_default();
        }
        assert!(moves > 100, "the test proves nothing: {moves}");
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        // Every move has left messages behind, and each of them is refused.
        for queue in ["tasklane.q.default", "tasklane.q.other"] {
            eventually(LIMIT, &format!("{queue} to be empty"), async || {
                Ok((stack.vhost.depth(queue).await? == Some(0)).then_some(()))
            })
            .await?;
        }
        nothing_left(&stack.vhost).await
    }

    async fn a_message_left_behind_does_not_go_round_when_its_tasks_new_queue_is_paused(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let submitted = ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({}))).await?);
        queued(&producer.api, "default", submitted.len()).await?;
        producer.api.raw_post("/v1/queues/other/pause", &json!({})).await?.expect::<Value>(&[200])?;
        assert_eq!(move_all(&producer.api).await?, 20);
        let worker = stack.test_worker(&log).env("TASKLANE_QUEUES", "default,other").start().await?;
        nothing_left(&stack.vhost).await?;
        queued(&producer.api, "other", submitted.len()).await?;
        let refused = worker.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "paused")]);
        assert!(refused <= 20.0, "{refused}");
        assert!(log.starts()?.is_empty());
        producer.api.raw_post("/v1/queues/other/resume", &json!({})).await?.expect::<Value>(&[200])?;
        check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
        log.check_each_started_once(submitted.iter().map(String::as_str))
    }
}
