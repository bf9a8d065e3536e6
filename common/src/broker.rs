//! The connection to RabbitMQ: made, declared on, watched, and made again as one whole *generation*.
//!
//! lapin's own recovery is not used: it gives up after some tries, and a half-recovered channel is worse than a new
//! one. Whatever belongs to an old generation (channels, delivery tags, confirms) dies with it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPHardError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::task::Lane;
use crate::topology::{self, CONTROL_EXCHANGE, DEAD_EXCHANGE, DEAD_QUEUE, EVENTS_EXCHANGE, TASKS_EXCHANGE};

/// How long a connection attempt or one synchronous AMQP method may take.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(10);

/// The heartbeat of connections whose peer need not know soon that they are dead.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// The largest frame, to which larger bodies are cut: lapin keeps room for 64 of them a connection, which at the
/// broker's 128 KiB would be 8 MiB.
pub const FRAME_BYTES_MAX: u64 = 32 * 1024;
/// The largest frame that RabbitMQ agrees to unless told otherwise, and so the most headers that another program's message has: they
/// are not cut.
pub const PEER_FRAME_BYTES_MAX: u64 = 128 * 1024;
const RECONNECT: Backoff = Backoff { base_ms: 100, max_ms: 5_000 };
/// A generation that lived so long was healthy: the next reconnection begins with the shortest wait again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// What can go wrong between this process and the broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The broker, or the library on its behalf, refused or failed.
    #[error(transparent)]
    Amqp(#[from] lapin::Error),
    /// No answer within [`RPC_TIMEOUT`].
    #[error("no answer to {0} within 10 s")]
    Timeout(&'static str),
    /// The connection or consumer ended without an error.
    #[error("{0}")]
    Ended(&'static str),
}

impl BrokerError {
    /// Whether the broker has sent a frame larger than was agreed on, as RabbitMQ does with headers.
    #[must_use]
    pub fn is_frame_too_large(&self) -> bool {
        match self {
            Self::Amqp(error) => matches!(error.kind(), ErrorKind::ProtocolError(error)
                if *error.kind() == AMQPErrorKind::Hard(AMQPHardError::FRAMEERROR)),
            Self::Timeout(_) | Self::Ended(_) => false,
        }
    }
}

/// What the broker says of a queue at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Messages ready for delivery.
    pub ready: u32,
    /// Consumers.
    pub consumers: u32,
}

/// Awaits a lapin future with [`RPC_TIMEOUT`].
///
/// # Errors
/// lapin's error, or [`BrokerError::Timeout`] naming `what`.
pub async fn within<T>(
    what: &'static str,
    future: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, BrokerError> {
    timeout(RPC_TIMEOUT, future).await.map_err(|_| BrokerError::Timeout(what))?.map_err(BrokerError::Amqp)
}

/// Connects under a name that the management UI shows. Each side takes a peer that is silent for two heartbeats for dead.
///
/// # Errors
/// When the broker is not there, refuses, or does not answer in time.
pub async fn connect(url: &SecretString, name: &str, heartbeat: Duration) -> Result<Connection, BrokerError> {
    connect_with_frames(url, name, heartbeat, FRAME_BYTES_MAX).await
}

/// [`connect`], with another limit for frames, in bytes.
///
/// # Errors
/// As of [`connect`].
pub async fn connect_with_frames(
    url: &SecretString,
    name: &str,
    heartbeat: Duration,
    frame_bytes_max: u64,
) -> Result<Connection, BrokerError> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let url = with_defaults(url.expose_secret(), heartbeat, frame_bytes_max);
    within("connect", Connection::connect(&url, properties)).await
}

/// Adds the heartbeat, in whole seconds, and the frame size, unless the address sets its own.
fn with_defaults(url: &str, heartbeat: Duration, frame_bytes_max: u64) -> String {
    let mut url = url.to_owned();
    for (name, value) in [("heartbeat", heartbeat.as_secs().max(1)), ("frame_max", frame_bytes_max)] {
        if !url.contains(&format!("{name}=")) {
            let separator = if url.contains('?') { '&' } else { '?' };
            url = format!("{url}{separator}{name}={value}");
        }
    }
    url
}

/// Declares the exchanges and the dead letters' queue. Idempotent.
///
/// # Errors
/// When the broker has something else under one of the names, or lacks the permission.
pub async fn declare_exchanges(channel: &Channel) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let (topic, fanout) = (ExchangeKind::Topic, ExchangeKind::Fanout);
    for (name, kind) in [
        (TASKS_EXCHANGE, topic.clone()),
        (DEAD_EXCHANGE, fanout.clone()),
        (CONTROL_EXCHANGE, fanout),
        (EVENTS_EXCHANGE, topic),
    ] {
        within("exchange.declare", channel.exchange_declare(name.into(), kind, options, FieldTable::default())).await?;
    }
    declare_quorum_queue(channel, DEAD_QUEUE).await?;
    bind(channel, DEAD_QUEUE, DEAD_EXCHANGE, "").await
}

/// Declares a lane's queue and binds it. Idempotent; the exchanges must be there.
///
/// # Errors
/// When the broker has something else under the name, or lacks the permission.
pub async fn declare_lane(channel: &Channel, lane: &Lane) -> Result<(), BrokerError> {
    let name = topology::broker_queue(lane);
    declare_quorum_queue(channel, &name).await?;
    bind(channel, &name, TASKS_EXCHANGE, &topology::binding_key(lane)).await
}

/// Nothing tunable is an argument, since arguments are frozen at the first declaration: limits are policies.
async fn declare_quorum_queue(channel: &Channel, name: &str) -> Result<(), BrokerError> {
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    within("queue.declare", channel.queue_declare(name.into(), options, arguments)).await?;
    Ok(())
}

pub(crate) async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> Result<(), BrokerError> {
    let options = QueueBindOptions::default();
    within("queue.bind", channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()))
        .await
}

/// Asks for the depth of lanes, at this moment, by passive declaration. Those that are not there are left out.
///
/// # Errors
/// When the connection fails in between.
pub async fn depths(connection: &Connection, lanes: &[Lane]) -> Result<BTreeMap<Lane, Depth>, BrokerError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let mut found = BTreeMap::new();
    let mut channel = within("channel.open", connection.create_channel()).await?;
    for lane in lanes {
        let name = topology::broker_queue(lane);
        match within("queue.declare", channel.queue_declare(name.into(), options, FieldTable::default())).await {
            Ok(answer) => {
                let depth = Depth { ready: answer.message_count(), consumers: answer.consumer_count() };
                found.insert(lane.clone(), depth);
            }
            // The 404 for a missing queue closes the channel, not the connection.
            Err(_) if connection.status().connected() => {
                channel = within("channel.open", connection.create_channel()).await?;
            }
            Err(error) => return Err(error),
        }
    }
    // The answers are in hand: a channel that does not close goes with its connection.
    let _ = within("channel.close", channel.close(200, "done".into())).await;
    Ok(found)
}

/// Counts the generations of one connection, and paces them: a growing wait between those that fail.
#[derive(Debug)]
pub struct Generations {
    role: &'static str,
    failures: i32,
    began: Instant,
}

impl Generations {
    /// For the connection that plays this role; the name is used in logs and metrics.
    #[must_use]
    pub fn of(role: &'static str) -> Self {
        Self { role, failures: 0, began: Instant::now() }
    }

    /// Whether another generation shall begin now: always, until the shutdown.
    pub fn begin(&mut self, shutdown: &CancellationToken) -> bool {
        self.began = Instant::now();
        !shutdown.is_cancelled()
    }

    /// Tells why a generation has ended, and waits before the next.
    pub async fn ended(&mut self, outcome: Result<(), BrokerError>, shutdown: &CancellationToken) {
        if shutdown.is_cancelled() {
            return;
        }
        self.failures = if self.began.elapsed() >= HEALTHY_AFTER { 1 } else { self.failures + 1 };
        let wait = RECONNECT.delay(self.failures);
        let (role, wait_ms) = (self.role, wait.as_millis());
        match outcome {
            Ok(()) => tracing::info!(role, wait_ms, "the broker connection is renewed"),
            Err(error) => tracing::warn!(role, %error, wait_ms, "the broker connection failed, trying again"),
        }
        metrics::counter!("tasklane_broker_reconnects_total", "role" => role).increment(1);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_address_sets_stays() {
        let ours = |url| with_defaults(url, Duration::from_millis(500), 8192);
        assert_eq!(ours("amqp://h/%2f"), "amqp://h/%2f?heartbeat=1&frame_max=8192");
        assert_eq!(ours("amqp://h/%2f?frame_max=4096"), "amqp://h/%2f?frame_max=4096&heartbeat=1");
        assert_eq!(ours("amqp://h/%2f?heartbeat=60"), "amqp://h/%2f?heartbeat=60&frame_max=8192");
    }
}
