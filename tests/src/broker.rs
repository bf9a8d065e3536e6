//! A private RabbitMQ node: its own folder, ports, cookie and node name, so that a test may do to it what it likes.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tempfile::TempDir;
use tokio::process::Command;

use crate::management::Management;
use crate::port::free_port;
use crate::process::{Launch, Process};
use crate::vhost::{self, Vhost};
use crate::wait::{eventually, within};

/// How long a node may take to start. An idle machine needs about five seconds, a busy one much more.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How long a node may take to stop when asked politely.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How long one `rabbitmqctl` may take.
const CTL_LIMIT: Duration = Duration::from_secs(60);

/// How long a node that runs may take to take a memory limit over.
const WATERMARK_LIMIT: Duration = Duration::from_secs(20);

/// What a node's memory limit is, and one that every node is over.
const MEMORY_BYTES: u64 = 512 << 20;
const NO_MEMORY_BYTES: u64 = 1;

/// The file that a node takes its memory limit from while it runs, and the one in which it says so.
const WATERMARK: &str = "watermark";
const WATERMARK_SET: &str = "watermark.set";

/// The end of what a node prints when its boot is over: "Starting broker... completed with 3 plugins."
const BOOTED: &str = " completed with ";

/// The user that a fresh node has, allowed on loopback only.
const USER: &str = "guest";

/// The password of [`USER`].
const PASSWORD: &str = "guest";

/// Where the scripts of RabbitMQ lie that do not change the user: Debian, the generic archive, Homebrew.
const SCRIPT_DIRS: [&str; 4] =
    ["/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin"];

/// How to reach a node that runs: all that a vhost needs to know.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where it speaks AMQP.
    pub amqp: SocketAddr,
    /// A user who may do everything.
    pub user: String,
    /// The user's password.
    pub password: String,
    /// Its management API.
    pub management: Management,
    /// Its command line, where the node is one of ours.
    pub ctl: Option<Ctl>,
}

impl Node {
    /// The AMQP URL of a vhost, at the node itself or at a proxy before it.
    pub fn url(&self, addr: SocketAddr, vhost: &str) -> String {
        format!("amqp://{}:{}@{addr}/{vhost}", self.user, self.password)
    }
}

/// `rabbitmqctl` for one private node.
#[derive(Clone, Debug)]
pub struct Ctl {
    /// The node's Erlang name.
    pub node: String,
    /// The folder with its `.erlang.cookie`.
    pub home: PathBuf,
}

impl Ctl {
    /// Runs one command and answers its output.
    pub async fn run(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(scripts()?.join("rabbitmqctl"));
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.envs([("LANG", "C.UTF-8"), ("RABBITMQ_CONF_ENV_FILE", "/dev/null")]).env("HOME", &self.home);
        command.args(["--quiet", "--node", &self.node]).args(args).kill_on_drop(true);
        let output = within(CTL_LIMIT, &format!("rabbitmqctl {args:?}"), command.output()).await??;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "rabbitmqctl {args:?}: {}: {said}{complained}", output.status);
        Ok(said)
    }
}

/// A private node. It ends, and all it has stored with it, when this guard is dropped.
#[derive(Debug)]
pub struct Broker {
    process: Option<Process>,
    node: Node,
    identity: Identity,
    place: TempDir,
}

/// What a node is called and where it listens; the same after each restart.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) cookie: String,
    amqp_port: u16,
    management_port: u16,
    distribution_port: u16,
    /// The names of all nodes of the cluster, or nothing for a node that stands alone.
    pub(crate) peers: Vec<String>,
    /// Further lines of its configuration.
    settings: Vec<String>,
}

impl Identity {
    /// A name, a cookie and ports that no other node has.
    pub(crate) fn fresh() -> Result<Self> {
        let number: u64 = rand::rng().random();
        Ok(Self {
            name: format!("tasklane-test-{number:016x}@localhost"),
            cookie: format!("{:032X}", rand::rng().random::<u128>()),
            amqp_port: free_port()?,
            management_port: free_port()?,
            distribution_port: free_port()?,
            peers: Vec::new(),
            settings: Vec::new(),
        })
    }
}

impl Broker {
    /// Starts a node and waits until it accepts AMQP connections.
    pub async fn private() -> Result<Self> {
        Self::with_identity(Identity::fresh()?).await
    }

    /// A node with further lines in its `rabbitmq.conf`.
    pub async fn with_settings(settings: &[String]) -> Result<Self> {
        Self::with_identity(Identity { settings: settings.to_vec(), ..Identity::fresh()? }).await
    }

    pub(crate) async fn with_identity(identity: Identity) -> Result<Self> {
        let place = tempfile::Builder::new().prefix("tasklane-rabbitmq-").tempdir()?;
        write_files(place.path(), &identity)?;
        let management_url = format!("http://127.0.0.1:{}", identity.management_port);
        let node = Node {
            amqp: (Ipv4Addr::LOCALHOST, identity.amqp_port).into(),
            user: USER.to_owned(),
            password: PASSWORD.to_owned(),
            management: Management::new(&management_url, USER, PASSWORD)?,
            ctl: Some(Ctl { node: identity.name.clone(), home: place.path().to_owned() }),
        };
        let mut broker = Self { process: None, node, identity, place };
        broker.start().await?;
        Ok(broker)
    }

    /// How to reach the node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The node's Erlang name.
    pub fn name(&self) -> &str {
        &self.identity.name
    }

    /// A fresh vhost on this node.
    pub async fn vhost(&self) -> Result<Vhost> {
        Vhost::on(self.node()).await
    }

    /// Starts the node again after [`Broker::stop`] or [`Broker::kill`]: same ports, same data.
    pub async fn start(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the node {} runs already", self.identity.name);
        // A node that starts again has the memory of its configuration.
        for file in [WATERMARK, WATERMARK_SET] {
            let _ = fs::remove_file(self.place.path().join(file));
        }
        let mut process = self.launch()?.spawn()?;
        let node = self.node.clone();
        process.ready(START_LIMIT, async || accepts(&node).await.map(Some)).await?;
        // The ports open a moment before the boot is over, and a vhost created in that moment stays down on this node.
        process.logged(BOOTED, START_LIMIT).await?;
        self.process = Some(process);
        Ok(())
    }

    /// Stops the node as a system's shutdown would: connections are closed, data are kept.
    pub async fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the node is not running")?;
        process.terminate()?;
        process.exited(STOP_LIMIT).await.map(drop)
    }

    /// SIGKILL: connections break, data are what the disk has.
    pub async fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the node is not running")?;
        process.kill().await
    }

    /// Throws away all that a stopped node has stored, as if its disk had been lost.
    pub fn lose_disk(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "a running node's disk cannot be taken away");
        fs::remove_dir_all(self.place.path().join("mnesia")).context("deleting the node's data")
    }

    /// The node's process, to freeze and thaw it.
    pub fn process(&self) -> Result<&Process> {
        self.process.as_ref().context("the node is not running")
    }

    /// Runs one `rabbitmqctl` command.
    pub async fn ctl(&self, args: &[&str]) -> Result<String> {
        self.node.ctl.as_ref().context("the node has no command line")?.run(args).await
    }

    /// Raises the memory alarm: the node stops reading from whoever publishes (`connection.blocked`).
    pub async fn raise_memory_alarm(&self) -> Result<()> {
        self.set_watermark(NO_MEMORY_BYTES).await
    }

    /// Takes the memory alarm back.
    pub async fn clear_memory_alarm(&self) -> Result<()> {
        self.set_watermark(MEMORY_BYTES).await
    }

    /// Not by `rabbitmqctl`: it is an Erlang machine of its own, whose start takes half a minute where the processors
    /// are busy, and for as long nobody else could do anything to the node.
    async fn set_watermark(&self, bytes: u64) -> Result<()> {
        let file = |name| self.place.path().join(name);
        let new = file("watermark.new");
        fs::write(&new, bytes.to_string())?;
        fs::rename(&new, file(WATERMARK))?;
        eventually(WATERMARK_LIMIT, &format!("the node to take {bytes} bytes for its memory limit"), async || {
            Ok((fs::read_to_string(file(WATERMARK_SET))? == bytes.to_string()).then_some(()))
        })
        .await
    }

    fn launch(&self) -> Result<Launch> {
        let place = self.place.path();
        // Few schedulers that do not spin: the node shares a small machine with the programs under test.
        let arguments = "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none";
        let watch = format!("-eval file:script({:?})", place.join("watch.script"));
        Ok(Launch::new("rabbitmq", scripts()?.join("rabbitmq-server"))
            .quiet()
            .bare_env()
            .env("LANG", "C.UTF-8")
            .env("HOME", place)
            // The start script then becomes the node itself, instead of waiting for it as its parent.
            .env("RUNNING_UNDER_SYSTEMD", "true")
            .env("RABBITMQ_NODENAME", &self.identity.name)
            .env("RABBITMQ_DIST_PORT", self.identity.distribution_port.to_string())
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_CONFIG_FILE", place.join("rabbitmq.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", place.join("enabled_plugins"))
            .env("RABBITMQ_PID_FILE", place.join("pid"))
            .env("RABBITMQ_MNESIA_BASE", place.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", place.join("log"))
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", format!("{arguments} {watch}")))
    }
}

/// Does the node accept AMQP connections, and does its management API answer?
async fn accepts(node: &Node) -> Result<()> {
    vhost::knock(node).await?;
    node.management.get(&["overview"]).await.map(drop)
}

fn write_files(place: &Path, identity: &Identity) -> Result<()> {
    for folder in ["mnesia", "log"] {
        fs::create_dir(place.join(folder))?;
    }
    let cookie = place.join(".erlang.cookie");
    fs::write(&cookie, &identity.cookie)?;
    fs::set_permissions(&cookie, fs::Permissions::from_mode(0o600))?;
    fs::write(place.join("enabled_plugins"), "[rabbitmq_management].\n")?;
    fs::write(place.join("rabbitmq.conf"), configuration(identity))?;
    fs::write(place.join("watch.script"), watch_script(place))?;
    Ok(())
}

/// What runs inside of the node and looks whether its memory limit was changed; the call is that of `rabbitmqctl`.
fn watch_script(place: &Path) -> String {
    let (limit, set) = (place.join(WATERMARK), place.join(WATERMARK_SET));
    format!(
        "spawn(fun() ->
    Watch = fun Again(Last) ->
        timer:sleep(50),
        case file:read_file({limit:?}) of
            {{ok, New}} when New =/= Last ->
                ok = vm_memory_monitor:set_vm_memory_high_watermark({{absolute, binary_to_integer(New)}}),
                ok = file:write_file({set:?}, New),
                Again(New);
            _ -> Again(Last)
        end
    end,
    Watch(none)
end).
"
    )
}

fn configuration(identity: &Identity) -> String {
    let mut lines = vec![
        format!("listeners.tcp.1 = 127.0.0.1:{}", identity.amqp_port),
        "management.tcp.ip = 127.0.0.1".to_owned(),
        format!("management.tcp.port = {}", identity.management_port),
        "raft.wal_max_size_bytes = 32000000".to_owned(),
        format!("vm_memory_high_watermark.absolute = {MEMORY_BYTES}"),
        "disk_free_limit.absolute = 50MB".to_owned(),
        "log.console = true".to_owned(),
        "log.console.level = warning".to_owned(),
        "log.file = false".to_owned(),
    ];
    if !identity.peers.is_empty() {
        lines.push("cluster_formation.peer_discovery_backend = classic_config".to_owned());
        lines.push("cluster_partition_handling = pause_minority".to_owned());
        let nodes = identity.peers.iter().enumerate();
        lines.extend(nodes.map(|(i, name)| format!("cluster_formation.classic_config.nodes.{} = {name}", i + 1)));
    }
    lines.extend(identity.settings.iter().cloned());
    lines.join("\n") + "\n"
}

/// The folder with `rabbitmq-server` and `rabbitmqctl`.
fn scripts() -> Result<PathBuf> {
    let chosen = std::env::var_os("TASKLANE_TEST_RABBITMQ_DIR").map(PathBuf::from);
    chosen
        .into_iter()
        .chain(SCRIPT_DIRS.map(PathBuf::from))
        .find(|dir| dir.join("rabbitmq-server").is_file())
        .context("no RabbitMQ found: install it, or set TASKLANE_TEST_RABBITMQ_DIR to the folder of rabbitmq-server")
}
