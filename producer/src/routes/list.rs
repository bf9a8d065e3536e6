//! `GET /v1/tasks`: tasks, newest first.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use serde::Serialize;
use tasklane_common::state::State as TaskState;
use tasklane_common::task::Task;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, Problem};
use crate::listing;

/// A page of tasks.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TaskPage {
    /// Newest first; may be fewer than asked for, even none, while there is a next page: a page that takes long to fill ends
    /// short.
    tasks: Vec<Task>,
    /// Give it as `cursor` for the next page; null on the last.
    next_cursor: Option<String>,
}

/// List tasks, newest first
#[utoipa::path(
    get, path = "/v1/tasks", tag = "tasks", operation_id = "listTasks",
    params(
        ("state" = Option<TaskState>, Query, description = "Only in this state"),
        ("kind" = Option<String>, Query, description = "Only of this kind"),
        ("queue" = Option<String>, Query, description = "Only of this queue"),
        ("tag" = Option<String>, Query, description = "Only with this tag, `key:value`; given several times, with all of them"),
        ("group" = Option<uuid::Uuid>, Query, description = "Only tasks of this group"),
        ("error" = Option<String>, Query, description = "Only tasks whose last error's message has this text in it, as it is written"),
        ("since" = Option<String>, Query, description = "Only tasks that were created then or later, such as `2030-01-31T08:00:00Z`"),
        ("until" = Option<String>, Query, description = "Only tasks that were created before that"),
        ("worker" = Option<uuid::Uuid>, Query, description = "Only tasks that this worker runs, or was the last to run"),
        ("reason" = Option<String>, Query, description = "Only tasks with this `reason`, whole, such as `final_error` or `poison`"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "How many tasks; defaults to 50"),
        ("cursor" = Option<String>, Query, description = "The `next_cursor` of the page before"),
    ),
    responses(
        (status = 200, description = "A page of tasks", body = TaskPage),
        (status = 400, description = "A parameter that does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(app): State<Arc<App>>, RawQuery(query): RawQuery) -> Result<Json<TaskPage>, ApiError> {
    let page = app.gate.look(app.gate.ledger().list(listing::query(query.as_deref())?)).await?;
    Ok(Json(TaskPage { tasks: page.tasks, next_cursor: page.next.map(listing::cursor) }))
}
