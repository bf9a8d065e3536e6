//! `edit`: change a task that waits.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;

use super::Context;
use super::spec::millis;
use crate::api::Task;
use crate::cli::Edit;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::input;
use crate::text::relative;

/// The body of the request.
#[derive(Debug, Serialize)]
struct Changes<'e> {
    #[serde(skip_serializing_if = "Option::is_none")]
    run_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delay_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<&'e str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<&'e str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_ms: Option<u64>,
}

pub(super) async fn run(cx: &Context<'_>, edit: &Edit) -> Result<Exit, Failure> {
    let changes = Changes {
        run_at: edit.at,
        delay_ms: edit.delay.map(millis),
        args: edit.args.as_deref().map(input::args).transpose()?,
        queue: edit.queue.as_deref(),
        priority: edit.priority.as_deref(),
        max_attempts: edit.max_attempts,
        timeout_ms: edit.timeout.map(millis),
    };
    let id = edit.id.to_string();
    // Asked twice, a task is changed to the same twice.
    let answer = cx.client.call(Call::patch(["v1", "tasks", &id]).json(&changes)?).await?;
    if cx.output.json {
        cx.output.json(&answer.text)?;
    } else {
        let task: Task = answer.read()?;
        let now = Timestamp::now();
        cx.output.line(&match task.run_at > now {
            true => format!("{id} edited, starts {}", relative(task.run_at, now)),
            false => format!("{id} edited, starts at once"),
        })?;
    }
    Ok(Exit::Done)
}
