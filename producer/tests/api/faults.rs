//! Requests that no route answers, and a ledger that is away.

use axum::body::Body;
use axum::http::Request;
use insta::assert_snapshot;
use tasklane_common::ledger::LedgerError;

use crate::support::{Api, json};

#[tokio::test]
async fn other_paths_and_methods_are_told() {
    let api = Api::start().await;
    assert_snapshot!("unknown_path", api.get("/v2/tasks").await.shown());
    let put = Request::put("/v1/tasks").body(Body::empty()).unwrap();
    assert_snapshot!("unknown_method", api.send(put).await.shown());
}

#[tokio::test]
async fn paths_that_are_no_text_and_packed_bodies_are_refused() {
    let api = Api::start().await;
    assert_snapshot!("path_no_text", api.get("/v1/tasks/%ff").await.shown());
    for path in ["/v1/queues/%ff", "/v1/limits/kind/%ff", "/v1/schedules/%ff", "/v1/groups/%c3%28"] {
        assert_eq!(api.get(path).await.status, 400, "{path}");
    }
    let packed = json("/v1/tasks").header("content-encoding", "gzip").body(Body::from(r#"{"kind":"a"}"#)).unwrap();
    let answer = api.send(packed).await;
    assert_snapshot!("body_packed", answer.shown());
    assert_eq!(answer.headers["accept-encoding"], "identity");
    let plain = json("/v1/tasks").header("content-encoding", "identity").body(Body::from(r#"{"kind":"a"}"#)).unwrap();
    assert_eq!(api.send(plain).await.status, 202);
}

#[tokio::test]
async fn a_ledger_that_is_away_is_told_at_once() {
    let api = Api::start().await;
    let away = api.app.gate.ask(async { Err::<(), _>(LedgerError::Unavailable("secret host".to_owned())) }).await;
    assert!(away.is_err());
    assert_snapshot!("ledger_away", api.post("/v1/tasks", r#"{"kind":"a"}"#).await.shown());
    for path in ["/v1/tasks", "/v1/queues", "/v1/workers", "/v1/tasks/0190f3c0-0000-7000-8000-000000000000"] {
        assert_eq!(api.get(path).await.status, 503, "{path}");
    }
    for path in ["/v1/tasks/0190f3c0-0000-7000-8000-000000000000/cancel", "/v1/tasks/cancel"] {
        let body = if path.ends_with("tasks/cancel") { r#"{"kind":"a"}"# } else { "" };
        assert_eq!(api.post(path, body).await.status, 503, "{path}");
    }
    assert_eq!(api.get("/healthz").await.status, 200);
}
