//! `GET /v1/tasks/{id}`: one task.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use tasklane_common::task::Task;

use crate::admission::Place;
use crate::app::App;
use crate::error::{ApiError, Problem};
use crate::extract;
use crate::extract::Path;
use crate::wait::{self, find};

/// Look at a task
///
/// With `wait_ms` the answer comes when the task has ended, or when the time is over; its `state` tells which.
#[utoipa::path(
    get, path = "/v1/tasks/{id}", tag = "tasks", operation_id = "getTask",
    params(
        ("id" = uuid::Uuid, Path, description = "The task"),
        ("wait_ms" = Option<u32>, Query, maximum = 60_000, description = "How long to wait for the task's end"),
    ),
    responses(
        (status = 200, description = "The task", body = Task),
        (status = 400, description = "A parameter that does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such task, or it ended so long ago that it is no longer kept", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn status(
    State(app): State<Arc<App>>,
    place: Place,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Task>, ApiError> {
    let wait = wait::asked(query.as_deref())?;
    let task = find(&app, extract::task_id(&id)?).await?;
    let Some(time) = wait.filter(|_| !task.state.is_final()) else { return Ok(Json(task)) };
    let wait = app.waits.begin(time)?;
    place.leave();
    wait.end_of(&app, task.id).await.map(Json)
}
