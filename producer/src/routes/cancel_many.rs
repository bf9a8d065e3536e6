//! `POST /v1/tasks/cancel`: all tasks that meet a filter, some thousands a call.

use std::collections::HashSet;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Serialize;
use tasklane_common::events::Happening;
use tasklane_common::state::State as TaskState;
use tasklane_common::task::{Task, TaskId};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::cancel::BODY_BYTES_MAX;
use crate::app::App;
use crate::caller::{Act, Caller, Deed};
use crate::cancellation::{self, CancelTasks, Cancellation};
use crate::error::{ApiError, Problem};
use crate::sweep::{PAGE, TASKS_MAX, TIME_MAX};
use crate::{extract, listing};

/// How far the cancellation has come.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CancelledTasks {
    /// How many waited, and are cancelled; in a dry run, would be.
    cancelled: u64,
    /// How many run, and will be stopped; in a dry run, would be.
    requested: u64,
    /// Give it as `cursor` to go on with the older tasks; null when none is left.
    next_cursor: Option<String>,
}

/// Cancel many tasks
///
/// Goes from the newest task to the oldest, at most 10,000 a call: repeat with `cursor` until `next_cursor` is null.
/// Tasks that have ended are left alone, and so are those submitted after the first call. What was cancelled stays so
/// when a later part fails.
#[utoipa::path(
    post, path = "/v1/tasks/cancel", tag = "tasks", operation_id = "cancelTasks",
    request_body = CancelTasks,
    responses(
        (status = 200, description = "How many tasks are cancelled, and whether there may be more", body = CancelledTasks),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit, or there is no filter", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn cancel_many(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<CancelledTasks>, ApiError> {
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let Cancellation { mut query, reason, dry_run } = cancellation::many(&body, PAGE)?;
    let until = Instant::now() + TIME_MAX;
    let mut done = CancelledTasks::default();
    let act = Act { call: "cancel", told: "tasks were cancelled" };
    let mut deed = (!dry_run).then(|| caller.begins(act, listing::told(&query)));
    if let Some(deed) = &mut deed {
        deed.detail(format_args!("reason: {reason}"));
    }
    loop {
        let page = app.gate.look(app.gate.ledger().list(query.clone())).await?;
        let open = page.tasks.iter().filter(|task| !task.state.is_final() && task.cancel_requested_at.is_none());
        let found: Vec<(TaskId, TaskState)> = open.map(|task| (task.id, task.state)).collect();
        let before = if dry_run || found.is_empty() {
            found
        } else {
            let ids = found.into_iter().map(|(id, _)| id).collect();
            app.gate.ask(app.gate.ledger().cancel(ids, reason.clone(), caller.known())).await?
        };
        if !dry_run {
            app.tell_cancelled(&before);
            tell_of_each(&app, &page.tasks, &before);
        }
        let running = before.iter().filter(|(_, state)| *state == TaskState::Running).count() as u64;
        let ended = before.iter().filter(|(_, state)| state.is_final()).count() as u64;
        done.requested += running;
        done.cancelled += before.len() as u64 - running - ended;
        if let Some(deed) = &mut deed {
            deed.count(before.len() as u64 - ended);
        }
        query.before = page.next;
        if page.next.is_none() || done.cancelled + done.requested >= TASKS_MAX || Instant::now() >= until {
            done.next_cursor = page.next.map(listing::cursor);
            deed.map(Deed::done).unwrap_or_default();
            return Ok(Json(done));
        }
    }
}

/// Tells those who look of what was waiting; of what runs, its worker will.
fn tell_of_each(app: &App, tasks: &[Task], before: &[(TaskId, TaskState)]) {
    if !app.events.wanted() {
        return;
    }
    let ended: HashSet<TaskId> =
        before.iter().filter(|(_, state)| cancellation::ends_at_once(*state)).map(|(id, _)| *id).collect();
    let ended = tasks.iter().filter(|task| ended.contains(&task.id));
    ended.for_each(|task| app.tell_of(task, (Happening::Cancelled, TaskState::Cancelled)));
}
