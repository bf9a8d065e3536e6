//! `POST /v1/tasks/purge` and `POST /v1/queues/{queue}/move`.

use insta::assert_snapshot;
use serde_json::{Value, json};
use tasklane_common::ledger::Transition;
use tasklane_common::task::Json;

use crate::support::Api;

async fn post(api: &Api, path: &str, body: Value) -> Value {
    let answer = api.post(path, body.to_string()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

async fn completed(api: &Api, body: &str) {
    let id = api.submitted(body).await;
    api.run(id, Transition::Complete { result: Json::null() }).await;
}

/// Filters are those of the list; a dry run only counts; what has not finished is left alone.
#[tokio::test]
async fn finished_tasks_are_purged_by_filter() {
    let api = Api::start().await;
    let path = "/v1/tasks/purge";
    for body in [r#"{"kind":"a","tags":{"of":"x"}}"#, r#"{"kind":"a"}"#, r#"{"kind":"b"}"#] {
        completed(&api, body).await;
    }
    let (waits, runs, unwanted) = (
        api.submitted(r#"{"kind":"a"}"#).await,
        api.submitted(r#"{"kind":"a"}"#).await,
        api.submitted(r#"{"kind":"a"}"#).await,
    );
    api.start_run(runs).await;
    api.post(&format!("/v1/tasks/{unwanted}/cancel"), "").await;
    let purged = |purged| json!({"purged": purged, "next_cursor": null});
    for _ in 0..2 {
        assert_eq!(post(&api, path, json!({"kind": "a", "dry_run": true})).await, purged(3));
    }
    assert_eq!(api.count().await, 6);
    assert_eq!(post(&api, path, json!({"state": "cancelled"})).await, purged(1));
    assert_eq!(post(&api, path, json!({"tag": "of:x", "queue": "default"})).await, purged(1));
    assert_snapshot!("purged", api.post(path, r#"{"kind":"a"}"#).await.shown());
    assert_eq!(api.count().await, 3);
    for id in [waits, runs] {
        assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.status, 200);
    }
}

#[tokio::test]
async fn a_bad_request_purges_nothing() {
    let api = Api::start().await;
    completed(&api, r#"{"kind":"a"}"#).await;
    assert_snapshot!("purge_no_filter", api.post("/v1/tasks/purge", r#"{"dry_run":false}"#).await.shown());
    assert_snapshot!("purge_waiting", api.post("/v1/tasks/purge", r#"{"state":"queued"}"#).await.shown());
    assert_eq!(api.post("/v1/tasks/purge", "nope").await.status, 400);
    assert_eq!(api.post("/v1/tasks/purge", r#"{"kind":"a","reason":"x"}"#).await.status, 422);
    assert_eq!(api.count().await, 1);
}

/// A call ends somewhere, and the next goes on there.
#[tokio::test]
async fn more_than_a_call_takes_are_moved_and_purged_by_several() {
    let api = Api::start().await;
    for _ in 0..3 {
        let tasks = vec![json!({"kind": "a"}); 4_000];
        assert_eq!(api.post("/v1/tasks/batch", json!({"tasks": tasks}).to_string()).await.status, 202);
    }
    api.in_several_calls("/v1/queues/default/move", json!({"to": "other"}), "moved", 12_000).await;
    api.in_several_calls("/v1/tasks/cancel", json!({"queue": "other"}), "cancelled", 12_000).await;
    api.in_several_calls("/v1/tasks/purge", json!({"queue": "other"}), "purged", 12_000).await;
}

#[tokio::test]
async fn waiting_tasks_are_moved_by_filter() {
    let api = Api::start().await;
    let path = "/v1/queues/default/move";
    for body in [r#"{"kind":"a","tags":{"of":"x"}}"#, r#"{"kind":"a","delay_ms":60000}"#, r#"{"kind":"b"}"#] {
        api.submitted(body).await;
    }
    let runs = api.submitted(r#"{"kind":"a"}"#).await;
    api.start_run(runs).await;
    completed(&api, r#"{"kind":"a"}"#).await;
    let moved = |moved| json!({"moved": moved, "next_cursor": null});
    for _ in 0..2 {
        assert_eq!(post(&api, path, json!({"to": "other", "dry_run": true})).await, moved(3));
    }
    assert_eq!(post(&api, path, json!({"to": "other", "filter": {"tag": "of:x"}})).await, moved(1));
    assert_eq!(post(&api, path, json!({"to": "other", "filter": {"kind": "b"}})).await, moved(1));
    assert_snapshot!("moved", api.post(path, r#"{"to":"other"}"#).await.shown());
    assert_eq!(post(&api, path, json!({"to": "other"})).await, moved(0));
    assert_eq!(api.get("/v1/tasks?queue=other").await.json()["tasks"].as_array().unwrap().len(), 3);
    assert_eq!(api.get(&format!("/v1/tasks/{runs}")).await.json()["queue"], "default");
    assert_eq!(post(&api, "/v1/queues/nothing/move", json!({"to": "other"})).await, moved(0));
}

#[tokio::test]
async fn a_bad_request_moves_nothing() {
    let api = Api::start().await;
    api.submitted(r#"{"kind":"a"}"#).await;
    let body = r#"{"to":"default","filter":{"kind":"no kind"}}"#;
    assert_snapshot!("move_to_itself", api.post("/v1/queues/default/move", body).await.shown());
    assert_eq!(api.post("/v1/queues/default/move", "nope").await.status, 400);
    assert_eq!(api.post("/v1/queues/default/move", "{}").await.status, 422);
    assert_eq!(api.post("/v1/queues/Default/move", r#"{"to":"other"}"#).await.status, 404);
    assert_eq!(api.get("/v1/tasks?queue=default").await.json()["tasks"].as_array().unwrap().len(), 1);
}
