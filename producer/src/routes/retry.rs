//! `POST /v1/tasks/{id}/retry`: run a finished failure again, or its work with other args as a new task.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use tasklane_common::events::Happening;
use tasklane_common::ledger::{Holder, Replayed};
use tasklane_common::state::{Event, State as TaskState, next};
use tasklane_common::task::{Json as Args, Task, TaskId};

use super::submit::{BODY_BYTES_MAX, answer, of_one, recorded, repeated};
use crate::app::App;
use crate::caller::{Act, Caller};
use crate::error::{ApiError, Problem};
use crate::extract::Path;
use crate::idempotency::{self, Fingerprint};
use crate::record::{self, Receipt, Recording};
use crate::retrying::{self, RetryTask};
use crate::wait::find;
use crate::{extract, trace_context};

const RETRY: Act = Act { call: "retry", told: "a task was started again" };

/// Run a failure again
///
/// A cancelled or discarded task starts over at once, and gets one more attempt if none is left; one that waits for its time
/// (`retryable`, `scheduled`) starts now. With `args` it stays as it
/// is, and a new task does its work with them: of the same kind, queue, priority, limits, tags and keys, and with `retried_from`.
/// Such a request is made repeatable by an `Idempotency-Key`.
#[utoipa::path(
    post, path = "/v1/tasks/{id}/retry", tag = "tasks", operation_id = "retryTask",
    params(
        ("id" = uuid::Uuid, Path, description = "The task"),
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, description = "Makes a request with `args` repeatable"),
    ),
    request_body(content = Option<RetryTask>, description = "Other args; may be left out"),
    responses(
        (status = 202, description = "It will run again; with `args`, the new task", body = Task, headers(
            ("Location" = Option<String>, description = "Where to ask for the new task"),
            ("Idempotent-Replayed" = Option<bool>, description = "`true` when nothing new was recorded"),
        )),
        (status = 400, description = "Not JSON, or a header that does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such task", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It has neither failed nor does it wait for its time, or another task holds its unique key", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "There is a body, and it is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit, or the idempotency key was used for another request", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn retry(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let id = extract::task_id(&id)?;
    let key = idempotency::key(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    if !body.is_empty() {
        extract::expect_json(&headers)?;
    }
    if let Some(args) = retrying::args(&body)? {
        return anew(&app, id, args, key, (&caller, &headers)).await;
    }
    let deed = caller.begins(RETRY, id);
    let replayed = app.gate.ask(app.gate.ledger().replay(id, caller.known())).await?;
    let refusal = match replayed {
        Replayed::Unknown => Some(ApiError::UnknownTask(id.to_string())),
        Replayed::KeyHeld(id) => Some(ApiError::UniqueKeyTaken(Holder { id, state: find(&app, id).await?.state })),
        Replayed::From(before) => next(before, Event::Replay).is_none().then_some(ApiError::NotRetryable(before)),
    };
    if let Some(refusal) = refusal {
        deed.nothing();
        return Err(refusal);
    }
    deed.done();
    // It is due at once: the relay publishes it.
    let task = find(&app, id).await?;
    app.tell_of(&task, (Happening::Replayed, TaskState::Accepted));
    Ok((StatusCode::ACCEPTED, Json(task)).into_response())
}

/// Records a task that does the failed one's work with other args.
async fn anew(
    app: &Arc<App>,
    id: TaskId,
    args: Args,
    key: Option<String>,
    (caller, headers): (&Caller, &HeaderMap),
) -> Result<Response, ApiError> {
    let idempotency = key.map(|key| Fingerprint::of_retry(id, &args).under(key));
    let failed = find(app, id).await;
    let task = match failed.and_then(|failed| retrying::anew(failed, args, trace_context::traceparent(headers))) {
        Ok(task) => task,
        // The other task may have been started again, or purged, since this was asked for the first time.
        Err(refusal) => {
            let ids = record::repeated_or(app, idempotency, 1, refusal).await?;
            let (task, origin) = repeated(app, ids).await?;
            return Ok(answer(&task, StatusCode::ACCEPTED, origin));
        }
    };
    let mut deed = caller.begins(RETRY, id);
    deed.detail(format_args!("with other args, as task {}", task.id));
    let recording = Recording { tasks: vec![task.clone()], idempotency, group: None, reply_to: None };
    let receipt = match record::record(app, recording).await {
        Err(refusal) if refusal.codes().0.is_client_error() => {
            deed.nothing();
            return Err(of_one(refusal));
        }
        receipt => receipt?,
    };
    match receipt {
        Receipt::New(..) => deed.done(),
        Receipt::Replayed(_) => deed.nothing(),
    }
    let (task, origin) = recorded(app, task, receipt).await?;
    Ok(answer(&task, StatusCode::ACCEPTED, origin))
}
