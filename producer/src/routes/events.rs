//! `GET /v1/events`: what happens to tasks at this moment, as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{RawQuery, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::{Stream, StreamExt, stream};
use tasklane_common::events::TaskEvent;
use tasklane_common::events::feed::{Filter, Item};
use tasklane_common::state::State as TaskState;
use tasklane_common::task::QueueName;

use crate::app::App;
use crate::error::{ApiError, Problem};
use crate::extract::Params;
use crate::routing::Pattern;

/// How often a listener to whom nothing happens hears that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Look at what happens to tasks
///
/// A stream of server-sent events until the client goes or the producer stops: `submitted`, `started`, `completed`,
/// `retried`, `snoozed`, `cancelled`, `discarded`, `interrupted`, `rescued` (its worker died, and another attempt follows),
/// `replayed` (somebody wanted a failed one to run again), each with a `TaskEvent`. Besides, `listening` says that from
/// here on events come, and a second one that some are missing, since the broker was away; `lost`, with `{"events": n}`,
/// says how many are missing since the client read too slowly. Events are for looking, not for deciding: they may get
/// lost, those of two processes may overtake each other, and the past is not told. What counts is the task itself.
#[utoipa::path(
    get, path = "/v1/events", tag = "events", operation_id = "streamEvents",
    params(
        ("kind" = Option<String>, Query, description = "Only of this kind, or of those that begin so: `email.*`"),
        ("queue" = Option<String>, Query, description = "Only of this queue"),
        ("state" = Option<TaskState>, Query, description = "Only what leads to this state"),
    ),
    responses(
        (status = 200, description = "The stream", body = TaskEvent, content_type = "text/event-stream"),
        (status = 400, description = "A parameter that does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Too many clients listen here, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn events(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let filter = filter(query.as_deref())?;
    let items = app.feed.listen(filter).ok_or(ApiError::TooManyListeners)?;
    let stopping = app.stopping.clone();
    let told = stream::unfold(items, async |mut items| items.recv().await.map(|item| (Ok(event(&item)), items)));
    let told = told.take_until(async move { stopping.cancelled().await });
    Ok(Sse::new(told).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

fn event(item: &Item) -> Event {
    match item {
        Item::Listening => Event::default().event("listening").data("{}"),
        Item::Lost(events) => Event::default().event("lost").data(format!(r#"{{"events":{events}}}"#)),
        Item::Event(event, json) => Event::default().event(event.event.as_str()).data(&**json),
    }
}

fn filter(query: Option<&str>) -> Result<Filter, ApiError> {
    let mut params = Params::parse(query, &["kind", "queue", "state"], &[]);
    let kind = params.read("kind", Pattern::parse);
    let queue = params.read("queue", |name| QueueName::parse(name).map_err(|error| error.to_string()));
    let state = params.read("state", |name| name.parse::<TaskState>().map_err(|error| error.to_string()));
    params.finish()?;
    Ok(Box::new(move |event: &TaskEvent| {
        kind.as_ref().is_none_or(|kind| kind.matches(&event.kind))
            && queue.as_ref().is_none_or(|queue| *queue == event.queue)
            && state.is_none_or(|state| state == event.state)
    }))
}
