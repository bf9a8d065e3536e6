//! Against a real server on the loopback interface.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::IntoResponse;
use serde_json::json;
use tasklane_common::task::ERROR_BYTES_MAX;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::super::tests::context;
use super::*;
use crate::decide::RESULT_BYTES_MAX;

/// Far longer than anything here may take.
const LIMIT: Duration = Duration::from_secs(30);

type Requests = Arc<Mutex<Vec<(HeaderMap, Bytes)>>>;

/// A service that answers every request alike.
struct Service {
    handler: HttpHandler,
    requests: Requests,
}

fn handler(url: &str) -> HttpHandler {
    let headers = json!({ "Authorization": "Bearer secret", "X-Team": "blue" });
    let table = json!({ "kind": "test.kind", "url": url, "headers": headers });
    HttpHandler::new(&serde_json::from_value(table).unwrap()).unwrap()
}

async fn service<R: IntoResponse>(respond: impl Fn() -> R + Clone + Send + Sync + 'static) -> Service {
    let requests = Requests::default();
    let answer = move |State(requests): State<Requests>, headers: HeaderMap, body: Bytes| {
        requests.lock().unwrap().push((headers, body));
        let response = respond().into_response();
        async move { response }
    };
    let router = Router::new().fallback(answer).with_state(requests.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let handler = handler(&format!("http://{}/path?key=1", listener.local_addr().unwrap()));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Service { handler, requests }
}

impl Service {
    async fn run(&self) -> Result<Outcome, HandlerError> {
        run(&self.handler).await
    }
}

async fn run(handler: &HttpHandler) -> Result<Outcome, HandlerError> {
    let args = Json::parse(r#"{"n": 1}"#.to_owned()).unwrap();
    tokio::time::timeout(LIMIT, handler.handle_json(args, &context())).await.expect("the run hangs")
}

fn completed(json: &str) -> Result<Outcome, HandlerError> {
    Ok(Outcome::Complete(Json::parse(json.to_owned()).unwrap()))
}

#[tokio::test]
async fn the_request_carries_args_and_headers() {
    let service = service(|| "{\"ok\": true}").await;
    let cx = context();
    let answer = service.handler.handle_json(Json::parse("[1, 2]".to_owned()).unwrap(), &cx).await;
    assert_eq!(answer, completed("{\"ok\": true}"));
    let requests = service.requests.lock().unwrap();
    let (headers, body) = &requests[0];
    assert_eq!(body, "[1, 2]".as_bytes());
    let id = cx.id.to_string();
    for (name, value) in [
        ("content-type", "application/json"),
        ("accept-encoding", "identity"),
        ("idempotency-key", &id),
        ("tasklane-task-id", &id),
        ("tasklane-attempt", "2"),
        ("tasklane-fence", "7"),
        ("traceparent", cx.traceparent.as_deref().unwrap()),
        ("authorization", "Bearer secret"),
        ("x-team", "blue"),
    ] {
        assert_eq!(headers[name], value, "{name}");
    }
}

#[tokio::test]
async fn the_body_is_the_result() {
    assert_eq!(service(|| "text").await.run().await, completed("\"text\""));
    assert_eq!(service(|| (StatusCode::CREATED, "7")).await.run().await, completed("7"));
    assert_eq!(service(|| StatusCode::NO_CONTENT).await.run().await, completed("null"));
}

#[tokio::test]
async fn the_status_decides() {
    for status in [502, 504] {
        let status = StatusCode::from_u16(status).unwrap();
        let error = service(move || (status, "busy")).await.run().await.unwrap_err();
        assert_eq!(error, HandlerError::unknown(format!("the service answered {status}: busy")));
    }
    for status in [408, 425, 429, 500, 503, 599] {
        let status = StatusCode::from_u16(status).unwrap();
        let error = service(move || (status, "busy")).await.run().await.unwrap_err();
        assert_eq!(error, HandlerError::retry(format!("the service answered {status}: busy")));
    }
    for status in [400, 401, 404, 409, 410, 422, 418] {
        let status = StatusCode::from_u16(status).unwrap();
        let error = service(move || (status, "never")).await.run().await.unwrap_err();
        assert_eq!(error, HandlerError::discard(format!("the service answered {status}: never")));
    }
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let service = service(|| (StatusCode::FOUND, [("location", "/elsewhere")])).await;
    assert_eq!(service.run().await, Err(HandlerError::discard("the service answered 302 Found")));
    assert_eq!(service.requests.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn the_service_may_say_when() {
    let seconds = service(|| (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "7")])).await.run().await;
    let message = "the service answered 503 Service Unavailable";
    assert_eq!(seconds, Err(HandlerError::retry_after(message, Duration::from_secs(7))));
}

#[test]
fn retry_after_is_seconds_or_a_date_up_to_an_hour() {
    let now: Timestamp = "2015-10-21T07:28:00Z".parse().unwrap();
    for (value, delay) in [
        ("0", None),
        ("120", Some(120)),
        ("86400", Some(3600)),
        ("18446744073709551615", Some(3600)),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:30 GMT", Some(30)),
        ("Thu, 22 Oct 2015 07:28:00 GMT", Some(3600)),
        ("Wed, 21 Oct 2015 07:27:00 GMT", None),
    ] {
        assert_eq!(retry_after(value, now), delay.map(Duration::from_secs), "{value}");
    }
}

#[tokio::test]
async fn too_large_a_result_is_refused() {
    let error = service(|| "x".repeat(RESULT_BYTES_MAX + 1)).await.run().await.unwrap_err();
    let told = "the service answered more than the 1048576 bytes that a result may have: \
                store it elsewhere and answer its address";
    assert_eq!(error, HandlerError::discard(told));
}

#[tokio::test]
async fn of_an_errors_body_the_beginning_is_told() {
    let error = service(|| (StatusCode::BAD_REQUEST, "x".repeat(100_000))).await.run().await.unwrap_err();
    assert!(error.to_string().len() < ERROR_BODY_BYTES + 100 && error.to_string().len() < ERROR_BYTES_MAX);
}

#[tokio::test]
async fn a_network_error_is_tried_again_and_tells_no_secrets() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = format!("http://user:password@{}/path?key=secret", listener.local_addr().unwrap());
    drop(listener);
    let error = run(&handler(&closed)).await.unwrap_err();
    assert_eq!(error, HandlerError::retry(error.to_string()));
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(!error.to_string().contains("password") && !error.to_string().contains("secret"), "{error}");
}

/// The head of the answer came, and then the service died.
#[tokio::test]
async fn a_broken_answer_is_tried_again() {
    let broken = || {
        let chunks = [Ok("{\"ok\""), Err(std::io::Error::other("died"))];
        Body::from_stream(futures::stream::iter(chunks))
    };
    let error = service(broken).await.run().await.unwrap_err();
    assert_eq!(error, HandlerError::unknown(error.to_string()));
}

/// It may have done what it was asked for.
#[tokio::test]
async fn whether_an_unanswered_request_took_effect_is_not_known() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let handler = handler(&format!("http://{}/", listener.local_addr().unwrap()));
    let reset = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        assert!(stream.read(&mut request).await.unwrap() > 0);
    });
    let error = run(&handler).await.unwrap_err();
    reset.await.unwrap();
    assert_eq!(error, HandlerError::unknown(error.to_string()));
}

/// A server whose connections each answer one request, and close when the next one comes. Answers how many it got.
async fn closing_server() -> (String, tokio::sync::mpsc::UnboundedReceiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (got, requests) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let got = got.clone();
            tokio::spawn(async move {
                let mut request = vec![0; 64 * 1024];
                // Head and body may come apart; this request is short.
                assert!(stream.read(&mut request).await.unwrap() > 0);
                got.send(()).unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1").await.unwrap();
                // Closed only when the next request is on its way.
                if stream.read(&mut request).await.unwrap() > 0 {
                    got.send(()).unwrap();
                }
            });
        }
    });
    (url, requests)
}

#[tokio::test]
async fn a_connection_that_the_server_closes_costs_no_attempt() {
    let (url, mut requests) = closing_server().await;
    let handler = handler(&url);
    for _ in 0..5 {
        assert_eq!(run(&handler).await, completed("1"));
    }
    let mut count = 0;
    while requests.try_recv().is_ok() {
        count += 1;
    }
    assert!(count > 5, "no request was ever closed upon: {count}");
}

#[tokio::test]
async fn a_request_that_must_not_come_twice_gets_a_connection_of_its_own() {
    let (url, mut requests) = closing_server().await;
    let table = json!({ "kind": "test.kind", "url": url, "guarantee": "at_most_once" });
    let handler = HttpHandler::new(&serde_json::from_value(table).unwrap()).unwrap();
    for _ in 0..5 {
        assert_eq!(run(&handler).await, completed("1"));
        requests.recv().await.unwrap();
    }
    assert!(requests.try_recv().is_err(), "one came twice");
}

#[tokio::test]
async fn an_encoded_answer_is_refused_by_name() {
    let error = service(|| ([("content-encoding", "gzip")], "\u{1f}x")).await.run().await.unwrap_err();
    let told =
        "the service answered 200 OK with Content-Encoding: gzip, and was asked for identity: let it answer without";
    assert_eq!(error, HandlerError::discard(told));
    assert_eq!(service(|| ([("content-encoding", "Identity")], "7")).await.run().await, completed("7"));
    let busy = service(|| (StatusCode::BAD_REQUEST, [("content-encoding", "br")], "\u{1f}x")).await;
    assert_eq!(busy.run().await, Err(HandlerError::discard("the service answered 400 Bad Request")));
}

#[tokio::test]
async fn a_stopped_run_drops_its_request() {
    let (asked, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let never = move || {
        asked.send(()).unwrap();
        Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>())
    };
    let service = service(never).await;
    let cx = context();
    let cancellation = cx.cancellation.clone();
    let run = tokio::spawn(async move { service.handler.handle_json(Json::null(), &cx).await });
    heard.recv().await.unwrap();
    cancellation.cancel();
    let answer = tokio::time::timeout(LIMIT, run).await.unwrap().unwrap();
    assert_eq!(answer, Err(HandlerError::unknown("the request was stopped")));
}

#[tokio::test]
async fn the_operator_says_which_statuses_are_final_besides() {
    for (status, is_final) in [(501, true), (429, true), (500, false), (404, true)] {
        let mut service = service(move || StatusCode::from_u16(status).unwrap()).await;
        service.handler.discard = vec![501, 429];
        let error = service.run().await.unwrap_err();
        let message = format!("the service answered {}", StatusCode::from_u16(status).unwrap());
        let expected = if is_final { HandlerError::discard(message) } else { HandlerError::retry(message) };
        assert_eq!(error, expected);
    }
}
