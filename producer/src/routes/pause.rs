//! `POST /v1/queues/{queue}/pause` and `POST /v1/queues/{queue}/resume`: whether tasks of a queue start.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::queues::{self, Queue};
use crate::app::App;
use crate::caller::{Act, Caller};
use crate::error::{ApiError, PAUSED_MAX, Problem};
use crate::extract::Path;

/// Pause a queue
///
/// No task of it starts after the answer, on any worker, until it is resumed; the pause is durable. What runs goes on:
/// the queue is drained when `counts.running` is 0. Submissions are accepted, and wait. A queue may be paused before it has
/// tasks; pausing one that is paused changes nothing.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/pause", tag = "queues", operation_id = "pauseQueue",
    params(("queue" = String, Path, description = "The queue")),
    responses(
        (status = 200, description = "It is paused, perhaps since earlier", body = Queue),
        (status = 404, description = "No queue can have this name", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "1,000 queues are paused already", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn pause(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    caller: Caller,
) -> Result<Json<Queue>, ApiError> {
    set(&app, &name, true, &caller).await
}

/// Resume a queue
///
/// What waits in it starts as workers have room. Resuming a queue that is not paused changes nothing.
#[utoipa::path(
    post, path = "/v1/queues/{queue}/resume", tag = "queues", operation_id = "resumeQueue",
    params(("queue" = String, Path, description = "The queue")),
    responses(
        (status = 200, description = "It goes on", body = Queue),
        (status = 404, description = "No queue can have this name", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn resume(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    caller: Caller,
) -> Result<Json<Queue>, ApiError> {
    set(&app, &name, false, &caller).await
}

async fn set(app: &App, name: &str, paused: bool, caller: &Caller) -> Result<Json<Queue>, ApiError> {
    let queue = queues::named(name)?;
    let act = match paused {
        true => Act { call: "pause", told: "a queue was paused" },
        false => Act { call: "resume", told: "a queue was resumed" },
    };
    let deed = caller.begins(act, format_args!("queue={queue}"));
    if paused {
        // Those that are paused at the same moment may be a few more.
        let known = app.gate.ask(app.gate.ledger().paused_queues()).await?;
        if known.len() >= PAUSED_MAX && !known.contains(&queue) {
            deed.nothing();
            return Err(ApiError::TooManyPaused);
        }
    }
    app.gate.ask(app.gate.ledger().set_paused(queue.clone(), paused, caller.known())).await?;
    deed.done();
    // Only after the ledger has it: whoever hears the word looks there.
    app.control.queue_changed(queue.clone());
    let (_, view) = queues::look(app, queue).await?;
    Ok(Json(view))
}
