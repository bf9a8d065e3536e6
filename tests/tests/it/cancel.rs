//! Cancelling over the API: a waiting task never starts, a running one is stopped, whatever dies or is lost in between.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use lapin::options::ExchangeDeleteOptions;
use serde_json::{Value, json};
use tasklane_common::topology::CONTROL_EXCHANGE;
use tasklane_tests::api::{Api, Task};
use tasklane_tests::oplog::{CommandKind, OperationLog, Step};
use tasklane_tests::process::is_alive;
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::nothing_left;

const LIMIT: Duration = Duration::from_secs(30);

/// Longer than any test: a lease that is renewed so seldom tells nothing of a cancellation in time.
const SELDOM_MS: u64 = 60_000;

/// Asks for a cancellation; answers the status and the task.
async fn cancel(api: &Api, id: &str) -> Result<(u16, Task)> {
    let answer = api.raw_post(&format!("/v1/tasks/{id}/cancel"), &json!({"reason": "the test said so"})).await?;
    Ok((answer.status, answer.expect(&[200, 202])?))
}

/// Submits a task that runs for a minute, and waits until its handler runs, which is a little after its claim.
async fn started(api: &Api, log: &OperationLog, kind: &str, args: &Value) -> Result<String> {
    let mut args = args.clone();
    args["work_ms"] = json!(60_000);
    let id = api.submit(&json!({"kind": kind, "args": args})).await?.id;
    eventually(LIMIT, "the handler to start", async || Ok((!log.of(&id)?.is_empty()).then_some(()))).await?;
    Ok(id)
}

fn check_cancelled(task: &Task) {
    assert_eq!((task.state.as_str(), task.reason.as_deref()), ("cancelled", Some("the test said so")), "{task:#?}");
}

on_both_ledgers! {
    async fn a_cancelled_task_never_starts_and_its_message_is_dropped(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let unwanted = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        producer.api.in_state(&unwanted, "queued", LIMIT).await?;
        let (status, task) = cancel(&producer.api, &unwanted).await?;
        assert_eq!(status, 200);
        check_cancelled(&task);
        let worker = stack.test_worker(&log).start().await?;
        // Its message comes behind the other one's.
        let wanted = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        producer.api.in_state(&wanted, "completed", LIMIT).await?;
        log.check_each_started_once([wanted.as_str()])?;
        assert!(log.of(&unwanted)?.is_empty(), "it was started");
        check_cancelled(&producer.api.get(&unwanted).await?);
        eventually(LIMIT, "its message to be refused", async || {
            let refused = worker.metrics().await?.sum("tasklane_claims_refused_total", &[("reason", "finished")]);
            Ok((refused >= 1.0).then_some(()))
        })
        .await?;
        nothing_left(&stack.vhost).await
    }

    async fn a_running_task_hears_of_its_cancellation_at_once(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack
            .test_worker(&log)
            .env("TASKLANE_LEASE_TTL_MS", 3 * SELDOM_MS)
            .env("TASKLANE_LEASE_RENEW_MS", SELDOM_MS)
            .env("TASKLANE_CANCEL_GRACE_MS", SELDOM_MS)
            .start()
            .await?;
        let id = started(&producer.api, &log, "test.work", &json!({"heeds": true})).await?;
        let (status, task) = cancel(&producer.api, &id).await?;
        assert_eq!((status, task.state.as_str()), (202, "running"));
        check_cancelled(&producer.api.in_state(&id, "cancelled", LIMIT / 3).await?);
        nothing_left(&stack.vhost).await
    }

    async fn a_deaf_handler_is_ended_after_the_grace(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).env("TASKLANE_CANCEL_GRACE_MS", 300).start().await?;
        let id = started(&producer.api, &log, "test.once", &json!({})).await?;
        cancel(&producer.api, &id).await?;
        check_cancelled(&producer.api.in_state(&id, "cancelled", LIMIT / 3).await?);
        nothing_left(&stack.vhost).await
    }

    async fn a_run_that_completes_in_time_has_completed(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).env("TASKLANE_CANCEL_GRACE_MS", SELDOM_MS).start().await?;
        let task = json!({"kind": "test.work", "args": {"work_ms": 3000}});
        let id = producer.api.submit(&task).await?.id;
        producer.api.in_state(&id, "running", LIMIT).await?;
        assert_eq!(cancel(&producer.api, &id).await?.0, 202);
        let task = producer.api.in_state(&id, "completed", LIMIT).await?;
        assert_eq!(task.reason, None, "{task:#?}");
        let late = producer.api.raw_post(&format!("/v1/tasks/{id}/cancel"), &json!({})).await?;
        assert_eq!((late.status, late.problem()?["code"].as_str()), (409, Some("not_cancellable")));
        Ok(())
    }

    async fn a_cancelled_commands_processes_are_all_killed(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let child = stack.place().join("child");
        let deaf = CommandKind::new("test.deaf")
            .then("trap '' TERM")
            .then("sleep 300 &")
            .then(&format!("echo $! > '{}.new'; mv '{0}.new' '{0}'", child.display()))
            .then("wait");
        let producer = stack.producer().start().await?;
        let _worker = stack
            .worker()
            .config(&log.command(&deaf)?)
            .env("TASKLANE_CANCEL_GRACE_MS", 300)
            .start()
            .await?;
        let id = producer.api.submit(&json!({"kind": "test.deaf"})).await?.id;
        let pid: i32 = eventually(LIMIT, "the command's child", async || {
            Ok(fs::read_to_string(&child).ok().and_then(|pid| pid.trim().parse().ok()))
        })
        .await?;
        assert!(is_alive(pid));
        cancel(&producer.api, &id).await?;
        check_cancelled(&producer.api.in_state(&id, "cancelled", LIMIT / 3).await?);
        eventually(LIMIT, "the end of the command's child", async || Ok((!is_alive(pid)).then_some(()))).await?;
        assert!(log.entries()?.iter().all(|entry| entry.step == Step::Start), "the script went on");
        Ok(())
    }

    async fn a_lost_word_costs_one_renewal_of_the_lease(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).env("TASKLANE_CANCEL_GRACE_MS", SELDOM_MS).start().await?;
        let id = started(&producer.api, &log, "test.work", &json!({"heeds": true})).await?;
        // With the exchange go its bindings: the worker hears nothing until it makes sure of its own, in half a minute.
        let connection = stack.vhost.connect().await?;
        let channel = connection.create_channel().await?;
        channel.exchange_delete(CONTROL_EXCHANGE.into(), ExchangeDeleteOptions::default()).await?;
        assert_eq!(cancel(&producer.api, &id).await?.0, 202);
        check_cancelled(&producer.api.in_state(&id, "cancelled", LIMIT / 3).await?);
        // Nobody's confirms were broken by that.
        let next = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
        producer.api.in_state(&next, "completed", LIMIT).await?;
        Ok(())
    }

    async fn a_killed_workers_tasks_are_cancelled_by_the_rescue(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut victim = stack.test_worker(&log).short_lease().env("TASKLANE_CANCEL_GRACE_MS", SELDOM_MS).start().await?;
        let again = started(&producer.api, &log, "test.work", &json!({})).await?;
        let once = started(&producer.api, &log, "test.once", &json!({})).await?;
        for id in [&again, &once] {
            assert_eq!(cancel(&producer.api, id).await?.0, 202);
        }
        victim.process.kill().await?;
        let _survivor = stack.test_worker(&log).start().await?;
        let task = producer.api.in_state(&again, "cancelled", LIMIT).await?;
        check_cancelled(&task);
        assert_eq!(task.errors.last().map(|error| error.kind.as_str()), Some("crash"), "{task:#?}");
        // Whether it took effect is unknown, and `cancelled` would deny it.
        let task = producer.api.in_state(&once, "discarded", LIMIT).await?;
        assert_eq!(task.reason.as_deref(), Some("interrupted"), "{task:#?}");
        log.check_each_started_once([again.as_str(), once.as_str()])?;
        nothing_left(&stack.vhost).await
    }

    async fn a_cancellation_that_was_answered_survives_its_producer(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let id = started(&producer.api, &log, "test.work", &json!({"heeds": true})).await?;
        let later = json!({"kind": "test.work", "delay_ms": SELDOM_MS});
        let mut waiting = BTreeSet::new();
        for _ in 0..20 {
            waiting.insert(producer.api.submit(&later).await?.id);
        }
        let many = producer.api.raw_post("/v1/tasks/cancel", &json!({"kind": "test.work"})).await?;
        producer.process.kill().await?;
        let counts: Value = many.expect(&[200])?;
        assert_eq!((&counts["cancelled"], &counts["requested"]), (&json!(20), &json!(1)), "{counts}");
        let next = stack.producer().start().await?;
        let ended = next.api.all_ended(21, LIMIT).await?;
        assert!(ended.iter().all(|task| task.state == "cancelled"), "{ended:#?}");
        let after = next.api.submit(&json!({"kind": "test.work", "delay_ms": 2000})).await.context("another one")?;
        next.api.in_state(&after.id, "completed", LIMIT).await?;
        log.check_each_started_once([id.as_str(), after.id.as_str()])?;
        Ok(())
    }
}
