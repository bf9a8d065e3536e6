//! `POST /v1/tasks/batch`: many tasks, all or none.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::Serialize;
use tasklane_common::group::NewGroup;
use tasklane_common::state::State as TaskState;
use tasklane_common::task::{GroupId, TaskId};
use utoipa::ToSchema;

use crate::app::App;
use crate::batch::{Batch, Collected, Lines};
use crate::body::Reader;
use crate::error::{ApiError, Problem};
use crate::idempotency::{self, REPLAYED_HEADER};
use crate::record::{self, Receipt, Recording, first_state};
use crate::request::{Circumstances, SubmitTask};
use crate::{extract, trace_context};

/// The largest batch.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// How many tasks of a replayed batch are looked up at a time, since each comes with args and result.
const LOOK_UP_MAX: usize = 200;

/// Many tasks, to be recorded together.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "shows the form of the body; the body itself is read task by task")]
pub(crate) struct SubmitBatch {
    /// The tasks.
    #[schema(min_items = 1, max_items = 10_000)]
    tasks: Vec<SubmitTask>,
    /// What follows, once, when all tasks have ended in whichever way: a task without a time and a unique key, with args of
    /// 64 KiB at most. Its handler gets `{"group": {"id", "total", "completed", "cancelled", "discarded"}, "args": …}`.
    then: Option<SubmitTask>,
}

/// The tasks of a batch, in its order.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BatchAccepted {
    /// One entry for each submission.
    tasks: Vec<BatchEntry>,
    /// The group that the tasks make, in a batch with `then`.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<GroupRef>,
}

/// A group.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GroupRef {
    /// Its identity: `GET /v1/groups/{id}`.
    id: GroupId,
}

/// One task of a batch.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BatchEntry {
    /// The task: with `return_existing` perhaps an earlier one with the same unique key.
    id: TaskId,
    /// Where it stands; null when an earlier task ended so long ago that it is no longer kept.
    state: Option<TaskState>,
}

/// Submit many tasks at once
///
/// All are recorded, or none: then the answer names every bad one, by index in `application/json`, by line in
/// `application/x-ndjson` (one task a line, empty lines are passed over, no `then`).
#[utoipa::path(
    post, path = "/v1/tasks/batch", tag = "tasks", operation_id = "submitBatch",
    params(
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, description = "Makes the request repeatable"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context, handed on to the handlers"),
    ),
    request_body(content((SubmitBatch = "application/json"), (SubmitTask = "application/x-ndjson"))),
    responses(
        (status = 202, description = "All are recorded", body = BatchAccepted, headers(
            ("Idempotent-Replayed" = Option<bool>, description = "`true` when nothing new was recorded"),
        )),
        (status = 400, description = "Not JSON, or a header that does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Other tasks hold unique keys; the answer names them", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is of neither type", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Tasks that do not fit, or an idempotency key used with another body", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; `Retry-After` says when to try again", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn submit_batch(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let media_type = extract::media_type(&headers);
    let key = idempotency::key(&headers)?;
    let circumstances = Circumstances { now: Timestamp::now(), traceparent: trace_context::traceparent(&headers) };
    let batch = Batch::new(&app.rules, circumstances, key.is_some());
    let mut reader = match media_type.as_str() {
        "application/json" | "application/x-ndjson" | "application/ndjson" => {
            app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?
        }
        _ => return Err(ApiError::MediaType { expected: "application/json or application/x-ndjson" }),
    };
    let Collected { tasks, then, fingerprint } = match media_type.as_str() {
        "application/json" => document(&mut reader, batch).await?,
        _ => lines(&mut reader, batch).await?,
    };
    let idempotency = key.zip(fingerprint).map(|(key, fingerprint)| fingerprint.under(key));
    let submitted: Vec<_> = tasks.iter().map(|task| (task.id, task.run_at)).collect();
    let group = then.map(|then| NewGroup { id: GroupId::new(), then });
    let group_id = group.as_ref().map(|group| group.id);
    let receipt = record::record(&app, Recording { tasks, idempotency, group, reply_to: None }).await?;
    match receipt {
        Receipt::New(at, existing) => {
            let entry = |(id, run_at)| BatchEntry { id, state: Some(first_state(run_at, at)) };
            let mut entries: Vec<_> = submitted.into_iter().map(entry).collect();
            let (standing, _) = look_up(&app, existing.iter().map(|(_, id)| *id).collect()).await?;
            for ((index, _), entry) in existing.into_iter().zip(standing) {
                entries[index] = entry;
            }
            Ok(answer(entries, group_id, false))
        }
        Receipt::Replayed(ids) => {
            let (entries, group_id) = look_up(&app, ids).await?;
            Ok(answer(entries, group_id, true))
        }
    }
}

async fn document(reader: &mut Reader, mut batch: Batch) -> Result<Collected, ApiError> {
    let whole = reader.whole().await?;
    // A large document takes the parser longer than a request may keep others from running.
    let parsed = tokio::task::spawn_blocking(move || {
        batch.add_document(&whole)?;
        batch.finish()
    });
    parsed.await.map_err(|error| ApiError::Internal(format!("reading a batch ended early: {error}")))?
}

async fn lines(reader: &mut Reader, mut batch: Batch) -> Result<Collected, ApiError> {
    let mut lines = Lines::default();
    while let Some(part) = reader.next().await? {
        if lines.feed(&part, &mut batch).is_break() {
            reader.discard().await;
            return batch.finish();
        }
    }
    lines.finish(&mut batch);
    batch.finish()
}

/// Where these tasks stand, and the group that they are of.
async fn look_up(app: &App, ids: Vec<TaskId>) -> Result<(Vec<BatchEntry>, Option<GroupId>), ApiError> {
    let mut group_id = None;
    let mut states = HashMap::with_capacity(ids.len());
    for some in ids.chunks(LOOK_UP_MAX) {
        let tasks = app.gate.look(app.gate.ledger().get(some.to_vec())).await?;
        group_id = group_id.or(tasks.iter().find_map(|task| task.group_id));
        states.extend(tasks.into_iter().map(|task| (task.id, task.state)));
    }
    let entries = ids.into_iter().map(|id| BatchEntry { id, state: states.get(&id).copied() }).collect();
    Ok((entries, group_id))
}

fn answer(tasks: Vec<BatchEntry>, group_id: Option<GroupId>, replayed: bool) -> Response {
    let group = group_id.map(|id| GroupRef { id });
    let mut response = (StatusCode::ACCEPTED, Json(BatchAccepted { tasks, group })).into_response();
    if replayed {
        response.headers_mut().insert(REPLAYED_HEADER, HeaderValue::from_static("true"));
    }
    response
}
