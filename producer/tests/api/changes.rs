//! Every call that changes something leaves one line in the log, and its caller with the task.

use std::io::Write;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::{Value, json};
use tasklane_common::ledger::{Failure, Transition};
use tasklane_common::task::{ErrorKind, TaskId};
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

use crate::support::{Answer, Api};

/// What this thread logs, from now until it is dropped.
struct Log {
    lines: Lines,
    _guard: DefaultGuard,
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for Lines {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        self.clone()
    }
}

impl Log {
    fn begin() -> Self {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt().json().flatten_event(true).with_writer(lines.clone()).finish();
        Self { lines, _guard: tracing::subscriber::set_default(subscriber) }
    }

    /// The changes since the last look.
    fn changes(&self) -> Vec<Value> {
        let text = String::from_utf8(std::mem::take(&mut *self.lines.0.lock().unwrap())).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["target"] == "tasklane_producer::changes").collect()
    }
}

async fn call(api: &Api, method: Method, path: &str, body: &str) -> Answer {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let request =
        request.header("tasklane-actor", "Jörg").header("user-agent", "a test\t1").header("x-request-id", "r-1");
    api.send(request.body(Body::from(body.to_owned())).unwrap()).await
}

async fn failed(api: &Api) -> TaskId {
    let id = api.submitted(r#"{"kind":"a","args":{"secret":"s3cret"}}"#).await;
    let error = Failure { message: "no".to_owned(), kind: ErrorKind::Error };
    api.run(id, Transition::Discard { reason: "final_error".to_owned(), error }).await;
    id
}

/// A call of each route that changes something: method, path in the document, path, body; the line's words, what it is of, tasks, detail.
const CALLS: [[&str; 8]; 16] = [
    [
        "PATCH",
        "/v1/tasks/{id}",
        "/v1/tasks/WAITS",
        r#"{"args":"s3cret","delay_ms":60000}"#,
        "a task was changed",
        "WAITS",
        "",
        "run_at, args",
    ],
    [
        "POST",
        "/v1/queues/{queue}/move",
        "/v1/queues/default/move",
        r#"{"to":"other","filter":{"kind":"a"}}"#,
        "tasks were given to another queue",
        "kind=a queue=default",
        "1",
        "to queue other",
    ],
    [
        "POST",
        "/v1/tasks/{id}/cancel",
        "/v1/tasks/WAITS/cancel",
        r#"{"reason":"no need"}"#,
        "a task was cancelled",
        "WAITS",
        "",
        "reason: no need",
    ],
    ["POST", "/v1/tasks/{id}/retry", "/v1/tasks/FAILED/retry", "", "a task was started again", "FAILED", "", ""],
    [
        "POST",
        "/v1/tasks/cancel",
        "/v1/tasks/cancel",
        r#"{"kind":"a","tag":"x:y"}"#,
        "tasks were cancelled",
        "kind=a tag=x:y",
        "0",
        "reason: requested",
    ],
    [
        "POST",
        "/v1/tasks/retry",
        "/v1/tasks/retry",
        r#"{"state":"cancelled"}"#,
        "tasks were started again",
        "state=cancelled",
        "1",
        "",
    ],
    [
        "POST",
        "/v1/tasks/purge",
        "/v1/tasks/purge",
        r#"{"state":"completed"}"#,
        "tasks were deleted",
        "state=completed",
        "0",
        "",
    ],
    ["POST", "/v1/queues/{queue}/pause", "/v1/queues/q/pause", "", "a queue was paused", "queue=q", "", ""],
    ["POST", "/v1/queues/{queue}/resume", "/v1/queues/q/resume", "", "a queue was resumed", "queue=q", "", ""],
    [
        "PUT",
        "/v1/schedules/{name}",
        "/v1/schedules/s",
        r#"{"cron":"@daily","task":{"kind":"a","args":"s3cret"}}"#,
        "a schedule was made",
        "schedule=s",
        "",
        "",
    ],
    [
        "POST",
        "/v1/schedules/{name}/pause",
        "/v1/schedules/s/pause",
        "",
        "a schedule was paused",
        "schedule=s",
        "",
        "changed: paused",
    ],
    [
        "PUT",
        "/v1/schedules/{name}",
        "/v1/schedules/s",
        r#"{"cron":"@hourly","task":{"kind":"a","args":"s3cret too"}}"#,
        "a schedule was replaced",
        "schedule=s",
        "",
        "changed: cron, task; it stays paused",
    ],
    [
        "POST",
        "/v1/schedules/{name}/resume",
        "/v1/schedules/s/resume",
        "",
        "a schedule was resumed",
        "schedule=s",
        "",
        "changed: paused",
    ],
    ["DELETE", "/v1/schedules/{name}", "/v1/schedules/s", "", "a schedule was deleted", "schedule=s", "", ""],
    [
        "PUT",
        "/v1/limits/{of}/{name}",
        "/v1/limits/kind/a",
        r#"{"max_running":2,"rate":{"tasks":5}}"#,
        "a limit was set",
        "limit=kind:a",
        "",
        "max_running=2, rate=5 per 1000 ms, burst=1",
    ],
    ["DELETE", "/v1/limits/{of}/{name}", "/v1/limits/kind/a", "", "a limit was deleted", "limit=kind:a", "", ""],
];

#[tokio::test]
async fn every_changing_call_leaves_one_line() {
    let api = Api::start().await;
    let (waits, failed) = (api.submitted(r#"{"kind":"a"}"#).await.to_string(), failed(&api).await.to_string());
    let log = Log::begin();
    for [method, _, path, body, told, of, tasks, detail] in CALLS {
        let named = |text: &str| text.replace("WAITS", &waits).replace("FAILED", &failed);
        let answer = call(&api, method.parse().unwrap(), &named(path), body).await;
        assert!(answer.status < 300, "{path}: {answer:?}");
        let [line] = &log.changes()[..] else { panic!("{path}: not one line") };
        assert_eq!((line["message"].as_str(), line["of"].as_str()), (Some(told), Some(&*named(of))), "{line}");
        assert_eq!(
            (line["tasks"].as_u64(), line["detail"].as_str().unwrap_or_default()),
            (tasks.parse().ok(), detail),
            "{line}"
        );
        assert_eq!(
            [&line["by"], &line["agent"], &line["request.id"], &line["level"]],
            ["Jörg", "a test\t1", "r-1", "INFO"]
        );
        assert!(!line.to_string().contains("s3cret"), "{line}");
    }
}

/// No route that changes something is missing from these calls, and its documentation has the header.
#[tokio::test]
async fn every_changing_route_is_called() {
    let document = Api::start().await.get("/openapi.json").await.json();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let changes = ["post", "put", "patch", "delete"].contains(&method.as_str())
                && !operation["operationId"].as_str().unwrap().starts_with("submit");
            let called = CALLS.iter().any(|[by, of, ..]| of == path && by.to_lowercase() == *method);
            let header = operation["parameters"].as_array().is_some_and(|parameters| {
                parameters.iter().any(|parameter| parameter["name"] == "Tasklane-Actor" && parameter["in"] == "header")
            });
            assert_eq!((called, header), (changes, changes), "{method} {path}");
        }
    }
}

/// Refusals, dry runs and what was so before leave no line: nothing was changed.
#[tokio::test]
async fn what_changes_nothing_leaves_no_line() {
    let api = Api::start().await;
    let (failure, done) = (failed(&api).await, api.submitted(r#"{"kind":"b"}"#).await);
    api.start_run(done).await;
    let body = json!({"cron": "@daily", "task": {"kind": "a"}}).to_string();
    api.put("/v1/schedules/same", body.clone()).await;
    let log = Log::begin();
    let unknown = "0190f3c0-0000-7000-8000-000000000000";
    for (method, path, body, status) in [
        (Method::POST, format!("/v1/tasks/{failure}/cancel"), "", 409),
        (Method::POST, format!("/v1/tasks/{done}/retry"), "", 409),
        (Method::PATCH, format!("/v1/tasks/{done}"), r#"{"priority":"high"}"#, 409),
        (Method::POST, format!("/v1/tasks/{unknown}/cancel"), "", 404),
        (Method::POST, format!("/v1/tasks/{unknown}/retry"), "", 404),
        (Method::PATCH, format!("/v1/tasks/{unknown}"), r#"{"priority":"high"}"#, 404),
        (Method::POST, "/v1/tasks/retry".to_owned(), r#"{"kind":"a","dry_run":true}"#, 200),
        (Method::POST, "/v1/tasks/cancel".to_owned(), r#"{"kind":"b","dry_run":true}"#, 200),
        (Method::POST, "/v1/tasks/purge".to_owned(), r#"{"kind":"a","dry_run":true}"#, 200),
        (Method::POST, "/v1/queues/default/move".to_owned(), r#"{"to":"x","dry_run":true}"#, 200),
        (Method::POST, "/v1/tasks/purge".to_owned(), "{}", 422),
        (Method::PUT, "/v1/schedules/same".to_owned(), &body, 200),
        (Method::DELETE, "/v1/schedules/other".to_owned(), "", 404),
        (Method::DELETE, "/v1/limits/kind/a".to_owned(), "", 404),
    ] {
        let answer = call(&api, method, &path, body).await;
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        assert_eq!(log.changes(), Vec::<Value>::new(), "{path}");
    }
}

/// A task that does a failed one's work with other args is new once, whether or not the request is repeated.
#[tokio::test]
async fn a_retry_with_other_args_leaves_one_line() {
    let api = Api::start().await;
    let failure = failed(&api).await;
    let path = format!("/v1/tasks/{failure}/retry");
    let log = Log::begin();
    let made = api.post_once(&path, "k", r#"{"args":"s3cret"}"#).await.json();
    let [line] = &log.changes()[..] else { panic!("not one line") };
    let detail = format!("with other args, as task {}", made["id"].as_str().unwrap());
    assert_eq!(
        (&line["message"], &line["of"], &line["detail"]),
        (&json!("a task was started again"), &json!(failure), &json!(detail))
    );
    for (args, status) in [(r#"{"args":"s3cret"}"#, 202), (r#"{"args":1}"#, 422)] {
        assert_eq!(api.post_once(&path, "k", args).await.status, status);
        assert_eq!(log.changes(), Vec::<Value>::new(), "{args}");
    }
}

/// With the task it is kept who changed it, and a name that does not fit is refused before anything is done.
#[tokio::test]
async fn the_caller_is_kept_with_the_task() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    let path = format!("/v1/tasks/{id}");
    assert_eq!(api.get(&path).await.json()["last_change"], Value::Null);
    let cancel = |actor: &[&'static str]| {
        let request = Request::post(format!("{path}/cancel"));
        actor
            .iter()
            .fold(request, |request, actor| request.header("tasklane-actor", *actor))
            .body(Body::empty())
            .unwrap()
    };
    let long: &'static str = Box::leak("x".repeat(129).into_boxed_str());
    for bad in [&[""][..], &[" "], &["a\tb"], &["a\u{85}b"], &[long], &["a", "b"]] {
        let refused = api.send(cancel(bad)).await;
        let problem = refused.json();
        assert_eq!((refused.status, &problem["code"]), (400, &json!("invalid_header")), "{bad:?}");
        assert_eq!(problem["errors"][0]["path"], "tasklane-actor");
    }
    assert_eq!(api.get(&path).await.json()["state"], "accepted");
    let cancelled = api.send(cancel(&["<b>Jörg\u{202e}</b>"])).await;
    let change = &cancelled.json()["last_change"];
    assert_eq!((&change["call"], &change["by"]), (&json!("cancel"), &json!("<b>Jörg\u{202e}</b>")));
    assert_eq!(change["request_id"], cancelled.headers["x-request-id"].to_str().unwrap());
}

/// A client that goes away in the middle of a call for many tasks leaves a line of what was done by then.
#[tokio::test]
async fn a_change_that_is_cut_is_told() {
    let api = Api::start().await;
    for _ in 0..2 {
        let tasks: Vec<_> = (0..600).map(|_| json!({"kind": "a"})).collect();
        assert_eq!(api.post("/v1/tasks/batch", json!({"tasks": tasks}).to_string()).await.status, 202);
    }
    let log = Log::begin();
    let mut cancel = Box::pin(call(&api, Method::POST, "/v1/tasks/cancel", r#"{"kind":"a"}"#));
    // One step of it at a time: it gives its first tasks to the ledger, and does not get to the last.
    while api.get("/v1/tasks?state=cancelled&limit=1").await.json()["tasks"].as_array().unwrap().is_empty() {
        tokio::select! {
            biased;
            answer = &mut cancel => panic!("all of it is done: {answer:?}"),
            () = std::future::ready(()) => {}
        }
    }
    drop(cancel);
    let [line] = &log.changes()[..] else { panic!("not one line") };
    assert_eq!(line["message"], "a change ended early, and may have been made in part");
    assert_eq!((&line["call"], &line["of"], &line["by"]), (&json!("cancel"), &json!("kind=a"), &json!("Jörg")));
}
