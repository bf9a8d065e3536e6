//! Words to all workers at once, over the control exchange: which runs somebody wants cancelled.
//!
//! They only save time, and may get lost: a worker acts on what the ledger says, and asks it now and then anyway.

use std::time::Duration;

use futures::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::FieldTable;
use lapin::{Channel, Connection};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::broker::{self, BrokerError, within};
use crate::publisher::Publisher;
use crate::task::{TaskId, WorkerId};
use crate::topology::{CONTROL_EXCHANGE, control_queue};

/// How many words wait to be sent; further ones are dropped.
const WAITING_MAX: usize = 1024;
/// How many tasks one message names.
const IDS_MAX: usize = 1_000;
/// How often a listener makes sure of its binding: somebody may have deleted the exchange.
const BIND_PERIOD: Duration = Duration::from_secs(30);

/// What a message says.
#[derive(Debug, Serialize, Deserialize)]
struct Word {
    cancel: Vec<TaskId>,
}

/// Speaks to the workers; clones share it.
#[derive(Debug, Clone)]
pub struct Control(mpsc::Sender<Vec<TaskId>>);

impl Control {
    /// Starts the speaker, on the publisher's connection; it ends with its last handle.
    #[must_use]
    pub fn spawn(publisher: Publisher) -> Self {
        let (words, mut waiting) = mpsc::channel::<Vec<TaskId>>(WAITING_MAX);
        tokio::spawn(async move {
            let mut batch = Vec::new();
            while waiting.recv_many(&mut batch, WAITING_MAX).await > 0 {
                let ids = std::mem::take(&mut batch).concat();
                if let Err(error) = send(&publisher, ids).await {
                    tracing::debug!(%error, "the workers were not told what to cancel: they find it in the ledger");
                }
            }
        });
        Self(words)
    }

    /// Tells the workers that these runs shall be cancelled, after the ledger has it.
    pub fn cancel(&self, ids: Vec<TaskId>) {
        if !ids.is_empty() {
            // With no room for it the workers hear of it a little later.
            let _ = self.0.try_send(ids);
        }
    }
}

async fn send(publisher: &Publisher, ids: Vec<TaskId>) -> Result<(), BrokerError> {
    let connection = publisher.connection().ok_or(BrokerError::Ended("the broker is away"))?;
    // A channel of its own: without the exchange the broker closes it, and nobody's confirms with it.
    let channel = within("channel.open", connection.create_channel()).await?;
    broker::declare_exchanges(&channel).await?;
    for some in ids.chunks(IDS_MAX) {
        let body = serde_json::to_vec(&Word { cancel: some.to_vec() }).unwrap_or_default();
        let (options, properties) = (BasicPublishOptions::default(), AMQPProperties::default());
        let publish = channel.basic_publish(CONTROL_EXCHANGE.into(), "".into(), options, &body, properties);
        within("basic.publish", publish).await?;
    }
    within("channel.close", channel.close(200, "done".into())).await
}

/// Listens in a worker's name until the channel fails; `heard` gets what shall be cancelled anywhere.
///
/// # Errors
/// Why it does not listen any more.
pub async fn listen(
    connection: &Connection,
    worker: WorkerId,
    heard: impl Fn(&[TaskId]),
) -> Result<std::convert::Infallible, BrokerError> {
    let channel = within("channel.open", connection.create_channel()).await?;
    let name = control_queue(worker);
    let declare = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    within("queue.declare", channel.queue_declare(name.as_str().into(), declare, FieldTable::default())).await?;
    bind(&channel, &name).await?;
    let consume = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut words =
        within("basic.consume", channel.basic_consume(name.as_str().into(), "".into(), consume, FieldTable::default()))
            .await?;
    let mut again = interval(BIND_PERIOD);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            word = words.next() => {
                let word = word.ok_or(BrokerError::Ended("the broker cancelled the consumer"))??;
                // What is no word of ours says nothing.
                if let Ok(Word { cancel }) = serde_json::from_slice(&word.data) {
                    heard(&cancel);
                }
            }
            _ = again.tick() => bind(&channel, &name).await?,
        }
    }
}

async fn bind(channel: &Channel, queue: &str) -> Result<(), BrokerError> {
    broker::declare_exchanges(channel).await?;
    broker::bind(channel, queue, CONTROL_EXCHANGE, "").await
}
