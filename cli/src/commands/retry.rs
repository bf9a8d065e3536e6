//! `retry`: cancelled or discarded tasks again, by id or all that meet a filter.

use std::io::IsTerminal;

use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Context;
use super::cancel::confirmed;
use crate::api::{RetriedTasks, Task};
use crate::cli::Retry;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::input::{self, IdArg};
use crate::text::count;

/// The body of the request for many tasks.
#[derive(Debug, Serialize)]
struct Retries<'r> {
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    per_second: Option<u32>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    replaced: bool,
    dry_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// The body of the request for one task with other args, which are given on as they were written.
#[derive(Debug, Serialize)]
struct OtherArgs<'r> {
    args: &'r RawValue,
}

/// How many tasks were met so far.
#[derive(Debug, Default, Clone, Copy)]
struct Met {
    retried: u64,
    conflicts: u64,
}

pub(super) async fn run(cx: &Context<'_>, retry: &Retry) -> Result<Exit, Failure> {
    match (&retry.args, &retry.ids[..]) {
        (Some(args), [IdArg::Id(id)]) => anew(cx, *id, &input::args(args)?).await,
        (Some(_), _) => Err(Failure::usage("--args are for one task at a time")),
        (None, []) => many(cx, retry).await,
        (None, ids) => each(cx, ids).await,
    }
}

async fn each(cx: &Context<'_>, ids: &[IdArg]) -> Result<Exit, Failure> {
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

/// With other args, as a new task.
async fn anew(cx: &Context<'_>, id: Uuid, args: &RawValue) -> Result<Exit, Failure> {
    let id = id.to_string();
    // With a key of its own a request whose answer was lost can be sent again.
    let key = Uuid::new_v4().to_string();
    let call = Call::post(["v1", "tasks", &id, "retry"]).json(&OtherArgs { args })?.key(key);
    let answer = cx.client.call(call).await?;
    if cx.output.json {
        cx.output.json(&answer.text)?;
    } else {
        let task: Task = answer.read()?;
        cx.output.line(&format!("{} does the work of {id} with other args", task.id))?;
    }
    Ok(Exit::Done)
}

async fn many(cx: &Context<'_>, retry: &Retry) -> Result<Exit, Failure> {
    if !retry.dry_run && !retry.yes {
        if !std::io::stdin().is_terminal() {
            let failure = Failure::usage("a filter may meet many tasks, and nobody is here to be asked");
            return Err(failure.hint("--dry-run counts them, --yes retries them"));
        }
        let met = sweep(cx, retry, true).await?;
        if !confirmed(&format!("Retry {}?", count(met.retried, "task")))? {
            return Err(Failure::usage("nothing was retried"));
        }
    }
    let met = sweep(cx, retry, retry.dry_run).await?;
    tell(cx, met, retry.dry_run)?;
    Ok(Exit::Done)
}

/// Goes through all tasks that meet the filter, some thousands a call.
async fn sweep(cx: &Context<'_>, retry: &Retry, dry_run: bool) -> Result<Met, Failure> {
    let filter = &retry.filter;
    let mut met = Met::default();
    let mut cursor = None;
    loop {
        let body = Retries {
            state: filter.state.as_deref(),
            kind: filter.kind.as_deref(),
            queue: filter.queue.as_deref(),
            tag: filter.tag(),
            reason: retry.reason.as_deref(),
            per_second: retry.per_second,
            replaced: retry.replaced,
            dry_run,
            cursor,
        };
        // Sent again it finds those that are left: what was retried has not failed any more.
        let answer = cx.client.call(Call::post(["v1", "tasks", "retry"]).json(&body)?).await;
        let done: RetriedTasks =
            answer.and_then(|answer| answer.read()).map_err(|failure| match met.retried > 0 && !dry_run {
                true => failure
                    .hint(format!("{} were retried before; the same command goes on", count(met.retried, "task"))),
                false => failure,
            })?;
        met.retried += done.retried;
        met.conflicts += done.conflicts;
        cursor = done.next_cursor;
        if cursor.is_none() {
            return Ok(met);
        }
    }
}

fn tell(cx: &Context<'_>, met: Met, dry_run: bool) -> Result<(), Failure> {
    let Met { retried, conflicts } = met;
    if cx.output.json {
        return cx.output.json(&json!({"retried": retried, "conflicts": conflicts, "dry_run": dry_run}).to_string());
    }
    let tasks = count(retried, "task");
    cx.output.line(&match (dry_run, conflicts) {
        (true, 0) => format!("{tasks} would start again"),
        (true, _) => format!("{tasks} would start again, {conflicts} not: other tasks hold their unique keys"),
        (false, 0) => format!("{tasks} will start again"),
        (false, _) => format!("{tasks} will start again, {conflicts} not: other tasks hold their unique keys"),
    })
}
