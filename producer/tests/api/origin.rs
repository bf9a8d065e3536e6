//! Pages of other sites, and names that were pointed here, change and see nothing.

use axum::body::Body;
use axum::http::Request;
use insta::assert_snapshot;

use crate::support::Api;

#[tokio::test]
async fn a_foreign_page_pauses_nothing_and_reads_nothing() {
    let api = Api::start().await;
    let foreign_form = Request::post("/v1/queues/slow/pause").header("origin", "https://evil.example");
    let answer = api.send(foreign_form.body(Body::empty()).unwrap()).await;
    assert_snapshot!("origin_foreign", answer.shown());
    let rebound = Request::get("/v1/tasks").header("host", "evil.example:8080");
    assert_snapshot!("origin_unknown_host", api.send(rebound.body(Body::empty()).unwrap()).await.shown());
    let cross_site = Request::post("/v1/queues/slow/pause").header("sec-fetch-site", "cross-site");
    assert_eq!(api.send(cross_site.body(Body::empty()).unwrap()).await.status, 403);
    assert_eq!(api.get("/v1/queues/slow").await.status, 404, "nobody paused it");
    let metrics = Request::get("/metrics").header("host", "evil.example");
    assert_eq!(api.send(metrics.body(Body::empty()).unwrap()).await.status, 403);
}
