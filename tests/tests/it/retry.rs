//! Failures that a person runs again: with other args as another task, and many at a pace.

use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::{Value, json};
use tasklane_tests::api::Task;
use tasklane_tests::on_both_ledgers;
use tasklane_tests::stack::Stack;

use crate::load::nothing_left;

/// Longer than a relay keeps to itself what it has fetched and not published.
const LIMIT: Duration = Duration::from_secs(60);

/// A task whose only attempt fails; another one of it would not.
fn failing() -> Value {
    json!({"kind": "test.work", "args": {"failures": 1, "answer": "done"}, "max_attempts": 1})
}

fn started(task: &Task) -> Result<Timestamp> {
    task.started_at.context("it has not started")
}

on_both_ledgers! {
    async fn a_failures_work_is_done_with_other_args_by_another_task(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let first = producer.api.submit(&failing()).await?.id;
        let failed = producer.api.in_state(&first, "discarded", LIMIT).await?;
        let path = format!("/v1/tasks/{first}/retry");
        let again: Task = producer.api.raw_post(&path, &json!({"args": {"answer": "mended"}})).await?.expect(&[202])?;
        assert_eq!((again.retried_from.as_deref(), again.attempt), (Some(first.as_str()), 0));
        assert_eq!(producer.api.in_state(&again.id, "completed", LIMIT).await?.result, json!("mended"));
        let left = producer.api.get(&first).await?;
        assert_eq!((left.state, left.attempt, left.finished_at), (failed.state, 1, failed.finished_at));
        log.check_each_started_once([first.as_str(), again.id.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn a_mass_retry_starts_at_its_pace(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        producer.api.submit_batch(&vec![failing(); 30]).await?;
        let failed = producer.api.all_ended(30, LIMIT).await?;
        assert!(failed.iter().all(|task| task.state == "discarded"), "{failed:#?}");
        let filter = json!({"kind": "test.work", "per_second": 10});
        let counts: Value = producer.api.raw_post("/v1/tasks/retry", &filter).await?.expect(&[200])?;
        assert_eq!(counts, json!({"retried": 30, "conflicts": 0, "next_cursor": null}));
        // What was answered needs nobody any more.
        producer.process.kill().await?;
        let next = stack.producer().start().await?;
        let done = next.api.all_ended(30, LIMIT).await?;
        assert!(done.iter().all(|task| task.state == "completed" && task.attempt == 2), "{done:#?}");
        let mut times = done.iter().map(|task| task.run_at.context("a time")).collect::<Result<Vec<_>>>()?;
        times.sort_unstable();
        for task in &done {
            assert!(started(task)? >= task.run_at.context("a time")?, "{task:#?}");
        }
        let spread = times[29].duration_since(times[0]).as_secs_f64();
        assert!(spread >= 2.8, "30 tasks, 10 a second, within {spread} s");
        nothing_left(&stack.vhost).await
    }
}
