//! `POST /v1/tasks/{id}/retry` and `POST /v1/tasks/retry`.

use insta::assert_snapshot;
use serde_json::{Value, json};
use tasklane_common::ledger::{Failure, ListQuery, Transition};
use tasklane_common::task::{ErrorKind, TaskId};

use crate::support::Api;

#[tokio::test]
async fn a_failure_can_run_again() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a","max_attempts":1}"#).await;
    let error = Failure { message: "no paper".to_owned(), kind: ErrorKind::Error };
    api.run(id, Transition::Discard { reason: "exhausted".to_owned(), error }).await;
    let path = format!("/v1/tasks/{id}/retry");
    assert_snapshot!("retried", api.post(&path, "").await.shown());
    assert_snapshot!("retried_twice", api.post(&path, "").await.shown());
    api.run(id, Transition::Complete { result: tasklane_common::task::Json::null() }).await;
    assert_eq!(api.post(&path, "").await.status, 409);
}

#[tokio::test]
async fn nothing_cannot_run_again() {
    let api = Api::start().await;
    let answer = api.post("/v1/tasks/0190f3c0-0000-7000-8000-000000000000/retry", "").await;
    assert_snapshot!("retry_unknown", answer.shown());
}

/// A task that has failed for good.
async fn failed(api: &Api, body: &str) -> TaskId {
    let id = api.submitted(body).await;
    let error = Failure { message: "no paper".to_owned(), kind: ErrorKind::Error };
    api.run(id, Transition::Discard { reason: "exhausted".to_owned(), error }).await;
    id
}

#[tokio::test]
async fn other_args_make_another_task() {
    let api = Api::start().await;
    let body = r#"{"kind":"a","queue":"q","args":{"to":"ada"},"tags":{"k":"v"},"max_attempts":3,"timeout_ms":5000,"unique_key":"one"}"#;
    let id = failed(&api, body).await;
    let before = api.get(&format!("/v1/tasks/{id}")).await.json();
    let path = format!("/v1/tasks/{id}/retry");
    let again = api.post_once(&path, "k1", r#"{"args":{"to":"bob"}}"#).await;
    assert_snapshot!("retried_with_args", again.shown());
    assert_eq!(again.json()["retried_from"], before["id"]);
    let mut after = api.get(&format!("/v1/tasks/{id}")).await.json();
    assert_eq!(after["retried_by"].take(), again.json()["id"]);
    assert_eq!(after, before, "the original stays as it is");
    assert_eq!(retry_many(&api, json!({"kind": "a"})).await["retried"], 0, "its work is done by another");
    let asked_for = json!({"kind": "a", "replaced": true, "dry_run": true});
    assert_eq!(retry_many(&api, asked_for).await["conflicts"], 1, "and that one holds the unique key");
    let repeated = api.post_once(&path, "k1", r#"{ "args": {"to": "bob"} }"#).await;
    assert_eq!((repeated.status, &repeated.json()["id"]), (202, &again.json()["id"]));
    assert_eq!(repeated.headers["idempotent-replayed"], "true");
    assert_eq!(api.post_once(&path, "k1", r#"{"args":1}"#).await.status, 422);
    // The new one holds the unique key until it has ended.
    assert_snapshot!("retried_with_args_key_taken", api.post(&path, r#"{"args":1}"#).await.shown());
    assert_eq!(api.post(&path, "").await.status, 409);
}

#[tokio::test]
async fn a_bad_retry_starts_nothing() {
    let api = Api::start().await;
    let id = failed(&api, r#"{"kind":"a"}"#).await;
    let path = format!("/v1/tasks/{id}/retry");
    assert_snapshot!("retry_bad_args", api.post(&path, r#"{"args":1e999}"#).await.shown());
    assert_snapshot!("retry_unknown_field", api.post(&path, r#"{"arg":1}"#).await.shown());
    assert_eq!(api.post(&path, "nope").await.status, 400);
    assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.json()["state"], "discarded");
    let waits = api.submitted(r#"{"kind":"a"}"#).await;
    assert_eq!(api.post(&format!("/v1/tasks/{waits}/retry"), r#"{"args":1}"#).await.status, 409);
    let unknown = "/v1/tasks/0190f3c0-0000-7000-8000-000000000000/retry";
    assert_eq!(api.post(unknown, r#"{"args":1}"#).await.status, 404);
    assert_eq!(api.count().await, 2);
    assert_snapshot!("retry_no_filter", api.post("/v1/tasks/retry", r#"{"per_second":5}"#).await.shown());
    let faults = r#"{"state":"running","kind":"","cursor":"x","per_second":10001}"#;
    assert_snapshot!("retry_many_faults", api.post("/v1/tasks/retry", faults).await.shown());
    assert_eq!(api.post("/v1/tasks/retry", r#"{"kind":"a","stat":"discarded"}"#).await.status, 422);
}

async fn retry_many(api: &Api, body: Value) -> Value {
    let answer = api.post("/v1/tasks/retry", body.to_string()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// Filters are those of the list; a dry run only counts; what was cancelled is left alone unless it is asked for.
#[tokio::test]
async fn many_failures_are_retried_by_filter() {
    let api = Api::start().await;
    for body in [r#"{"kind":"a","tags":{"of":"x"}}"#, r#"{"kind":"a","queue":"q"}"#, r#"{"kind":"b"}"#] {
        failed(&api, body).await;
    }
    for body in [r#"{"kind":"a","unique_key":"one"}"#, r#"{"kind":"a","unique_key":"one"}"#] {
        let id = api.submitted(body).await;
        assert_eq!(api.post(&format!("/v1/tasks/{id}/cancel"), "").await.status, 200);
    }
    let counts = |retried, conflicts| json!({"retried": retried, "conflicts": conflicts, "next_cursor": null});
    for _ in 0..2 {
        assert_eq!(retry_many(&api, json!({"kind": "a", "dry_run": true})).await, counts(2, 0));
        let cancelled = json!({"state": "cancelled", "dry_run": true});
        assert_eq!(retry_many(&api, cancelled).await, counts(1, 1));
    }
    assert_eq!(retry_many(&api, json!({"tag": "of:x"})).await, counts(1, 0));
    assert_eq!(retry_many(&api, json!({"queue": "q", "state": "discarded"})).await, counts(1, 0));
    assert_eq!(retry_many(&api, json!({"kind": "a"})).await, counts(0, 0));
    assert_eq!(retry_many(&api, json!({"state": "cancelled", "per_second": 1})).await, counts(1, 1));
    assert_eq!(api.get("/v1/tasks?state=discarded").await.json()["tasks"].as_array().unwrap().len(), 1);
}

/// One by its id, the others by filter; those that have never failed only where that is asked for.
#[tokio::test]
async fn what_waits_for_its_time_can_be_started() {
    let api = Api::start().await;
    let error = Failure { message: "no paper".to_owned(), kind: ErrorKind::Error };
    let mut ids = Vec::new();
    for _ in 0..3 {
        let id = api.submitted(r#"{"kind":"mail.send"}"#).await;
        let transition = Transition::Retry { delay: std::time::Duration::from_secs(3600), error: error.clone() };
        api.run(id, transition).await;
        ids.push(id);
    }
    api.submitted(r#"{"kind":"mail.send","delay_ms":3600000}"#).await;
    let path = format!("/v1/tasks/{}/retry", ids[0]);
    assert_eq!(api.post(&path, r#"{"args":1}"#).await.status, 409, "it will do its work itself");
    let answer = api.post(&path, "").await;
    assert_eq!((answer.status, &answer.json()["state"]), (202, &json!("accepted")));
    assert_eq!(retry_many(&api, json!({"kind": "mail.send"})).await["retried"], 0);
    assert_eq!(retry_many(&api, json!({"state": "retryable", "per_second": 1})).await["retried"], 2);
    assert_eq!(retry_many(&api, json!({"state": "scheduled", "kind": "mail.send"})).await["retried"], 1);
    assert_eq!(api.get("/v1/tasks?state=accepted").await.json()["tasks"].as_array().unwrap().len(), 4);
}

/// The starts of all calls that follow each other are spread evenly.
#[tokio::test]
async fn a_mass_retry_does_not_come_all_at_once() {
    let api = Api::start().await;
    for _ in 0..3 {
        let tasks = vec![json!({"kind": "a"}); 4_000];
        assert_eq!(api.post("/v1/tasks/batch", json!({"tasks": tasks}).to_string()).await.status, 202);
    }
    let mut cursor = Value::Null;
    loop {
        let body = json!({"kind": "a", "cursor": cursor}).to_string();
        cursor = api.post("/v1/tasks/cancel", body).await.json()["next_cursor"].clone();
        if cursor.is_null() {
            break;
        }
    }
    let (mut retried, mut cursor) = (0, Value::Null);
    loop {
        let body = json!({"state": "cancelled", "per_second": 100, "cursor": cursor});
        let done = retry_many(&api, body).await;
        retried += done["retried"].as_u64().unwrap();
        cursor = done["next_cursor"].clone();
        if cursor.is_null() {
            break;
        }
    }
    assert_eq!(retried, 12_000);
    let query = ListQuery { limit: 12_000, ..ListQuery::default() };
    let tasks = api.app.gate.ledger().list(query).await.unwrap().tasks;
    let (newest, oldest) = (&tasks[0], &tasks[tasks.len() - 1]);
    let spread = oldest.run_at.duration_since(newest.run_at).as_secs_f64();
    assert!((spread - 119.99).abs() < 5.0, "12,000 tasks, 100 a second: {spread} s");
    let thousand = tasks[1_000].run_at.duration_since(newest.run_at).as_secs_f64();
    assert!((thousand - 10.0).abs() < 3.0, "{thousand}");
}
