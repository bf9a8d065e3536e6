//! What every operation of the OpenAPI document has: the answers that any request may get, and examples.

use serde_json::{Value, json};
use utoipa::openapi::path::{Operation, Parameter, PathItem};
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::openapi::{ContentBuilder, HeaderBuilder, OpenApi, Ref, RefOr};

use crate::error::PROBLEM_JSON;

/// Those that hang on the listener and on the process, not on what is asked.
const ANYWHERE: [(&str, &str); 4] = [
    ("400", "A path, parameter or header that does not fit"),
    ("403", "A page of another site asks, or by a name that is not known to be this program's"),
    ("405", "The path does not know the method; `Allow` lists those it knows"),
    ("500", "A fault of the program's own; its log has more under the request's id"),
];
/// That of a body that is too slow.
const WITH_BODY: (&str, &str) = ("408", "The body did not arrive in time");
/// That of what is recorded where too much waits.
const RECORDING: (&str, &str) =
    ("429", "So many tasks wait in a queue that it takes no more; `Retry-After` says when there may be room");
/// The operations that record tasks.
const RECORDS: [&str; 3] = ["submitTask", "submitBatch", "retryTask"];

/// Completes the document.
pub(crate) fn complete(document: &mut OpenApi) {
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            add_answers(operation);
            for parameter in operation.parameters.iter_mut().flatten() {
                if let RefOr::T(parameter) = parameter {
                    show(path, parameter);
                }
            }
            if let (Some(RefOr::T(body)), Some(id)) = (&mut operation.request_body, &operation.operation_id)
                && let Some(RefOr::T(content)) = body.content.get_mut("application/json")
            {
                content.example = body_of(id);
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete].into_iter().flatten()
}

fn add_answers(operation: &mut Operation) {
    let id = operation.operation_id.as_deref().unwrap_or_default();
    let with_body = operation.request_body.is_some().then_some(WITH_BODY);
    let recording = RECORDS.contains(&id).then_some(RECORDING);
    for (status, description) in ANYWHERE.into_iter().chain(with_body).chain(recording) {
        operation.responses.responses.entry(status.to_owned()).or_insert_with(|| {
            let schema = Ref::from_schema_name("Problem");
            let content = ContentBuilder::new().schema(Some(schema)).build();
            let answer = ResponseBuilder::new().description(description).content(PROBLEM_JSON, content);
            let text = |kind| HeaderBuilder::new().schema(Some(ObjectBuilder::new().schema_type(kind))).build();
            RefOr::T(match status {
                "405" => answer.header("Allow", text(Type::String)).build(),
                "429" => answer.header("Retry-After", text(Type::Integer)).build(),
                _ => answer.build(),
            })
        });
    }
}

/// What a reader may try, and what holds when a parameter is left out.
fn show(path: &str, parameter: &mut Parameter) {
    let (default, example) = match parameter.name.as_str() {
        "wait_ms" => (Some(json!(0)), json!(5000)),
        "limit" => (Some(json!(50)), json!(100)),
        "id" => (None, json!("0197f3f0-0000-7000-8000-000000000000")),
        "group" => (None, json!("0197f3f0-0000-7000-8000-000000000000")),
        "queue" => (None, json!("default")),
        "kind" => (None, json!("report.build")),
        "tag" => (None, json!("customer:4711")),
        "of" => (None, json!("kind")),
        "name" if path.starts_with("/v1/limits") => (None, json!("report.build")),
        "name" => (None, json!("nightly-report")),
        "Idempotency-Key" => (None, json!("order-4711")),
        "Tasklane-Actor" => (None, json!("ada")),
        "traceparent" => (None, json!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
        _ => return,
    };
    if let Some(RefOr::T(Schema::Object(schema))) = &mut parameter.schema {
        schema.default = default;
        schema.examples = vec![example];
    }
}

fn body_of(operation: &str) -> Option<Value> {
    let report = json!({
        "kind": "report.build", "args": {"month": "2026-11"}, "queue": "reports",
        "tags": {"customer": "4711"}, "max_attempts": 5, "timeout_ms": 60_000,
    });
    Some(match operation {
        "submitTask" => report,
        "submitBatch" => json!({"tasks": [
            {"kind": "mail.send", "args": {"to": "ada@example.com"}},
            {"kind": "mail.send", "args": {"to": "bob@example.com"}, "delay_ms": 60_000},
        ]}),
        "editTask" => json!({"delay_ms": 0}),
        "cancelTask" => json!({"reason": "no longer needed"}),
        "retryTask" => json!({"args": {"month": "2026-12"}}),
        "cancelTasks" => json!({"kind": "report.build", "reason": "no longer needed", "dry_run": true}),
        "retryTasks" => json!({"kind": "report.build", "per_second": 20, "dry_run": true}),
        "purgeTasks" => json!({"state": "completed", "kind": "report.build", "dry_run": true}),
        "moveTasks" => json!({"to": "slow", "filter": {"kind": "report.build"}, "dry_run": true}),
        "putSchedule" => json!({
            "cron": "30 2 * * *", "timezone": "Europe/Berlin", "overlap": "skip",
            "task": {"kind": "report.build", "args": {"month": "last"}},
        }),
        "putLimit" => json!({"max_running": 4, "rate": {"tasks": 10, "per_ms": 1000}}),
        _ => return None,
    })
}
