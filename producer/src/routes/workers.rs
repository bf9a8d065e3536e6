//! `GET /v1/workers`: who is alive.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use tasklane_common::ledger::{Fleet, GoneWorker, Run, Worker};
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, Problem};

/// The workers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WorkerList {
    /// Those whose lease is alive.
    workers: Vec<LiveWorker>,
    /// Those that went within the last hour, the newest first; at most 100.
    gone: Vec<GoneWorker>,
}

/// A live worker, and what it runs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct LiveWorker {
    #[serde(flatten)]
    worker: Worker,
    /// What it runs now, the longest first; at most 100.
    runs: Vec<Run>,
}

/// List the workers
///
/// Those whose lease is alive, with what they run, and those that went lately, with how.
#[utoipa::path(
    get, path = "/v1/workers", tag = "workers", operation_id = "listWorkers",
    responses(
        (status = 200, description = "The workers", body = WorkerList),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<WorkerList>, ApiError> {
    let Fleet { workers, mut runs, gone } = app.gate.look(app.gate.ledger().fleet()).await?;
    let live = |worker: Worker| LiveWorker { runs: runs.remove(&worker.id).unwrap_or_default(), worker };
    Ok(Json(WorkerList { workers: workers.into_iter().map(live).collect(), gone }))
}
