//! `POST /v1/tasks/{id}/retry`: run a finished failure again.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use tasklane_common::ledger::Replayed;
use tasklane_common::state::{Event, next};
use tasklane_common::task::Task;

use crate::app::App;
use crate::error::{ApiError, Problem};
use crate::extract;
use crate::wait::find;

/// Run a failure again
///
/// A cancelled or discarded task starts over at once, and gets one more attempt if none is left.
#[utoipa::path(
    post, path = "/v1/tasks/{id}/retry", tag = "tasks", operation_id = "retryTask",
    params(("id" = uuid::Uuid, Path, description = "The task")),
    responses(
        (status = 202, description = "It will run again", body = Task),
        (status = 404, description = "No such task", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It has not failed, or another task holds its unique key", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn retry(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Task>), ApiError> {
    let id = extract::task_id(&id)?;
    let before = match app.gate.ask(app.gate.ledger().replay(id)).await? {
        Replayed::Unknown => return Err(ApiError::UnknownTask(id.to_string())),
        Replayed::KeyHeld(holder) => return Err(ApiError::UniqueKeyTaken(holder)),
        Replayed::From(before) => before,
    };
    if next(before, Event::Replay).is_none() {
        return Err(ApiError::NotRetryable(before));
    }
    // It is due at once: the relay publishes it.
    Ok((StatusCode::ACCEPTED, Json(find(&app, id).await?)))
}
