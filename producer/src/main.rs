//! The program `tasklane-producer`.

mod allocator;

use std::pin::pin;
use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tasklane_common::config::ConfigError;
use tasklane_common::doctor::{self, Role, Subject};
use tasklane_common::ledger::LedgerError;
use tasklane_common::memory;
use tasklane_common::shutdown::Signals;
use tasklane_common::task::QueueName;
use tasklane_common::telemetry::{self, Metrics, Program};
use tasklane_common::traces::Traces;
use tasklane_producer::{Command, ProducerArgs, Settings, StartError, StopSummary, run};
use tokio_util::sync::CancellationToken;

const BAD_SETTINGS: u8 = 2;
const UNAVAILABLE: u8 = 69;
const INTERNAL: u8 = 70;
const AT_ONCE: u8 = 130;

fn main() -> ExitCode {
    let args = ProducerArgs::parse();
    if args.command == Some(Command::Doctor) {
        let subject = args.resolve().map(subject).map_err(|error| error.to_string());
        return doctor::visit("tasklane-producer", args.json, subject);
    }
    match start(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tasklane-producer: {error}");
            ExitCode::from(code_of(&error))
        }
    }
}

/// What the doctor looks at in the name of this producer.
fn subject(settings: Settings) -> Subject {
    let mut queues = vec![QueueName::default()];
    for queue in settings.rules.routes.queues() {
        if !queues.contains(queue) {
            queues.push(queue.clone());
        }
    }
    Subject { common: settings.common, queues, role: Role::Producer }
}

fn start(args: &ProducerArgs) -> anyhow::Result<ExitCode> {
    memory::give_back();
    let settings = args.resolve()?;
    let traces = Traces::begin(&settings.common, "tasklane-producer")?;
    telemetry::init_logging(&settings.common, traces.as_ref())?;
    let metrics = Metrics::install(Program::Producer)?;
    allow_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(until_told(settings, metrics));
    // What still blocks a thread after the grace must not keep the process.
    runtime.shutdown_background();
    outcome
}

/// The first signal asks the producer to stop, the second ends it at once.
async fn until_told(settings: Settings, metrics: Metrics) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let stop = CancellationToken::new();
    let grace_ms = settings.common.shutdown_grace_ms;
    let mut running = pin!(run(settings, metrics, stop.clone().cancelled_owned()));
    loop {
        tokio::select! {
            outcome = &mut running => {
                let StopSummary { requests, tasks, all_finished } = outcome?;
                tracing::info!(requests, tasks, all_finished, "stopped");
                return Ok(ExitCode::SUCCESS);
            }
            signal = signals.next() => {
                if stop.is_cancelled() {
                    tracing::warn!(signal, "stopped at once");
                    return Ok(ExitCode::from(AT_ONCE));
                }
                tracing::info!(signal, grace_ms, "stopping: requests under way are finished");
                stop.cancel();
            }
        }
    }
}

/// Each connection is an open file, and shells often allow a thousand although the system allows more.
fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, limit = limit.current, "the limit of open files, and so of connections, stays low");
    }
}

fn code_of(error: &anyhow::Error) -> u8 {
    if error.is::<ConfigError>() {
        return BAD_SETTINGS;
    }
    match error.downcast_ref::<StartError>() {
        Some(StartError::Ledger(LedgerError::Address(_))) => BAD_SETTINGS,
        Some(_) => UNAVAILABLE,
        None => INTERNAL,
    }
}
