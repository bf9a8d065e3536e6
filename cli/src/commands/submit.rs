//! `submit`: one task, and its end if somebody waits for it.

use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

use super::spec::{Spec, millis, spec};
use super::wait::{POLL_MAX, exit_of, until_end};
use super::{Context, get};
use crate::api::Task;
use crate::cli::Submit;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::note;
use crate::text::{brief, relative};

/// The body of the request.
#[derive(Debug, Serialize)]
struct Submission<'s> {
    #[serde(flatten)]
    task: Spec<'s>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delay_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    run_at: Option<Timestamp>,
}

pub(super) async fn run(cx: &Context<'_>, submit: Submit) -> Result<Exit, Failure> {
    let submission = Submission { task: spec(&submit.task)?, delay_ms: submit.delay.map(millis), run_at: submit.at };
    // With a key of its own a request whose answer was lost can be sent again.
    let key = submit.key.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
    let until = submit.wait.map(|time| Instant::now() + time);
    let first_wait = submit.wait.map(|time| time.min(POLL_MAX));
    let call = Call::post(["v1", "tasks"]).json(&submission)?.key(&key);
    let call = call.optional("wait_ms", first_wait.map(millis)).waiting(first_wait.unwrap_or_default());
    let answer = cx.client.call(call).await.map_err(|failure| match failure.outcome_unknown {
        true => failure.hint(format!("it may have been recorded: submit it again with --key {key} to have it once")),
        false => failure,
    })?;
    let mut task: Task = answer.read()?;
    let replayed = answer.is_replayed();
    let mut text = answer.text;
    if let Some(until) = until.filter(|_| !task.has_ended()) {
        (text, task) = until_end(&cx.client, &task.id, until)
            .await
            .map_err(|failure| failure.hint(format!("it was submitted: tasklane wait {}", task.id)))?;
    }
    let exit = submit.wait.map_or(Exit::Done, |_| exit_of(&task));
    if submit.quiet {
        cx.output.line(&task.id)?;
    } else if cx.output.json {
        cx.output.json(&text)?;
    } else if submit.wait.is_some() {
        cx.output.text(&get::view(&task, cx.output, Timestamp::now()))?;
    } else {
        cx.output.line(&receipt(&task, replayed, Timestamp::now()))?;
    }
    if let (Exit::TimedOut, Some(time)) = (exit, submit.wait) {
        note(&format!("it has not ended within {}: tasklane wait {}", brief(time), task.id));
    }
    Ok(exit)
}

fn receipt(task: &Task, replayed: bool, now: Timestamp) -> String {
    let Task { id, queue, state, run_at, .. } = task;
    match (replayed, state.as_str()) {
        (true, _) => format!("{id} was submitted before under this key, and is {state}"),
        (false, "scheduled") => format!("{id} submitted to {queue}, starts {}", relative(*run_at, now)),
        (false, _) => format!("{id} submitted to {queue}"),
    }
}
