//! `retry`: cancelled or discarded tasks, again.

use uuid::Uuid;

use super::Context;
use crate::client::Call;
use crate::failure::{Exit, Failure};

pub(super) async fn run(cx: &Context<'_>, ids: &[Uuid]) -> Result<Exit, Failure> {
    cx.each(ids, async |id| {
        // Not repeated by itself: the task may have failed once more in between, and would start a second time.
        let answer = cx.client.call(Call::post(["v1", "tasks", id, "retry"]).once()).await;
        let answer = answer.map_err(|failure| {
            let told = Failure { message: format!("{id}: {}", failure.message), ..failure };
            match told.outcome_unknown {
                true => told.hint(format!("it may start all the same: look with tasklane get {id}")),
                false => told,
            }
        })?;
        if cx.output.json {
            cx.output.json(&answer.text)?
        } else {
            cx.output.line(&format!("{id} starts again"))?
        }
        Ok(Exit::Done)
    })
    .await
}
