//! A client that does what clients are told to: it repeats a refused submission under the same idempotency key.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tasklane_tests::api::Api;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The pause between two submissions.
const PACE: Duration = Duration::from_millis(20);

/// The pause before a refused submission is repeated.
const AGAIN: Duration = Duration::from_millis(100);

/// Submits one task after the other, each until it is taken.
#[derive(Debug)]
pub(crate) struct PatientLoad {
    stopped: CancellationToken,
    done: Arc<Mutex<Done>>,
    submitting: JoinHandle<Result<()>>,
}

/// What a load has come to so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done {
    /// The ids of what was answered with 202, each submission once.
    pub(crate) accepted: BTreeSet<String>,
    /// How many times a submission was answered with 503.
    pub(crate) refused: usize,
    /// How many times it was not answered at all.
    pub(crate) unanswered: usize,
}

impl PatientLoad {
    /// Begins to submit this task.
    pub(crate) fn of(api: &Api, task: Value) -> Self {
        let (stopped, done) = (CancellationToken::new(), Arc::new(Mutex::new(Done::default())));
        let submitting = tokio::spawn(submit_all(api.clone(), task, Arc::clone(&done), stopped.clone()));
        Self { stopped, done, submitting }
    }

    /// What it has come to so far.
    pub(crate) async fn so_far(&self) -> Done {
        self.done.lock().await.clone()
    }

    /// Ends it, after the submission that is under way has been taken.
    pub(crate) async fn stop(self) -> Result<Done> {
        self.stopped.cancel();
        self.submitting.await??;
        Ok(self.done.lock().await.clone())
    }
}

async fn submit_all(api: Api, task: Value, done: Arc<Mutex<Done>>, stopped: CancellationToken) -> Result<()> {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stopped.is_cancelled() {
        pace.tick().await;
        let key = Uuid::now_v7().to_string();
        while !submitted(&api, &key, &task, &done).await? {
            sleep(AGAIN).await;
        }
    }
    Ok(())
}

/// Submits once; whether the task was taken.
async fn submitted(api: &Api, key: &str, task: &Value, done: &Mutex<Done>) -> Result<bool> {
    let Ok(answer) = api.submit_once(key, task).await else {
        done.lock().await.unanswered += 1;
        return Ok(false);
    };
    match answer.status {
        202 => {
            let id = answer.json()?["id"].as_str().context("a task without an id")?.to_owned();
            done.lock().await.accepted.insert(id);
            Ok(true)
        }
        503 => {
            let problem = answer.problem()?;
            ensure!(answer.header("retry-after").is_some(), "503 without Retry-After: {problem}");
            done.lock().await.refused += 1;
            Ok(false)
        }
        other => bail!("a submission was answered with {other}: {}", answer.text()),
    }
}
