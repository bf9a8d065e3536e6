//! How failed attempts are followed by others, as a kind's table says it: the delays, the age, and what is final.

use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::json;
use tasklane_tests::api::{Api, Task, TaskError};
use tasklane_tests::oplog::{CommandKind, OperationLog};
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};

const LIMIT: Duration = Duration::from_secs(30);

/// A command that fails with what `shell` does, under a line of settings.
fn failing(log: &OperationLog, kind: &str, shell: &str, setting: &str) -> Result<String> {
    log.command(&CommandKind::new(kind).then(shell).setting(setting))
}

async fn submit(api: &Api, kind: &str) -> Result<String> {
    Ok(api.submit(&json!({"kind": kind})).await?.id)
}

/// How long the task waits after its newest failure, by the ledger's clock.
fn wait_ms(task: &Task) -> Result<i64> {
    let failed = task.errors.last().context("no failure")?.at;
    let next = task.run_at.context("no time to run at")?;
    Ok(next.as_millisecond() - failed.as_millisecond())
}

fn check_discarded(task: &Task, reason: &str, attempt: u32) {
    assert_eq!((task.reason.as_deref(), task.attempt), (Some(reason), attempt), "{task:#?}");
}

on_both_ledgers! {
    async fn each_kind_waits_as_its_policy_says(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let fixed = failing(&log, "test.fixed", "exit 1", "retry = { policy = \"fixed\", delays_ms = [100, 70000] }")?;
        let linear = failing(&log, "test.linear", "exit 1", "retry = { policy = \"linear\", base_ms = 60000 }")?;
        let exponential = failing(&log, "test.exponential", "exit 1", "retry = { base_ms = 40000, max_ms = 50000 }")?;
        let producer = stack.producer().start().await?;
        let _worker = stack.worker().config(&fixed).config(&linear).config(&exponential).start().await?;
        let fixed = submit(&producer.api, "test.fixed").await?;
        let linear = submit(&producer.api, "test.linear").await?;
        let exponential = submit(&producer.api, "test.exponential").await?;
        let task = eventually(LIMIT, "the second failure", async || {
            let task = producer.api.get(&fixed).await?;
            Ok((task.errors.len() == 2).then_some(task))
        })
        .await?;
        assert_eq!(wait_ms(&task)?, 70_000, "{task:#?}");
        let first = task.errors[0].at;
        let second = task.started_at.context("it has not started")?;
        assert!(second.as_millisecond() - first.as_millisecond() >= 100, "{task:#?}");
        let task = producer.api.in_state(&linear, "retryable", LIMIT).await?;
        assert!((30_000..=60_000).contains(&wait_ms(&task)?), "{task:#?}");
        let task = producer.api.in_state(&exponential, "retryable", LIMIT).await?;
        assert!((20_000..=40_000).contains(&wait_ms(&task)?), "{task:#?}");
        Ok(())
    }

    async fn a_task_past_its_age_is_discarded(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let retry = "retry = { policy = \"fixed\", delays_ms = [400], max_age_ms = 4000 }";
        let command = failing(&log, "test.aging", "echo broken >&2; exit 1", retry)?;
        let producer = stack.producer().start().await?;
        let _worker = stack.worker().config(&command).start().await?;
        // Its age counts from when it is due, not from its recording, which alone would be past it.
        let later = json!({"kind": "test.aging", "delay_ms": 4500});
        let (id, later) = (submit(&producer.api, "test.aging").await?, producer.api.submit(&later).await?.id);
        for id in [id, later] {
            let task = producer.api.in_state(&id, "discarded", LIMIT).await?;
            check_discarded(&task, "too_old", task.attempt);
            assert!(task.attempt >= 2 && task.errors.len() == task.attempt as usize, "{task:#?}");
            // An attempt that was decided in time may come too late.
            let told = |error: &TaskError| error.message == "broken" || error.message.starts_with("the attempt was not begun");
            assert!(task.errors.iter().all(told) && task.errors[0].message == "broken", "{task:#?}");
        }
        Ok(())
    }

    async fn an_attempt_that_comes_too_late_is_not_begun(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let retry = "retry = { policy = \"fixed\", delays_ms = [0], max_age_ms = 3000 }";
        // Its first run takes the worker down with it, so that nobody decides but the rescue, which knows no ages.
        let command = failing(&log, "test.aging", "test $TASKLANE_FENCE -gt 1 || kill -9 $PPID; sleep 0.1", retry)?;
        let producer = stack.producer().start().await?;
        let start = || stack.worker().config(&command).short_lease();
        let mut worker = start().start().await?;
        let id = submit(&producer.api, "test.aging").await?;
        log.started(1, LIMIT).await?;
        worker.process.exited(LIMIT).await?;
        let created = producer.api.get(&id).await?.created_at;
        eventually(LIMIT, "the task to be past its age", async || {
            let age = Timestamp::now().as_millisecond() - created.as_millisecond();
            Ok((age > 3_100).then_some(()))
        })
        .await?;
        let _worker = start().start().await?;
        let task = producer.api.in_state(&id, "discarded", LIMIT).await?;
        check_discarded(&task, "too_old", 2);
        let last = task.errors.last().map(|error| error.message.as_str()).unwrap_or_default();
        assert!(last.starts_with("the attempt was not begun: the task was first due "), "{task:#?}");
        assert!(last.ends_with("and the max_age_ms of its kind is 3000"), "{task:#?}");
        log.check_each_started_once([id.as_str()])?;
        // A person's wish begins it anew.
        let again = producer.api.raw_post(&format!("/v1/tasks/{id}/retry"), &json!({})).await?;
        assert_eq!(again.status, 202, "{}", again.text());
        eventually(LIMIT, "the task to complete", async || {
            Ok((producer.api.get(&id).await?.state == "completed").then_some(()))
        })
        .await?;
        assert_eq!(log.starts()?.len(), 2);
        Ok(())
    }
}

/// What the operator has named is final at the first attempt, and nothing else.
#[tokio::test]
async fn what_a_table_names_is_never_tried_again() -> Result<()> {
    let stack = Stack::new(tasklane_tests::ledger::LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let coded = failing(&log, "test.coded", "exit $(cat)", "discard_exit_codes = [3]\nretry = { base_ms = 60000 }")?;
    let late = failing(&log, "test.late", "sleep 60", "timeout_ms = 300\ndiscard_errors = [\"timeout\"]")?;
    let producer = stack.producer().start().await?;
    let _worker = stack.worker().config(&coded).config(&late).start().await?;
    let exit = |code: u8| json!({"kind": "test.coded", "args": code});
    let (named, other) = (producer.api.submit(&exit(3)).await?.id, producer.api.submit(&exit(4)).await?.id);
    let late = submit(&producer.api, "test.late").await?;
    check_discarded(&producer.api.in_state(&named, "discarded", LIMIT).await?, "final_error", 1);
    let task = producer.api.in_state(&late, "discarded", LIMIT).await?;
    check_discarded(&task, "final_error", 1);
    assert_eq!(task.errors[0].kind, "timeout");
    producer.api.in_state(&other, "retryable", LIMIT).await?;
    Ok(())
}
