//! A vhost of a test's own, and what an operator can do to it.

use std::time::Duration;

use anyhow::{Context, Result};
use lapin::message::BasicGetMessage;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::broker::Node;
use crate::proxy::Proxy;
use crate::teardown;
use crate::wait::within;

/// How long one small AMQP conversation of the harness may take.
const LIMIT: Duration = Duration::from_secs(20);

/// After how long without a reader a tap deletes itself.
const TAP_EXPIRY_MS: i32 = 120_000;

/// A vhost that is deleted, with its queues and connections, when this guard is dropped.
#[derive(Debug)]
pub struct Vhost {
    name: String,
    node: Node,
}

impl Vhost {
    /// Creates a vhost on a running node.
    pub async fn on(node: &Node) -> Result<Self> {
        let vhost = Self { name: format!("test-{}", Uuid::now_v7().simple()), node: node.clone() };
        vhost.create().await?;
        Ok(vhost)
    }

    /// Creates the vhost again on a node that has lost its disk.
    pub async fn create(&self) -> Result<()> {
        self.node.management.create_vhost(&self.name).await
    }

    /// The name of the vhost.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node it lives on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its AMQP URL.
    pub fn url(&self) -> String {
        self.node.url(self.node.amqp, &self.name)
    }

    /// Its AMQP URL, the way leading through a proxy (which must lead to this node).
    pub fn url_through(&self, proxy: &Proxy) -> String {
        self.node.url(proxy.addr(), &self.name)
    }

    /// Imports the parts of a definitions file that belong to a vhost, whichever vhost they name there.
    pub async fn import(&self, definitions: &Value) -> Result<()> {
        let mut parts = json!({});
        for part in ["queues", "exchanges", "bindings", "policies", "parameters"] {
            let mut items = definitions[part].as_array().cloned().unwrap_or_default();
            items.iter_mut().filter_map(Value::as_object_mut).for_each(|item| drop(item.remove("vhost")));
            parts[part] = items.into();
        }
        self.node.management.import(&self.name, &parts).await
    }

    /// A connection of the test's own.
    pub async fn connect(&self) -> Result<Connection> {
        within(LIMIT, "an AMQP connection", Connection::connect(&self.url(), ConnectionProperties::default()))
            .await?
            .context("connecting to the broker")
    }

    /// How many messages are ready in a queue at this moment; `None` if there is no such queue.
    pub async fn depth(&self, queue: &str) -> Result<Option<u32>> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        self.converse(async |channel| match channel.queue_declare(queue.into(), passive, FieldTable::default()).await {
            Ok(declared) => Ok(Some(declared.message_count())),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error.into()),
        })
        .await
    }

    /// Throws away what is ready in a queue; answers how many messages that were.
    pub async fn purge(&self, queue: &str) -> Result<u32> {
        self.converse(async |channel| Ok(channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await?)).await
    }

    /// Deletes a queue with all that is in it.
    pub async fn delete_queue(&self, queue: &str) -> Result<u32> {
        self.converse(async |channel| Ok(channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?))
            .await
    }

    /// Publishes one message and waits for its confirm.
    pub async fn publish(&self, exchange: &str, key: &str, body: &[u8], properties: BasicProperties) -> Result<()> {
        self.converse(async |channel| {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let options = BasicPublishOptions::default();
            channel.basic_publish(exchange.into(), key.into(), options, body, properties.clone()).await?.await?;
            Ok(())
        })
        .await
    }

    /// Declares a queue bound to an exchange, as an operator who wants to see what passes: a classic one, which goes
    /// by itself. All queues that a message is routed to take part in its confirm, and a quorum queue of 3.10 that is
    /// dead because its node was killed too early would keep every publication from being confirmed.
    pub async fn tap(&self, exchange: &str, key: &str) -> Result<String> {
        let queue = format!("tap-{}", Uuid::now_v7().simple());
        let mut expiring = FieldTable::default();
        expiring.insert("x-expires".into(), AMQPValue::LongInt(TAP_EXPIRY_MS));
        self.declare_bound(&queue, expiring, exchange, key).await?;
        Ok(queue)
    }

    /// Declares a durable quorum queue (unless it is there) and binds it.
    pub async fn bind(&self, queue: &str, exchange: &str, key: &str) -> Result<()> {
        let mut quorum = FieldTable::default();
        quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        self.declare_bound(queue, quorum, exchange, key).await
    }

    async fn declare_bound(&self, queue: &str, arguments: FieldTable, exchange: &str, key: &str) -> Result<()> {
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.converse(async |channel| {
            channel.queue_declare(queue.into(), durable, arguments.clone()).await?;
            let (options, none) = (QueueBindOptions::default(), FieldTable::default());
            Ok(channel.queue_bind(queue.into(), exchange.into(), key.into(), options, none).await?)
        })
        .await
    }

    /// Takes all that is ready in a queue out of it.
    pub async fn take(&self, queue: &str) -> Result<Vec<BasicGetMessage>> {
        self.converse(async |channel| {
            let mut taken = Vec::new();
            while let Some(message) = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await? {
                taken.push(message);
            }
            Ok(taken)
        })
        .await
    }

    /// Closes every connection to the vhost that the management API shows, which a new one is a moment later; clients
    /// see a `connection.close`.
    pub async fn close_connections(&self) -> Result<()> {
        self.node.management.close_connections(&self.name).await
    }

    /// Opens a connection, holds one short conversation on a channel, and closes it.
    async fn converse<T>(&self, conversation: impl AsyncFnOnce(&Channel) -> Result<T>) -> Result<T> {
        let connection = self.connect().await?;
        let (_channel, answer) = within(LIMIT, "the broker to answer", async {
            let channel = connection.create_channel().await?;
            // A channel dropped is a channel closing, during which lapin cannot close the connection.
            let answer = conversation(&channel).await?;
            Ok::<_, anyhow::Error>((channel, answer))
        })
        .await??;
        within(LIMIT, "the connection to close", connection.close(200, "done".into())).await??;
        Ok(answer)
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        let (management, name) = (self.node.management.clone(), self.name.clone());
        // A node that has been stopped takes the vhost with it; only a node that is left running must be cleaned.
        teardown::run(&format!("deleting vhost {name}"), async move {
            if management.get(&["overview"]).await.is_ok() {
                management.delete_vhost(&name).await?;
            }
            Ok(())
        });
    }
}

/// Opens and closes one connection to the default vhost.
pub(crate) async fn knock(node: &Node) -> Result<()> {
    let url = node.url(node.amqp, "%2f");
    let connection =
        within(LIMIT, "an AMQP connection", Connection::connect(&url, ConnectionProperties::default())).await??;
    within(LIMIT, "the connection to close", connection.close(200, "done".into())).await??;
    Ok(())
}

fn is_not_found(error: &lapin::Error) -> bool {
    matches!(error.kind(), lapin::ErrorKind::ProtocolError(reason) if reason.get_id() == 404)
}
