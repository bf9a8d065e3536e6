//! Handlers that die, or do not stop when they are told to.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::json;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::{CommandKind, OperationLog, Step};
use tasklane_tests::process::is_alive;
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, on_both_ledgers};

const LIMIT: Duration = Duration::from_secs(60);

/// What a command gets to end by itself after SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// What the command gets before SIGTERM; a shell that starts slowly still comes to its `trap`.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How much later than its grace a handler may be gone.
const SLACK: Duration = Duration::from_secs(3);

/// A command whose first run has a child, tells both process ids, and waits for ever; `body` comes before.
fn family(kind: &str, pids: &Path, body: &str) -> CommandKind {
    let pids = pids.display();
    CommandKind::new(kind).then(&format!(
        "if [ \"$TASKLANE_FENCE\" = 1 ]; then\n{body}\nsleep 300 &\necho \"$$ $!\" > '{pids}.new'\n\
         mv '{pids}.new' '{pids}'\nwait $!\nexit $?\nfi"
    ))
}

/// The process ids of a command and of its child, once both run.
async fn pids_in(file: &Path) -> Result<(i32, i32)> {
    let text = eventually(LIMIT, "the command to run", async || Ok(fs::read_to_string(file).ok())).await?;
    let (leader, child) = text.trim().split_once(' ').context("two process ids")?;
    Ok((leader.parse()?, child.parse()?))
}

fn sigkill(pid: i32) -> Result<()> {
    Ok(kill_process(Pid::from_raw(pid).context("a process id")?, Signal::KILL)?)
}

async fn gone(pid: i32) -> Result<()> {
    eventually(SLACK, &format!("process {pid} to be gone"), async || Ok((!is_alive(pid)).then_some(()))).await
}

on_both_ledgers! {
    /// As the kernel does when memory ends: either the command itself is killed, or a child of it.
    async fn a_killed_command_is_tried_again_and_leaves_no_process(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let files: [PathBuf; 2] = ["leader.pids", "child.pids"].map(|name| stack.place().join(name));
        let leader_killed = log.command(&family("test.leader", &files[0], ""))?;
        let child_killed = log.command(&family("test.child", &files[1], ""))?;
        let mut worker = stack.worker().config(&leader_killed).config(&child_killed).start().await?;

        for (kind, file, told) in [("test.leader", &files[0], "signal 9"), ("test.child", &files[1], "status 137")] {
            let task = producer.api.submit(&json!({"kind": kind})).await?;
            let (leader, child) = pids_in(file).await?;
            assert!(is_alive(leader) && is_alive(child));
            sigkill(if kind == "test.leader" { leader } else { child })?;
            gone(leader).await?;
            gone(child).await?;
            let done = producer.api.in_state(&task.id, "completed", LIMIT).await?;
            assert_eq!((done.attempt, done.errors.len()), (2, 1), "{done:#?}");
            let error = &done.errors[0];
            // `Killed` is what the shell says of a child that was killed.
            assert!(error.message.contains(told) || error.message.contains("Killed"), "{error:?}");
            assert_eq!((error.kind.as_str(), error.attempt), ("error", 1), "{error:?}");
        }
        assert_eq!(worker.process.has_exited()?, None);
        log.check_fences_rise()?;
        log.check_no_overlap()
    }

    async fn a_command_that_ignores_sigterm_is_killed_five_seconds_after_its_timeout(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let file = stack.place().join("deaf.pids");
        let deaf = family("test.deaf", &file, "trap '' TERM").setting(&format!("timeout_ms = {}", TIMEOUT.as_millis()));
        let _worker = stack.worker().config(&log.command(&deaf)?).start().await?;
        let task = producer.api.submit(&json!({"kind": "test.deaf"})).await?;
        let (leader, child) = pids_in(&file).await?;
        let done = producer.api.in_state(&task.id, "completed", LIMIT).await?;
        assert!(!is_alive(leader) && !is_alive(child), "somebody has survived");
        assert_eq!((done.attempt, done.errors.len(), done.errors[0].kind.as_str()), (2, 1, "timeout"), "{done:#?}");
        let between = between_starts(&log, &task.id)?;
        // Its second attempt comes after the usual wait of a failed one. The timeout begins before the command's first line.
        let expected = TIMEOUT + TERM_GRACE;
        assert!(between >= expected - SLACK && between < expected + SLACK * 2, "tried again after {between:?}");
        log.check_no_overlap()
    }

    async fn an_async_handler_that_ignores_its_cancellation_is_dropped(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut worker = stack.test_worker(&log).start().await?;
        // It never looks at its cancellation token.
        let deaf = json!({"kind": "test.work", "timeout_ms": 1000, "args": {"work_ms": 60_000, "work_again_ms": 10}});
        let task = producer.api.submit(&deaf).await?;
        let done = producer.api.in_state(&task.id, "completed", Duration::from_secs(20)).await?;
        assert_eq!((done.attempt, done.errors.len(), done.errors[0].kind.as_str()), (2, 1, "timeout"), "{done:#?}");
        let ends = log.of(&task.id)?.into_iter().filter(|entry| entry.step == Step::End).count();
        assert_eq!(ends, 1, "the first run was dropped, not finished");
        assert_eq!(worker.process.has_exited()?, None);
        log.check_no_overlap()
    }
}

fn between_starts(log: &OperationLog, task: &str) -> Result<Duration> {
    let starts: Vec<_> = log.of(task)?.into_iter().filter(|entry| entry.step == Step::Start).collect();
    let (first, second) = (starts.first().context("a first start")?, starts.get(1).context("a second start")?);
    Ok(second.at.saturating_sub(first.at))
}

/// Whatever is not there to start it with, it is not the task's fault.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_started_costs_no_attempt() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.worker().config(&log.command(&CommandKind::new("test.quick"))?).start().await?;
    let pid = Pid::from_raw(worker.process.pid());
    let limit = getrlimit(Resource::Nofile);
    // Whatever is open stays open, and nothing else can be opened.
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum: limit.maximum })?;
    let task = producer.api.submit(&json!({"kind": "test.quick"})).await?;
    worker.process.logged("this worker can start nothing", LIMIT).await?;
    prlimit(pid, Resource::Nofile, limit)?;
    let done = producer.api.in_state(&task.id, "completed", LIMIT).await?;
    assert_eq!((done.attempt, done.errors.len()), (1, 0), "{done:#?}");
    Ok(())
}
