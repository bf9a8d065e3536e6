//! `list`: tasks, newest first, page after page.

use jiff::Timestamp;

use super::Context;
use crate::api::{Identified, Task, TaskPage};
use crate::cli::{List, tag_of};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::{note, state_style};
use crate::table::{Cell, Column, Table};
use crate::text::{brief_ms, cut, json_line, relative};

/// How many tasks one request asks for: with the largest args and results a page stays within what a client takes.
const PAGE: u64 = 100;

pub(super) async fn run(cx: &Context<'_>, list: &List) -> Result<Exit, Failure> {
    let mut left = if list.all { u64::MAX } else { list.limit };
    let mut cursor: Option<String> = None;
    let mut table = Table::new([
        Column::new("ID"),
        Column::new("KIND").cut(10).optional(1),
        Column::new("QUEUE").cut(8).optional(4),
        Column::new("STATE"),
        Column::new("TRIES").optional(5),
        Column::new("AGE").optional(3),
        Column::new("WHY").cut(12).optional(2),
    ]);
    let mut found = false;
    while left > 0 {
        let call = Call::get(["v1", "tasks"]).query("limit", left.min(PAGE)).optional("cursor", cursor.as_ref());
        let page: TaskPage = cx.client.call(filtered(call, list)).await?.read()?;
        left = left.saturating_sub(page.tasks.len() as u64);
        found |= !page.tasks.is_empty();
        show(cx, list, &page, &mut table)?;
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    if cx.output.terminal && !cx.output.json && !list.quiet {
        match (found, cursor) {
            (false, _) => note("no tasks"),
            (true, Some(_)) => note("there are more: --limit N, or --all"),
            (true, None) => {}
        }
    }
    Ok(Exit::Done)
}

fn filtered(call: Call, list: &List) -> Call {
    let call = call
        .optional("state", list.state.as_ref())
        .optional("kind", list.kind.as_ref())
        .optional("queue", list.queue.as_ref())
        .optional("error", list.error.as_ref())
        .optional("reason", list.reason.as_ref())
        .optional("since", list.since)
        .optional("until", list.until)
        .optional("worker", list.worker)
        .optional("group", list.group);
    list.tags.iter().fold(call, |call, tag| call.query("tag", tag_of(tag)))
}

fn show(cx: &Context<'_>, list: &List, page: &TaskPage, table: &mut Table) -> Result<(), Failure> {
    let read = |error: serde_json::Error| {
        Failure::new(Exit::Refused, format!("a task is not as this program knows it: {error}"))
    };
    let mut text = String::new();
    for json in &page.tasks {
        if list.quiet {
            let task: Identified = serde_json::from_str(json.get()).map_err(read)?;
            text.push_str(&crate::text::visible(&task.id));
            text.push('\n');
        } else if cx.output.json {
            text.push_str(&json_line(json.get()));
            text.push('\n');
        } else {
            table.row(row(&serde_json::from_str(json.get()).map_err(read)?, Timestamp::now()));
        }
    }
    if list.quiet || cx.output.json { cx.output.text(&text) } else { cx.output.table(table) }
}

/// How much of an error's message is seen.
const MESSAGE_CHARS_MAX: usize = 60;

/// How old it is; of what runs since when it does, of what waits for its time how long it will.
fn age(task: &Task, now: Timestamp) -> String {
    match (task.state.as_str(), task.started_at) {
        ("running", Some(started)) => format!("for {}", brief_ms(now.as_millisecond() - started.as_millisecond())),
        ("retryable" | "scheduled", _) if task.run_at > now => relative(task.run_at, now),
        _ => brief_ms(now.as_millisecond().saturating_sub(task.created_at.as_millisecond())),
    }
}

/// Why it is where it is: what somebody has said or decided, then what its last attempt has.
fn why(task: &Task) -> String {
    let failed = task.errors.last().filter(|_| task.state != "completed");
    let held = task.limited_by.as_ref().map(|limit| format!("limited by {limit}"));
    let said = task.reason.clone().or(held);
    let message = failed.map(|error| cut(&error.message, MESSAGE_CHARS_MAX));
    match (said, message, failed) {
        (Some(said), Some(message), _) => format!("{said}: {message}"),
        (Some(said), None, _) => said,
        (None, Some(message), Some(error)) => format!("{}: {message}", error.kind),
        (None, _, _) => String::new(),
    }
}

fn row(task: &Task, now: Timestamp) -> [Cell; 7] {
    [
        Cell::new(&task.id),
        Cell::new(&task.kind),
        Cell::new(&task.queue),
        Cell::new(&task.state).styled(state_style(&task.state)),
        Cell::new(format!("{}/{}", task.attempt, task.max_attempts)),
        Cell::new(age(task, now)),
        Cell::new(why(task)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn task(changes: Value) -> Task {
        let mut task = json!({
            "id": "i", "kind": "k", "queue": "q", "state": "accepted", "attempt": 0, "max_attempts": 20,
            "created_at": "2026-11-23T07:00:00Z", "run_at": "2026-11-23T07:00:00Z"
        });
        for (key, value) in changes.as_object().unwrap() {
            task[key] = value.clone();
        }
        serde_json::from_value(task).unwrap()
    }

    #[test]
    fn the_age_says_what_counts_in_its_state() {
        let now = "2026-11-23T07:10:00Z".parse().unwrap();
        let age = |changes| age(&task(changes), now);
        assert_eq!(age(json!({})), "10m0s");
        assert_eq!(age(json!({"state": "running", "started_at": "2026-11-23T07:09:30Z"})), "for 30s");
        assert_eq!(age(json!({"state": "retryable", "run_at": "2026-11-23T07:10:20Z"})), "in 20s");
        assert_eq!(age(json!({"state": "retryable", "run_at": "2026-11-23T07:09:59Z"})), "10m0s", "it is due");
        assert_eq!(age(json!({"state": "scheduled", "run_at": "2026-11-23T08:10:00Z"})), "in 1h0m");
    }

    #[test]
    fn why_is_the_reason_and_then_the_message() {
        let why = |changes| why(&task(changes));
        let error = json!([{"attempt": 1, "at": "2026-11-23T07:00:00Z", "message": "old", "kind": "panic"},
            {"attempt": 2, "at": "2026-11-23T07:00:00Z", "message": "no space left on the device of the month of November 2026", "kind": "error"}]);
        assert_eq!(why(json!({})), "");
        let message = "no space left on the device of the month of November 2026";
        let discarded = json!({"state": "discarded", "reason": "final_error", "errors": error});
        assert_eq!(why(discarded), format!("final_error: {message}"));
        assert_eq!(why(json!({"state": "retryable", "errors": error})), format!("error: {message}"));
        assert_eq!(why(json!({"state": "completed", "errors": error})), "");
        assert_eq!(why(json!({"state": "cancelled", "reason": "wrong month"})), "wrong month");
        assert_eq!(why(json!({"limited_by": "kind:k"})), "limited by kind:k");
        let long = json!([{"attempt": 1, "at": "2026-11-23T07:00:00Z", "message": "x".repeat(100), "kind": "error"}]);
        assert_eq!(why(json!({"state": "retryable", "errors": long})), format!("error: {}…", "x".repeat(59)));
    }
}
