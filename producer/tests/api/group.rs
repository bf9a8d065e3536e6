//! Batches with an end: `then` of `POST /v1/tasks/batch`, and `GET /v1/groups/{id}`.

use insta::assert_snapshot;
use serde_json::json;
use tasklane_common::ledger::Transition;
use tasklane_common::task::{Json, TaskId};

use crate::support::Api;

const BATCH: &str = "/v1/tasks/batch";

fn body(then: serde_json::Value) -> String {
    json!({"tasks": [{"kind": "a"}, {"kind": "b"}], "then": then}).to_string()
}

#[tokio::test]
async fn a_batch_with_an_end_is_recorded_looked_at_and_followed() {
    let api = Api::start().await;
    let answer =
        api.post(BATCH, body(json!({"kind": "email.done", "args": {"to": ["all"]}, "tags": {"k": "v"}}))).await;
    assert_snapshot!("group_batch", answer.shown());
    let group = answer.json()["group"]["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/groups/{group}");
    assert_snapshot!("group_open", api.get(&path).await.shown());
    let ids: Vec<TaskId> =
        serde_json::from_value(json!([answer.json()["tasks"][0]["id"], answer.json()["tasks"][1]["id"]])).unwrap();
    assert_eq!(api.get(&format!("/v1/tasks/{}", ids[0])).await.json()["group_id"], json!(group));
    api.submitted(r#"{"kind": "other"}"#).await;
    let members = api.get(&format!("/v1/tasks?group={group}")).await.json();
    let members: Vec<_> = members["tasks"].as_array().unwrap().iter().map(|task| task["id"].clone()).collect();
    assert_eq!(members, [json!(ids[1]), json!(ids[0])]);
    api.run(ids[0], Transition::Complete { result: Json::null() }).await;
    api.run(ids[1], Transition::Cancel { reason: "no".to_owned() }).await;
    let closed = api.app.gate.ledger().close_group(group.parse().unwrap()).await.unwrap().unwrap();
    let shown = api.get(&path).await;
    assert_snapshot!("group_closed", shown.shown());
    assert_eq!(shown.json()["then"]["id"], json!(closed.then_id));
    let task = api.get(&format!("/v1/tasks/{}", closed.then_id)).await;
    assert_snapshot!("group_then", task.shown());
}

#[tokio::test]
async fn a_repeated_batch_gives_the_same_group_and_another_end_is_another_body() {
    let api = Api::start().await;
    let first = api.post_once(BATCH, "batch-1", &body(json!({"kind": "done"}))).await;
    let again = api.post_once(BATCH, "batch-1", &body(json!({"kind": "done"}))).await;
    assert_eq!((again.status, again.json()), (202, first.json()));
    assert!(again.json()["group"]["id"].is_string());
    assert_eq!(again.headers["idempotent-replayed"], "true");
    for other in [json!({"kind": "other"}), json!({"kind": "done", "args": 1}), json!(null)] {
        assert_eq!(api.post_once(BATCH, "batch-1", &body(other)).await.json()["code"], "idempotency_key_reused");
    }
    assert_eq!(api.count().await, 2);
    // Without an end a batch is what it was before: `null` stands for a field left out.
    let plain = api.post_once(BATCH, "batch-2", r#"{"tasks":[{"kind":"a"}]}"#).await;
    let null = api.post_once(BATCH, "batch-2", r#"{"tasks":[{"kind":"a"}],"then":null}"#).await;
    assert_eq!((null.json(), plain.json().get("group")), (plain.json(), None));
}

#[tokio::test]
async fn every_fault_of_an_end_is_named() {
    let api = Api::start().await;
    let bad = json!({
        "kind": "a b", "delay_ms": 1, "run_at": "2030-01-31T08:00:00Z", "unique_key": "k", "on_conflict": "reject",
        "max_attempts": 0, "queue": "A", "tags": {"a:b": "x"}
    });
    assert_snapshot!("group_bad_then", api.post(BATCH, body(bad)).await.shown());
    assert_snapshot!("group_unknown_field", api.post(BATCH, body(json!({"kind": "a", "colour": 1}))).await.shown());
    let existing = json!({
        "tasks": [{"kind": "a"}, {"kind": "a", "unique_key": "k", "on_conflict": "return_existing"}],
        "then": {"kind": "done"}
    });
    assert_snapshot!("group_return_existing", api.post(BATCH, existing.to_string()).await.shown());
    let paths = async |then: serde_json::Value| {
        let answer = api.post(BATCH, body(then)).await;
        assert_eq!(answer.status, 422, "{answer:?}");
        let errors = answer.json()["errors"].as_array().unwrap().clone();
        errors.iter().map(|error| error["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(paths(json!({})).await, ["then.kind"]);
    assert_eq!(paths(json!([])).await, ["then"]);
    assert_eq!(paths(json!({"kind": "a", "args": "x".repeat(70_000)})).await, ["then.args"]);
    let deep: serde_json::Value = (0..127).fold(json!(1), |inner, _| json!([inner]));
    assert_eq!(paths(json!({"kind": "a", "args": deep})).await, ["then.args"], "its handler could not read it");
    let empty = api.post(BATCH, r#"{"tasks":[],"then":{"kind":"a"}}"#).await;
    assert_eq!(empty.json()["errors"][0]["path"], "tasks");
    let lines = api.post_lines("{\"kind\":\"a\"}\n{\"then\":{\"kind\":\"a\"}}\n").await;
    assert_eq!(lines.json()["errors"][0]["path"], "line 2: then");
    assert_eq!(api.count().await, 0);
}

#[tokio::test]
async fn an_unknown_group_is_told() {
    let api = Api::start().await;
    assert_snapshot!("group_unknown", api.get("/v1/groups/01a20751-1f82-705d-a198-4567bb46f288").await.shown());
    assert_snapshot!("group_no_id", api.get("/v1/groups/none").await.shown());
    let none = api.get("/v1/tasks?group=01a20751-1f82-705d-a198-4567bb46f288").await.json();
    assert_eq!(none, json!({"tasks": [], "next_cursor": null}));
    assert_snapshot!("group_bad_filter", api.get("/v1/tasks?group=none").await.shown());
}
