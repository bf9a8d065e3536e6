//! Traces: a span for each request and for each run of a task, sent to an OpenTelemetry collector.
//!
//! Spans are `tracing` spans with the target [`TARGET`]. They exist only where a collector is set, or where a program that uses
//! the library has a subscriber of its own that wants them; without one a span costs a comparison.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::Key;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{Protocol, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData, SpanExporter};
use reqwest::blocking::Client;
use reqwest::redirect;
use tracing::level_filters::LevelFilter;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::registry::LookupSpan;

use crate::config::{Common, ConfigError};
use crate::envelope::TRACEPARENT_HEADER;

/// The target of the spans; the log leaves it out.
pub const TARGET: &str = "tasklane::trace";

/// How long the collector may take for one batch of spans.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the end of a program waits for the spans that are left.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The attribute that names the program.
const SERVICE_NAME: Key = Key::from_static_str("service.name");

/// The way to the collector; spans that are left are sent when it is dropped, outside of any runtime.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// The way that the settings ask for: spans go to `<otlp_url>/v1/traces`, as protobuf over HTTP. A collector that is away
    /// costs spans and nothing else. `service` is what they say they come from, where `OTEL_SERVICE_NAME` says nothing else.
    ///
    /// Must not be called within a runtime: the spans are sent by threads of their own.
    ///
    /// # Errors
    /// [`ConfigError::Setting`] when no client can be made for that address.
    pub fn begin(settings: &Common, service: &str) -> Result<Option<Self>, ConfigError> {
        let Some(url) = &settings.otlp_url else { return Ok(None) };
        Self::to(url, settings.trace_ratio, service)
            .map(Some)
            .map_err(|error| ConfigError::setting("otlp_url", format!("traces cannot be sent there: {error}")))
    }

    fn to(url: &str, ratio: f64, service: &str) -> Result<Self, Box<dyn std::error::Error>> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(client(url)?)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", url.trim_end_matches('/')))
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let resource = Resource::builder().build();
        let named = resource.get_ref(&SERVICE_NAME).map(ToString::to_string).unwrap_or_default();
        // OpenTelemetry's own variables go first, as everywhere; without any it has no better name.
        let resource = match named.is_empty() || named.starts_with("unknown_service") {
            true => Resource::builder().with_service_name(service.to_owned()).build(),
            false => resource,
        };
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(Told { exporter, url: url.to_owned(), failing: AtomicBool::new(false) })
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(resource)
            .build();
        Ok(Self(provider))
    }

    /// What turns spans of `tracing` into spans for the collector, those of handlers and their libraries too; what is logged
    /// within one becomes an event of it.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'s> LookupSpan<'s>,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.0.tracer("tasklane"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_error_events_to_status(false)
            .with_tracked_inactivity(false)
            .with_filter(LevelFilter::INFO)
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "not all traces could be sent");
        }
    }
}

/// A client for the collector: no redirects and no proxies from the environment, which would see its token.
fn client(url: &str) -> reqwest::Result<Client> {
    // Whoever came first has chosen; an error says just that.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().timeout(EXPORT_TIMEOUT).redirect(redirect::Policy::none()).no_proxy();
    match url.starts_with("https:") {
        true => client.build(),
        // The system's certificates are many, or missing; nothing needs them here.
        false => client.tls_certs_only([]).build(),
    }
}

/// Makes the span continue a trace, before it is entered; a `traceparent` that breaks the format is ignored.
pub fn continue_from(span: &Span, traceparent: Option<&str>) {
    let Some(traceparent) = traceparent.filter(|_| !span.is_disabled()) else { return };
    let carrier = HashMap::from([(TRACEPARENT_HEADER.to_owned(), traceparent.to_owned())]);
    // Fails only where nothing makes a trace of spans.
    let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
}

/// The `traceparent` of what comes out of a span; `None` where nothing makes a trace of it.
#[must_use]
pub fn traceparent(span: &Span) -> Option<String> {
    if span.is_disabled() {
        return None;
    }
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT_HEADER)
}

/// Marks the span as failed, unless it succeeds after all.
pub fn fail(span: &Span, why: &dyn Display) {
    span.record("otel.status_code", "ERROR").record("otel.status_description", tracing::field::display(why));
}

/// Marks the span as a success, whatever was logged within it.
pub fn succeed(span: &Span) {
    span.record("otel.status_code", "OK");
}

/// An exporter whose failures are told once, when they begin and when they end, and counted.
#[derive(Debug)]
struct Told<E> {
    exporter: E,
    url: String,
    failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Told<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let exported = self.exporter.export(batch).await;
        let was_failing = self.failing.swap(exported.is_err(), Ordering::Relaxed);
        match &exported {
            Ok(()) if was_failing => tracing::info!("traces are sent again"),
            Err(error) if !was_failing => {
                tracing::warn!(%error, otlp_url = self.url, "traces cannot be sent, spans are lost");
            }
            _ => {}
        }
        let outcome = if exported.is_ok() { "sent" } else { "lost" };
        metrics::counter!("tasklane_spans_total", "outcome" => outcome).increment(spans);
        // Told and counted here: the SDK would log each batch.
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::Status;
    use tracing::field::Empty;
    use tracing::{error, info_span, subscriber};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// Keeps what comes.
    #[derive(Debug, Clone, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    /// The status with which a span ends within which an error was logged.
    fn status(end: impl FnOnce(&Span)) -> Status {
        let kept = Kept::default();
        let traces = Traces(SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build());
        subscriber::with_default(tracing_subscriber::registry().with(traces.layer()), || {
            let span = info_span!(target: TARGET, "process", otel.status_code = Empty, otel.status_description = Empty);
            // Begins it, as the telling of it to a handler does.
            assert!(traceparent(&span).is_some());
            span.in_scope(|| error!(error = %"z: a line of a handler's log"));
            end(&span);
        });
        let spans = kept.0.lock().unwrap();
        assert_eq!((spans.len(), spans[0].events.len()), (1, 1), "{spans:?}");
        spans[0].status.clone()
    }

    #[test]
    fn how_a_run_ended_goes_before_what_was_logged_within_it() {
        assert_eq!(status(succeed), Status::Ok);
        assert_eq!(status(|span| fail(span, &"a: the attempt failed")), Status::error("a: the attempt failed"));
    }
}
