//! `POST /v1/queues/{queue}/move`: waiting tasks go to another queue, some thousands a call.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;

use super::cancel::BODY_BYTES_MAX;
use super::queues;
use crate::app::App;
use crate::caller::Caller;
use crate::error::{ApiError, Problem};
use crate::extract;
use crate::extract::Path;
use crate::sweep::{self, MoveTasks, Swept};

/// How far the move has come.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MovedTasks {
    /// How many are in the other queue; in a dry run, would be.
    moved: u64,
    /// Give it as `cursor` to go on with the older tasks; null when none is left.
    next_cursor: Option<String>,
}

/// Move waiting tasks to another queue
///
/// What waits, in whatever state, starts there at once or when its time comes, as often as it may. Running and finished tasks
/// are left alone. Messages in the old queue are dropped as they come, and start nothing any more. Goes from the newest task
/// to the oldest, at most 10,000 a call: repeat with `cursor` until `next_cursor` is null. Tasks submitted after the first call stay. What was moved stays so when a later part fails.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/move", tag = "queues", operation_id = "moveTasks",
    params(("queue" = String, Path, description = "The queue in which they wait")),
    request_body = MoveTasks,
    responses(
        (status = 200, description = "How many tasks are moved, and whether there may be more", body = MovedTasks),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No queue can have this name", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn move_tasks(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<MovedTasks>, ApiError> {
    let from = queues::named(&name)?;
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let Swept { tasks: moved, next_cursor } = sweep::moving(from, &body)?.run(&app, &caller).await?;
    Ok(Json(MovedTasks { moved, next_cursor }))
}
