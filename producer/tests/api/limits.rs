//! `/v1/limits`, and submissions that a full queue refuses.

use insta::assert_snapshot;
use serde_json::json;

use crate::support::Api;

#[tokio::test]
async fn a_limit_is_made_replaced_shown_and_deleted() {
    let api = Api::start().await;
    let all = r#"{"max_running":5,"rate":{"tasks":100},"max_queued":1000}"#;
    assert_snapshot!("limit_made", api.put("/v1/limits/queue/default", all).await.shown());
    let key = "/v1/limits/key/customer:*";
    assert_eq!(api.put(key, r#"{"max_running":1}"#).await.status, 201);
    assert_eq!(api.put(key, r#"{"max_running":2}"#).await.status, 200);
    assert_eq!(api.get(key).await.json()["max_running"], 2);
    assert_snapshot!("limits", api.get("/v1/limits").await.shown());
    assert_eq!(api.delete(key).await.status, 204);
    assert_snapshot!("limit_unknown", api.delete(key).await.shown());
    assert_eq!(api.get(key).await.status, 404);
}

#[tokio::test]
async fn a_bad_limit_is_told_what_is_wrong() {
    let api = Api::start().await;
    let bad = r#"{"max_running":0,"rate":{"tasks":0,"burst":0},"max_queued":5}"#;
    assert_snapshot!("limit_bad_numbers", api.put("/v1/limits/kind/a", bad).await.shown());
    assert_snapshot!("limit_empty", api.put("/v1/limits/kind/a", "{}").await.shown());
    assert_snapshot!("limit_unknown_field", api.put("/v1/limits/kind/a", r#"{"max":5}"#).await.shown());
    assert_snapshot!("limit_bad_word", api.put("/v1/limits/worker/a", r#"{"max_running":5}"#).await.shown());
    assert_snapshot!("limit_bad_name", api.put("/v1/limits/key/a*b", r#"{"max_running":5}"#).await.shown());
    assert_eq!(api.put("/v1/limits/kind/a", "{").await.status, 400);
    assert_eq!(api.get("/v1/limits").await.json(), json!({"limits": []}));
}

#[tokio::test]
async fn a_full_queue_refuses_and_records_nothing() {
    let api = Api::start().await;
    api.put("/v1/limits/queue/small", r#"{"max_queued":2}"#).await;
    api.submitted(r#"{"kind":"a","queue":"small"}"#).await;
    // What was taken counts at once, not from the next look on.
    let batch = r#"{"tasks":[{"kind":"a","queue":"small"},{"kind":"a"},{"kind":"a","queue":"small"}]}"#;
    assert_snapshot!("queue_full", api.post("/v1/tasks/batch", batch).await.shown());
    api.submitted(r#"{"kind":"a","queue":"small"}"#).await;
    assert_eq!(api.post("/v1/tasks", r#"{"kind":"a","queue":"small"}"#).await.status, 429);
    api.submitted(r#"{"kind":"a"}"#).await;
    assert_eq!(api.get("/v1/tasks").await.json()["tasks"].as_array().map(Vec::len), Some(3));
}

#[tokio::test]
async fn a_concurrency_key_is_kept_and_checked() {
    let api = Api::start().await;
    let made = api.post("/v1/tasks", r#"{"kind":"a","concurrency_key":"customer:7"}"#).await.json();
    assert_eq!((&made["concurrency_key"], &made["limited_by"]), (&json!("customer:7"), &json!(null)));
    let bad = api.post("/v1/tasks", r#"{"kind":"a","concurrency_key":"a*"}"#).await;
    assert_snapshot!("bad_concurrency_key", bad.shown());
}
