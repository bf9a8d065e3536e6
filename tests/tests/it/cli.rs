//! The operator's command `tasklane`, as a shell runs it: its output, its exit codes, and what it does when things break.

mod changing;
mod failures;
mod looking;

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::Api;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::CommandKind;
use tasklane_tests::process::binary;
use tasklane_tests::proxy::{Direction, Proxy};
use tasklane_tests::stack::{Producer, Stack, Worker};
use tasklane_tests::within;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// However slow the machine is.
const LIMIT: Duration = Duration::from_secs(60);

/// The id of no task.
const NOBODY: &str = "01a20751-1f82-705d-a198-4567bb46f288";

/// The command, for one producer.
#[derive(Clone)]
struct Cli {
    url: String,
    env: Vec<(&'static str, &'static str)>,
}

/// How a command ended, and what it said.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Cli {
    fn at(url: impl Into<String>) -> Self {
        Self { url: url.into(), env: Vec::new() }
    }

    fn of(producer: &Producer) -> Self {
        Self::at(producer.api.url(""))
    }

    fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary("tasklane")?);
        command.args(args).env_clear().env("TASKLANE_URL", &self.url).envs(self.env.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        Ok(command)
    }

    /// Runs it without input.
    async fn run(&self, args: &[&str]) -> Result<Said> {
        ended(self.command(args)?.spawn()?, args).await
    }

    /// Runs it with input.
    async fn fed(&self, args: &[&str], input: &str) -> Result<Said> {
        let mut child = self.command(args)?.stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("its standard input")?;
        let input = input.to_owned();
        // A command that refuses its input closes the pipe, which is not this test's matter.
        let feed = tokio::spawn(async move { stdin.write_all(input.as_bytes()).await });
        let said = ended(child, args).await;
        feed.abort();
        said
    }

    /// Runs it and expects success; answers what it printed.
    async fn ok(&self, args: &[&str]) -> Result<String> {
        let said = self.run(args).await?;
        ensure!(said.code == Some(0), "{args:?}: {said:#?}");
        Ok(said.out)
    }

    /// Runs it with `--json` and expects success; answers the documents that it printed.
    async fn json(&self, args: &[&str]) -> Result<Vec<Value>> {
        documents(&self.ok(&[args, &["--json"]].concat()).await?)
    }

    /// Submits a task; answers its id.
    async fn submit(&self, args: &[&str]) -> Result<String> {
        Ok(self.ok(&[&["submit", "--quiet"], args].concat()).await?.trim().to_owned())
    }
}

impl Said {
    /// It ended so, printed nothing, and said all this.
    fn failed(&self, code: i32, words: &[&str]) {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""), "{self:#?}");
        // Before the error it may say why it tried again.
        let told = self.err.lines().find(|line| !line.contains(": trying again in ")).unwrap_or_default();
        assert!(told.starts_with("error: ") && !self.err.contains("panicked"), "{self:#?}");
        for word in words {
            assert!(self.err.contains(word), "{word}: {self:#?}");
        }
    }
}

async fn ended(child: Child, args: &[&str]) -> Result<Said> {
    let output = within(LIMIT, &format!("tasklane {args:?}"), child.wait_with_output()).await??;
    let text = |bytes| String::from_utf8(bytes).context("not text");
    Ok(Said { code: output.status.code(), out: text(output.stdout)?, err: text(output.stderr)? })
}

fn documents(text: &str) -> Result<Vec<Value>> {
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
}

async fn producer() -> Result<(Stack, Producer)> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    Ok((stack, producer))
}

/// A worker that answers with the args, one that gives up, and one that takes its time.
async fn worker(stack: &Stack) -> Result<Worker> {
    let log = stack.operation_log()?;
    let kinds = [
        CommandKind::new("test.echo").then("cat"),
        CommandKind::new("test.fail").then("echo 'no such month' >&2; exit 65"),
        CommandKind::new("test.slow").then("sleep 30"),
    ];
    let mut start = stack.worker();
    for kind in kinds {
        start = start.config(&log.command(&kind)?);
    }
    start.start().await
}
