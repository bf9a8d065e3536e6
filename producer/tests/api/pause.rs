//! `POST /v1/queues/{queue}/pause` and `…/resume`.

use insta::assert_snapshot;
use serde_json::json;
use tasklane_common::ledger::{Belief, Caller, Claim, ClaimRequest, Refusal};
use tasklane_common::task::{Guarantee, QueueName};

use crate::support::Api;

#[tokio::test]
async fn a_paused_queue_is_shown_and_grants_nothing() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a","queue":"slow"}"#).await;
    let paused = api.post("/v1/queues/slow/pause", "").await;
    assert_snapshot!("queue_paused", paused.shown());
    assert_eq!(api.post("/v1/queues/slow/pause", "").await.shown(), paused.shown(), "idempotent");
    assert_eq!(api.get("/v1/queues/slow").await.json()["paused"], true);
    let (worker, guarantee) = (api.worker().await, Guarantee::AtLeastOnce);
    let belief = Belief::of(&api.app.gate.ledger().get(vec![id]).await.unwrap()[0]);
    let request = ClaimRequest { id, worker, guarantee, belief, crashes_below: i32::MAX };
    let claim = api.app.gate.ledger().claim(request).await.unwrap();
    assert_eq!(claim, Claim::Refused(Refusal::Paused));
    for _ in 0..2 {
        let resumed = api.post("/v1/queues/slow/resume", "").await;
        assert_eq!((resumed.status, &resumed.json()["paused"]), (200, &json!(false)));
    }
    api.start_run(id).await;
}

/// Before the first task of a queue there may be a pause.
#[tokio::test]
async fn a_queue_is_paused_before_it_has_tasks() {
    let api = Api::start().await;
    assert_eq!(api.get("/v1/queues/later").await.status, 404);
    assert_eq!(api.post("/v1/queues/later/pause", "").await.status, 200);
    assert_snapshot!("queues_one_paused", api.get("/v1/queues").await.shown());
    assert_eq!(api.post("/v1/queues/later/resume", "").await.json()["paused"], false);
    assert_eq!(api.get("/v1/queues/later").await.status, 404);
}

/// Every worker holds each pause in memory and asks for all of them.
#[tokio::test]
async fn there_is_an_end_to_paused_queues() {
    let api = Api::start().await;
    for number in 0..1_000 {
        let queue = QueueName::parse(&format!("q{number}")).unwrap();
        api.app.gate.ledger().set_paused(queue, true, Caller::UNKNOWN).await.unwrap();
    }
    assert_snapshot!("pause_too_many", api.post("/v1/queues/more/pause", "").await.shown());
    assert_eq!(api.post("/v1/queues/q7/pause", "").await.status, 200, "it is paused already");
    assert_eq!(api.post("/v1/queues/q7/resume", "").await.status, 200);
    assert_eq!(api.post("/v1/queues/more/pause", "").await.status, 200);
}

#[tokio::test]
async fn what_is_no_name_is_no_queue() {
    let api = Api::start().await;
    assert_snapshot!("pause_bad_name", api.post("/v1/queues/Slow%20One/pause", "").await.shown());
    assert_eq!(api.post("/v1/queues/Slow%20One/resume", "").await.status, 404);
}
