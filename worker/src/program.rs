//! A whole program around a [`Worker`]: arguments, settings, logs, ledger, metrics, signals, exit codes.
//!
//! `tasklane-worker` is this with no handlers of its own; a program with Rust handlers is this with them:
//!
//! ```no_run
//! use std::process::ExitCode;
//! use tasklane_worker::{Handler, HandlerError, Outcome, TaskContext};
//!
//! struct Greet;
//!
//! impl Handler for Greet {
//!     const KIND: &'static str = "greet";
//!     type Args = String;
//!
//!     async fn handle(&self, name: String, _cx: &TaskContext) -> Result<Outcome, HandlerError> {
//!         Outcome::complete(format!("Hello, {name}!"))
//!     }
//! }
//!
//! fn main() -> ExitCode {
//!     tasklane_worker::program::main(|handlers| handlers.handler(Greet))
//! }
//! ```

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use secrecy::ExposeSecret;
use tasklane_common::config::File;
use tasklane_common::doctor::{self, Role, Subject};
use tasklane_common::ledger::{self, LedgerError};
use tasklane_common::memory;
use tasklane_common::shutdown::Signals;
use tasklane_common::telemetry::{self, Metrics, Program};
use tasklane_common::traces::Traces;
use tasklane_common::vital;
use tasklane_common::web::hosts::Hosts;

use crate::builtin;
use crate::config::{Command, Settings, WorkerArgs};
use crate::health;
use crate::init;
use crate::process_group::{ProcessGroups, serve_if_reaper};
use crate::registry::{Registry, RegistryBuilder};
use crate::worker::{Shutdown, Worker};

/// Settings or handlers make no sense.
pub const EXIT_SETTINGS: u8 = 2;
/// The ledger cannot be used.
pub const EXIT_LEDGER: u8 = 69;
/// Something else keeps the program from its work.
pub const EXIT_INTERNAL: u8 = 70;

/// Runs a worker with these handlers, and those of the settings file, until a signal ends it.
///
/// The program takes the flags, environment and file of `tasklane-worker`, and has its exit codes.
#[must_use]
pub fn main(handlers: impl FnOnce(RegistryBuilder) -> RegistryBuilder) -> ExitCode {
    main_from(std::env::args_os(), handlers)
}

/// As [`main`], with arguments other than the process's; the first is the program's name.
#[must_use]
pub fn main_from<A>(
    args: impl IntoIterator<Item = A>,
    handlers: impl FnOnce(RegistryBuilder) -> RegistryBuilder,
) -> ExitCode
where
    A: Into<OsString> + Clone,
{
    serve_if_reaper();
    if init::is_needed() {
        return init::run().unwrap_or_else(|error| fail(EXIT_INTERNAL, &error.into()));
    }
    memory::give_back();
    let args = WorkerArgs::parse_from(args);
    let groups = ProcessGroups::default();
    let prepared =
        args.common.read_file().map_err(anyhow::Error::from).and_then(|file| prepare(&args, &file, handlers, &groups));
    if args.command == Some(Command::Doctor) {
        let subject = prepared.map(|(settings, registry, _)| subject(settings, &registry));
        return doctor::visit(&name(), args.json, subject.map_err(|error| format!("{error:#}")));
    }
    // What is left of the traces is sent when all else has ended.
    let (settings, registry, _traces) = match prepared {
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

fn prepare(
    args: &WorkerArgs,
    file: &File,
    handlers: impl FnOnce(RegistryBuilder) -> RegistryBuilder,
    groups: &ProcessGroups,
) -> anyhow::Result<(Settings, Registry, Option<Traces>)> {
    let settings = args.settings(file)?;
    let traces = Traces::begin(&settings.common, &name())?;
    telemetry::init_logging(&settings.common, traces.as_ref())?;
    let registry = builtin::register(handlers(Registry::builder()), file, groups)?.build()?;
    Ok((settings, registry, traces))
}

/// What the doctor looks at in the name of this worker.
fn subject(settings: Settings, registry: &Registry) -> Subject {
    let Settings { concurrency, lease_ttl, lease_renew, custody_after, create_ledger, .. } = settings;
    let mut queues = settings.queues;
    for queue in registry.queues() {
        if !queues.contains(&queue) {
            queues.push(queue);
        }
    }
    let role = Role::Worker { concurrency, lease_ttl, lease_renew, custody_after, create_ledger };
    Subject { common: settings.common, queues, role }
}

async fn work(settings: Settings, registry: Registry, groups: ProcessGroups) -> ExitCode {
    let url = settings.common.ledger_url.expose_secret();
    let opened = if settings.create_ledger { ledger::open(url).await } else { ledger::open_existing(url).await };
    let ledger = match opened {
        Ok(ledger) => ledger,
        Err(error @ LedgerError::Address(_)) => return fail(EXIT_SETTINGS, &error.into()),
        Err(error) => return fail(EXIT_LEDGER, &error.into()),
    };
    tracing::info!(ledger = ledger.place(), id = %ledger.id(), "the ledger is open");
    let metrics = settings.metrics_addr.map(|addr| (addr, settings.common.http_hosts.clone()));
    let worker = Worker::new(settings, registry, ledger, groups);
    let signals = match surroundings(&worker, metrics).await {
        Ok(signals) => signals,
        Err(error) => return fail(EXIT_INTERNAL, &error),
    };
    let shutdown = Shutdown::default();
    vital::spawn("signals", hear(signals, shutdown.clone()));
    let summary = worker.run(shutdown).await;
    tracing::info!("stopped: {summary}");
    ExitCode::SUCCESS
}

/// Metrics, their listener, and an ear for signals.
async fn surroundings(worker: &Worker, listener: Option<(SocketAddr, Hosts)>) -> anyhow::Result<Signals> {
    let signals = Signals::listen().context("cannot listen for signals")?;
    let metrics = Metrics::install(Program::Worker).context("cannot install the metrics")?;
    vital::spawn("metrics", metrics.clone().upkeep());
    if let Some((addr, hosts)) = listener {
        let router = telemetry::health_router(metrics, worker.readiness(), hosts.at(&addr.to_string()));
        health::serve(addr, router).with_context(|| {
            format!("cannot listen on metrics_addr {addr}; if it is taken, give another with --metrics-addr")
        })?;
    }
    Ok(signals)
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
    eprintln!("{}: {error:#}", name());
    ExitCode::from(code)
}

/// The name of this program, which need not be `tasklane-worker`.
fn name() -> String {
    let program = std::env::current_exe().ok();
    let file = program.as_deref().and_then(|path| path.file_name());
    file.map_or("worker".to_owned(), |name| name.to_string_lossy().into_owned())
}
