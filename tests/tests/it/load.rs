//! What the fault tests submit, and the questions they all ask afterwards.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::{Accepted, Api, Task};
use tasklane_tests::eventually;
use tasklane_tests::oplog::{Entry, OperationLog, Step};
use tasklane_tests::vhost::Vhost;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// How long the broker may take to see the last acks.
const ACK_LIMIT: Duration = Duration::from_secs(10);

/// The pause between two submissions of a [`Load`].
const PACE: Duration = Duration::from_millis(25);

/// So many equal tasks.
pub(crate) fn tasks(count: usize, kind: &str, args: &Value) -> Vec<Value> {
    (0..count).map(|_| json!({"kind": kind, "args": args})).collect()
}

/// The ids of what was accepted.
pub(crate) fn ids(accepted: &[Accepted]) -> BTreeSet<String> {
    accepted.iter().map(|task| task.id.clone()).collect()
}

/// All of these tasks are among `ended`, and every one of them is completed.
pub(crate) fn check_completed(ended: &[Task], submitted: &BTreeSet<String>) -> Result<()> {
    let ended_ids: BTreeSet<String> = ended.iter().map(|task| task.id.clone()).collect();
    let missing: Vec<_> = submitted.difference(&ended_ids).collect();
    ensure!(missing.is_empty(), "{} of {} tasks are missing: {missing:?}", missing.len(), submitted.len());
    let failed: Vec<_> = ended.iter().filter(|task| task.state != "completed").collect();
    ensure!(failed.is_empty(), "{} of {} tasks are not completed: {failed:#?}", failed.len(), ended.len());
    Ok(())
}

/// The runs of one process that have begun and not ended.
pub(crate) fn running_at(entries: &[Entry], pid: i32) -> Vec<Entry> {
    let ended = |start: &Entry| {
        entries.iter().any(|entry| entry.step == Step::End && entry.task == start.task && entry.fence == start.fence)
    };
    entries.iter().filter(|entry| entry.step == Step::Start && entry.pid == pid && !ended(entry)).cloned().collect()
}

/// Waits until a process has begun at least `count` runs.
pub(crate) async fn started_at(log: &OperationLog, pid: i32, count: usize, limit: Duration) -> Result<()> {
    eventually(limit, &format!("{count} runs to begin in process {pid}"), async || {
        let started = log.starts()?.into_iter().filter(|start| start.pid == pid).count();
        Ok((started >= count).then_some(()))
    })
    .await
}

/// Neither a task queue nor the dead letters hold anything that waits.
pub(crate) async fn nothing_left(vhost: &Vhost) -> Result<()> {
    for queue in ["tasklane.q.default", "tasklane.q.default.high", "tasklane.q.default.low", "tasklane.dead"] {
        eventually(ACK_LIMIT, &format!("{queue} to be empty"), async || {
            let depth = vhost.depth(queue).await?;
            ensure!(depth == Some(0), "its depth is {depth:?}");
            Ok(Some(()))
        })
        .await?;
    }
    Ok(())
}

/// Submits one task after the other, in the background, until it is stopped.
#[derive(Debug)]
pub(crate) struct Load {
    stopped: CancellationToken,
    submitting: JoinHandle<Result<Loaded>>,
}

/// What a load has come to.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// The ids of all that was answered with 202; another answer fails the whole load.
    pub(crate) accepted: BTreeSet<String>,
    /// The longest that a submission took.
    pub(crate) slowest: Duration,
}

impl Load {
    /// Begins to submit this task, at most every [`PACE`].
    pub(crate) fn of(api: &Api, task: Value) -> Self {
        let stopped = CancellationToken::new();
        let submitting = tokio::spawn(submit_paced(api.clone(), task, stopped.clone()));
        Self { stopped, submitting }
    }

    /// Ends it.
    pub(crate) async fn stop(self) -> Result<Loaded> {
        self.stopped.cancel();
        self.submitting.await?
    }
}

async fn submit_paced(api: Api, task: Value, stopped: CancellationToken) -> Result<Loaded> {
    let mut loaded = Loaded::default();
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stopped.is_cancelled() {
        pace.tick().await;
        let asked = Instant::now();
        let accepted =
            api.submit(&task).await.with_context(|| format!("after {} accepted tasks", loaded.accepted.len()))?;
        loaded.slowest = loaded.slowest.max(asked.elapsed());
        loaded.accepted.insert(accepted.id);
    }
    Ok(loaded)
}
