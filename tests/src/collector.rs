//! An OpenTelemetry collector: takes traces over HTTP, as programs send them, and shows what came.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use prost::Message;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// How many bytes of spans may come at once.
const BATCH_BYTES_MAX: usize = 16 << 20;

/// How many spans are kept; those that come later are counted.
const KEPT_MAX: usize = 1_000;

/// A span that has come.
#[derive(Debug, Clone)]
pub struct Span {
    /// Which program made it.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Its trace, in hexadecimal.
    pub trace: String,
    /// Its own id, in hexadecimal.
    pub id: String,
    /// The id of what it belongs to; empty for the first of a trace.
    pub parent: String,
    /// Its attributes, as text.
    pub attributes: BTreeMap<String, String>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// A collector on a port of its own, until it is dropped.
#[derive(Debug)]
pub struct Collector {
    addr: SocketAddr,
    arrived: Arc<Arrived>,
    _serving: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Arrived {
    count: AtomicUsize,
    spans: Mutex<Vec<Span>>,
    /// The last `authorization`.
    token: Mutex<String>,
}

impl Collector {
    /// One on a port of its own.
    pub async fn start() -> Result<Self> {
        Self::at((Ipv4Addr::LOCALHOST, 0).into()).await
    }

    /// One that listens there.
    pub async fn at(addr: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(addr).await.with_context(|| format!("a collector at {addr}"))?;
        let addr = listener.local_addr()?;
        let arrived = Arc::new(Arrived::default());
        let router = Router::new()
            .route("/v1/traces", post(take))
            .layer(DefaultBodyLimit::max(BATCH_BYTES_MAX))
            .with_state(Arc::clone(&arrived));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the collector has ended: {error}");
            }
        });
        Ok(Self { addr, arrived, _serving: serving })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Whether the last that said one came with this `authorization`.
    pub fn has_seen(&self, token: &str) -> bool {
        *self.arrived.token.lock().unwrap_or_else(PoisonError::into_inner) == token
    }

    /// How many spans have come.
    pub fn count(&self) -> usize {
        self.arrived.count.load(Ordering::Relaxed)
    }

    /// The first 1,000 spans that have come, or a few more, in the order in which they did.
    pub fn spans(&self) -> Vec<Span> {
        self.arrived.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn take(State(arrived): State<Arc<Arrived>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    if let Some(token) = headers.get(AUTHORIZATION).and_then(|token| token.to_str().ok()) {
        token.clone_into(&mut arrived.token.lock().unwrap_or_else(PoisonError::into_inner));
    }
    let Ok(request) = ExportTraceServiceRequest::decode(body) else { return StatusCode::BAD_REQUEST };
    let scopes = request.resource_spans.iter().flat_map(|of_service| &of_service.scope_spans);
    arrived.count.fetch_add(scopes.map(|scope| scope.spans.len()).sum(), Ordering::Relaxed);
    let mut kept = arrived.spans.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() < KEPT_MAX {
        kept.extend(read(request));
    }
    StatusCode::OK
}

fn read(request: ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for of_service in request.resource_spans {
        let resource = texts(of_service.resource.unwrap_or_default().attributes);
        let service = resource.get("service.name").cloned().unwrap_or_default();
        for span in of_service.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            let status = span.status.unwrap_or_default();
            spans.push(Span {
                service: service.clone(),
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                attributes: texts(span.attributes),
                error: (status.code == SpanStatus::Error as i32).then_some(status.message),
            });
        }
    }
    spans
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    attributes.into_iter().map(|KeyValue { key, value, .. }| (key, text(value))).collect()
}

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        Some(any_value::Value::BoolValue(truth)) => truth.to_string(),
        other => format!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
