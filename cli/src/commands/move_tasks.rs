//! `move`: waiting tasks go to another queue.

use serde::Serialize;
use serde_json::json;

use super::Context;
use crate::api::MovedTasks;
use crate::cli::{Move, tag_of};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::text::count;

/// The body of the request.
#[derive(Debug, Serialize)]
struct Asked<'c> {
    to: &'c str,
    filter: Filter<'c>,
    dry_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

#[derive(Debug, Serialize)]
struct Filter<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
}

pub(super) async fn run(cx: &Context<'_>, moving: &Move) -> Result<Exit, Failure> {
    let Move { from, to, kind, tag, dry_run } = moving;
    let (mut moved, mut cursor) = (0, None);
    loop {
        let filter = Filter { kind: kind.as_deref(), tag: tag.as_ref().map(tag_of) };
        let body = Asked { to, filter, dry_run: *dry_run, cursor };
        // Asked twice, a task is moved once; the count may then be too low.
        let answer = cx.client.call(Call::post(["v1", "queues", from, "move"]).json(&body)?).await;
        let done: MovedTasks =
            answer.and_then(|answer| answer.read()).map_err(|failure| match moved > 0 && !dry_run {
                true => failure.hint(format!("{} were moved before; the same command goes on", count(moved, "task"))),
                false => failure,
            })?;
        moved += done.moved;
        cursor = done.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    if cx.output.json {
        cx.output.json(&json!({"moved": moved, "dry_run": dry_run}).to_string())?;
    } else {
        let verb = if *dry_run { "would be moved" } else { "moved" };
        cx.output.line(&format!("{} {verb} from {from} to {to}", count(moved, "waiting task")))?;
    }
    Ok(Exit::Done)
}
