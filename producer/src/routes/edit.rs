//! `PATCH /v1/tasks/{id}`: change a task that waits.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use jiff::Timestamp;
use tasklane_common::ledger::Edited;
use tasklane_common::state::{Event, next};
use tasklane_common::task::Task;

use super::submit::BODY_BYTES_MAX;
use crate::app::App;
use crate::caller::{Act, Caller};
use crate::editing::{self, EditTask};
use crate::error::{ApiError, FieldError, Problem};
use crate::extract;
use crate::extract::Path;
use crate::wait::find;

/// Edit a task
///
/// Changes a task that waits for its start, all that is given or nothing. When this answers, no run starts any more with
/// the old args, before the new time, or from the old queue, whatever is on its way in the broker. The task is
/// `scheduled` then, and is published when its time has come.
#[utoipa::path(
    patch, path = "/v1/tasks/{id}", tag = "tasks", operation_id = "editTask",
    params(("id" = uuid::Uuid, Path, description = "The task")),
    request_body = EditTask,
    responses(
        (status = 200, description = "It is changed", body = Task),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such task", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It runs or has ended; `detail` names its state", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit, or there is none", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; the same call again is harmless", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn edit(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Task>, ApiError> {
    let id = extract::task_id(&id)?;
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let edit = editing::edit(&body, Timestamp::now())?;
    let mut deed = caller.begins(Act { call: "edit", told: "a task was changed" }, id);
    deed.detail(edit.fields().join(", "));
    let refusal = match app.gate.ask(app.gate.ledger().edit(id, edit, caller.known())).await? {
        Edited::Unknown => ApiError::UnknownTask(id.to_string()),
        Edited::NoAttemptLeft(made) => {
            let rule = format!("must be at least {}: the task has started {made} times", made.saturating_add(1));
            ApiError::InvalidEdit(vec![FieldError::new("max_attempts", rule)])
        }
        Edited::From(before) if next(before, Event::Edit).is_none() => ApiError::NotEditable(before),
        // It is due at its time: the relay publishes it then.
        Edited::From(_) => {
            deed.done();
            return find(&app, id).await.map(Json);
        }
    };
    deed.nothing();
    Err(refusal)
}
