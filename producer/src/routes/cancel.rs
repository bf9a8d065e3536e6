//! `POST /v1/tasks/{id}/cancel`: a waiting task at once, a running one as soon as its worker has stopped it.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use tasklane_common::events::Happening;
use tasklane_common::state::State as TaskState;
use tasklane_common::task::Task;

use crate::app::App;
use crate::caller::{Act, Caller};
use crate::cancellation::{self, CancelTask};
use crate::error::{ApiError, Problem};
use crate::extract;
use crate::extract::Path;
use crate::wait::find;

/// The largest body: a reason, and room to write it with escapes.
pub(super) const BODY_BYTES_MAX: usize = 16 * 1024;

/// Cancel a task
///
/// A waiting task is cancelled when this answers, and never starts. Of a running one it is asked, which is as durable:
/// its worker stops it, or, should it die, whoever takes over does; ask for the task with `wait_ms` to see its end. A run
/// that completes in time has completed.
#[utoipa::path(
    post, path = "/v1/tasks/{id}/cancel", tag = "tasks", operation_id = "cancelTask",
    params(("id" = uuid::Uuid, Path, description = "The task")),
    request_body(content = Option<CancelTask>, description = "Why; may be left out"),
    responses(
        (status = 200, description = "It is cancelled, perhaps since earlier", body = Task),
        (status = 202, description = "It runs, and will be stopped", body = Task),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such task", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It has completed or was discarded", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "There is a body, and it is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<Task>), ApiError> {
    let id = extract::task_id(&id)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    if !body.is_empty() {
        extract::expect_json(&headers)?;
    }
    let reason = cancellation::reason(&body)?;
    let mut deed = caller.begins(Act { call: "cancel", told: "a task was cancelled" }, id);
    deed.detail(format_args!("reason: {reason}"));
    let before = app.gate.ask(app.gate.ledger().cancel(vec![id], reason, caller.known())).await?;
    match before.iter().any(|(_, state)| !state.is_final()) {
        true => deed.done(),
        false => deed.nothing(),
    }
    app.tell_cancelled(&before);
    let task = find(&app, id).await?;
    if before.iter().any(|(_, state)| cancellation::ends_at_once(*state)) {
        app.tell_of(&task, (Happening::Cancelled, TaskState::Cancelled));
    }
    match task.state {
        TaskState::Cancelled => Ok((StatusCode::OK, Json(task))),
        state @ (TaskState::Completed | TaskState::Discarded) => Err(ApiError::NotCancellable(state)),
        _ => Ok((StatusCode::ACCEPTED, Json(task))),
    }
}
