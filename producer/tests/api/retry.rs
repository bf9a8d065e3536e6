//! `POST /v1/tasks/{id}/retry`.

use insta::assert_snapshot;
use tasklane_common::ledger::{Failure, Transition};
use tasklane_common::task::ErrorKind;

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
