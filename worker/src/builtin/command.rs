//! `[[command]]`: a program that handles one kind. Args on stdin, the result on stdout, the exit status says the rest.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::{self, Shared};
use rustix::fs::{Access, access};
use tasklane_common::config::{CommandTable, ConfigError};
use tasklane_common::task::{ERROR_BYTES_MAX, Json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::is_scarcity;
use super::output::{Tail, TooMuch, Whole};
use crate::handler::{HandlerError, Options, Outcome, TaskContext};
use crate::process_group::{Group, Pipes, ProcessGroups};
use crate::registry::DynHandler;

/// The exit code by which a program says that no other attempt will help.
const EXIT_DISCARD: i32 = 65;
/// How long a program may take to end after SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// How long the output is waited for after the program has exited: a child of it may hold the pipes.
const LINGER: Duration = Duration::from_secs(1);
/// Of the worker's settings, those that hold passwords, or may. No program needs them.
const SECRETS: [&str; 6] = [
    "TASKLANE_AMQP_URL",
    "TASKLANE_LEDGER_URL",
    "TASKLANE_MANAGEMENT_URL",
    "TASKLANE_OTLP_URL",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
];
const CHUNK_BYTES: usize = 16 * 1024;

/// Runs a program for every task of a kind.
#[derive(Debug)]
pub struct CommandHandler {
    program: String,
    arguments: Vec<String>,
    options: Options,
    /// Exit codes that are final besides [`EXIT_DISCARD`].
    discard: Vec<i32>,
    groups: ProcessGroups,
}

/// What a program has said so far.
#[derive(Debug)]
struct Output {
    stdout: Whole,
    stderr: Tail,
}

/// Why the program is not watched any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It exited by itself.
    Exited,
    /// It wrote too much.
    TooMuch(TooMuch),
    /// It was asked to stop.
    Stopped,
}

impl CommandHandler {
    /// Checks the table. Its programs run in `groups`.
    ///
    /// # Errors
    /// When there is no program, when it cannot be found, or when the timeout is none.
    pub fn new(table: &CommandTable, groups: ProcessGroups) -> Result<Self, ConfigError> {
        let fault = |message: String| ConfigError::setting("command", format!("kind {}: {message}", table.kind));
        let Some((program, arguments)) = table.argv.split_first().filter(|(program, _)| !program.is_empty()) else {
            return Err(fault("argv must begin with a program".to_owned()));
        };
        if table.argv.iter().any(|word| word.contains('\0')) {
            return Err(fault("argv must not hold NUL characters".to_owned()));
        }
        find(program).map_err(&fault)?;
        let options = Options {
            queue: table.queue.clone(),
            timeout: super::timeout("command", &table.kind, table.timeout_ms)?,
            retry: table.retry.clone(),
            discard_errors: table.discard_errors.clone(),
            guarantee: super::guarantee("command", &table.kind, table.guarantee)?,
        };
        let (program, arguments) = (program.clone(), arguments.to_vec());
        Ok(Self { program, arguments, options, discard: table.discard_exit_codes.clone(), groups })
    }

    fn command(&self, cx: &TaskContext) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env("TASKLANE_TASK_ID", cx.id.to_string())
            .env("TASKLANE_KIND", cx.kind.as_str())
            .env("TASKLANE_ATTEMPT", cx.attempt.to_string())
            .env("TASKLANE_FENCE", cx.fence.to_string())
            .env_remove("TRACEPARENT")
            .envs(cx.traceparent.as_ref().map(|traceparent| ("TRACEPARENT", traceparent)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for secret in SECRETS {
            command.env_remove(secret);
        }
        command
    }
}

#[async_trait]
impl DynHandler for CommandHandler {
    fn options(&self) -> Options {
        self.options.clone()
    }

    async fn handle_json(&self, args: Json, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        // Dropped anywhere from here on, the group is killed.
        let mut group = self.groups.spawn(&mut self.command(cx)).map_err(|error| not_started(&self.program, &error))?;
        let mut output = Output { stdout: Whole::new(cx.result_bytes_max), stderr: Tail::new(ERROR_BYTES_MAX) };
        let end = {
            let exchange = pin!(output.exchange(group.pipes(), args));
            watch(&mut group, exchange.shared(), &cx.cancellation).await
        };
        // However it ended, the run is over, and with it everything in the group.
        let status = group.end().await;
        match end {
            End::Exited => {
                let status = status.map_err(|error| {
                    HandlerError::unknown(format!("how the program {} ended is not known: {error}", self.program))
                })?;
                answer(&self.program, &self.discard, status, output)
            }
            End::TooMuch(much) => Err(HandlerError::discard(format!("the program {} {much}", self.program))),
            End::Stopped => Err(HandlerError::unknown(format!("the program {} was stopped", self.program))),
        }
    }
}

impl Output {
    /// Writes the args and reads the output until all pipes are closed.
    async fn exchange(&mut self, pipes: Pipes, args: Json) -> Result<(), TooMuch> {
        let Self { stdout, stderr } = self;
        let write = async {
            if let Some(mut stdin) = pipes.stdin {
                // A program may leave its input unread.
                let _ = stdin.write_all(args.as_str().as_bytes()).await;
            }
            Ok(())
        };
        let read_stdout = read(pipes.stdout, |chunk| stdout.push(chunk));
        let read_stderr = read(pipes.stderr, |chunk| {
            stderr.push(chunk);
            Ok(())
        });
        future::try_join3(write, read_stdout, read_stderr).await.map(drop)
    }
}

/// Reads to the end; a pipe that breaks has ended.
async fn read(
    pipe: Option<impl AsyncRead + Unpin>,
    mut keep: impl FnMut(&[u8]) -> Result<(), TooMuch>,
) -> Result<(), TooMuch> {
    let Some(mut pipe) = pipe else { return Ok(()) };
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(read @ 1..) = pipe.read(&mut chunk).await {
        keep(&chunk[..read])?;
    }
    Ok(())
}

/// Watches until the program has ended and said all, or must end.
async fn watch(
    group: &mut Group,
    exchange: Shared<impl Future<Output = Result<(), TooMuch>>>,
    cancellation: &CancellationToken,
) -> End {
    tokio::select! {
        biased;
        () = group.exited() => match timeout(LINGER, exchange).await {
            Ok(Err(much)) => End::TooMuch(much),
            Ok(Ok(())) | Err(_) => End::Exited,
        },
        much = overflow(exchange.clone()) => End::TooMuch(much),
        () = cancellation.cancelled() => {
            group.terminate();
            // It is still listened to: a program that cannot write cannot end. Not only the leader gets its time.
            let gone = async {
                group.exited().await;
                let _ = exchange.await;
            };
            let _ = timeout(TERM_GRACE, gone).await;
            End::Stopped
        }
    }
}

/// Ends only when there is too much output.
async fn overflow(exchange: impl Future<Output = Result<(), TooMuch>>) -> TooMuch {
    match exchange.await {
        Err(much) => much,
        Ok(()) => future::pending().await,
    }
}

fn answer(program: &str, discard: &[i32], status: ExitStatus, mut output: Output) -> Result<Outcome, HandlerError> {
    if status.success() {
        return Ok(Outcome::Complete(output.stdout.into_result()?));
    }
    let message = match (output.stderr.text(), status.code(), status.signal()) {
        (text, ..) if !text.is_empty() => text,
        (_, Some(code), _) => format!("the program {program} exited with status {code}"),
        (_, None, Some(signal)) => format!("the program {program} was killed by signal {signal}"),
        (_, None, None) => format!("the program {program} failed: {status}"),
    };
    match status.code() {
        Some(code) if code == EXIT_DISCARD || discard.contains(&code) => Err(HandlerError::discard(message)),
        // Whoever sent the signal, the program did not choose this end: how far it had come is not known.
        None => Err(HandlerError::unknown(message)),
        Some(_) => Err(HandlerError::retry(message)),
    }
}

/// What it means that a program did not start. For want of processes, files or memory it is not the task's fault.
fn not_started(program: &str, error: &io::Error) -> HandlerError {
    let message = format!("the program {program} cannot be started: {error}");
    match error.kind() {
        _ if is_scarcity(error) => HandlerError::not_started(message),
        io::ErrorKind::BrokenPipe => HandlerError::unknown(message),
        _ => HandlerError::retry(message),
    }
}

/// Looks for a program as the system will: by its path, or by its name in PATH.
fn find(program: &str) -> Result<(), String> {
    let executable = |path: &Path| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    if program.contains('/') {
        return if executable(Path::new(program)) { Ok(()) } else { Err(format!("{program} is no executable file")) };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|directory| executable(&directory.join(program))) {
        Ok(())
    } else {
        Err(format!("the program {program} is not in PATH"))
    }
}

#[cfg(test)]
mod tests;
