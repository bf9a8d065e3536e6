//! The client that changes its mind: it has waiting tasks changed, one change after the other.

use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::api::{Answer, Task};
use crate::history::{Answered, Edit, Op};
use crate::nemesis::client::{ANSWER_LIMIT, Client, PRIORITIES, Submission, random_queue};

/// The states in which a task does not wait; its fence is that of its last run then.
const STARTED: [&str; 4] = ["running", "completed", "cancelled", "discarded"];

impl Client {
    /// Changes one of the submission's tasks as often as it is to be.
    pub(super) async fn edit(&self, submission: &Submission, tasks: &[String], rng: &mut StdRng) -> Result<()> {
        let all: Vec<(&String, &Value)> = tasks.iter().zip(&submission.tasks).collect();
        let Some((task, submitted)) = all.choose(rng) else { return Ok(()) };
        for number in 1..=u64::from(submission.edits) {
            sleep(Duration::from_millis(rng.random_range(0..800))).await;
            let (edit, body) = random(task, number, &submitted["args"], rng);
            let is_timed = body["delay_ms"].is_u64();
            // Before the answer is known, since the change may come true without one.
            self.history.append(Op::Edit(edit.clone()))?;
            let api = self.apis.choose(rng).context("a client has a producer")?;
            let answer = timeout(ANSWER_LIMIT, api.raw_patch(&format!("/v1/tasks/{task}"), &body)).await;
            let known = match answer {
                Ok(Ok(answer)) => judge(edit, &answer, is_timed)?,
                Ok(Err(error)) if error.downcast_ref().is_some_and(reqwest::Error::is_connect) => {
                    Edit { outcome: Answered::Fail, ..edit }
                }
                Ok(Err(_)) | Err(_) => continue,
            };
            self.history.append(Op::Edit(known))?;
        }
        Ok(())
    }
}

/// A change of some of what can be changed.
fn random(task: &str, number: u64, args: &Value, rng: &mut StdRng) -> (Edit, Value) {
    let mut body = json!({});
    if rng.random_bool(0.3) {
        body["priority"] = PRIORITIES[rng.random_range(0..PRIORITIES.len())].into();
    }
    if rng.random_bool(0.4) {
        body["delay_ms"] = rng.random_range(0_u64..2_000).into();
    }
    let queue = rng.random_bool(0.3).then(|| random_queue(rng));
    if let Some(queue) = queue {
        body["queue"] = queue.into();
    }
    let with_args = body == json!({}) || rng.random_bool(0.8);
    if with_args {
        body["args"] = args.clone();
        body["args"]["edition"] = number.into();
    }
    let (task, queue, outcome) = (task.to_owned(), queue.map(str::to_owned), Answered::Unknown);
    (Edit { task, number, args: with_args, queue, outcome, fence: None, run_at: None }, body)
}

/// What an answer means. A server's error leaves open whether the ledger has made the change.
fn judge(edit: Edit, answer: &Answer, is_timed: bool) -> Result<Edit> {
    match answer.status {
        200 => {
            let task: Task = answer.expect(&[200])?;
            // Where it was started right behind the change, that run has it, too.
            let fence = Some(task.fence.saturating_sub(u64::from(STARTED.contains(&task.state.as_str()))));
            let run_at = task
                .run_at
                .filter(|_| is_timed)
                .map(|at| at.duration_since(Timestamp::UNIX_EPOCH).try_into())
                .transpose()?;
            Ok(Edit { outcome: Answered::Ok, fence, run_at, ..edit })
        }
        400..=499 => Ok(Edit { outcome: Answered::Fail, ..edit }),
        _ => Ok(edit),
    }
}
