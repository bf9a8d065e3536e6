//! The checked-in document is the one that the routes give.

use std::path::Path;

use tasklane_producer::router;
use tasklane_producer::routes::docs;

use crate::support::Api;

/// Writes the document anew: `UPDATE_OPENAPI=1 cargo test -p tasklane-producer`.
#[test]
fn the_checked_in_document_is_up_to_date() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let document = docs::document(&router::openapi());
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&file, &document).unwrap();
    }
    let checked_in = std::fs::read(&file).unwrap_or_default();
    assert!(checked_in == document, "producer/openapi.json is out of date: run with UPDATE_OPENAPI=1");
}

#[tokio::test]
async fn the_document_is_served_and_names_every_path_of_the_contract() {
    let api = Api::start().await;
    let document = api.get("/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let paths: Vec<_> = document["paths"].as_object().unwrap().keys().cloned().collect();
    for path in [
        "/v1/tasks",
        "/v1/tasks/batch",
        "/v1/tasks/{id}",
        "/v1/tasks/{id}/retry",
        "/v1/tasks/retry",
        "/v1/tasks/{id}/cancel",
        "/v1/tasks/cancel",
        "/v1/tasks/purge",
        "/v1/queues/{queue}/move",
        "/v1/groups/{id}",
        "/v1/queues",
        "/v1/queues/{queue}",
        "/v1/queues/{queue}/pause",
        "/v1/queues/{queue}/resume",
        "/v1/schedules",
        "/v1/schedules/{name}",
        "/v1/workers",
        "/v1/events",
        "/healthz",
        "/readyz",
        "/metrics",
    ] {
        assert!(paths.iter().any(|known| known == path), "{path} is not in {paths:?}");
    }
    let page = api.get("/docs").await;
    assert!(page.text.contains("POST /v1/tasks/batch") && !page.text.contains("src="), "{}", page.text);
}
