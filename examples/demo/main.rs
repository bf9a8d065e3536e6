//! Real work over a real broker: one producer, two workers, thousands of files, each hashed by one task, and the proof.
//!
//! ```sh
//! make demo           # stays until Ctrl-C
//! make demo ONCE=1    # ends by itself, and badly when anything does not add up
//! ```
//!
//! Every `.rs` file below cargo's registry, at most 5,000, becomes one task, submitted over HTTP in batches. At the end
//! the demo compares three witnesses: what it submitted, what the API says, and a file into which the handlers write
//! each start. It needs the programs beside it (`make demo` builds them) and the broker at `TASKLANE_AMQP_URL`.

mod broker;
mod evidence;
mod files;
mod programs;
mod progress;
mod report;
mod signals;
mod worker;

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use tasklane_examples::client::Client;

use crate::broker::Broker;
use crate::evidence::Evidence;
use crate::programs::Programs;
use crate::signals::Signals;

const FILES_MAX: usize = 5_000;
/// How many digests are compared with those of the system's own program.
const SAMPLE: usize = 50;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    match args.next() {
        // The two workers are this program, too.
        Some(word) if word == "worker" => worker::main(program, args),
        Some(_) => {
            eprintln!("usage: demo (with ONCE=1 in the environment it ends by itself)");
            ExitCode::from(2)
        }
        None => match demo() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("\ndemo: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

#[tokio::main]
async fn demo() -> Result<()> {
    let mut signals = Signals::listen()?;
    let place = tempfile::Builder::new().prefix("tasklane-demo-").tempdir()?;
    let broker = Broker::from_env()?;
    let mut programs = Programs::new(place.path())?;
    let once = std::env::var("ONCE").is_ok_and(|value| !matches!(value.as_str(), "" | "0"));
    let outcome = tokio::select! {
        outcome = run(&mut programs, &broker, place.path()) => outcome,
        () = signals.next() => Err(Stopped.into()),
    };
    if let (Ok(client), false) = (&outcome, once) {
        report::print_places(client, &broker).await;
        report::print_what_next(client, &programs);
        tokio::select! {
            () = programs.tell_of_ended() => println!("all programs have ended"),
            () = signals.next() => println!("\nstopping"),
        }
    }
    if outcome.is_ok() && once {
        println!("\nAll of it ends here. `make demo` without ONCE=1 stays up, to look around.");
    }
    // Whatever has happened: no program and no message of the demo stays behind.
    let started = programs.end().await;
    if let (true, Err(error)) = (started, broker.empty().await) {
        eprintln!("demo: the broker's queue could not be emptied: {error}");
    }
    if started && outcome.as_ref().is_err_and(|error| !error.is::<Stopped>()) {
        eprintln!("\ndemo: logs and ledger are kept in {}", place.keep().display());
    }
    outcome.map(drop)
}

/// Somebody did not want to wait.
#[derive(Debug, thiserror::Error)]
#[error("stopped before its end")]
struct Stopped;

/// The demo itself; returns how its producer is reached.
async fn run(programs: &mut Programs, broker: &Broker, place: &Path) -> Result<Client> {
    let files = files::find(FILES_MAX)?;
    println!("work      {} .rs files below {}, one task a file", files.paths.len(), files.root.display());
    let before = broker.prepare().await?;
    println!("broker    RabbitMQ at {}, queue {}", broker.address(), worker::QUEUE);
    println!("ledger    {}", programs.ledger().display());

    let port = free_port(8080).or_else(|_| free_port(0)).context("looking for a free port")?;
    let client = Client::at(&format!("http://127.0.0.1:{port}"))?;
    programs.start(&client, broker.url(), port).await?;
    let note = if port == 8080 { "" } else { ", since 8080 is taken" };
    println!("producer  {}{note} (pid {})", client.url(), programs.producer_pid());
    println!("workers   {}", programs.worker_pids().map(|pid| format!("pid {pid}")).collect::<Vec<_>>().join(", "));

    let ids = tokio::select! {
        ids = progress::work(&client, &files.paths) => ids?,
        story = programs.one_has_ended() => bail!("{story}"),
    };
    let evidence = Evidence::gather(&client, &place.join(worker::STARTS), ids, (broker, before)).await?;
    report::print(&evidence);
    println!("  digests          {}", report::check_digests(&evidence.tasks, SAMPLE).await?);
    let faults = evidence.faults();
    ensure!(faults.is_empty(), "it does not add up: {}", faults.join("; "));
    Ok(client)
}

/// The port if it is free, or with 0 any that is.
fn free_port(port: u16) -> std::io::Result<u16> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).and_then(|listener| Ok(listener.local_addr()?.port()))
}
