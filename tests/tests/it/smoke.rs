//! The shortest way through everything: one producer, one worker, a few tasks.

use std::time::Duration;

use serde_json::json;
use tasklane_tests::oplog::CommandKind;
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::nothing_left;

const LIMIT: Duration = Duration::from_secs(30);

on_both_ledgers! {
    async fn a_few_tasks_run_once_each_and_answer(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let echo = log.command(&CommandKind::new("test.echo").then("cat"))?;
        let producer = stack.producer().start().await?;
        let worker = stack.worker().config(&echo).start().await?;

        let tasks: Vec<_> = (0..10).map(|n| json!({"kind": "test.echo", "args": {"n": n}})).collect();
        let accepted = producer.api.submit_batch(&tasks).await?;
        let ended = producer.api.all_ended(tasks.len(), LIMIT).await?;

        assert!(ended.iter().all(|task| task.state == "completed" && task.result == task.args), "{ended:#?}");
        log.check_each_started_once(accepted.iter().map(|task| task.id.as_str()))?;
        log.check_no_overlap()?;
        eventually(LIMIT, "the worker to count all ten", async || {
            let settled = worker.metrics().await?.sum("tasklane_tasks_settled_total", &[("outcome", "completed")]);
            Ok((settled == 10.0).then_some(()))
        })
        .await?;
        nothing_left(&stack.vhost).await
    }
}
