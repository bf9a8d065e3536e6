//! A producer without a listener, and its answers in a form that two runs agree on.

use std::fmt::Write;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, HeaderValue, Method, Request, header};
use axum::response::Response;
use serde_json::Value;
use tasklane_common::completion::Completions;
use tasklane_common::config::RouteTable;
use tasklane_common::events::Events;
use tasklane_common::events::feed::Feed;
use tasklane_common::ledger::{self, Belief, Claim, ClaimRequest, Settled, Settlement, Transition, WorkerRecord};
use tasklane_common::publisher::Publisher;
use tasklane_common::task::{Fence, Guarantee, Kind, QueueName, TaskId, WorkerId};
use tasklane_common::telemetry::{Metrics, Program};
use tasklane_common::web::hosts::Hosts;
use tasklane_producer::app::{App, Parts};
use tasklane_producer::request::Rules;
use tasklane_producer::router::router;
use tasklane_producer::routing::Routes;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Headers that are part of the contract.
const SHOWN: [&str; 6] = ["content-type", "location", "idempotent-replayed", "retry-after", "allow", "x-request-id"];

pub(crate) struct Api {
    pub(crate) app: Arc<App>,
    router: Router,
    _ledger: TempDir,
    _background: tokio_util::sync::DropGuard,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

fn metrics() -> Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(|| Metrics::install(Program::Producer).unwrap()).clone()
}

impl Api {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ledger = ledger::open(&format!("sqlite://{}/api.db", folder.path().display())).await.unwrap();
        let background = CancellationToken::new();
        // Nobody listens on port 1.
        let broker = "amqp://127.0.0.1:1/%2f".parse().unwrap();
        let publisher = Publisher::spawn(&broker, ledger.clone(), Duration::ZERO, background.clone());
        let completions = Completions::spawn(&broker, background.clone());
        let queue = QueueName::parse("emails").unwrap();
        let emails = RouteTable { kind: "email.*".to_owned(), queue, result_ttl_ms: None };
        let rules = Rules { max_attempts: 20, routes: Routes::new(&[emails]).unwrap() };
        let events = Events::spawn(publisher.clone());
        let feed = Feed::spawn(&broker, publisher.clone(), events.clone(), background.clone());
        let app = App::new(Parts {
            ledger,
            publisher,
            completions,
            events,
            feed,
            metrics: metrics(),
            rules,
            hosts: Hosts::default(),
        });
        let router = router(Arc::clone(&app));
        Self { app, router, _ledger: folder, _background: background.drop_guard() }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let (parts, body) = self.ask(request).await.into_parts();
        let text = String::from_utf8(to_bytes(body, usize::MAX).await.unwrap().to_vec()).unwrap();
        Answer { status: parts.status.as_u16(), headers: parts.headers, text }
    }

    async fn ask(&self, mut request: Request<Body>) -> Response {
        request.headers_mut().entry(header::HOST).or_insert(HeaderValue::from_static("localhost"));
        self.router.clone().oneshot(request).await.unwrap()
    }

    /// The head of an answer whose body does not end by itself, and the body.
    pub(crate) async fn open(&self, path: &str) -> Response {
        self.ask(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(json(path).body(body.into()).unwrap()).await
    }

    pub(crate) async fn put(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(json(path).method(Method::PUT).body(body.into()).unwrap()).await
    }

    pub(crate) async fn patch(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(json(path).method(Method::PATCH).body(body.into()).unwrap()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(Request::delete(path).body(Body::empty()).unwrap()).await
    }

    /// Posts under an idempotency key.
    pub(crate) async fn post_once(&self, path: &str, key: &str, body: &str) -> Answer {
        self.send(json(path).header("idempotency-key", key).body(body.to_owned().into()).unwrap()).await
    }

    pub(crate) async fn post_lines(&self, body: impl Into<Body>) -> Answer {
        let request = Request::post("/v1/tasks/batch").header(header::CONTENT_TYPE, "application/x-ndjson");
        self.send(request.body(body.into()).unwrap()).await
    }

    /// Posts lines under an idempotency key.
    pub(crate) async fn post_lines_once(&self, key: &str, body: &str) -> Answer {
        let request = Request::post("/v1/tasks/batch").header(header::CONTENT_TYPE, "application/x-ndjson");
        self.send(request.header("idempotency-key", key).body(body.to_owned().into()).unwrap()).await
    }

    /// Submits a task that the ledger then has.
    pub(crate) async fn submitted(&self, body: &str) -> TaskId {
        let answer = self.post("/v1/tasks", body.to_owned()).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        answer.json()["id"].as_str().unwrap().parse().unwrap()
    }

    /// Repeats a call for many tasks from where the last one ended, until all are done; each does at most 10,000.
    pub(crate) async fn in_several_calls(&self, path: &str, mut body: Value, counted: &str, expected: u64) {
        let (mut calls, mut done) = (0, 0);
        loop {
            let answer = self.post(path, body.to_string()).await.json();
            let count = answer[counted].as_u64().unwrap();
            assert!(count <= 10_000, "{answer}");
            (calls, done) = (calls + 1, done + count);
            body["cursor"] = answer["next_cursor"].clone();
            if body["cursor"].is_null() {
                break;
            }
        }
        assert!(calls > 1 && done == expected, "{done} in {calls} calls");
    }

    /// How many tasks there are, in any state.
    pub(crate) async fn count(&self) -> usize {
        self.get("/v1/tasks?limit=1000").await.json()["tasks"].as_array().unwrap().len()
    }

    /// Runs a task as a worker would, as far as the ledger sees it.
    pub(crate) async fn run(&self, id: TaskId, transition: Transition) {
        let settlement = Settlement { id, fence: self.start_run(id).await, transition };
        assert_eq!(self.app.gate.ledger().settle(settlement).await.unwrap(), Settled::Applied);
    }

    /// Takes a task as a worker does.
    pub(crate) async fn start_run(&self, id: TaskId) -> Fence {
        let worker = self.worker().await;
        let belief = Belief::of(&self.app.gate.ledger().get(vec![id]).await.unwrap()[0]);
        let guarantee = Guarantee::AtLeastOnce;
        let request = ClaimRequest { id, worker, guarantee, belief, crashes_below: i32::MAX };
        match self.app.gate.ledger().claim(request).await.unwrap() {
            Claim::Granted(granted) => granted.fence,
            Claim::Refused(reason) => panic!("the claim was refused: {reason:?}"),
        }
    }

    /// Enters a worker.
    pub(crate) async fn worker(&self) -> WorkerId {
        let id = WorkerId::new();
        let record = WorkerRecord {
            id,
            name: None,
            host: "a-host".to_owned(),
            pid: 7,
            queues: vec![QueueName::default()],
            kinds: vec![Kind::parse("report.build").unwrap()],
            concurrency: 4,
            version: "1.2.3".to_owned(),
        };
        self.app.gate.ledger().register(record, Duration::from_secs(60)).await.unwrap();
        id
    }
}

/// A POST of JSON, whose headers and body are to follow.
pub(crate) fn json(path: &str) -> axum::http::request::Builder {
    Request::builder().method(Method::POST).uri(path).header(header::CONTENT_TYPE, "application/json")
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        let value = serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {self:?}"));
        check_times(&value);
        value
    }

    /// Status, the contract's headers, and the body, with what differs between runs taken out.
    pub(crate) fn shown(&self) -> String {
        let mut shown = format!("{}\n", self.status);
        for name in SHOWN {
            if let Some(value) = self.headers.get(name) {
                writeln!(shown, "{name}: {}", steady(value.to_str().unwrap())).unwrap();
            }
        }
        let body = match serde_json::from_str::<Value>(&self.text) {
            Ok(mut body) => {
                steady_json(&mut body);
                serde_json::to_string_pretty(&body).unwrap()
            }
            Err(_) => self.text.clone(),
        };
        shown + "\n" + &body
    }
}

/// All times of all answers are written alike, so that they sort as text; what clients gave stays as it is.
fn check_times(value: &Value) {
    match value {
        Value::String(text) if text.ends_with('Z') && text.parse::<jiff::Timestamp>().is_ok() => {
            let fraction = text.split_once('.').map_or("", |(_, fraction)| fraction);
            assert_eq!(fraction.len(), "000Z".len(), "three digits of fraction: {text}");
        }
        Value::Array(items) => items.iter().for_each(check_times),
        Value::Object(entries) => {
            let ours = entries.iter().filter(|(key, _)| !["args", "tags", "result", "example"].contains(&key.as_str()));
            ours.for_each(|(_, value)| check_times(value));
        }
        _ => {}
    }
}

fn steady_json(value: &mut Value) {
    match value {
        Value::String(text) => *text = steady(text),
        Value::Array(items) => items.iter_mut().for_each(steady_json),
        Value::Object(entries) => entries.iter_mut().for_each(|(key, value)| match key.as_str() {
            "lease_age_ms" | "oldest_waiting_ms" if value.is_number() => *value = "[some]".into(),
            _ => steady_json(value),
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Puts `[uuid]` and `[time]` for ids and for times of this century's beginning.
fn steady(text: &str) -> String {
    let part = |part: &str| match part {
        id if id.len() == 36 && id.parse::<TaskId>().is_ok() => "[uuid]".to_owned(),
        cursor if cursor.len() == 33 && cursor.bytes().all(|byte| byte.is_ascii_hexdigit()) => "[cursor]".to_owned(),
        time if time.len() > 19 && time.starts_with("202") && time.parse::<jiff::Timestamp>().is_ok() => {
            "[time]".to_owned()
        }
        other => other.to_owned(),
    };
    let words: Vec<_> = text.split(' ').map(|word| word.split('/').map(part).collect::<Vec<_>>().join("/")).collect();
    words.join(" ")
}
