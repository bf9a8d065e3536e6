//! `cancel`: tasks by id, or all that meet a filter.

use std::io::{BufRead, IsTerminal, Write};

use serde::Serialize;
use serde_json::json;

use super::Context;
use crate::api::{CancelledTasks, Task};
use crate::cli::Cancel;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::text::count;

/// The body of the request for many tasks.
#[derive(Debug, Serialize)]
struct Cancellation<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'c str>,
    dry_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// How many tasks were met so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Met {
    cancelled: u64,
    requested: u64,
}

pub(super) async fn run(cx: &Context<'_>, cancel: &Cancel) -> Result<Exit, Failure> {
    if cancel.ids.is_empty() { many(cx, cancel).await } else { each(cx, cancel).await }
}

async fn each(cx: &Context<'_>, cancel: &Cancel) -> Result<Exit, Failure> {
    let body = cancel.reason.as_ref().map_or_else(|| json!({}), |reason| json!({"reason": reason}));
    cx.each(&cancel.ids, async |id| {
        // Asked twice, a task is cancelled once.
        let answer = cx.client.call(Call::post(["v1", "tasks", id, "cancel"]).json(&body)?).await;
        let answer = answer.map_err(|failure| Failure { message: format!("{id}: {}", failure.message), ..failure })?;
        if cx.output.json {
            cx.output.json(&answer.text)?;
        } else {
            let task: Task = answer.read()?;
            match task.state.as_str() {
                "cancelled" => cx.output.line(&format!("{id} cancelled"))?,
                state => cx.output.line(&format!("{id} is {state} and will be stopped"))?,
            }
        }
        Ok(Exit::Done)
    })
    .await
}

async fn many(cx: &Context<'_>, cancel: &Cancel) -> Result<Exit, Failure> {
    if cancel.dry_run {
        let met = sweep(cx, cancel, true).await?;
        tell(cx, met, true)?;
        return Ok(Exit::Done);
    }
    if !cancel.yes {
        if !std::io::stdin().is_terminal() {
            let failure = Failure::usage("a filter may meet many tasks, and nobody is here to be asked");
            return Err(failure.hint("--dry-run counts them, --yes cancels them"));
        }
        let met = sweep(cx, cancel, true).await?;
        let (waiting, running) = (count(met.cancelled, "waiting task"), count(met.requested, "running task"));
        if !confirmed(&format!("Cancel {waiting} and stop {running}?"))? {
            return Err(Failure::usage("nothing was cancelled"));
        }
    }
    let met = sweep(cx, cancel, false).await?;
    tell(cx, met, false)?;
    Ok(Exit::Done)
}

/// Goes through all tasks that meet the filter, some thousands a call.
async fn sweep(cx: &Context<'_>, cancel: &Cancel, dry_run: bool) -> Result<Met, Failure> {
    let filter = &cancel.filter;
    let mut met = Met::default();
    let mut cursor = None;
    loop {
        let body = Cancellation {
            state: filter.state.as_deref(),
            kind: filter.kind.as_deref(),
            queue: filter.queue.as_deref(),
            tag: filter.tag(),
            reason: cancel.reason.as_deref(),
            dry_run,
            cursor,
        };
        let answer = cx.client.call(Call::post(["v1", "tasks", "cancel"]).json(&body)?).await;
        let done: CancelledTasks = answer.and_then(|answer| answer.read()).map_err(|failure| {
            let so_far = met.cancelled + met.requested;
            match so_far > 0 && !dry_run {
                true => {
                    failure.hint(format!("{} were cancelled before; the same command goes on", count(so_far, "task")))
                }
                false => failure,
            }
        })?;
        met.cancelled += done.cancelled;
        met.requested += done.requested;
        cursor = done.next_cursor;
        if cursor.is_none() {
            return Ok(met);
        }
    }
}

fn tell(cx: &Context<'_>, met: Met, dry_run: bool) -> Result<(), Failure> {
    let Met { cancelled, requested } = met;
    if cx.output.json {
        return cx
            .output
            .json(&json!({"cancelled": cancelled, "requested": requested, "dry_run": dry_run}).to_string());
    }
    let (waiting, running) = (count(cancelled, "waiting task"), count(requested, "running task"));
    cx.output.line(&match dry_run {
        true => format!("{waiting} would be cancelled, {running} would be stopped"),
        false => format!("{waiting} cancelled, {running} will be stopped"),
    })
}

/// Asks whoever is at the terminal.
pub(super) fn confirmed(question: &str) -> Result<bool, Failure> {
    let mut stderr = std::io::stderr();
    write!(stderr, "{question} [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
