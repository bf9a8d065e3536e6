//! Runs a command (the tests) beside a private RabbitMQ node and a private PostgreSQL server.
//!
//! ```text
//! test-services -- cargo nextest run --workspace
//! ```
//!
//! The whereabouts of both are in the command's environment (`TASKLANE_TEST_AMQP_URL`, `TASKLANE_TEST_PG_URL`, …);
//! its exit code becomes ours. Both services end with the command, and on SIGINT and SIGTERM, which the command gets
//! too. With `--hold` there is no command: the variables are printed, and everything ends when standard input does.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tasklane_tests::services::{READY, Running};
use tasklane_tests::within;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind, signal};

/// How long the command may take to end after a signal before it is killed.
const GRACE: Duration = Duration::from_secs(20);

/// What a shell answers for a command ended by SIGTERM; ours when the command had to be stopped.
const STOPPED: u8 = 143;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let mode = args.next();
    let rest: Vec<OsString> = args.collect();
    match mode.as_deref().and_then(|mode| mode.to_str()) {
        Some("--hold") if rest.is_empty() => hold().await,
        Some("--") if !rest.is_empty() => run(&rest).await,
        _ => bail!("usage: test-services -- <command> [<argument>…] | test-services --hold"),
    }
}

/// SIGINT and SIGTERM, from the first moment on: none is lost between two waits.
struct Stop {
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

impl Stop {
    fn listen() -> Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// The next of them.
    async fn told(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
        }
    }
}

/// Starts the services; a signal meanwhile ends what has been started.
async fn start(stop: &mut Stop) -> Result<Option<Running>> {
    tokio::select! {
        running = Running::start() => running.map(Some),
        _ = stop.told() => Ok(None),
    }
}

async fn hold() -> Result<ExitCode> {
    let mut stop = Stop::listen()?;
    let Some(running) = start(&mut stop).await? else { return Ok(ExitCode::from(STOPPED)) };
    let mut stdout = std::io::stdout();
    for (key, value) in running.variables() {
        writeln!(stdout, "{key}={value}")?;
    }
    writeln!(stdout, "{READY}")?;
    stdout.flush()?;
    let mut input = tokio::io::stdin();
    let mut ignored = [0; 64];
    tokio::select! {
        () = async { while matches!(input.read(&mut ignored).await, Ok(1..)) {} } => {}
        _ = stop.told() => {}
    }
    drop(running);
    // The runtime would wait for the thread that reads standard input, which a signal does not wake.
    std::process::exit(0)
}

async fn run(command: &[OsString]) -> Result<ExitCode> {
    let mut stop = Stop::listen()?;
    let Some(running) = start(&mut stop).await? else { return Ok(ExitCode::from(STOPPED)) };
    let (program, args) = command.split_first().context("a command")?;
    let mut child = Command::new(program)
        .args(args)
        .envs(running.variables())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    tokio::select! {
        status = child.wait() => {
            let code = status?.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
            return Ok(ExitCode::from(code));
        }
        signal = stop.told() => pass_on(signal, &mut child).await?,
    }
    Ok(ExitCode::from(STOPPED))
}

/// Ends the command. A terminal sends SIGINT to all of its foreground group, so the command has that one already.
async fn pass_on(signal: Signal, child: &mut Child) -> Result<()> {
    if signal == Signal::TERM {
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            kill_process(pid, Signal::TERM)?;
        }
    }
    if within(GRACE, "the command to end", child.wait()).await.is_err() {
        child.kill().await?;
    }
    Ok(())
}
