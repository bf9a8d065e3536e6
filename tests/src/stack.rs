//! One test's world: a vhost, a ledger, and the producers and workers that share them.

use std::ffi::OsString;
use std::fs;
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::api::{Answer, Api};
use crate::broker::Node;
use crate::ledger::{Ledger, LedgerKind};
use crate::metrics::Metrics;
use crate::oplog::OperationLog;
use crate::port::free_port;
use crate::process::{Launch, Process, binary};
use crate::services;
use crate::vhost::Vhost;

/// How long a producer or worker may take to become ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long one that is started [under](Start::under) another program may take.
const SLOW_READY_LIMIT: Duration = Duration::from_secs(180);

/// How long a [short lease](Start::short_lease) lives without renewal.
pub const LEASE_TTL: Duration = Duration::from_secs(3);

/// How long a program that is to fail at its start may take for it.
const FAIL_LIMIT: Duration = Duration::from_secs(60);

/// What one test works with. Declare it first: whatever is started on it must end before it.
#[derive(Debug)]
pub struct Stack {
    /// The vhost, with the policies of `rabbitmq/definitions.json`; all else the programs declare themselves.
    pub vhost: Vhost,
    /// The ledger, empty.
    pub ledger: Ledger,
    place: TempDir,
}

impl Stack {
    /// A world on the shared RabbitMQ node.
    pub async fn new(kind: LedgerKind) -> Result<Self> {
        Self::on(&services::shared().await?.node, kind).await
    }

    /// A world on a node of the test's own, for tests that do harm to it.
    pub async fn on(node: &Node, kind: LedgerKind) -> Result<Self> {
        Self::with(node, Ledger::fresh(kind).await?).await
    }

    /// A world on a node and with a ledger of the test's own.
    pub async fn with(node: &Node, ledger: Ledger) -> Result<Self> {
        let vhost = Vhost::on(node).await?;
        vhost.import(&json!({"policies": definitions()?["policies"]})).await?;
        let place = tempfile::Builder::new().prefix("tasklane-test-").tempdir()?;
        Ok(Self { vhost, ledger, place })
    }

    /// A folder for whatever the test wants to keep.
    pub fn place(&self) -> &Path {
        self.place.path()
    }

    /// A new operation log, into which the test's handlers write.
    pub fn operation_log(&self) -> Result<OperationLog> {
        OperationLog::create(self.place())
    }

    /// A producer, not yet started.
    pub fn producer(&self) -> Start<Producer> {
        Start::new(self)
    }

    /// A worker, not yet started. The kinds it knows are in its [`Start::config`].
    pub fn worker(&self) -> Start<Worker> {
        Start::new(self)
    }

    /// A worker, not yet started, with the handlers of `src/bin/test-worker.rs`, which write into `log`.
    pub fn test_worker(&self, log: &OperationLog) -> Start<Worker> {
        self.worker().binary("test-worker").env("TASKLANE_TEST_OPLOG", log.file().display())
    }
}

/// A producer or worker about to be started, with the settings of its stack.
#[derive(Debug)]
pub struct Start<P> {
    binary: String,
    under: Vec<String>,
    env: Vec<(String, String)>,
    args: Vec<String>,
    config: Option<String>,
    addr: Option<SocketAddr>,
    log: Option<PathBuf>,
    place: PathBuf,
    program: PhantomData<fn() -> P>,
}

impl<P> Clone for Start<P> {
    fn clone(&self) -> Self {
        let Self { binary, under, env, args, config, addr, log, place, program } = self;
        Self {
            binary: binary.clone(),
            under: under.clone(),
            env: env.clone(),
            args: args.clone(),
            config: config.clone(),
            addr: *addr,
            log: log.clone(),
            place: place.clone(),
            program: *program,
        }
    }
}

impl<P: Program> Start<P> {
    fn new(stack: &Stack) -> Self {
        let start = Self {
            binary: P::BINARY.to_owned(),
            under: Vec::new(),
            env: Vec::new(),
            args: Vec::new(),
            config: None,
            addr: None,
            log: None,
            place: stack.place().to_owned(),
            program: PhantomData,
        };
        // Of the tests' programs any may be first.
        start
            .env("TASKLANE_AMQP_URL", stack.vhost.url())
            .env("TASKLANE_LEDGER_URL", stack.ledger.url())
            .env("TASKLANE_CREATE_LEDGER", true)
    }

    /// Sets a variable; the last one set under a name counts. `TASKLANE_AMQP_URL` may lead through a proxy, say.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl ToString) -> Self {
        self.env.push((key.to_owned(), value.to_string()));
        self
    }

    /// Adds a command line argument.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Adds to the program's TOML file.
    #[must_use]
    pub fn config(mut self, toml: &str) -> Self {
        let config = self.config.get_or_insert_default();
        config.push_str(toml);
        config.push('\n');
        self
    }

    /// Where it listens; by default on a free port, which is another one at each start.
    #[must_use]
    pub fn at(mut self, addr: SocketAddr) -> Self {
        self.addr = Some(addr);
        self
    }

    /// Appends what it says to a file that stays.
    #[must_use]
    pub fn log_to(mut self, file: impl Into<PathBuf>) -> Self {
        self.log = Some(file.into());
        self
    }

    /// Starts another binary of the workspace in the same place.
    #[must_use]
    pub fn binary(mut self, name: &str) -> Self {
        name.clone_into(&mut self.binary);
        self
    }

    /// Starts it by a program that looks into it, such as valgrind, given with its arguments.
    #[must_use]
    pub fn under(mut self, command: &[&str]) -> Self {
        self.under = command.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Starts the program and waits until it says that it is ready.
    pub async fn start(self) -> Result<P> {
        let limit = if self.under.is_empty() { READY_LIMIT } else { SLOW_READY_LIMIT };
        let mut program = self.spawn()?;
        program.ready(limit).await?;
        Ok(program)
    }

    /// Starts the program and does not wait.
    pub fn spawn(self) -> Result<P> {
        let addr = self.addr.map_or_else(free_addr, Ok)?;
        let process = self.launch(addr)?.spawn()?;
        P::started(process, addr)
    }

    /// Starts a program that is expected to end by itself; answers how it ended and what it said.
    pub async fn fail(self) -> Result<(ExitStatus, String)> {
        let addr = free_addr()?;
        let mut process = self.launch(addr)?.spawn()?;
        let status = process.exited(FAIL_LIMIT).await?;
        Ok((status, process.log()))
    }

    /// The program sees nothing of the environment and of the folder the tests run in.
    fn launch(self, addr: SocketAddr) -> Result<Launch> {
        let own = binary(&self.binary)?;
        let mut command = self.under.into_iter().map(OsString::from).chain([own.into()]);
        let program = command.next().context("a command has a program")?;
        let mut launch = Launch::new(&self.binary, program)
            .bare_env()
            .dir(&self.place)
            .args(command)
            .args(self.args)
            .log_to(self.log)
            .env(P::ADDR_VARIABLE, addr.to_string())
            .env("RUST_BACKTRACE", "1");
        if let Some(toml) = self.config {
            let file = self.place.join(format!("{}-{}.toml", self.binary, Uuid::now_v7().simple()));
            fs::write(&file, toml)?;
            launch = launch.env("TASKLANE_CONFIG", file);
        }
        Ok(self.env.into_iter().fold(launch, |launch, (key, value)| launch.env(key, value)))
    }
}

impl Start<Worker> {
    /// A lease of [`LEASE_TTL`], for tests that wait for its end: a machine that stands still for two seconds loses it.
    #[must_use]
    pub fn short_lease(self) -> Self {
        self.env("TASKLANE_LEASE_TTL_MS", LEASE_TTL.as_millis())
            .env("TASKLANE_LEASE_RENEW_MS", LEASE_TTL.as_millis() / 6)
    }
}

/// What producers and workers have in common.
pub trait Program: Sized {
    /// The name of the binary.
    const BINARY: &'static str;

    /// The variable that says where it listens.
    const ADDR_VARIABLE: &'static str;

    /// Wraps a started process.
    fn started(process: Process, addr: SocketAddr) -> Result<Self>;

    /// Waits until `/readyz` answers 200.
    fn ready(&mut self, limit: Duration) -> impl Future<Output = Result<()>>;
}

/// A running producer.
#[derive(Debug)]
pub struct Producer {
    /// Its process.
    pub process: Process,
    /// Its HTTP API.
    pub api: Api,
}

impl Program for Producer {
    const BINARY: &'static str = "tasklane-producer";
    const ADDR_VARIABLE: &'static str = "TASKLANE_HTTP_ADDR";

    fn started(process: Process, addr: SocketAddr) -> Result<Self> {
        Ok(Self { process, api: Api::new(addr)? })
    }

    async fn ready(&mut self, limit: Duration) -> Result<()> {
        let api = &self.api;
        self.process.ready(limit, async || is_ready(api).await).await
    }
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    /// Its process.
    pub process: Process,
    /// Its health and metrics, the only HTTP it speaks.
    probe: Api,
    /// Where it speaks it.
    pub addr: SocketAddr,
}

impl Worker {
    /// Its metrics at this moment.
    pub async fn metrics(&self) -> Result<Metrics> {
        self.probe.metrics().await
    }

    /// Does it say that it is ready?
    pub async fn is_ready(&self) -> Result<bool> {
        Ok(is_ready(&self.probe).await?.is_some())
    }

    /// What its listener answers.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.probe.raw_get(path).await
    }

    /// Why it says that it is not ready; `None` when it is.
    pub async fn problem(&self) -> Result<Option<String>> {
        let (status, text) = self.readiness().await?;
        Ok((status != 200).then_some(text))
    }

    /// What `/readyz` answers.
    pub async fn readiness(&self) -> Result<(u16, String)> {
        let answer = self.probe.raw_get("/readyz").await?;
        Ok((answer.status, answer.text()))
    }
}

impl Program for Worker {
    const BINARY: &'static str = "tasklane-worker";
    const ADDR_VARIABLE: &'static str = "TASKLANE_METRICS_ADDR";

    fn started(process: Process, addr: SocketAddr) -> Result<Self> {
        Ok(Self { process, probe: Api::new(addr)?, addr })
    }

    async fn ready(&mut self, limit: Duration) -> Result<()> {
        let probe = &self.probe;
        self.process.ready(limit, async || is_ready(probe).await).await
    }
}

/// A port of 127.0.0.1 on which nobody listens.
pub(crate) fn free_addr() -> Result<SocketAddr> {
    Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?)))
}

async fn is_ready(api: &Api) -> Result<Option<()>> {
    Ok((api.raw_get("/readyz").await?.status == 200).then_some(()))
}

/// The broker's definitions as the repository has them.
pub fn definitions() -> Result<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rabbitmq/definitions.json");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    Ok(serde_json::from_str(&text)?)
}
