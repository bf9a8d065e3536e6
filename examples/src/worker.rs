//! A worker in the example's own process. A worker of yours is rather a program of its own: see `hello.rs`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use secrecy::ExposeSecret;
use tasklane_common::{ledger, telemetry};
use tasklane_worker::config::WorkerArgs;
use tasklane_worker::process_group::ProcessGroups;
use tasklane_worker::{RegistryBuilder, Shutdown, StopSummary, Worker};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::client::Client;

/// How long the producer may take to see the new worker.
const SEEN_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A running worker. Dropped without [`LocalWorker::stop`] it goes on until the process ends.
#[derive(Debug)]
pub struct LocalWorker {
    shutdown: Shutdown,
    running: JoinHandle<StopSummary>,
}

impl LocalWorker {
    /// Starts a worker with these handlers and the settings of the environment, and waits until the producer sees it.
    ///
    /// # Errors
    /// When the settings make no sense, the ledger cannot be opened, or is not the producer's.
    pub async fn start(handlers: RegistryBuilder, client: &Client) -> Result<Self> {
        // Only the environment: the command line is the example's.
        let args = WorkerArgs::parse_from(["example"]);
        let mut settings = args.settings(&Default::default())?;
        if args.common.log.is_none() {
            settings.common.log = "warn".to_owned();
        }
        if args.concurrency.is_none() {
            let cores = std::thread::available_parallelism()?.get();
            settings.concurrency = u16::try_from(cores)?;
        }
        telemetry::init_logging(&settings.common, None)?;
        let registry = handlers.build()?;
        let kinds = registry.kinds();
        let ledger = ledger::open_existing(settings.common.ledger_url.expose_secret()).await?;
        let shutdown = Shutdown::default();
        let worker = Worker::new(settings, registry, ledger, ProcessGroups::default());
        let running = tokio::spawn(worker.run(shutdown.clone()));
        let started = Self { shutdown, running };
        let deadline = Instant::now() + SEEN_LIMIT;
        while !client.workers().await?.iter().any(|worker| worker.kinds == kinds) {
            ensure!(
                Instant::now() < deadline,
                "the producer at {} does not see this worker: set TASKLANE_LEDGER_URL to the producer's ledger",
                client.url()
            );
            sleep(Duration::from_millis(20)).await;
        }
        Ok(started)
    }

    /// Takes nothing new, finishes what runs, and tells what was done.
    ///
    /// # Errors
    /// When the worker panicked or does not end.
    pub async fn stop(self) -> Result<StopSummary> {
        self.shutdown.gracefully.cancel();
        let ended = tokio::time::timeout(STOP_LIMIT, self.running).await;
        ended.context("the worker does not end")?.context("the worker panicked")
    }
}
