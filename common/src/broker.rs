//! The connection to RabbitMQ: made, declared on, watched, and made again as one whole *generation*.
//!
//! lapin's own recovery is not used: it gives up after some tries, and a half-recovered channel is worse than a new
//! one. Whatever belongs to an old generation (channels, delivery tags, confirms) dies with it.

mod address;
mod connect;
mod generations;
pub mod guard;

use std::collections::BTreeMap;
use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ErrorKind, ExchangeKind};
use tokio::time::timeout;

pub use self::address::Address;
pub use self::connect::{LEDGER_PROPERTY, connect, connect_for};
pub use self::generations::Generations;
use crate::task::Lane;
use crate::topology::{self, CONTROL_EXCHANGE, DEAD_EXCHANGE, DEAD_QUEUE, EVENTS_EXCHANGE, TASKS_EXCHANGE};

/// How long a connection attempt or one synchronous AMQP method may take.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(10);

/// AMQP's codes of what the broker refuses.
const ACCESS_REFUSED: u16 = 403;
const NOT_ALLOWED: u16 = 530;

/// The heartbeat of connections whose peer need not know soon that they are dead.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// What can go wrong between this process and the broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The broker, or the library on its behalf, refused or failed.
    #[error(transparent)]
    Amqp(#[from] lapin::Error),
    /// There is no connection.
    #[error("no connection to RabbitMQ at {to}: {error}")]
    Connect {
        /// Where, and as whom.
        to: String,
        /// Why.
        error: lapin::Error,
    },
    /// The broker does not let this user in.
    #[error("RabbitMQ does not let us in at {to}: {what}? ({error})")]
    Denied {
        /// Where, and as whom.
        to: String,
        /// What to look at.
        what: &'static str,
        /// What it said.
        error: lapin::Error,
    },
    /// No answer within [`RPC_TIMEOUT`].
    #[error("no answer to {0} within 10 s")]
    Timeout(&'static str),
    /// The connection or consumer ended without an error.
    #[error("{0}")]
    Ended(&'static str),
}

impl BrokerError {
    /// Why no connection came about, in words for whoever has set the address.
    fn connecting(address: &Address, error: lapin::Error) -> Self {
        let code = match error.kind() {
            ErrorKind::ProtocolError(said) => said.get_id(),
            _ => 0,
        };
        let to = address.to_string();
        match code {
            ACCESS_REFUSED => Self::Denied { to, what: "are user and password right", error },
            NOT_ALLOWED => {
                Self::Denied { to, what: "is there such a virtual host, and has the user permissions in it", error }
            }
            _ => Self::Connect { to, error },
        }
    }

    /// The code of AMQP with which the broker closed a channel or the connection, if it did.
    #[must_use]
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Amqp(error) | Self::Connect { error, .. } | Self::Denied { error, .. } => match error.kind() {
                ErrorKind::ProtocolError(said) => Some(said.get_id()),
                _ => None,
            },
            Self::Timeout(_) | Self::Ended(_) => None,
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
