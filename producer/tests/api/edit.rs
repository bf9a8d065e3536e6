//! `PATCH /v1/tasks/{id}`.

use insta::assert_snapshot;
use tasklane_common::ledger::{Failure, Transition};
use tasklane_common::task::{ErrorKind, Json};

use crate::support::Api;

const UNKNOWN: &str = "/v1/tasks/0190f3c0-0000-7000-8000-000000000000";

#[tokio::test]
async fn a_waiting_task_is_changed() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a","args":{"to":"ada"},"tags":{"k":"v"},"unique_key":"one"}"#).await;
    let path = format!("/v1/tasks/{id}");
    let edit = r#"{"args":{"to":"bob"},"delay_ms":3600000,"queue":"slow","priority":"high","max_attempts":3,"timeout_ms":5000}"#;
    let edited = api.patch(&path, edit).await;
    assert_snapshot!("edited", edited.shown());
    assert_eq!(api.get(&path).await.json(), edited.json());
    let earlier = api.patch(&path, r#"{"run_at":"2020-01-01T00:00:00Z"}"#).await.json();
    assert!(earlier["run_at"].as_str() < edited.json()["run_at"].as_str(), "{earlier}");
    assert_eq!(earlier["args"]["to"], "bob", "what is left out stays");
    api.run(id, Transition::Complete { result: Json::null() }).await;
}

#[tokio::test]
async fn what_runs_or_has_ended_is_not_changed() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    let path = format!("/v1/tasks/{id}");
    let fence = api.start_run(id).await;
    assert_snapshot!("edit_running", api.patch(&path, r#"{"args":1}"#).await.shown());
    let transition = Transition::Complete { result: Json::null() };
    let settlement = tasklane_common::ledger::Settlement { id, fence, transition };
    api.app.gate.ledger().settle(settlement).await.unwrap();
    assert_snapshot!("edit_completed", api.patch(&path, r#"{"delay_ms":0}"#).await.shown());
    assert_eq!(api.get(&path).await.json()["args"], serde_json::json!({}));
    assert_snapshot!("edit_unknown", api.patch(UNKNOWN, r#"{"args":1}"#).await.shown());
}

#[tokio::test]
async fn a_bad_edit_changes_nothing() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    let path = format!("/v1/tasks/{id}");
    let before = api.get(&path).await.json();
    let faults =
        r#"{"run_at":"soon","delay_ms":-1,"args":1e999,"queue":"A","priority":"top","max_attempts":0,"timeout_ms":0}"#;
    assert_snapshot!("edit_many_faults", api.patch(&path, faults).await.shown());
    assert_snapshot!("edit_nothing", api.patch(&path, "{}").await.shown());
    assert_snapshot!("edit_unknown_field", api.patch(&path, r#"{"args":2,"kind":"b"}"#).await.shown());
    let both = r#"{"run_at":"2030-01-31T08:00:00Z","delay_ms":5}"#;
    assert_snapshot!("edit_two_times", api.patch(&path, both).await.shown());
    let large = format!(r#"{{"args":"{}"}}"#, "x".repeat(1024 * 1024));
    assert_snapshot!("edit_args_too_large", api.patch(&path, large).await.shown());
    let huge = format!(r#"{{"args":"{}"}}"#, "x".repeat(2 * 1024 * 1024));
    assert_eq!(api.patch(&path, huge).await.status, 413);
    assert_snapshot!("edit_no_json", api.patch(&path, "nope").await.shown());
    assert_eq!(api.get(&path).await.json(), before);
}

#[tokio::test]
async fn an_attempt_must_be_left() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    for _ in 0..2 {
        let error = Failure { message: "no paper".to_owned(), kind: ErrorKind::Error };
        api.run(id, Transition::Retry { delay: std::time::Duration::ZERO, error }).await;
    }
    let path = format!("/v1/tasks/{id}");
    assert_snapshot!("edit_no_attempt_left", api.patch(&path, r#"{"args":2,"max_attempts":2}"#).await.shown());
    assert_eq!(api.patch(&path, r#"{"max_attempts":3}"#).await.json()["max_attempts"], 3);
}
