//! Everything that only looks: tasks, lists, queues, workers, health.

use std::collections::BTreeSet;

use insta::assert_snapshot;
use jiff::Timestamp;
use tasklane_common::ledger::{Failure, Transition};
use tasklane_common::task::{ErrorKind, Json};

use crate::support::Api;

#[tokio::test]
async fn a_task_is_shown_in_all_its_ends() {
    let api = Api::start().await;
    let completed = api.submitted(r#"{"kind":"report.build"}"#).await;
    api.run(completed, Transition::Complete { result: Json::parse("[1]".to_owned()).unwrap() }).await;
    assert_snapshot!("task_completed", api.get(&format!("/v1/tasks/{completed}?wait_ms=60000")).await.shown());
    let discarded = api.submitted(r#"{"kind":"report.build","max_attempts":1}"#).await;
    let error = Failure { message: "no paper".to_owned(), kind: ErrorKind::Error };
    api.run(discarded, Transition::Discard { reason: "exhausted".to_owned(), error }).await;
    assert_snapshot!("task_discarded", api.get(&format!("/v1/tasks/{discarded}")).await.shown());
}

#[tokio::test]
async fn an_expired_result_is_told() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"report.build","result_ttl_ms":1}"#).await;
    api.run(id, Transition::Complete { result: Json::parse("[1]".to_owned()).unwrap() }).await;
    let expired = async { while api.app.gate.ledger().expire_results(Timestamp::MAX, 1).await.unwrap() == 0 {} };
    tokio::time::timeout(std::time::Duration::from_secs(20), expired).await.unwrap();
    assert_snapshot!("task_result_expired", api.get(&format!("/v1/tasks/{id}")).await.shown());
}

#[tokio::test]
async fn a_wait_for_an_earlier_task_ends_with_it() {
    let api = Api::start().await;
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    let path = format!("/v1/tasks/{id}?wait_ms=60000");
    let (answer, ()) = tokio::join!(api.get(&path), api.run(id, Transition::Cancel { reason: "enough".to_owned() }));
    assert_eq!((answer.status, answer.json()["state"].as_str()), (200, Some("cancelled")));
    let id = api.submitted(r#"{"kind":"a"}"#).await;
    let answer = api.get(&format!("/v1/tasks/{id}?wait_ms=30")).await;
    assert_eq!((answer.status, answer.json()["state"].as_str()), (200, Some("accepted")));
}

#[tokio::test]
async fn unknown_tasks_are_told() {
    let api = Api::start().await;
    assert_snapshot!("task_unknown", api.get("/v1/tasks/0190f3c0-0000-7000-8000-000000000000").await.shown());
    assert_snapshot!("task_bad_id", api.get("/v1/tasks/seven").await.shown());
}

#[tokio::test]
async fn pages_follow_each_other() {
    let api = Api::start().await;
    for n in 0..5 {
        api.submitted(&format!(r#"{{"kind":"a","args":{n},"tags":{{"parity":"{}"}}}}"#, n % 2)).await;
    }
    let first = api.get("/v1/tasks?limit=2").await;
    assert_snapshot!("page", first.shown());
    let mut seen = Vec::new();
    let mut page = first.json();
    loop {
        seen.extend(page["tasks"].as_array().unwrap().iter().map(|task| task["args"].as_i64().unwrap()));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        page = api.get(&format!("/v1/tasks?limit=2&cursor={cursor}")).await.json();
    }
    assert_eq!(seen, [4, 3, 2, 1, 0]);
    let odd = api.get("/v1/tasks?tag=parity:1&state=accepted&kind=a&queue=default").await.json();
    assert_eq!(odd["tasks"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn bad_filters_are_all_named() {
    let api = Api::start().await;
    let path = "/v1/tasks?state=done&kind=a%20b&queue=Q&tag=x&limit=1001&cursor=0190f3c0&order=asc";
    assert_snapshot!("bad_filters", api.get(path).await.shown());
}

#[tokio::test]
async fn queues_and_workers_are_shown() {
    let api = Api::start().await;
    api.worker().await;
    api.submitted(r#"{"kind":"a","queue":"slow"}"#).await;
    api.submitted(r#"{"kind":"a","queue":"slow","delay_ms":60000}"#).await;
    assert_snapshot!("queues", api.get("/v1/queues").await.shown());
    assert_snapshot!("queue", api.get("/v1/queues/slow").await.shown());
    assert_snapshot!("queue_unknown", api.get("/v1/queues/nothing").await.shown());
    assert_snapshot!("workers", api.get("/v1/workers").await.shown());
}

#[tokio::test]
async fn the_producer_is_ready_without_a_broker() {
    let api = Api::start().await;
    assert_snapshot!("healthy", api.get("/healthz").await.shown());
    assert_snapshot!("ready", api.get("/readyz").await.shown());
    api.submitted(r#"{"kind":"a","queue":"measured"}"#).await;
    let metrics = api.get("/metrics").await.text;
    for line in [
        r#"tasklane_tasks_submitted_total{queue="measured"} 1"#,
        r#"tasklane_http_requests_total{method="GET",route="/readyz",status="200"}"#,
        r#"tasklane_http_request_seconds_bucket{method="POST",route="/v1/tasks""#,
        // Nothing of these has happened yet.
        r#"tasklane_submissions_refused_total{queue="measured"} 0"#,
        r#"tasklane_publications_total{outcome="refused"} 0"#,
        r#"tasklane_http_requests_total{method="DELETE",route="/v1/limits/{of}/{name}",status="500"} 0"#,
        "tasklane_pruned_total 0",
        // What the ledger says.
        r#"tasklane_queue_tasks{queue="measured",state="accepted"} 1"#,
        r#"tasklane_queue_oldest_seconds{queue="measured"}"#,
        "tasklane_workers 0",
        r#"tasklane_build_info{program="producer",version=""#,
    ] {
        assert!(metrics.contains(line), "no {line} in:\n{metrics}");
    }
    let named = |prefix: &str| -> BTreeSet<String> {
        let lines = metrics.lines().filter_map(|line| line.strip_prefix(prefix));
        lines.filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
    };
    assert_eq!(named("# HELP "), named("# TYPE "), "each has words");
}
