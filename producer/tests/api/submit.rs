//! `POST /v1/tasks`.

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use insta::assert_snapshot;
use tasklane_common::ledger::Transition;
use tasklane_common::task::{Json, TaskId};

use crate::support::{Api, json};

#[tokio::test]
async fn a_submission_is_accepted_while_the_broker_is_away() {
    let api = Api::start().await;
    let answer = api.post("/v1/tasks", r#"{"kind":"report.build","args":{"month":5}}"#).await;
    assert_snapshot!("accepted", answer.shown());
    let location = answer.headers["location"].to_str().unwrap();
    assert_eq!(api.get(location).await.json(), answer.json(), "what is answered is what is recorded");
}

#[tokio::test]
async fn a_submission_with_everything_is_scheduled() {
    let api = Api::start().await;
    let body = r#"{"kind":"email.welcome","args":[1,"ü"],"max_attempts":3,"timeout_ms":60000,"result_ttl_ms":3600000,"priority":"high",
        "run_at":"2100-01-01T00:00:00+01:00","tags":{"customer":"42","plan":"a:b"}}"#;
    let answer = api.post("/v1/tasks", body).await;
    assert_snapshot!("scheduled", answer.shown());
    assert_eq!(api.get(answer.headers["location"].to_str().unwrap()).await.json(), answer.json());
}

#[tokio::test]
async fn a_repeated_request_gives_the_same_task() {
    let api = Api::start().await;
    let first = api.post_once("/v1/tasks", "order-7", r#"{"kind":"a","args":{"x":1,"y":2}}"#).await;
    let again = api.post_once("/v1/tasks", "order-7", r#"{"args":{"y":2,"x":1},"kind":"a"}"#).await;
    assert_snapshot!("replayed", again.shown());
    assert_eq!(again.json(), first.json());
    let other = api.post_once("/v1/tasks", "order-7", r#"{"kind":"a","args":{"x":2}}"#).await;
    assert_snapshot!("key_reused", other.shown());
    assert_eq!(api.count().await, 1);
}

#[tokio::test]
async fn fifty_parallel_requests_with_one_key_give_one_task() {
    let api = Api::start().await;
    let requests = (0..50).map(|_| api.post_once("/v1/tasks", "one", r#"{"kind":"a"}"#));
    let answers = futures::future::join_all(requests).await;
    let ids: std::collections::BTreeSet<_> = answers.iter().map(|answer| answer.json()["id"].to_string()).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(answers.iter().filter(|answer| !answer.headers.contains_key("idempotent-replayed")).count(), 1);
    assert_eq!(api.count().await, 1);
}

#[tokio::test]
async fn a_waiting_client_is_answered_when_the_task_ends() {
    let api = Api::start().await;
    let waiting = api.post("/v1/tasks?wait_ms=60000", r#"{"kind":"a"}"#);
    let working = async {
        let id = loop {
            let listed = api.get("/v1/tasks").await.json();
            if let Some(id) = listed["tasks"][0]["id"].as_str() {
                break id.parse::<TaskId>().unwrap();
            }
            tokio::task::yield_now().await;
        };
        api.run(id, Transition::Complete { result: Json::parse(r#"{"pages": 3}"#.to_owned()).unwrap() }).await;
    };
    let (answer, ()) = tokio::join!(waiting, working);
    assert_snapshot!("waited", answer.shown());
}

#[tokio::test]
async fn a_wait_has_an_end() {
    let api = Api::start().await;
    let answer = api.post("/v1/tasks?wait_ms=30", r#"{"kind":"a"}"#).await;
    assert_eq!((answer.status, answer.json()["state"].as_str()), (202, Some("accepted")));
}

#[tokio::test]
async fn a_stopping_producer_keeps_nobody_waiting() {
    let api = Api::start().await;
    api.app.stopping.cancel();
    let answer = api.post("/v1/tasks?wait_ms=60000", r#"{"kind":"a"}"#);
    let answer = tokio::time::timeout(Duration::from_secs(20), answer).await.unwrap();
    assert_eq!(answer.status, 202);
    assert_snapshot!("not_ready", api.get("/readyz").await.shown());
}

#[tokio::test]
async fn bad_submissions_are_refused_and_nothing_is_recorded() {
    let api = Api::start().await;
    let long_kind = format!(r#"{{"kind":"{}"}}"#, "k".repeat(300));
    let many_tags: Vec<_> = (0..33).map(|n| format!(r#""t{n}":"""#)).collect();
    let many_tags = format!(r#"{{"kind":"a","tags":{{{}}}}}"#, many_tags.join(","));
    let bad = [
        ("not_json", "{kind: a}"),
        ("empty_body", ""),
        ("not_an_object", r#"["a"]"#),
        ("no_kind", "{}"),
        ("wrong_type", r#"{"kind":"a","tags":{"k":7}}"#),
        ("unknown_field", r#"{"kind":"a","timeout":7}"#),
        ("long_kind", &long_kind),
        ("many_tags", &many_tags),
        (
            "many_faults",
            r#"{"kind":"a b","queue":"A.b","max_attempts":1001,"timeout_ms":0,"result_ttl_ms":0,"delay_ms":1,"run_at":"soon"}"#,
        ),
        ("priority", r#"{"kind":"a","priority":"urgent"}"#),
        ("unreadable_args", r#"{"kind":"a","args":{"half":"\ud83d"}}"#),
    ];
    for (name, body) in bad {
        assert_snapshot!(format!("bad_{name}"), api.post("/v1/tasks", body.to_owned()).await.shown());
    }
    let large = format!(r#"{{"kind":"a","args":"{}"}}"#, "x".repeat(2 * 1024 * 1024));
    assert_snapshot!("bad_large_body", api.post("/v1/tasks", large).await.shown());
    let args = format!(r#"{{"kind":"a","args":"{}"}}"#, "x".repeat(1024 * 1024));
    assert_snapshot!("bad_large_args", api.post("/v1/tasks", args).await.shown());
    assert_eq!(api.count().await, 0);
}

#[tokio::test]
async fn bad_headers_and_parameters_are_named() {
    let api = Api::start().await;
    let untyped = Request::post("/v1/tasks").body(Body::from("{}")).unwrap();
    assert_snapshot!("bad_media_type", api.send(untyped).await.shown());
    assert_snapshot!("bad_key", api.post_once("/v1/tasks", &"k".repeat(256), r#"{"kind":"a"}"#).await.shown());
    assert_snapshot!("bad_wait", api.post("/v1/tasks?wait_ms=60001&wait=1", r#"{"kind":"a"}"#).await.shown());
    assert_eq!(api.count().await, 0);
}

#[tokio::test]
async fn a_requests_id_comes_back() {
    let api = Api::start().await;
    let request = json("/v1/tasks").header("x-request-id", "mine-1").body(Body::from("[")).unwrap();
    let answer = api.send(request).await;
    assert_eq!(
        (answer.headers["x-request-id"].to_str().unwrap(), answer.json()["instance"].as_str()),
        ("mine-1", Some("mine-1"))
    );
}
