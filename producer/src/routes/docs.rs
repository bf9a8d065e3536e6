//! `/openapi.json`, and `/docs`: the same as a reference to read and try, with nothing loaded from elsewhere.
//!
//! The viewer is Scalar, whose script comes with its crate.

use std::sync::LazyLock;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderName, header};
use axum::routing::get;
use utoipa::openapi::OpenApi;

const HTML: &str = "text/html; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// Scripts are ours and the viewer's; the viewer writes its styles into the page. Nothing goes to another host.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src 'self' data:; font-src 'self' data:; form-action 'none'; base-uri 'none'; \
                      frame-ancestors 'none'";

/// Addresses are relative, so that the page works below any path of a proxy.
const PAGE: &str = r#"<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tasklane API</title>
<link rel="icon" href="data:,">
<style>body{margin:0}</style>
<div id="reference"></div>
<noscript>This reference needs JavaScript. The same for programs: <a href="openapi.json">openapi.json</a></noscript>
<script src="docs/viewer.js"></script>
<script src="docs/start.js"></script>
</html>
"#;

/// The viewer brings fonts, a proxy, telemetry and an assistant of its makers' hosts: none is used.
const START: &str = r#"Scalar.createApiReference('#reference', {
  url: 'openapi.json',
  agent: { disabled: true },
  baseServerURL: new URL('.', location).href.replace(/\/$/, ''),
  defaultHttpClient: { targetKey: 'shell', clientKey: 'curl' },
  defaultOpenAllTags: false,
  documentDownloadType: 'json',
  hideClientButton: true,
  mcp: { disabled: true },
  showDeveloperTools: 'never',
  telemetry: false,
  withDefaultFonts: false,
})
"#;

static VIEWER: LazyLock<Bytes> =
    LazyLock::new(|| scalar_api_reference::get_asset("scalar.js").unwrap_or_default().into());

/// The document as it is served and checked in.
#[must_use]
pub fn document(openapi: &OpenApi) -> Bytes {
    // A generated document is maps and strings: it always has a JSON form.
    let mut text = serde_json::to_string_pretty(openapi).unwrap_or_default();
    text.push('\n');
    text.into()
}

/// The document, the page that shows it, and the page's scripts.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>(openapi: &OpenApi) -> Router<S> {
    let document = document(openapi);
    Router::new()
        .route("/openapi.json", get(async move || serve("application/json", document)))
        .route("/docs", get(async || serve(HTML, Bytes::from_static(PAGE.as_bytes()))))
        .route("/docs/start.js", get(async || serve(JAVASCRIPT, Bytes::from_static(START.as_bytes()))))
        .route("/docs/viewer.js", get(async || serve(JAVASCRIPT, VIEWER.clone())))
}

fn serve(media_type: &'static str, content: Bytes) -> ([(HeaderName, &'static str); 4], Bytes) {
    let headers = [
        (header::CONTENT_TYPE, media_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, content)
}
