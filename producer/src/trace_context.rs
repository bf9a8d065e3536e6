//! W3C trace context: a request's `traceparent` goes with the task to its handler, by way of the request's own span where
//! traces are made.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tasklane_common::traces::{self, TARGET};
use tracing::field::Empty;
use tracing::{Span, info_span};

const HEADER: HeaderName = HeaderName::from_static("traceparent");
const LENGTH: usize = 55;

/// What is asked for every few seconds by machines, and would hide the rest.
const UNTRACED: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// A request's part of its trace. What comes out of the request, its tasks, continues this part.
pub(crate) fn begin(request: &mut Request, method: &'static str, route: &str) -> Span {
    if UNTRACED.contains(&route) {
        return Span::none();
    }
    // The names are OpenTelemetry's conventions for HTTP.
    let span = info_span!(
        target: TARGET, "request",
        otel.name = %format_args!("{method} {route}"), otel.kind = "server", otel.status_code = Empty,
        http.request.method = method, http.route = route, http.response.status_code = Empty,
    );
    traces::continue_from(&span, traceparent(request.headers()));
    if let Some(own) = traces::traceparent(&span).and_then(|own| HeaderValue::try_from(own).ok()) {
        request.headers_mut().insert(HEADER, own);
    }
    span
}

/// Notes how it was answered; of faults only ours count as such.
pub(crate) fn end(span: &Span, status: StatusCode) {
    span.record("http.response.status_code", status.as_u16());
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
}

/// The request's trace context. One that breaks the format is ignored, as its specification asks.
#[must_use]
pub(crate) fn traceparent(headers: &HeaderMap) -> Option<&str> {
    let text = headers.get(HEADER)?.to_str().ok()?;
    is_traceparent(text).then_some(text)
}

fn is_traceparent(text: &str) -> bool {
    if text.len() != LENGTH {
        return false;
    }
    let hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let zero = |part: &str| part.bytes().all(|byte| byte == b'0');
    match text.split('-').collect::<Vec<_>>()[..] {
        [version, trace, parent, flags] => {
            (version.len(), trace.len(), parent.len(), flags.len()) == (2, 32, 16, 2)
                && [version, trace, parent, flags].into_iter().all(hex)
                && version != "ff"
                && !zero(trace)
                && !zero(parent)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_format_passes() {
        assert!(is_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
        for bad in [
            "",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00_0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331_01",
        ] {
            assert!(!is_traceparent(bad), "{bad}");
        }
    }
}
