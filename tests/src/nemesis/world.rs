//! What the nemesis plays with: a broker, a database server, and on them two lanes, one for each ledger.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tasklane_common::topology::QUEUE_PREFIX;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};
use url::Url;

use crate::api::Api;
use crate::broker::Node;
use crate::cluster::Cluster;
use crate::history::Writer;
use crate::ledger::{Ledger, LedgerKind};
use crate::nemesis::limits;
use crate::nemesis::member::{Member, Role, Wires};
use crate::nemesis::operator::Doubts;
use crate::oplog::{CommandKind, OperationLog};
use crate::postgres::Postgres;
use crate::process::Process;
use crate::proxy::Proxy;
use crate::stack::{Program, Stack, Start, free_addr};
use crate::wait::eventually;

/// The queues of a lane, which all workers consume.
pub const QUEUES: [&str; 2] = ["default", "other"];

/// What the broker's names of a queue end with, for tasks of each priority.
pub const LANES: [&str; 3] = ["", ".high", ".low"];

/// How many producers a lane has.
const PRODUCERS: usize = 2;

/// How many workers a lane has.
const WORKERS: usize = 3;

/// How long everything may take to be up, at the beginning and after the last fault.
const UP_LIMIT: Duration = Duration::from_secs(60);

/// How long a new queue is left alone: a node of RabbitMQ 3.10 that is killed in a quorum queue's first moments may
/// leave it dead for ever.
const SETTLING: Duration = Duration::from_secs(4);

/// Tasks share messages as long as one place works them off in this time: some do, when they come together or pile up.
const BUNDLE: Duration = Duration::from_secs(2);

/// How long a program told to stop finishes what runs: shorter than some tasks, so that they are interrupted.
const GRACE: Duration = Duration::from_secs(2);

/// The kind of tasks that a program runs, and whose outcome may be unknown.
pub const COMMAND: &str = "test.command";

/// What transactional tasks count in.
const COUNTER: &str = "CREATE TABLE counter (n BIGINT NOT NULL); INSERT INTO counter VALUES (0)";

/// Tasks that are killed or fail over and over are to go on doing so.
const PATIENCE: &str = "1000";

/// Everything. Lanes end before what they stand on.
#[derive(Debug)]
pub struct World {
    /// One world of tasks for each ledger.
    pub lanes: Vec<Lane>,
    /// The broker; who holds it is the only one to harm it.
    pub broker: Mutex<Cluster>,
    /// The database server; who holds it is the only one to harm it.
    pub postgres: Mutex<Postgres>,
    /// Until when the broker must be left alone.
    settled_at: Mutex<Instant>,
}

/// Producers and workers on one ledger, in a vhost of their own.
#[derive(Debug)]
pub struct Lane {
    /// Which ledger.
    pub kind: LedgerKind,
    /// Its processes: producers first.
    pub members: Vec<Member>,
    /// What everybody writes down.
    pub history: Arc<Writer>,
    /// The file of the history.
    pub history_file: PathBuf,
    /// Vhost and ledger.
    pub stack: Stack,
    /// What nobody has answered; who holds it is the only one to pause a queue.
    pub doubts: Mutex<Doubts>,
}

/// The broker's name of a queue, for tasks that are neither urgent nor can wait.
pub fn broker_queue(queue: &str) -> String {
    format!("{QUEUE_PREFIX}{queue}")
}

/// The broker's names of a queue, for tasks of each priority.
pub fn broker_queues(queue: &str) -> [String; LANES.len()] {
    LANES.map(|lane| format!("{QUEUE_PREFIX}{queue}{lane}"))
}

impl World {
    /// Builds everything, and waits until it is up. Histories and logs go to `place`.
    pub async fn build(nodes: usize, place: &Path) -> Result<Self> {
        let (broker, postgres) = tokio::try_join!(Cluster::private(nodes), Postgres::private())?;
        let mut lanes = Vec::new();
        for kind in [LedgerKind::Sqlite, LedgerKind::Postgres] {
            lanes.push(Lane::build(kind, &broker, &postgres, place).await?);
        }
        let settled_at = Mutex::new(Instant::now() + SETTLING);
        let world = Self { lanes, broker: Mutex::new(broker), postgres: Mutex::new(postgres), settled_at };
        world.up().await?;
        for lane in &world.lanes {
            lane.stack.ledger.execute(COUNTER).await?;
            limits::set(lane).await?;
        }
        Ok(world)
    }

    /// Waits until every process says that it is ready.
    pub async fn up(&self) -> Result<()> {
        for lane in &self.lanes {
            for member in &lane.members {
                eventually(UP_LIMIT, &format!("{} {} to be ready", lane.kind, member.name), async || {
                    Ok((member.probe.raw_get("/readyz").await?.status == 200).then_some(()))
                })
                .await?;
            }
        }
        Ok(())
    }

    /// A queue is about to be declared anew.
    pub async fn unsettle(&self) {
        *self.settled_at.lock().await = Instant::now() + SETTLING;
    }

    /// Waits until the broker may be harmed.
    pub async fn settled(&self) {
        let at = *self.settled_at.lock().await;
        sleep_until(at).await;
    }
}

impl Lane {
    async fn build(kind: LedgerKind, broker: &Cluster, postgres: &Postgres, place: &Path) -> Result<Self> {
        let node = broker.nodes.first().context("a cluster has a node")?.node();
        let (ledger, ledger_addr) = match kind {
            LedgerKind::Sqlite => (Ledger::fresh(kind).await?, None),
            LedgerKind::Postgres => (Ledger::Postgres(postgres.database().await?), Some(addr_of(&postgres.url())?)),
        };
        let stack = Stack::with(node, ledger).await?;
        let place = place.join(kind.to_string().to_lowercase());
        std::fs::create_dir_all(&place)?;
        let history_file = place.join("history.jsonl");
        let history = Arc::new(Writer::open(&history_file, true)?);
        let mut lane = Self { kind, members: Vec::new(), history, history_file, stack, doubts: Mutex::default() };
        let mut nodes = broker.nodes.iter().map(|broker| broker.node().clone()).cycle();
        for at in 0..PRODUCERS + WORKERS {
            let (role, name) = match at.checked_sub(PRODUCERS) {
                None => (Role::Producer, format!("producer-{}", at + 1)),
                Some(at) => (Role::Worker, format!("worker-{}", at + 1)),
            };
            let node = nodes.next().context("a cluster has a node")?;
            let wires = Wires {
                amqp: Proxy::to(node.amqp).await?,
                ledger: match ledger_addr {
                    Some(addr) => Some(Proxy::to(addr).await?),
                    None => None,
                },
                http: None,
            };
            let member = lane.member((name, role), &node, wires, &place).await?;
            lane.members.push(member);
        }
        Ok(lane)
    }

    async fn member(&self, who: (String, Role), node: &Node, mut wires: Wires, place: &Path) -> Result<Member> {
        let addr = free_addr()?;
        let log = place.join(format!("{}.log", who.0));
        let amqp = node.url(wires.amqp.addr(), self.stack.vhost.name());
        let ledger = match (&self.stack.ledger, &wires.ledger) {
            (Ledger::Postgres(database), Some(wire)) => database.url_at(wire.addr())?,
            (ledger, _) => ledger.url(),
        };
        if who.1 == Role::Producer {
            wires.http = Some(Proxy::to(addr).await?);
        }
        let launch: Launcher = match who.1 {
            Role::Producer => {
                let start = self.stack.producer().env("TASKLANE_MAX_ATTEMPTS", PATIENCE).config(&limits::file());
                launcher(Settings { amqp, ledger, addr, log }.of(start), |producer| producer.process)
            }
            Role::Worker => {
                let start = self
                    .stack
                    .worker()
                    .binary("test-worker")
                    .env("TASKLANE_QUEUES", QUEUES.join(","))
                    .env("TASKLANE_TEST_OPLOG", self.history_file.display())
                    .env("TASKLANE_TEST_OPLOG_SYNC", 1)
                    .short_lease()
                    .config("backoff = { base_ms = 200, max_ms = 2000 }")
                    .config(&command(&self.history_file)?);
                launcher(Settings { amqp, ledger, addr, log }.of(start), |worker| worker.process)
            }
        };
        Ok(Member::keep(who, wires, Api::new(addr)?, &self.history, launch))
    }

    /// The producers.
    pub fn producers(&self) -> &[Member] {
        self.members.split_at(PRODUCERS).0
    }

    /// The workers.
    pub fn workers(&self) -> &[Member] {
        self.members.split_at(PRODUCERS).1
    }

    /// The API of the first producer, past all wires.
    pub fn api(&self) -> Result<&Api> {
        Ok(&self.producers().first().context("a lane has a producer")?.probe)
    }
}

/// The table of the command that must not start twice.
fn command(history: &Path) -> Result<String> {
    let command = CommandKind::new(COMMAND).lasting(Duration::from_millis(400)).effect();
    OperationLog::at(history).command(&command.setting("guarantee = \"at_most_once\""))
}

/// What all programs of a world are told.
struct Settings {
    amqp: String,
    ledger: String,
    addr: SocketAddr,
    log: PathBuf,
}

impl Settings {
    fn of<P: Program>(self, start: Start<P>) -> Start<P> {
        start
            .env("TASKLANE_AMQP_URL", self.amqp)
            .env("TASKLANE_LEDGER_URL", self.ledger)
            .env("TASKLANE_MAX_CRASHES", PATIENCE)
            .env("TASKLANE_SHUTDOWN_GRACE_MS", GRACE.as_millis())
            .env("TASKLANE_BUNDLE_MS", BUNDLE.as_millis())
            // A backtrace of a panic reads debug information that stays in memory, and memory is measured.
            .env("RUST_BACKTRACE", 0)
            .at(self.addr)
            .log_to(self.log)
    }
}

/// Starts a process, again and again.
type Launcher = Box<dyn Fn() -> Result<Process> + Send>;

fn launcher<P: Program + 'static>(start: Start<P>, process: fn(P) -> Process) -> Launcher {
    Box::new(move || Ok(process(start.clone().spawn()?)))
}

fn addr_of(url: &str) -> Result<SocketAddr> {
    let url: Url = url.parse().context("the URL of the PostgreSQL server")?;
    let addr = url.socket_addrs(|| Some(5432)).context("the host of the PostgreSQL server")?;
    addr.first().copied().context("the PostgreSQL server has an address")
}
