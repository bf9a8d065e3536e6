//! `/openapi.json`, and `/docs`: the same as a page to read, with nothing loaded from elsewhere.

use std::fmt::Write;

use axum::body::Bytes;
use axum::http::{HeaderName, header};
use serde_json::Value;
use utoipa::openapi::OpenApi;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}\
code{background:#8882;padding:.1em .3em;border-radius:.2em}dt{margin-top:1rem}dd{margin:0 0 0 1.5rem;white-space:pre-line}";

/// The document as it is served and checked in.
#[must_use]
pub fn document(openapi: &OpenApi) -> Bytes {
    // A generated document is maps and strings: it always has a JSON form.
    let mut text = serde_json::to_string_pretty(openapi).unwrap_or_default();
    text.push('\n');
    text.into()
}

/// The page.
#[must_use]
pub fn page(openapi: &OpenApi) -> Bytes {
    let document = serde_json::to_value(openapi).unwrap_or_default();
    let mut page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
         <title>Tasklane API</title><style>{STYLE}</style><h1>Tasklane API</h1><p>{}</p>\
         <p>The whole of it, for programs: <a href=/openapi.json>/openapi.json</a></p><dl>",
        escape(text(&document["info"]["description"])),
    );
    for (path, methods) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in methods.as_object().into_iter().flatten() {
            describe(&mut page, path, method, operation);
        }
    }
    page.push_str("</dl></html>\n");
    page.into()
}

/// Serves either.
pub(crate) async fn serve(media_type: &'static str, content: Bytes) -> ([(HeaderName, &'static str); 2], Bytes) {
    let policy = "default-src 'none'; style-src 'unsafe-inline'";
    ([(header::CONTENT_TYPE, media_type), (header::CONTENT_SECURITY_POLICY, policy)], content)
}

fn describe(page: &mut String, path: &str, method: &str, operation: &Value) {
    let named = operation["parameters"].as_array().into_iter().flatten().map(|parameter| text(&parameter["name"]));
    let named: Vec<_> = named.map(|name| format!("<code>{}</code>", escape(name))).collect();
    // Writing to a string does not fail.
    let _ = write!(
        page,
        "<dt><code>{} {}</code> {}</dt><dd>{}\n{}</dd>",
        method.to_uppercase(),
        escape(path),
        escape(text(&operation["summary"])),
        escape(text(&operation["description"])),
        if named.is_empty() { String::new() } else { format!("Parameters and headers: {}", named.join(", ")) },
    );
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
