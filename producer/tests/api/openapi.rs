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
    let answer = api.get("/openapi.json").await;
    let document = answer.json();
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
    let first = paths.iter().min_by_key(|path| answer.text.find(&format!("\"{path}\": {{")));
    assert_eq!(first.map(String::as_str), Some("/v1/tasks"), "what people look for first is first");
}

#[tokio::test]
async fn the_reference_loads_nothing_from_another_host() {
    let api = Api::start().await;
    let page = api.get("/docs").await;
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'self'; ") && !policy.contains("http"), "{policy}");
    let scripts: Vec<_> = page.text.split("src=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(scripts, ["docs/viewer.js", "docs/start.js"]);
    assert!(api.get("/docs/viewer.js").await.text.contains("createApiReference"));
    assert!(api.get("/docs/start.js").await.text.contains("url: 'openapi.json'"));
}

/// Every operation and every field says in a reader's words what it is.
#[test]
fn the_reference_has_words_for_everything_and_no_links_of_the_source() {
    let document = serde_json::to_value(router::openapi()).unwrap();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let told = ["summary", "tags"].iter().all(|key| !operation[key].is_null());
            assert!(told, "{method} {path} needs a summary and a tag");
            let answers = &operation["responses"];
            assert!(["400", "403", "405", "500"].iter().all(|status| answers[status].is_object()), "{method} {path}");
            if !operation["requestBody"].is_null() {
                assert!(answers["408"].is_object(), "{method} {path}");
                assert!(
                    !operation["requestBody"]["content"]["application/json"]["example"].is_null(),
                    "{method} {path}"
                );
            }
            if ["submitTask", "submitBatch", "retryTask"].iter().any(|id| operation["operationId"] == *id) {
                assert!(answers["429"].is_object(), "{method} {path} records tasks");
            }
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                assert!(parameter["description"].is_string(), "{method} {path}: {}", parameter["name"]);
            }
        }
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        assert!(schema["description"].is_string(), "{name}");
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            let described = property["description"].is_string() || property["oneOf"][0]["description"].is_string();
            assert!(described, "{name}.{field}");
        }
    }
    let text = document.to_string();
    let link = text.find("[`").map(|at| &text[at.saturating_sub(80)..at + 60]);
    assert_eq!(link, None, "a link of the source's documentation is not one of the reference");
}
