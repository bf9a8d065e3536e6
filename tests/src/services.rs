//! The RabbitMQ node and the PostgreSQL server that all tests of a run share.
//!
//! A node takes seconds to start, so one is started for the whole run, by the wrapper `test-services` (see
//! `src/bin/test-services.rs`), which tells its whereabouts to the tests in the environment. A test process that
//! was started without the wrapper starts a wrapper of its own and holds it until it ends. The same variables can
//! point to services that are there already.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStdin, Command};
use tokio::sync::OnceCell;
use url::Url;

use crate::broker::{Broker, Ctl, Node};
use crate::management::Management;
use crate::postgres::Postgres;
use crate::process::binary;
use crate::wait::within;

/// The AMQP URL of the shared node.
pub const AMQP_URL: &str = "TASKLANE_TEST_AMQP_URL";

/// The URL of the shared node's management API.
pub const MANAGEMENT_URL: &str = "TASKLANE_TEST_MANAGEMENT_URL";

/// The URL of a database of the shared PostgreSQL server, as a user who may create databases.
pub const PG_URL: &str = "TASKLANE_TEST_PG_URL";

/// The Erlang name of the shared node, for `rabbitmqctl`. Not needed by tests that do without it.
pub const RABBITMQ_NODE: &str = "TASKLANE_TEST_RABBITMQ_NODE";

/// The folder with the shared node's `.erlang.cookie`. Not needed by tests that do without `rabbitmqctl`.
pub const RABBITMQ_HOME: &str = "TASKLANE_TEST_RABBITMQ_HOME";

/// What the wrapper prints when everything is up, after one line `KEY=VALUE` for each variable.
pub const READY: &str = "ready";

/// How long a wrapper may take to start everything.
const START_LIMIT: Duration = Duration::from_secs(180);

/// Where the shared services are.
#[derive(Debug)]
pub struct Services {
    /// The RabbitMQ node.
    pub node: Node,
    /// The administrator's URL of the PostgreSQL server.
    pub postgres_url: String,
    /// The wrapper this process has started: it ends everything when this pipe closes, as it does at our end.
    _held: Option<ChildStdin>,
}

/// The services of this run; started now if there are none.
pub async fn shared() -> Result<&'static Services> {
    static SHARED: OnceCell<Services> = OnceCell::const_new();
    SHARED
        .get_or_try_init(async || {
            let given: HashMap<String, String> = std::env::vars().collect();
            if given.contains_key(AMQP_URL) { Services::from_variables(&given, None) } else { hold().await }
        })
        .await
}

/// The services themselves, started by and living as long as the wrapper.
#[derive(Debug)]
pub struct Running {
    broker: Broker,
    postgres: Postgres,
}

impl Running {
    /// Starts a RabbitMQ node and a PostgreSQL server side by side.
    pub async fn start() -> Result<Self> {
        let (broker, postgres) = tokio::try_join!(Broker::private(), Postgres::private())?;
        Ok(Self { broker, postgres })
    }

    /// What the tests must know, as environment variables.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let node = self.broker.node();
        let mut variables = vec![
            (AMQP_URL, node.url(node.amqp, "%2f")),
            (MANAGEMENT_URL, node.management.url().to_string()),
            (PG_URL, self.postgres.url()),
        ];
        if let Some(ctl) = &node.ctl {
            variables.push((RABBITMQ_NODE, ctl.node.clone()));
            variables.push((RABBITMQ_HOME, ctl.home.display().to_string()));
        }
        variables
    }
}

impl Services {
    /// Where the PostgreSQL server listens, for a proxy before it.
    pub fn postgres_addr(&self) -> Result<SocketAddr> {
        let url: Url = self.postgres_url.parse().context("the URL of the PostgreSQL server")?;
        let addr = url.socket_addrs(|| Some(5432)).context("the host of the PostgreSQL server")?;
        addr.first().copied().context("the PostgreSQL server has an address")
    }

    fn from_variables(variables: &HashMap<String, String>, held: Option<ChildStdin>) -> Result<Self> {
        let get = |key: &str| variables.get(key).with_context(|| format!("{key} is not set, though {AMQP_URL} is"));
        let amqp: Url = get(AMQP_URL)?.parse().with_context(|| format!("{AMQP_URL} is not a URL"))?;
        let (user, password) = (amqp.username(), amqp.password().unwrap_or_default());
        let addr = amqp.socket_addrs(|| Some(5672)).with_context(|| format!("the host in {AMQP_URL}"))?;
        let ctl = match (variables.get(RABBITMQ_NODE), variables.get(RABBITMQ_HOME)) {
            (Some(node), Some(home)) => Some(Ctl { node: node.clone(), home: home.into() }),
            _ => None,
        };
        let node = Node {
            amqp: *addr.first().with_context(|| format!("{AMQP_URL} leads to no address"))?,
            user: user.to_owned(),
            password: password.to_owned(),
            management: Management::new(get(MANAGEMENT_URL)?, user, password)?,
            ctl,
        };
        Ok(Self { node, postgres_url: get(PG_URL)?.clone(), _held: held })
    }
}

/// Starts a wrapper that ends when this process ends.
async fn hold() -> Result<Services> {
    let mut wrapper = Command::new(binary("test-services")?)
        .arg("--hold")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("starting test-services")?;
    let lifeline = wrapper.stdin.take().context("the wrapper's input is piped")?;
    let output = wrapper.stdout.take().context("the wrapper's output is piped")?;
    let variables = within(START_LIMIT, "test-services to start", async {
        let mut lines = BufReader::new(output).lines();
        let mut variables = HashMap::new();
        while let Some(line) = lines.next_line().await? {
            match line.split_once('=') {
                Some((key, value)) => drop(variables.insert(key.to_owned(), value.to_owned())),
                None if line == READY => return Ok(variables),
                None => anyhow::bail!("test-services said {line:?}"),
            }
        }
        anyhow::bail!("test-services ended before it was ready")
    })
    .await??;
    ensure!(!variables.is_empty(), "test-services told nothing");
    Services::from_variables(&variables, Some(lifeline))
}
