//! A PostgreSQL server that has fewer connections than its processes would like.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tasklane_tests::ledger::Ledger;
use tasklane_tests::postgres::Postgres;
use tasklane_tests::services;
use tasklane_tests::stack::Stack;

use crate::load::{check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(180);
/// Fewer than the sixteen that three processes use under load; each could begin with one, and a worker keeps two more.
const CONNECTIONS: u32 = 9;
const TASKS: usize = 300;

/// Each process makes do with what it gets, and gives back what it does not need; who cannot settle claims nothing. So all
/// tasks run, and none of them twice.
#[tokio::test]
async fn few_connections_are_shared_and_no_task_runs_twice() -> Result<()> {
    let server = Postgres::with_connections(CONNECTIONS).await?;
    let ledger = Ledger::Postgres(server.database().await?);
    let stack = Stack::with(&services::shared().await?.node, ledger).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let mut submitted = ids(&producer.api.submit_batch(&tasks(TASKS, "test.once", &json!({"work_ms": 100}))).await?);
    let worker = || stack.test_worker(&log).short_lease().env("TASKLANE_CONCURRENCY", 16);
    let first = worker().start().await?;
    log.started(20, LIMIT).await?;
    let second = worker().start().await?;
    submitted.extend(ids(&producer.api.submit_batch(&tasks(TASKS, "test.once", &json!({"work_ms": 100}))).await?));
    let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
    check_completed(&ended, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    for said in [&first.process, &second.process, &producer.process].map(tasklane_tests::process::Process::log) {
        let complaints = said.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).count();
        assert!(complaints <= 20, "{complaints} lines:\n{said}");
    }
    nothing_left(&stack.vhost).await
}
