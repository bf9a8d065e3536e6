//! A message in the worker's hands. It is settled once, by moving it: acked, given back, or buried.
//!
//! That of a bundle is shared by its tasks, and settled once all of them have settled their share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Confirmation, Connection};
use tasklane_common::broker::{BrokerError, within};
use tasklane_common::envelope::Envelope;
use tasklane_common::task::Lane;
use tasklane_common::topology::{DEAD_EXCHANGE, REASON_HEADER, broker_queue};

use crate::acks::Acks;

/// A delivery of one generation of the connection; when that has ended, settling it does nothing: the broker
/// delivers the message again, and the ledger refuses what was done meanwhile.
#[derive(Debug)]
#[must_use = "a delivery that is never settled blocks its place until the connection ends"]
pub struct Delivery {
    connection: Arc<Connection>,
    acks: Arc<Acks>,
    tag: u64,
    shared: Option<Arc<Shared>>,
    /// The lane it came from.
    pub lane: Lane,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// The AMQP properties.
    pub properties: AMQPProperties,
    /// The body; taken by decoding.
    pub body: Vec<u8>,
}

/// What the shares of a bundle have in common.
#[derive(Debug)]
struct Shared {
    /// How many shares are not settled.
    open: AtomicUsize,
    /// Whether one of them was given back.
    back: AtomicBool,
}

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Acked,
    GivenBack,
}

impl Shared {
    fn among(count: usize) -> Arc<Self> {
        Arc::new(Self { open: AtomicUsize::new(count), back: AtomicBool::new(false) })
    }

    /// Settles a share; what becomes of the message, if it was the last one: it is not acked before all are settled, and goes
    /// back for each that did.
    fn settle(&self, end: End) -> Option<End> {
        if end == End::GivenBack {
            self.back.store(true, Ordering::Release);
        }
        let last = self.open.fetch_sub(1, Ordering::AcqRel) == 1;
        last.then(|| if self.back.load(Ordering::Acquire) { End::GivenBack } else { End::Acked })
    }
}

impl Delivery {
    /// Takes over what lapin delivered.
    pub fn new(connection: Arc<Connection>, acks: Arc<Acks>, lane: Lane, message: lapin::message::Delivery) -> Self {
        let lapin::message::Delivery { delivery_tag: tag, redelivered, properties, data: body, .. } = message;
        acks.delivered(tag);
        Self { connection, acks, tag, shared: None, lane, redelivered, properties, body }
    }

    /// A share for each of so many tasks of a bundle.
    pub fn shares(self, count: usize) -> impl Iterator<Item = Self> {
        let shared = Shared::among(count);
        let Self { connection, acks, tag, lane, redelivered, .. } = self;
        (0..count).map(move |_| Self {
            connection: Arc::clone(&connection),
            acks: Arc::clone(&acks),
            tag,
            shared: Some(Arc::clone(&shared)),
            lane: lane.clone(),
            redelivered,
            properties: AMQPProperties::default(),
            body: Vec::new(),
        })
    }

    /// The broker may forget the message.
    pub fn ack(self) {
        match &self.shared {
            None => self.acks.ack(self.tag),
            Some(shared) => self.settle_bundle(shared.settle(End::Acked)),
        }
    }

    /// The broker shall deliver the message to somebody else. Of a bundle it delivers all, once the others have ended; what has
    /// run by then is refused by the ledger.
    pub async fn give_back(self) {
        match &self.shared {
            None => self.acks.give_back(self.tag).await,
            Some(shared) => self.settle_bundle(shared.settle(End::GivenBack)),
        }
    }

    /// Tells the broker what the shares of a bundle have come to, if they have.
    fn settle_bundle(&self, end: Option<End>) {
        match end {
            None => {}
            Some(End::Acked) => self.acks.ack(self.tag),
            Some(End::GivenBack) => {
                let (acks, tag) = (Arc::clone(&self.acks), self.tag);
                tokio::spawn(async move { acks.give_back(tag).await });
            }
        }
    }

    /// Puts the message behind all others of its queue, with these headers. What is given back instead comes again at once,
    /// and each time counts towards the queue's delivery limit.
    pub async fn go_last(mut self, body: &[u8], headers: FieldTable) {
        let (properties, queue) =
            (std::mem::take(&mut self.properties).with_headers(headers), broker_queue(&self.lane));
        match Box::pin(publish(&self.connection, ("", &queue), properties, body)).await {
            Ok(()) => self.ack(),
            Err(error) => {
                tracing::debug!(%error, queue = %self.lane, "a message does not go to the end of its queue: given back");
                self.give_back().await;
            }
        }
    }

    /// Puts a task of this message into the dead letters; one of a bundle by itself.
    pub async fn bury_task(mut self, envelope: &Envelope, reason: &'static str) {
        if self.shared.is_some() {
            self.properties = envelope.properties();
        }
        self.bury(envelope.args.as_str().as_bytes().to_vec(), reason).await;
    }

    /// Puts a copy with the reason into the dead letters, and lets the broker forget the message once that is confirmed.
    pub async fn bury(mut self, body: Vec<u8>, reason: &'static str) {
        let id = self.properties.message_id().as_ref().map_or("none", |id| id.as_str());
        tracing::warn!(queue = %self.lane, reason, message.id = id, "not a task: moved to the dead letters");
        metrics::counter!("tasklane_dead_letters_total", "reason" => reason).increment(1);
        let properties = std::mem::take(&mut self.properties);
        let mut headers = properties.headers().clone().unwrap_or_default();
        headers.insert(REASON_HEADER.into(), AMQPValue::LongString(reason.into()));
        let properties = properties.with_headers(headers);
        // Boxed, as whatever is rare on the way of a delivery: its future would make that of each larger.
        match Box::pin(publish(&self.connection, (DEAD_EXCHANGE, ""), properties, &body)).await {
            Ok(()) => self.ack(),
            Err(error) => {
                // Unacked it stays with this consumer until the connection ends, and is delivered again.
                tracing::error!(%error, reason, "a dead letter could not be published, the message stays unacked");
            }
        }
    }
}

/// On a channel of its own: this is rare, and must not disturb the channel of the others.
async fn publish(
    connection: &Connection,
    (exchange, key): (&str, &str),
    properties: AMQPProperties,
    body: &[u8],
) -> Result<(), BrokerError> {
    let channel = within("channel.open", connection.create_channel()).await?;
    within("confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let properties = properties.with_delivery_mode(2);
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let confirm =
        within("basic.publish", channel.basic_publish(exchange.into(), key.into(), options, body, properties)).await?;
    let confirmed = within("publisher confirm", confirm).await? == Confirmation::Ack(None);
    // The message is safe: a channel that does not close goes with its connection.
    let _ = within("channel.close", channel.close(200, "done".into())).await;
    if confirmed { Ok(()) } else { Err(BrokerError::Ended("the broker refused the message")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_settled_with_its_last_share_and_goes_back_for_any() {
        use End::{Acked, GivenBack};
        let settled = |ends: &[End]| {
            let shared = Shared::among(ends.len());
            ends.iter().map(|end| shared.settle(*end)).collect::<Vec<_>>()
        };
        assert_eq!(settled(&[Acked]), [Some(Acked)]);
        assert_eq!(settled(&[Acked, Acked, Acked]), [None, None, Some(Acked)]);
        assert_eq!(settled(&[GivenBack, Acked, Acked]), [None, None, Some(GivenBack)]);
        assert_eq!(settled(&[Acked, GivenBack]), [None, Some(GivenBack)]);
    }
}
