//! `POST /v1/tasks/batch`.

use insta::assert_snapshot;

use crate::support::Api;

const PATH: &str = "/v1/tasks/batch";

#[tokio::test]
async fn both_forms_are_recorded_in_order() {
    let api = Api::start().await;
    let answer = api.post(PATH, r#"{"tasks":[{"kind":"a"},{"kind":"b","delay_ms":60000}]}"#).await;
    assert_snapshot!("batch", answer.shown());
    let answer = api.post_lines("{\"kind\":\"c\"}\r\n\n{\"kind\":\"d\"}").await;
    assert_eq!(answer.status, 202);
    let listed = api.get("/v1/tasks").await.json();
    let kinds: Vec<_> = listed["tasks"].as_array().unwrap().iter().map(|task| task["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["d", "c", "b", "a"]);
    let id = answer.json()["tasks"][1]["id"].as_str().unwrap().to_owned();
    assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.json()["kind"], "d");
}

#[tokio::test]
async fn a_repeated_batch_gives_the_same_tasks() {
    let api = Api::start().await;
    let body = r#"{"tasks":[{"kind":"a"},{"kind":"b"}]}"#;
    let first = api.post_once(PATH, "batch-1", body).await;
    let again = api.post_once(PATH, "batch-1", body).await;
    assert_eq!(again.json(), first.json());
    assert_snapshot!("batch_replayed", again.shown());
    assert_eq!(
        api.post_once(PATH, "batch-1", r#"{"tasks":[{"kind":"a"}]}"#).await.json()["code"],
        "idempotency_key_reused"
    );
    assert_eq!(api.count().await, 2);
}

#[tokio::test]
async fn ten_thousand_tasks_pass_and_one_more_does_not() {
    let api = Api::start().await;
    let body = |count: usize| format!(r#"{{"tasks":[{}]}}"#, vec![r#"{"kind":"a"}"#; count].join(","));
    assert_snapshot!("batch_too_many", api.post(PATH, body(10_001)).await.shown());
    assert_snapshot!("batch_too_many_lines", api.post_lines("{\"kind\":\"a\"}\n".repeat(10_001)).await.shown());
    assert_eq!(api.count().await, 0);
    let answer = api.post(PATH, body(10_000)).await;
    assert_eq!((answer.status, answer.json()["tasks"].as_array().unwrap().len()), (202, 10_000));
}

#[tokio::test]
async fn one_bad_task_refuses_the_batch() {
    let api = Api::start().await;
    let body = r#"{"tasks":[{"kind":"a"},{"kind":"b c"},{"kind":"a","max_attempts":0},[]]}"#;
    assert_snapshot!("batch_bad_tasks", api.post(PATH, body).await.shown());
    assert_snapshot!("batch_not_json", api.post(PATH, r#"{"tasks":[{"kind":"a"}"#).await.shown());
    assert_snapshot!("batch_empty", api.post(PATH, r#"{"tasks":[]}"#).await.shown());
    assert_snapshot!("batch_no_list", api.post(PATH, r#"{"kind":"a"}"#).await.shown());
    let lines = format!("{}{{\"kind\":\n{{\"kind\":\"a\",\"tag\":1}}\n", "{\"kind\":\"a\"}\n".repeat(4320));
    assert_snapshot!("batch_bad_line", api.post_lines(lines).await.shown());
    let long = format!("{{\"kind\":\"a\",\"args\":\"{}\"}}", "x".repeat(2 * 1024 * 1024));
    assert_snapshot!("batch_long_line", api.post_lines(long).await.shown());
    assert_eq!(api.count().await, 0);
}

#[tokio::test]
async fn a_batch_of_another_type_is_refused() {
    let api = Api::start().await;
    let request = axum::http::Request::post(PATH).header("content-type", "text/csv");
    let answer = api.send(request.body("kind".to_owned().into()).unwrap()).await;
    assert_snapshot!("batch_media_type", answer.shown());
}
