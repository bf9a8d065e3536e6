//! A message in the worker's hands. It is settled once, by moving it: acked, given back, or buried.

use std::sync::Arc;

use lapin::Connection;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::AMQPValue;
use tasklane_common::broker::{BrokerError, within};
use tasklane_common::task::Lane;
use tasklane_common::topology::{DEAD_EXCHANGE, REASON_HEADER};

use crate::acks::Acks;

/// A delivery of one generation of the connection; when that has ended, settling it does nothing: the broker
/// delivers the message again, and the ledger refuses what was done meanwhile.
#[derive(Debug)]
#[must_use = "a delivery that is never settled blocks its place until the connection ends"]
pub struct Delivery {
    connection: Arc<Connection>,
    acks: Arc<Acks>,
    tag: u64,
    /// The lane it came from.
    pub lane: Lane,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// The AMQP properties.
    pub properties: AMQPProperties,
    /// The body; taken by decoding.
    pub body: Vec<u8>,
}

impl Delivery {
    /// Takes over what lapin delivered.
    pub fn new(connection: Arc<Connection>, acks: Arc<Acks>, lane: Lane, message: lapin::message::Delivery) -> Self {
        let lapin::message::Delivery { delivery_tag: tag, redelivered, properties, data: body, .. } = message;
        acks.delivered(tag);
        Self { connection, acks, tag, lane, redelivered, properties, body }
    }

    /// The broker may forget the message.
    pub fn ack(self) {
        self.acks.ack(self.tag);
    }

    /// The broker shall deliver the message to somebody else.
    pub async fn give_back(self) {
        self.acks.give_back(self.tag).await;
    }

    /// Puts a copy with the reason into the dead letters, and lets the broker forget the message once that is confirmed.
    pub async fn bury(mut self, body: Vec<u8>, reason: &'static str) {
        tracing::warn!(queue = %self.lane, reason, "not a task: moved to the dead letters");
        metrics::counter!("tasklane_dead_letters_total", "reason" => reason).increment(1);
        let properties = std::mem::take(&mut self.properties);
        // Boxed, as whatever is rare on the way of a delivery: its future would make that of each larger.
        match Box::pin(publish_dead(&self.connection, properties, &body, reason)).await {
            Ok(()) => self.ack(),
            Err(error) => {
                // Unacked it stays with this consumer until the connection ends, and is delivered again.
                tracing::error!(%error, reason, "a dead letter could not be published, the message stays unacked");
            }
        }
    }
}

/// On a channel of its own: this is rare, and must not disturb the channel of the others.
async fn publish_dead(
    connection: &Connection,
    properties: AMQPProperties,
    body: &[u8],
    reason: &str,
) -> Result<(), BrokerError> {
    let channel = within("channel.open", connection.create_channel()).await?;
    within("confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let mut headers = properties.headers().clone().unwrap_or_default();
    headers.insert(REASON_HEADER.into(), AMQPValue::LongString(reason.into()));
    let properties = properties.with_headers(headers).with_delivery_mode(2);
    let options = BasicPublishOptions::default();
    let confirm =
        within("basic.publish", channel.basic_publish(DEAD_EXCHANGE.into(), "".into(), options, body, properties))
            .await?;
    let confirmed = within("publisher confirm", confirm).await?.is_ack();
    // The message is safe: a channel that does not close goes with its connection.
    let _ = within("channel.close", channel.close(200, "done".into())).await;
    if confirmed { Ok(()) } else { Err(BrokerError::Ended("the broker refused the dead letter")) }
}
