//! `POST /v1/tasks/purge`: finished tasks that meet a filter are deleted, some thousands a call.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;

use super::cancel::BODY_BYTES_MAX;
use crate::app::App;
use crate::caller::Caller;
use crate::error::{ApiError, Problem};
use crate::extract;
use crate::sweep::{self, PurgeTasks, Swept};

/// How far the purge has come.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PurgedTasks {
    /// How many are deleted; in a dry run, would be.
    purged: u64,
    /// Give it as `cursor` to go on with the older tasks; null when none is left.
    next_cursor: Option<String>,
}

/// Purge many tasks
///
/// Deletes completed, cancelled and discarded tasks for good, with their args, results and keys, before their retention is
/// over. Waiting and running tasks are left alone: cancel them first. Goes from the newest task to the oldest, at most 10,000
/// a call: repeat with `cursor` until `next_cursor` is null. What was purged stays so when a later part fails.
#[utoipa::path(
    post, path = "/v1/tasks/purge", tag = "tasks", operation_id = "purgeTasks",
    request_body = PurgeTasks,
    responses(
        (status = 200, description = "How many tasks are deleted, and whether there may be more", body = PurgedTasks),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit, or there is no filter", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn purge(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<PurgedTasks>, ApiError> {
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let Swept { tasks: purged, next_cursor } = sweep::purge(&body)?.run(&app, &caller).await?;
    Ok(Json(PurgedTasks { purged, next_cursor }))
}
