//! `POST /v1/tasks`: one task.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use tasklane_common::task::{NewTask, Task, TaskId};

use crate::admission::Place;
use crate::app::App;
use crate::args::ARGS_BYTES_MAX;
use crate::error::{ApiError, Problem};
use crate::idempotency::{self, Fingerprint, REPLAYED_HEADER};
use crate::record::{self, Receipt, Recording, as_recorded};
use crate::request::{Circumstances, SubmitTask};
use crate::wait::{self, find};
use crate::{extract, trace_context};

/// The largest args, and room for the other fields.
pub(super) const BODY_BYTES_MAX: usize = ARGS_BYTES_MAX + 128 * 1024;

/// The response header that says that another task with the same unique key stands for this one.
const EXISTING_HEADER: HeaderName = HeaderName::from_static("unique-existing");

/// Submit a task
///
/// The task is durable when this answers. With `wait_ms` the answer comes when the task has ended (200), or when the
/// time is over (202). A request with an `Idempotency-Key` may be repeated: the same key and body answer with the same
/// task and `Idempotent-Replayed: true`.
#[utoipa::path(
    post, path = "/v1/tasks", tag = "tasks", operation_id = "submitTask",
    params(
        ("wait_ms" = Option<u32>, Query, maximum = 60_000, description = "How long to wait for the task's end"),
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, description = "Makes the request repeatable"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context, handed on to the handler"),
    ),
    request_body = SubmitTask,
    responses(
        (status = 202, description = "Recorded; it has not ended yet", body = Task, headers(
            ("Location" = String, description = "Where to ask for the task"),
            ("Idempotent-Replayed" = Option<bool>, description = "`true` when nothing new was recorded"),
            ("Unique-Existing" = Option<bool>, description = "`true` when this is the earlier task with the same unique key"),
        )),
        (status = 200, description = "It has ended within `wait_ms`", body = Task),
        (status = 400, description = "Not JSON, or a parameter or header that does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Another task holds the unique key: `task_id` names it", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit, or the idempotency key was used with another body", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; `Retry-After` says when to try again", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn submit(
    State(app): State<Arc<App>>,
    place: Place,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let wait = wait::asked(query.as_deref())?;
    extract::expect_json(&headers)?;
    let key = idempotency::key(&headers)?;
    let mut reader = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?;
    let task: SubmitTask = extract::object(&reader.whole().await?)?;
    let idempotency = key.map(|key| Fingerprint::of_task(&task).under(key));
    let circumstances = Circumstances { now: Timestamp::now(), traceparent: trace_context::traceparent(&headers) };
    let task = task.validate(&app.rules, circumstances).map_err(ApiError::InvalidTask)?;

    // The wait begins before the task is published: a notice can come sooner than the answer of the ledger.
    let waits = wait.is_some();
    let mut wait = wait.map(|time| app.waits.begin(time)).transpose()?;
    let reply_to = wait.as_mut().and_then(|wait| wait.expect_notice(&app, task.id));
    let recording = Recording { tasks: vec![task.clone()], idempotency, group: None, reply_to };
    let receipt = record::record(&app, recording).await.map_err(of_one)?;
    drop(reader);
    let (mut task, origin) = recorded(&app, task, receipt).await?;
    if let Some(mut wait) = wait.filter(|_| !task.state.is_final()) {
        place.leave();
        if origin != Origin::New {
            wait.expect_nothing();
        }
        task = wait.end_of(&app, task.id).await?;
    }
    let status = if waits && task.state.is_final() { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok(answer(&task, status, origin))
}

/// Where the task of an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// This request.
    New,
    /// An earlier one with the same idempotency key.
    Replayed,
    /// An earlier one with the same unique key.
    Existing,
}

pub(super) fn of_one(error: ApiError) -> ApiError {
    match error {
        ApiError::UniqueKeysTaken(conflicts) => match conflicts[..] {
            [(_, holder)] => ApiError::UniqueKeyTaken(holder),
            _ => ApiError::UniqueKeysTaken(conflicts),
        },
        other => other,
    }
}

/// The task to answer with.
pub(super) async fn recorded(app: &App, task: NewTask, receipt: Receipt) -> Result<(Task, Origin), ApiError> {
    match receipt {
        Receipt::New(at, existing) => match existing[..] {
            [] => Ok((as_recorded(task, at), Origin::New)),
            [(_, holder), ..] => find(app, holder).await.map(|task| (task, Origin::Existing)),
        },
        Receipt::Replayed(ids) => repeated(app, ids).await,
    }
}

/// The task of an earlier request.
pub(super) async fn repeated(app: &App, ids: Vec<TaskId>) -> Result<(Task, Origin), ApiError> {
    let id = ids.into_iter().next().ok_or_else(|| ApiError::Internal("a replay without a task".to_owned()))?;
    find(app, id).await.map(|task| (task, Origin::Replayed))
}

pub(super) fn answer(task: &Task, status: StatusCode, origin: Origin) -> Response {
    let mut response = (status, Json(task)).into_response();
    let headers = response.headers_mut();
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/tasks/{}", task.id)) {
        headers.insert(header::LOCATION, location);
    }
    let said = match origin {
        Origin::New => return response,
        Origin::Replayed => REPLAYED_HEADER,
        Origin::Existing => EXISTING_HEADER,
    };
    headers.insert(said, HeaderValue::from_static("true"));
    response
}
