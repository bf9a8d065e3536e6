//! Logs, traces and metrics, set up once by a program's `main`.

mod catalogue;
mod lines;

use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn;
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::time::timeout;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

pub use self::catalogue::{METRICS, Metric, Program, SETTLED, Shape};
use crate::config::{Common, ConfigError, LogFormat, environment};
use crate::traces::{self, Traces};
use crate::web::hosts::{self, Hosts};

/// Bounds of the histograms of seconds: from half a millisecond to an hour.
const SECONDS: [f64; 20] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0,
    1800.0, 3600.0,
];
/// Bounds of the histograms of counts.
const COUNTS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
const UPKEEP_PERIOD: Duration = Duration::from_secs(5);
/// How long the look at what a program needs may take.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// The process's metrics; clones share them.
#[derive(Debug, Clone)]
pub struct Metrics(PrometheusHandle);

impl Metrics {
    /// Installs the recorder that every `metrics` macro writes to, and begins what is known of a program's metrics.
    ///
    /// # Errors
    /// When the process has one already.
    pub fn install(program: Program) -> Result<Self, BuildError> {
        let handle = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
            .set_buckets_for_metric(Matcher::Suffix("_writes".to_owned()), &COUNTS)?
            .install_recorder()?;
        catalogue::begin(program);
        Ok(Self(handle))
    }

    /// The metrics in Prometheus' text form.
    #[must_use]
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Lets go of what idle histograms have buffered, every few seconds; without it an unscraped process grows.
    pub async fn upkeep(self) {
        let mut period = tokio::time::interval(UPKEEP_PERIOD);
        loop {
            period.tick().await;
            self.0.run_upkeep();
        }
    }
}

/// Libraries that tell of a failure before they return it: whoever handles that tells it, once. `log` may ask for them by
/// name, such as `info,lapin=debug`.
const SILENCED: &str = "lapin=off,async_rs=off,rustls_connector=off";

/// Starts logging to standard error, and making traces where they have a way to go.
///
/// # Errors
/// [`ConfigError::Setting`] when the filter cannot be read.
pub fn init_logging(settings: &Common, traces: Option<&Traces>) -> Result<(), ConfigError> {
    let filter = EnvFilter::try_new(format!("{SILENCED},{}", settings.log))
        .map_err(|error| ConfigError::setting("log", format!("{error}; such as info or warn,tasklane_worker=debug")))?;
    // The fields of these spans are for the collector: nothing is written for them here.
    let filter =
        filter.and(filter_fn(|metadata| metadata.target() != traces::TARGET).with_max_level_hint(LevelFilter::TRACE));
    let log = tracing_subscriber::fmt::layer().with_timer(SystemTime);
    let log = match settings.log_format {
        LogFormat::Text => log
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_writer(|| lines::Lines(std::io::stderr()))
            .boxed(),
        LogFormat::Json => log.with_writer(std::io::stderr).json().flatten_event(true).with_current_span(false).boxed(),
    };
    // A second initialisation, in a test, keeps the first.
    let _ = tracing_subscriber::registry().with(log.with_filter(filter)).with(traces.map(Traces::layer)).try_init();
    environment::warn_of_strays();
    Ok(())
}

/// `/healthz`, `/readyz` and `/metrics`; `ready` answers with what is wrong, or nothing.
pub fn health_router<F>(metrics: Metrics, ready: F, hosts: Hosts) -> Router
where
    F: AsyncReadiness,
{
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || {
                let ready = ready.clone();
                async move {
                    let late = || Some("the program does not get to answering: its threads are blocked".to_owned());
                    match timeout(READY_TIMEOUT, ready.problem()).await.unwrap_or_else(|_| late()) {
                        None => (StatusCode::OK, lines(["ready".to_owned()].into_iter().chain(ready.notes()))),
                        Some(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
                    }
                }
            }),
        )
        .route(
            "/metrics",
            get(move || async move {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
            }),
        )
        .layer(from_fn(move |request, next| hosts::let_in(hosts.clone(), request, next)))
}

/// Knows whether its process can do its work.
pub trait AsyncReadiness: Clone + Send + Sync + 'static {
    /// What keeps it from its work, or `None`.
    fn problem(&self) -> impl Future<Output = Option<String>> + Send;

    /// What is wrong and does not keep it from its work.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

fn lines(all: impl Iterator<Item = String>) -> String {
    all.map(|line| line + "\n").collect()
}
