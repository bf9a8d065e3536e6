//! `pause` and `resume`: whether a queue's tasks start.

use super::{Context, queues};
use crate::api::Queue;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::note;

pub(super) async fn run(cx: &Context<'_>, queue: &str, verb: &str) -> Result<Exit, Failure> {
    // Asked twice, a queue is paused once.
    let answer = cx.client.call(Call::post(["v1", "queues", queue, verb])).await?;
    let queue = answer.read::<Queue>()?;
    if cx.output.json {
        cx.output.json(&answer.text)?;
    } else {
        cx.output.table(&mut queues::table(std::slice::from_ref(&queue)))?;
    }
    if queue.workers == Some(0) && queue.counts.values().all(|count| *count == 0) {
        note(&format!("nobody uses a queue {}: no worker consumes it, and it has no tasks", queue.name));
    }
    Ok(Exit::Done)
}
