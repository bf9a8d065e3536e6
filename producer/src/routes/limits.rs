//! `GET /v1/limits`, and `GET`, `PUT` and `DELETE /v1/limits/{of}/{name}`: how much runs at once, how often it starts, and how
//! much may wait.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tasklane_common::ledger::{LimitSet, complain};
use tasklane_common::limit::{Bounds, Limit, Origin, Rate, Scope, ScopeError};
use tasklane_common::task::truncate;
use utoipa::ToSchema;

use crate::app::App;
use crate::caller::{Act, Caller};
use crate::error::{ApiError, FieldError, Problem};
use crate::extract::Path;
use crate::extract::{self, JsonFault};

/// The largest body.
const BODY_BYTES_MAX: usize = 16 * 1024;

/// A limit, shared by all workers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct LimitView {
    /// What shares it: the tasks of a `queue`, of a `kind`, or with a concurrency `key`.
    of: &'static str,
    /// The name of that. A key that ends in `*` stands for each key that begins so, and each has the limit for itself.
    name: String,
    /// How many tasks run at once.
    max_running: Option<u32>,
    /// How often tasks start.
    rate: Option<Rate>,
    /// How many tasks may wait before submissions are refused.
    max_queued: Option<u32>,
    /// Who set it.
    origin: Origin,
}

impl From<Limit> for LimitView {
    fn from(Limit { scope, bounds, origin }: Limit) -> Self {
        let Bounds { max_running, rate, max_queued } = bounds;
        Self { of: scope.word(), name: scope.name().to_owned(), max_running, rate, max_queued, origin }
    }
}

/// All limits.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct LimitList {
    /// By what they are of, and name.
    limits: Vec<LimitView>,
}

/// List the limits
#[utoipa::path(
    get, path = "/v1/limits", tag = "limits", operation_id = "listLimits",
    responses(
        (status = 200, description = "All, at most 1,000", body = LimitList),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<LimitList>, ApiError> {
    let limits = app.gate.look(app.gate.ledger().limits()).await?;
    Ok(Json(LimitList { limits: limits.into_iter().map(LimitView::from).collect() }))
}

/// Look at a limit
#[utoipa::path(
    get, path = "/v1/limits/{of}/{name}", tag = "limits", operation_id = "getLimit",
    params(("of" = String, Path, description = "`queue`, `kind` or `key`"), ("name" = String, Path, description = "Which")),
    responses(
        (status = 200, description = "The limit", body = LimitView),
        (status = 404, description = "No such limit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn one(
    State(app): State<Arc<App>>,
    Path((of, name)): Path<(String, String)>,
) -> Result<Json<LimitView>, ApiError> {
    let scope = Scope::named(&of, &name).map_err(|_| unknown(&of, &name))?;
    let limits = app.gate.look(app.gate.ledger().limits()).await?;
    let limit = limits.into_iter().find(|limit| limit.scope == scope).ok_or_else(|| unknown(&of, &name))?;
    Ok(Json(limit.into()))
}

/// Set a limit
///
/// After the answer no task starts beyond it, on any worker; what runs counts, and goes on. A task that finds no place is
/// held in the ledger, shown with `limited_by`, and starts when there is one: of those that one limit holds, each
/// concurrency key has its turn. `max_queued` is for queues only, and holds submissions off with 429.
#[utoipa::path(
    put, path = "/v1/limits/{of}/{name}", tag = "limits", operation_id = "putLimit",
    params(
        ("of" = String, Path, description = "`queue`, `kind` or `key`"),
        ("name" = String, Path, description = "A queue, a kind, or a concurrency key, which may end in `*`"),
    ),
    request_body = Bounds,
    responses(
        (status = 201, description = "Made", body = LimitView),
        (status = 200, description = "Replaced", body = LimitView),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "There are as many limits as there may be", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn put(
    State(app): State<Arc<App>>,
    Path((of, name)): Path<(String, String)>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let bounds: Bounds = extract::object(&body).map_err(|fault| match fault {
        JsonFault::Syntax(message) => ApiError::InvalidJson(message),
        JsonFault::Shape(error) => ApiError::InvalidLimit(vec![error]),
    })?;
    let scope = Scope::named(&of, &name).map_err(|error| {
        let path = if error == ScopeError::Word { "of" } else { "name" };
        ApiError::InvalidLimit(vec![FieldError::new(path, error.to_string())])
    })?;
    let faults = bounds.faults(Some(&scope));
    if !faults.is_empty() {
        let error = |(path, message)| FieldError::new(path, message);
        return Err(ApiError::InvalidLimit(faults.into_iter().map(error).collect()));
    }
    let mut deed = caller.begins(Act { call: "limit", told: "a limit was set" }, format_args!("limit={scope}"));
    deed.detail(told(&bounds));
    let status = match app.gate.ask(app.gate.ledger().set_limit(scope.clone(), bounds)).await? {
        LimitSet::Made => StatusCode::CREATED,
        LimitSet::Replaced => StatusCode::OK,
        LimitSet::TooMany => {
            deed.nothing();
            return Err(ApiError::TooManyLimits);
        }
    };
    deed.done();
    look(&app).await;
    Ok((status, Json(LimitView::from(Limit { scope, bounds, origin: Origin::Api }))).into_response())
}

/// Delete a limit
///
/// What it holds starts as workers have room. One that a settings file sets comes back when a producer with that file starts.
#[utoipa::path(
    delete, path = "/v1/limits/{of}/{name}", tag = "limits", operation_id = "deleteLimit",
    params(("of" = String, Path, description = "`queue`, `kind` or `key`"), ("name" = String, Path, description = "Which")),
    responses(
        (status = 204, description = "It is deleted"),
        (status = 404, description = "No such limit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Path((of, name)): Path<(String, String)>,
    caller: Caller,
) -> Result<StatusCode, ApiError> {
    let scope = Scope::named(&of, &name).map_err(|_| unknown(&of, &name))?;
    let deed = caller.begins(Act { call: "unlimit", told: "a limit was deleted" }, format_args!("limit={scope}"));
    if !app.gate.ask(app.gate.ledger().delete_limit(scope.clone())).await? {
        deed.nothing();
        return Err(unknown(&of, &name));
    }
    deed.done();
    look(&app).await;
    Ok(StatusCode::NO_CONTENT)
}

/// So that a bound holds here from the answer on; other producers follow at their next look.
async fn look(app: &App) {
    if let Err(error) = app.intake.look(&**app.gate.ledger()).await {
        complain(&error, "how full the queues are is not known");
    }
}

/// Bounds as the log tells them.
fn told(Bounds { max_running, rate, max_queued }: &Bounds) -> String {
    let parts = [
        max_running.map(|most| format!("max_running={most}")),
        rate.map(|Rate { tasks, per_ms, burst }| format!("rate={tasks} per {per_ms} ms, burst={burst}")),
        max_queued.map(|most| format!("max_queued={most}")),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn unknown(of: &str, name: &str) -> ApiError {
    ApiError::UnknownLimit(format!("{}/{}", truncate(of, 16), truncate(name, 64)))
}
