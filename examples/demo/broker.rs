//! The demo's queue in the broker, and what the demo tells about the broker.

use anyhow::{Result, bail, ensure};
use lapin::options::{QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ConnectionProperties};
use secrecy::{ExposeSecret, SecretString};
use tasklane_common::broker::{declare_exchanges, declare_lane, within};
use tasklane_common::task::{Lane, Priority, QueueName};
use tasklane_common::topology::{DEAD_QUEUE, broker_queue};
use tasklane_examples::client::Client;

use crate::worker::QUEUE;

/// The broker at `TASKLANE_AMQP_URL`.
pub(crate) struct Broker {
    url: SecretString,
    lane: Lane,
}

/// What is left in it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Left {
    /// Messages ready in the demo's queue.
    pub(crate) ready: u32,
    /// Dead letters, perhaps of others.
    pub(crate) dead: u32,
}

impl Broker {
    pub(crate) fn from_env() -> Result<Self> {
        let url = std::env::var("TASKLANE_AMQP_URL");
        let url = url.unwrap_or_else(|_| "amqp://guest:guest@127.0.0.1:5672/%2f".to_owned());
        Ok(Self { url: url.into(), lane: Lane { queue: QueueName::parse(QUEUE)?, priority: Priority::Normal } })
    }

    /// For the programs that the demo starts.
    pub(crate) fn url(&self) -> &str {
        self.url.expose_secret()
    }

    /// For people: without user and password.
    pub(crate) fn address(&self) -> String {
        self.place().map_or_else(|| "?".to_owned(), |(host, port)| format!("{host}:{port}"))
    }

    /// Declares the demo's queue and empties it of what an earlier demo left, unless another demo is running.
    pub(crate) async fn prepare(&self) -> Result<Left> {
        let connection = match self.connect().await {
            Ok(connection) => connection,
            Err(error) => bail!("no broker answers at {}; rabbitmq/up starts one ({error})", self.address()),
        };
        let channel = within("channel.open", connection.create_channel()).await?;
        declare_exchanges(&channel).await?;
        declare_lane(&channel, &self.lane).await?;
        let (_, consumers) = look(&channel, &broker_queue(&self.lane)).await?;
        ensure!(consumers == 0, "somebody consumes the queue {QUEUE} of this broker: another demo is running");
        purge(&channel, &self.lane).await?;
        let (dead, _) = look(&channel, DEAD_QUEUE).await?;
        within("connection.close", connection.close(200, "done".into())).await?;
        Ok(Left { ready: 0, dead })
    }

    /// Forgets messages whose ledger is about to be deleted.
    pub(crate) async fn empty(&self) -> Result<()> {
        let connection = self.connect().await?;
        let channel = within("channel.open", connection.create_channel()).await?;
        let (_, consumers) = look(&channel, &broker_queue(&self.lane)).await?;
        if consumers == 0 {
            purge(&channel, &self.lane).await?;
        }
        Ok(within("connection.close", connection.close(200, "done".into())).await?)
    }

    /// What is left in the demo's queue and among the dead letters.
    pub(crate) async fn left(&self) -> Result<Left> {
        let connection = self.connect().await?;
        let channel = within("channel.open", connection.create_channel()).await?;
        let (ready, _) = look(&channel, &broker_queue(&self.lane)).await?;
        let (dead, _) = look(&channel, DEAD_QUEUE).await?;
        within("connection.close", connection.close(200, "done".into())).await?;
        Ok(Left { ready, dead })
    }

    /// Where the management UI is, if it answers.
    pub(crate) async fn management_ui(&self, client: &Client) -> Option<String> {
        let given = std::env::var("TASKLANE_MANAGEMENT_URL").ok();
        let (host, port) = self.place()?;
        let port = port.checked_add(10_000)?;
        let url = given.unwrap_or_else(|| format!("http://{host}:{port}"));
        let (status, page) = client.probe(&url).await.ok()?;
        (status.is_success() && page.contains("RabbitMQ")).then_some(url)
    }

    async fn connect(&self) -> Result<Connection> {
        let properties = ConnectionProperties::default().with_connection_name("tasklane demo".into());
        Ok(within("connect", Connection::connect(self.url(), properties)).await?)
    }

    fn place(&self) -> Option<(String, u16)> {
        let url = reqwest::Url::parse(self.url()).ok()?;
        let port = url.port().unwrap_or(if url.scheme() == "amqps" { 5671 } else { 5672 });
        Some((url.host_str()?.to_owned(), port))
    }
}

/// Messages ready, and consumers.
async fn look(channel: &Channel, queue: &str) -> Result<(u32, u32)> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let answer = channel.queue_declare(queue.into(), passive, FieldTable::default());
    let queue = within("queue.declare", answer).await?;
    Ok((queue.message_count(), queue.consumer_count()))
}

async fn purge(channel: &Channel, lane: &Lane) -> Result<()> {
    let purged = channel.queue_purge(broker_queue(lane).into(), QueuePurgeOptions::default());
    within("queue.purge", purged).await?;
    Ok(())
}
