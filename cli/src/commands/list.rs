//! `list`: tasks, newest first, page after page.

use jiff::Timestamp;

use super::Context;
use crate::api::{Identified, Task, TaskPage};
use crate::cli::{Filter, List};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::state_style;
use crate::table::{Cell, Column, Table};
use crate::text::{brief_ms, json_line};

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
        let page: TaskPage = cx.client.call(filtered(call, &list.filter)).await?.read()?;
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
            (false, _) => cx.output.note("no tasks"),
            (true, Some(_)) => cx.output.note("there are more: --limit N, or --all"),
            (true, None) => {}
        }
    }
    Ok(Exit::Done)
}

fn filtered(call: Call, filter: &Filter) -> Call {
    call.optional("state", filter.state.as_ref())
        .optional("kind", filter.kind.as_ref())
        .optional("queue", filter.queue.as_ref())
        .optional("tag", filter.tag())
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

fn row(task: &Task, now: Timestamp) -> [Cell; 7] {
    let age = now.as_millisecond().saturating_sub(task.created_at.as_millisecond());
    let why = match task.errors.last() {
        Some(error) if task.state != "completed" => task.reason.as_deref().unwrap_or(&error.kind),
        _ => task.reason.as_deref().unwrap_or_default(),
    };
    [
        Cell::new(&task.id),
        Cell::new(&task.kind),
        Cell::new(&task.queue),
        Cell::new(&task.state).styled(state_style(&task.state)),
        Cell::new(format!("{}/{}", task.attempt, task.max_attempts)),
        Cell::new(brief_ms(age)),
        Cell::new(crate::text::cut(why, 60)),
    ]
}
