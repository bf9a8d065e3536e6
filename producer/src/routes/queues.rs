//! `GET /v1/queues` and `GET /v1/queues/{queue}`: what waits where.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use serde::Serialize;
use tasklane_common::broker::Depth;
use tasklane_common::clock;
use tasklane_common::ledger::QueueCounts;
use tasklane_common::state::State as TaskState;
use tasklane_common::task::{QueueName, truncate};
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, Problem};
use crate::extract::Path;

/// How many queues the broker is asked about for one list; each is a round trip.
const DEPTHS_MAX: usize = 100;

/// A queue, in the ledger and in the broker.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Queue {
    /// Its name.
    name: QueueName,
    /// How many tasks are in each state. Completed tasks are not counted.
    counts: BTreeMap<TaskState, u64>,
    /// For how long the longest-waiting task has been able to start; null when none waits.
    oldest_waiting_ms: Option<i64>,
    /// Messages ready for delivery in the broker; null when it is away, or has no such queue yet.
    broker_depth: Option<u32>,
    /// Live workers that serve it.
    workers: u32,
    /// Consumers in the broker, of which a worker has one for each priority; null as above.
    consumers: Option<u32>,
    /// Whether it is paused: no task of it starts, and those in `running` go on.
    paused: bool,
    /// Since when it is paused; null when it is not.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    paused_at: Option<Timestamp>,
    /// Who paused it, as `Tasklane-Actor` said; null when it did not.
    paused_by: Option<String>,
}

/// All queues.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct QueueList {
    /// By name.
    queues: Vec<Queue>,
}

/// List the queues
#[utoipa::path(
    get, path = "/v1/queues", tag = "queues", operation_id = "listQueues",
    responses(
        (status = 200, description = "Those with tasks, with workers, with routes, or paused", body = QueueList),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<QueueList>, ApiError> {
    let mut known = known(&app).await?;
    let names: Vec<_> = known.keys().take(DEPTHS_MAX).cloned().collect();
    let depths = app.publisher.queue_depths(&names).await.unwrap_or_default();
    let queue = |(name, known)| {
        let depth = depths.get(&name).copied();
        view(name, known, depth)
    };
    Ok(Json(QueueList { queues: std::mem::take(&mut known).into_iter().map(queue).collect() }))
}

/// Look at a queue
#[utoipa::path(
    get, path = "/v1/queues/{queue}", tag = "queues", operation_id = "getQueue",
    params(("queue" = String, Path, description = "The queue")),
    responses(
        (status = 200, description = "The queue", body = Queue),
        (status = 404, description = "No task waits there, no worker consumes it, the broker does not have it", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn one(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Queue>, ApiError> {
    let queue = named(&name)?;
    let (known, view) = look(&app, queue).await?;
    if known { Ok(Json(view)) } else { Err(ApiError::UnknownQueue(name)) }
}

/// The queue in a path. A text that is no name is the name of no queue.
pub(super) fn named(name: &str) -> Result<QueueName, ApiError> {
    QueueName::parse(name).map_err(|_| ApiError::UnknownQueue(truncate(name, 64)))
}

/// A queue as it is, and whether anybody has heard of it.
pub(super) async fn look(app: &App, queue: QueueName) -> Result<(bool, Queue), ApiError> {
    let known = known(app).await?.remove(&queue);
    let depth =
        app.publisher.queue_depths(std::slice::from_ref(&queue)).await.and_then(|mut depths| depths.remove(&queue));
    Ok((known.is_some() || depth.is_some(), view(queue, known.unwrap_or_default(), depth)))
}

/// What is known of a queue beside the broker.
#[derive(Debug, Default)]
struct Known {
    counted: Option<QueueCounts>,
    workers: u32,
}

/// The queues that the ledger, a live worker or the settings know.
async fn known(app: &App) -> Result<BTreeMap<QueueName, Known>, ApiError> {
    let counted = app.gate.look(app.gate.ledger().queues()).await?;
    let workers = app.gate.look(app.gate.ledger().workers()).await?;
    let mut known: BTreeMap<QueueName, Known> = BTreeMap::new();
    known.entry(QueueName::default()).or_default();
    for queue in app.rules.routes.queues() {
        known.entry(queue.clone()).or_default();
    }
    for worker in workers {
        for queue in BTreeSet::from_iter(worker.queues) {
            known.entry(queue).or_default().workers += 1;
        }
    }
    for counts in counted {
        let queue = counts.queue.clone();
        known.entry(queue).or_default().counted = Some(counts);
    }
    Ok(known)
}

fn view(name: QueueName, Known { counted, workers }: Known, depth: Option<Depth>) -> Queue {
    let mut counts: BTreeMap<_, _> =
        TaskState::ALL.into_iter().filter(|state| *state != TaskState::Completed).map(|state| (state, 0)).collect();
    let oldest_waiting = counted.as_ref().and_then(|counted| counted.oldest_waiting);
    let pause = counted.as_ref().and_then(|counted| counted.paused.clone());
    counts.extend(counted.map(|counted| counted.counts).unwrap_or_default());
    Queue {
        name,
        counts,
        oldest_waiting_ms: oldest_waiting.map(clock::millis),
        broker_depth: depth.map(|depth| depth.ready),
        workers,
        consumers: depth.map(|depth| depth.consumers),
        paused: pause.is_some(),
        paused_at: pause.as_ref().map(|pause| pause.at),
        paused_by: pause.and_then(|pause| pause.by),
    }
}
