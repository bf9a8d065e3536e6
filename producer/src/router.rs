//! All routes, and the layers around them.

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use tasklane_common::web::answers::Answers;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::error::ApiError;
use crate::routes::{
    batch, cancel, cancel_many, docs, edit, events, group, health, limits, list, move_tasks, pause, pause_schedule,
    purge, put_schedule, queues, retry, retry_many, schedules, status, submit, workers,
};
use crate::{admission, caller, observe, reference};

/// The document's frame; paths and schemas are collected from the routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Tasklane",
        description = "Submit tasks, once or periodically, look at them, edit and cancel them, run failures again, pause queues, limit what runs. Durations are integers with `_ms` in the name, \
                       times are RFC 3339 in UTC, errors are RFC 9457 `application/problem+json`.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    tags(
        (name = "tasks", description = "Submit and look at tasks"),
        (name = "queues", description = "What waits where"),
        (name = "schedules", description = "What is submitted periodically"),
        (name = "limits", description = "How much runs at once, how often it starts, how much may wait"),
        (name = "workers", description = "Who is alive"),
        (name = "events", description = "What happens at this moment"),
        (name = "operations", description = "For those who run the producer"),
    ),
)]
struct Frame;

/// The whole API.
pub fn router(app: Arc<App>) -> Router {
    let (admitted, operations, openapi) = parts();
    observe::begin_failures(&openapi);
    let admitted = admitted.layer(from_fn_with_state(app.admission.clone(), admission::admit));
    admitted
        .merge(operations)
        .merge(docs::routes(&openapi))
        .fallback(async || ApiError::UnknownPath)
        .method_not_allowed_fallback(async || ApiError::UnknownMethod)
        // Together, the outermost first: each by itself would be boxed, and cloned for every request.
        .layer((
            from_fn_with_state(Arc::clone(&app), observe::observe),
            CatchPanicLayer::custom(observe::answer_panic),
            from_fn_with_state(Answers::default(), observe::hold_answer),
            from_fn(observe::limit_time),
            from_fn_with_state(Arc::clone(&app), observe::let_in),
        ))
        .with_state(app)
}

/// The API's OpenAPI 3.1 document, generated from the routes.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    parts().2
}

/// The routes of the work, those of the operation, and the document of both, in the order in which people read it.
fn parts() -> (Router<Arc<App>>, Router<Arc<App>>, utoipa::openapi::OpenApi) {
    let (admitted, work) = OpenApiRouter::with_openapi(Frame::openapi())
        .routes(routes!(submit::submit, list::list))
        .routes(routes!(batch::submit_batch))
        .routes(routes!(status::status, edit::edit))
        .routes(routes!(cancel::cancel))
        .routes(routes!(retry::retry))
        .routes(routes!(cancel_many::cancel_many))
        .routes(routes!(retry_many::retry_many))
        .routes(routes!(purge::purge))
        .routes(routes!(group::group))
        .routes(routes!(queues::list))
        .routes(routes!(queues::one))
        .routes(routes!(pause::pause))
        .routes(routes!(pause::resume))
        .routes(routes!(move_tasks::move_tasks))
        .routes(routes!(schedules::list))
        .routes(routes!(schedules::one, schedules::delete, put_schedule::put))
        .routes(routes!(pause_schedule::pause))
        .routes(routes!(pause_schedule::resume))
        .routes(routes!(limits::list))
        .routes(routes!(limits::one, limits::put, limits::delete))
        .routes(routes!(workers::list))
        .routes(routes!(events::events))
        .split_for_parts();
    let (operations, operation) = OpenApiRouter::new()
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
        .split_for_parts();
    let mut document = work.merge_from(operation);
    caller::document(&mut document);
    reference::complete(&mut document);
    (admitted, operations, document)
}
