//! `/healthz`, `/readyz` and `/metrics`: for those who run the producer.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use serde::Serialize;
use tokio::time::timeout;
use utoipa::ToSchema;

use crate::app::App;
use crate::backlog;

const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// What the producer stands on.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Readiness {
    /// Whether requests should come here: the ledger takes writes, and the producer is not about to stop.
    ready: bool,
    /// Whether the ledger takes writes.
    ledger: bool,
    /// Whether the broker takes messages. Without it submissions are accepted all the same, and published later.
    broker: bool,
    /// Whether the producer is about to stop.
    stopping: bool,
    /// What the ledger, or the way to it, says where it takes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Whether the process is alive
#[utoipa::path(
    get, path = "/healthz", tag = "operations", operation_id = "isAlive",
    responses((status = 200, description = "It is", body = String)),
)]
pub(crate) async fn alive() -> &'static str {
    "ok\n"
}

/// Whether requests should come here
#[utoipa::path(
    get, path = "/readyz", tag = "operations", operation_id = "isReady",
    responses(
        (status = 200, description = "They should, even while the broker is away", body = Readiness),
        (status = 503, description = "They should not: the ledger is away, or the producer is about to stop", body = Readiness),
    ),
)]
pub(crate) async fn ready(State(app): State<Arc<App>>) -> (StatusCode, Json<Readiness>) {
    let problem = match timeout(PING_TIMEOUT, app.gate.ledger().ping()).await {
        Ok(answered) => answered.err().map(|error| error.to_string()),
        Err(_) => Some(format!("the ledger takes no write within {} s", PING_TIMEOUT.as_secs())),
    };
    let ledger = problem.is_none();
    let stopping = app.stopping.is_cancelled();
    let ready = ledger && !stopping;
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Readiness { ready, ledger, broker: app.publisher.is_connected(), stopping, problem }))
}

/// Everything that is measured, in Prometheus' text form
#[utoipa::path(
    get, path = "/metrics", tag = "operations", operation_id = "getMetrics",
    responses((status = 200, description = "The metrics", body = String, content_type = "text/plain")),
)]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> ([(HeaderName, &'static str); 1], String) {
    backlog::refresh(&app).await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
}
