//! The `tasklane-worker` program: handlers from the settings file, signals, exit codes.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use secrecy::ExposeSecret;
use tasklane_common::config::File;
use tasklane_common::ledger;
use tasklane_common::shutdown::Signals;
use tasklane_common::telemetry::{self, Metrics};
use tasklane_worker::config::{Settings, WorkerArgs};
use tasklane_worker::process_group::ProcessGroups;
use tasklane_worker::worker::{Shutdown, Worker};
use tasklane_worker::{Registry, builtin};

const EXIT_SETTINGS: u8 = 2;
const EXIT_LEDGER: u8 = 69;
const EXIT_INTERNAL: u8 = 70;

fn main() -> ExitCode {
    let args = WorkerArgs::parse();
    let groups = ProcessGroups::default();
    let prepared = args.common.read_file().map_err(anyhow::Error::from).and_then(|file| prepare(&args, &file, &groups));
    let (settings, registry) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return fail(EXIT_SETTINGS, &error),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(EXIT_INTERNAL, &error.into()),
    };
    let code = runtime.block_on(work(settings, registry, groups));
    // A handler that blocks its thread must not keep the process.
    runtime.shutdown_background();
    code
}

fn prepare(args: &WorkerArgs, file: &File, groups: &ProcessGroups) -> anyhow::Result<(Settings, Registry)> {
    let settings = args.settings(file)?;
    telemetry::init_logging(&settings.common)?;
    let registry = builtin::register(Registry::builder(), file, groups)?.build()?;
    Ok((settings, registry))
}

async fn work(settings: Settings, registry: Registry, groups: ProcessGroups) -> ExitCode {
    let ledger = match ledger::open(settings.common.ledger_url.expose_secret()).await {
        Ok(ledger) => ledger,
        Err(error) => return fail(EXIT_LEDGER, &error.into()),
    };
    let metrics_addr = settings.metrics_addr;
    let worker = Worker::new(settings, registry, ledger, groups);
    let started = async {
        let signals = Signals::listen().context("cannot listen for signals")?;
        let metrics = Metrics::install().context("cannot install the metrics")?;
        tokio::spawn(metrics.clone().upkeep());
        if let Some(addr) = metrics_addr {
            let listener = tokio::net::TcpListener::bind(addr)
                .await
                .with_context(|| format!("cannot listen on metrics_addr {addr}"))?;
            let router = telemetry::health_router(metrics, worker.readiness());
            tokio::spawn(async move { axum::serve(listener, router).await });
        }
        anyhow::Ok(signals)
    };
    let signals = match started.await {
        Ok(signals) => signals,
        Err(error) => return fail(EXIT_INTERNAL, &error),
    };
    let shutdown = Shutdown::default();
    tokio::spawn(hear(signals, shutdown.clone()));
    let summary = worker.run(shutdown).await;
    tracing::info!("stopped: {summary}");
    ExitCode::SUCCESS
}

/// The first signal asks, the second insists.
async fn hear(mut signals: Signals, shutdown: Shutdown) {
    let signal = signals.next().await;
    tracing::info!(signal, "stopping; a second signal interrupts what runs");
    shutdown.gracefully.cancel();
    let signal = signals.next().await;
    tracing::warn!(signal, "stopping at once");
    shutdown.at_once.cancel();
}

fn fail(code: u8, error: &anyhow::Error) -> ExitCode {
    eprintln!("tasklane-worker: {error:#}");
    ExitCode::from(code)
}
