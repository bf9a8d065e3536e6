//! `pause` and `resume`: whether a queue's tasks start.

use super::{Context, queues};
use crate::api::Queue;
use crate::client::Call;
use crate::failure::{Exit, Failure};

pub(super) async fn run(cx: &Context<'_>, queue: &str, verb: &str) -> Result<Exit, Failure> {
    // Asked twice, a queue is paused once.
    let answer = cx.client.call(Call::post(["v1", "queues", queue, verb])).await?;
    if cx.output.json {
        cx.output.json(&answer.text)?;
    } else {
        cx.output.table(&mut queues::table(&[answer.read::<Queue>()?]))?;
    }
    Ok(Exit::Done)
}
