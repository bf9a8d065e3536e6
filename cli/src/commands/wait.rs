//! `wait`: until tasks have ended; the exit code says how.

use std::pin::pin;
use std::time::Duration;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::Context;
use super::get::between;
use crate::api::Task;
use crate::cli::Wait;
use crate::client::{Call, Client};
use crate::failure::{Exit, Failure};
use crate::input;
use crate::output::{Output, note, state_style};
use crate::text::{brief, cut, json_line};

/// How long one request waits; proxies seldom cut so short a silence.
pub(super) const POLL_MAX: Duration = Duration::from_secs(25);
/// How many tasks are waited for at once.
const AT_ONCE: usize = 16;
/// The pause when an answer came sooner than it was asked for, as from a producer that stops.
const PAUSE: Duration = Duration::from_millis(250);
/// How much of a result is seen.
const RESULT_CHARS_MAX: usize = 200;

pub(super) async fn run(cx: &Context<'_>, wait: &Wait) -> Result<Exit, Failure> {
    let until = Instant::now() + wait.timeout;
    let ids = input::ids(&wait.ids.ids)?;
    let ends = ids.iter().map(ToString::to_string).map(async |id| until_end(&cx.client, &id, until).await);
    let mut ends = pin!(stream::iter(ends).buffer_unordered(AT_ONCE));
    let mut worst = Exit::Done;
    while let Some(end) = ends.next().await {
        let told = end.and_then(|(text, task)| {
            if cx.output.json {
                cx.output.json(&text)?;
            } else {
                cx.output.text(&end_line(&task, cx.output))?;
            }
            Ok(exit_of(&task))
        });
        worst = worst.max(cx.one_of_many(told)?);
    }
    if worst == Exit::TimedOut {
        note(&format!("the wait of {} is over", brief(wait.timeout)));
    }
    Ok(worst)
}

/// The task when it has ended, or when the time is over; as JSON and read.
///
/// # Errors
/// When it is not there, or no producer answers.
pub(super) async fn until_end(client: &Client, id: &str, until: Instant) -> Result<(String, Task), Failure> {
    loop {
        let asked_at = Instant::now();
        let left = until.saturating_duration_since(asked_at);
        let time = left.min(POLL_MAX);
        let call = Call::get(["v1", "tasks", id]).query("wait_ms", time.as_millis()).waiting(time);
        let answer = client.call(call).await?;
        let task: Task = answer.read()?;
        if task.has_ended() || left.is_zero() {
            return Ok((answer.text, task));
        }
        if asked_at.elapsed() < time.min(PAUSE) {
            sleep(PAUSE.min(until.saturating_duration_since(Instant::now()))).await;
        }
    }
}

/// How the program ends when it waited for this task.
pub(super) fn exit_of(task: &Task) -> Exit {
    match task.state.as_str() {
        "completed" => Exit::Done,
        _ if task.has_ended() => Exit::Failed,
        _ => Exit::TimedOut,
    }
}

/// How a task has ended, in one line.
fn end_line(task: &Task, output: &Output) -> String {
    let mut line = format!(
        "{}  {}",
        output.paint(&task.id, anstyle::Style::new()),
        output.paint(&task.state, state_style(&task.state))
    );
    if let Some((from, to)) = task.started_at.zip(task.finished_at) {
        line.push_str(&format!("  ran {}", brief(between(from, to))));
    } else if !task.has_ended() {
        line.push_str(&format!("  for {}", brief(between(task.created_at, Timestamp::now()))));
    }
    let more = match (task.state.as_str(), &task.result, task.errors.last()) {
        ("completed", Some(result), _) => Some(json_line(result.get()).into_owned()),
        ("discarded", _, Some(error)) => {
            Some(format!("{}: {}", task.reason.as_deref().unwrap_or(&error.kind), error.message))
        }
        _ => task.reason.clone(),
    };
    if let Some(more) = more {
        line.push_str(&format!("  {}", output.paint(&cut(&more, RESULT_CHARS_MAX), anstyle::Style::new())));
    }
    line.push('\n');
    line
}
