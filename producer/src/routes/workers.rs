//! `GET /v1/workers`: who is alive.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use tasklane_common::ledger::Worker;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, Problem};

/// The live workers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WorkerList {
    /// Those whose lease is alive.
    workers: Vec<Worker>,
}

/// List the live workers
#[utoipa::path(
    get, path = "/v1/workers", tag = "workers", operation_id = "listWorkers",
    responses(
        (status = 200, description = "The workers whose lease is alive", body = WorkerList),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<WorkerList>, ApiError> {
    let workers = app.gate.ask(app.gate.ledger().workers()).await?;
    Ok(Json(WorkerList { workers }))
}
