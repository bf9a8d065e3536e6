//! `POST /v1/tasks/{id}/cancel` and `POST /v1/tasks/cancel`.

use insta::assert_snapshot;
use serde_json::{Value, json};
use tasklane_common::ledger::Transition;
use tasklane_common::task::Json;

use crate::support::Api;

#[tokio::test]
async fn a_waiting_task_is_cancelled_at_once() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    let path = format!("/v1/tasks/{id}/cancel");
    let cancelled = api.post(&path, r#"{"reason":"order 66 was withdrawn"}"#).await;
    assert_snapshot!("cancelled", cancelled.shown());
    let again = api.post(&path, "").await;
    assert_eq!((again.status, again.json()), (200, cancelled.json()), "idempotent, and the first reason stays");
}

#[tokio::test]
async fn a_running_task_is_asked_to_stop() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    api.start_run(id).await;
    let path = format!("/v1/tasks/{id}/cancel");
    let requested = api.post(&path, "").await;
    assert_snapshot!("cancel_requested", requested.shown());
    let again = api.post(&path, r#"{"reason":"me too"}"#).await;
    assert_eq!((again.status, again.json()), (202, requested.json()));
}

#[tokio::test]
async fn what_has_ended_cannot_be_cancelled() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    api.run(id, Transition::Complete { result: Json::null() }).await;
    assert_snapshot!("cancel_completed", api.post(&format!("/v1/tasks/{id}/cancel"), "").await.shown());
    assert_eq!(api.post("/v1/tasks/0190f3c0-0000-7000-8000-000000000000/cancel", "").await.status, 404);
}

#[tokio::test]
async fn a_bad_request_cancels_nothing() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    let path = format!("/v1/tasks/{id}/cancel");
    let long = json!({"reason": "x".repeat(1025)}).to_string();
    assert_snapshot!("cancel_long_reason", api.post(&path, long).await.shown());
    assert_eq!(api.post(&path, "nope").await.status, 400);
    assert_snapshot!("cancel_no_filter", api.post("/v1/tasks/cancel", r#"{"reason":"all"}"#).await.shown());
    assert_eq!(api.post("/v1/tasks/cancel", r#"{"kind":"a","stat":"queued"}"#).await.status, 422);
    assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.json()["state"], "accepted");
}

async fn cancel_many(api: &Api, body: Value) -> Value {
    let answer = api.post("/v1/tasks/cancel", body.to_string()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// Filters are those of the list; a dry run only counts; what ended is left alone.
#[tokio::test]
async fn many_are_cancelled_by_filter() {
    let api = Api::start().await;
    for body in [r#"{"kind":"a","tags":{"of":"x"}}"#, r#"{"kind":"a","delay_ms":60000}"#, r#"{"kind":"b"}"#] {
        api.submitted(body).await;
    }
    let (runs, ended) = (api.submitted(r#"{"kind":"a"}"#).await, api.submitted(r#"{"kind":"a"}"#).await);
    api.start_run(runs).await;
    api.run(ended, Transition::Complete { result: Json::null() }).await;
    let counts = |cancelled, requested| json!({"cancelled": cancelled, "requested": requested, "next_cursor": null});
    for _ in 0..2 {
        assert_eq!(cancel_many(&api, json!({"kind": "a", "dry_run": true})).await, counts(2, 1));
    }
    assert_eq!(cancel_many(&api, json!({"state": "scheduled"})).await, counts(1, 0));
    assert_eq!(cancel_many(&api, json!({"tag": "of:x", "queue": "default"})).await, counts(1, 0));
    assert_eq!(cancel_many(&api, json!({"kind": "a", "reason": "enough"})).await, counts(0, 1));
    assert_eq!(cancel_many(&api, json!({"kind": "a"})).await, counts(0, 0));
    assert_eq!(api.get("/v1/tasks?state=cancelled").await.json()["tasks"].as_array().unwrap().len(), 2);
    assert_eq!(api.get(&format!("/v1/tasks/{runs}")).await.json()["reason"], "enough");
}

/// A call ends somewhere, and the next goes on there.
#[tokio::test]
async fn more_than_a_call_takes_are_cancelled_by_several() {
    let api = Api::start().await;
    for _ in 0..3 {
        let tasks = vec![json!({"kind": "a"}); 4_000];
        assert_eq!(api.post("/v1/tasks/batch", json!({"tasks": tasks}).to_string()).await.status, 202);
    }
    api.in_several_calls("/v1/tasks/cancel", json!({"kind": "a"}), "cancelled", 12_000).await;
}
