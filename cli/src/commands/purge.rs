//! `purge`: finished tasks that meet a filter are deleted.

use std::io::IsTerminal;

use serde::Serialize;
use serde_json::json;

use super::Context;
use super::cancel::confirmed;
use crate::api::PurgedTasks;
use crate::cli::{Filter, Purge};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::text::count;

/// The body of the request.
#[derive(Debug, Serialize)]
struct Asked<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    dry_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

pub(super) async fn run(cx: &Context<'_>, purge: &Purge) -> Result<Exit, Failure> {
    if purge.filter == Filter::default() {
        let failure = Failure::usage("nothing says which tasks");
        return Err(failure.hint("give at least one of --state, --kind, --queue, --tag"));
    }
    if !purge.dry_run && !purge.yes {
        if !std::io::stdin().is_terminal() {
            let failure = Failure::usage("a filter may meet many tasks, and nobody is here to be asked");
            return Err(failure.hint("--dry-run counts them, --yes deletes them"));
        }
        let met = sweep(cx, purge, true).await?;
        if !confirmed(&format!("Delete {} for good?", count(met, "finished task")))? {
            return Err(Failure::usage("nothing was deleted"));
        }
    }
    let purged = sweep(cx, purge, purge.dry_run).await?;
    let tasks = count(purged, "finished task");
    if cx.output.json {
        cx.output.json(&json!({"purged": purged, "dry_run": purge.dry_run}).to_string())?;
    } else {
        cx.output.line(&format!("{tasks} {}", if purge.dry_run { "would be deleted" } else { "deleted" }))?;
    }
    Ok(Exit::Done)
}

/// Goes through all tasks that meet the filter, some thousands a call.
async fn sweep(cx: &Context<'_>, purge: &Purge, dry_run: bool) -> Result<u64, Failure> {
    let filter = &purge.filter;
    let (mut purged, mut cursor) = (0, None);
    loop {
        let body = Asked {
            state: filter.state.as_deref(),
            kind: filter.kind.as_deref(),
            queue: filter.queue.as_deref(),
            tag: filter.tag(),
            dry_run,
            cursor,
        };
        // Asked twice, a task is deleted once; the count may then be too low.
        let answer = cx.client.call(Call::post(["v1", "tasks", "purge"]).json(&body)?).await;
        let done: PurgedTasks =
            answer.and_then(|answer| answer.read()).map_err(|failure| match purged > 0 && !dry_run {
                true => {
                    failure.hint(format!("{} were deleted before; the same command goes on", count(purged, "task")))
                }
                false => failure,
            })?;
        purged += done.purged;
        cursor = done.next_cursor;
        if cursor.is_none() {
            return Ok(purged);
        }
    }
}
