//! `GET /v1/events` while the broker is away: what may be asked for, how many may ask, and when the stream ends.

use std::time::Duration;

use axum::body::to_bytes;
use insta::assert_snapshot;
use tasklane_common::events::feed::LISTENERS_MAX;
use tokio::time::timeout;

use crate::support::Api;

const LIMIT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn parameters_that_do_not_fit_are_told() {
    let api = Api::start().await;
    assert_snapshot!("events_bad_query", api.get("/v1/events?kind=a*b&queue=A&state=done&tag=a:b").await.shown());
}

#[tokio::test]
async fn a_stream_begins_at_once_and_ends_when_the_producer_stops() {
    let api = Api::start().await;
    let response = api.open("/v1/events?kind=email.*&queue=emails&state=running").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["cache-control"], "no-cache");
    api.app.stopping.cancel();
    let body = timeout(LIMIT, to_bytes(response.into_body(), 1_000)).await.unwrap().unwrap();
    assert!(body.is_empty(), "nothing has happened: {body:?}");
}

#[tokio::test]
async fn listeners_have_a_bound_and_those_that_go_make_room() {
    let api = Api::start().await;
    let mut open = Vec::new();
    for _ in 0..LISTENERS_MAX {
        open.push(api.open("/v1/events").await);
    }
    assert_snapshot!("events_too_many", api.get("/v1/events").await.shown());
    open.pop();
    assert_eq!(api.open("/v1/events").await.status(), 200);
}

#[tokio::test]
async fn nothing_is_wanted_while_nobody_hears_that_it_is() {
    let api = Api::start().await;
    let _open = api.open("/v1/events").await;
    api.submitted(r#"{"kind":"a"}"#).await;
    assert!(!api.app.events.wanted(), "without a broker nothing could be told");
}
