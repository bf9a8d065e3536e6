//! The outermost layer: gives the request its id, measures it, writes the bodies of errors, logs faults of ours once.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tasklane_common::web::answers::Answers;
use tracing::Instrument;
use utoipa::openapi::OpenApi;
use uuid::Uuid;

use crate::app::App;
use crate::error::{ApiError, Cause, Problem};
use crate::trace_context;

/// Names a request, in both directions and in the log.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 128;
/// The longest any request may take: the longest body, the longest wait, and the ledger's answers.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(150);

pub(crate) async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let span = trace_context::begin(&mut request, method, &route);
    // One that the client has given may have been unfit.
    if let Ok(value) = HeaderValue::from_str(&id) {
        request.headers_mut().insert(REQUEST_ID, value);
    }
    let mut response = next.run(request).instrument(span.clone()).await;
    trace_context::end(&span, response.status());
    write_problem(&mut response, &id);
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let status = response.status();
    let seconds = began.elapsed().as_secs_f64();
    if let Some(Cause(cause)) = response.extensions().get() {
        tracing::error!(request.id = id, method, route, cause, "a request met an internal error");
    } else {
        tracing::debug!(request.id = id, method, route, status = status.as_u16(), seconds, "request");
    }
    app.tally.requests.fetch_add(1, Ordering::Relaxed);
    metrics::histogram!("tasklane_http_request_seconds", "method" => method, "route" => route.clone()).record(seconds);
    let status = status.as_str().to_owned();
    metrics::counter!("tasklane_http_requests_total", "method" => method, "route" => route, "status" => status)
        .increment(1);
    response
}

/// Begins the series of each route's failures, so that the first of them is seen as an increase.
pub(crate) fn begin_failures(document: &OpenApi) {
    for (route, item) in &document.paths.paths {
        let methods = [
            ("GET", &item.get),
            ("POST", &item.post),
            ("PUT", &item.put),
            ("PATCH", &item.patch),
            ("DELETE", &item.delete),
        ];
        for (method, _) in methods.into_iter().filter(|(_, operation)| operation.is_some()) {
            for status in ["500", "503"] {
                let route = route.clone();
                metrics::counter!("tasklane_http_requests_total", "method" => method, "route" => route, "status" => status)
                    .increment(0);
            }
        }
    }
}

/// Refuses what pages of other sites have a browser send.
pub(crate) async fn let_in(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match app.hosts.check(&request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => ApiError::Refused(refusal).into_response(),
    }
}

/// Refuses to hold more answers in memory than there is room for.
pub(crate) async fn hold_answer(State(answers): State<Answers>, request: Request, next: Next) -> Response {
    answers.hold(next.run(request).await).unwrap_or_else(|| ApiError::Overloaded.into_response())
}

/// Ends a request that takes too long.
pub(crate) async fn limit_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::Timeout.into_response(),
    }
}

/// The answer to a request whose handler panicked.
#[expect(clippy::needless_pass_by_value, reason = "the layer's signature")]
pub(crate) fn answer_panic(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    ApiError::Internal(format!("panic: {}", text.unwrap_or("without a text"))).into_response()
}

fn write_problem(response: &mut Response, id: &str) {
    let Some(mut problem) = response.extensions_mut().remove::<Problem>() else { return };
    problem.instance = Some(id.to_owned());
    // A problem is strings and numbers: it always has a JSON form.
    *response.body_mut() = Body::from(serde_json::to_vec(&problem).unwrap_or_default());
    response.headers_mut().remove(header::CONTENT_LENGTH);
}

/// The client's id for its request if it is harmless in logs, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let harmless = |id: &&str| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte))
    };
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(harmless);
    given.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}

/// Methods are client input too, and a metric's label must have an end.
fn known_method(method: &Method) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use tower::ServiceExt;
    use tower_http::catch_panic::CatchPanicLayer;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_internal_error_and_tells_the_client_nothing() {
        async fn panics() {
            panic!("a secret")
        }
        let router = Router::new().route("/", get(panics)).layer(CatchPanicLayer::custom(answer_panic));
        let mut response = router.oneshot(Request::new(Body::empty())).await.unwrap();
        assert_eq!(response.extensions().get::<Cause>().unwrap().0, "panic: a secret");
        write_problem(&mut response, "id-1");
        let text = axum::body::to_bytes(response.into_body(), 1000).await.unwrap();
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert!(text.contains(r#""code":"internal""#) && text.contains("id-1") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn only_harmless_ids_are_taken_over() {
        let id = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(text.as_bytes()).unwrap());
            request_id(&headers)
        };
        assert_eq!(id("trace:42/a"), "trace:42/a");
        for odd in ["", "a b", "ü", &"x".repeat(129), "a\"b"] {
            assert_ne!(id(odd), odd);
        }
    }
}
