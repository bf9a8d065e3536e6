//! Publishes every message a second time: what a broker's retries, shovels and operators do at their worst.

use std::time::Duration;

use anyhow::Result;
use lapin::options::{BasicGetOptions, BasicPublishOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use tasklane_common::topology::TASKS_EXCHANGE;
use tokio::time::{Instant, sleep};

use crate::nemesis::world::broker_queue;
use crate::vhost::Vhost;
use crate::wait::within;

/// The pause when there is nothing to publish again.
const PAUSE: Duration = Duration::from_millis(20);

/// How long the broker may be silent in between.
const LIMIT: Duration = Duration::from_secs(20);

/// Copies whatever passes the exchange for a while, straight into the queues.
///
/// The tap is a queue of this connection's own: it ends with it, and with the broker. A quorum queue that a killed node
/// leaves dead in its first moments would keep back the confirms of all that is published to the exchange.
pub async fn run(vhost: &Vhost, time: Duration) -> Result<()> {
    within(time + LIMIT, "the copies to be made", copy(vhost, Instant::now() + time)).await?
}

async fn copy(vhost: &Vhost, until: Instant) -> Result<()> {
    let connection = vhost.connect().await?;
    let channel = connection.create_channel().await?;
    let own = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let tap = channel.queue_declare("".into(), own, FieldTable::default()).await?.name().clone();
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(tap.clone(), TASKS_EXCHANGE.into(), "#".into(), options, none).await?;
    while Instant::now() < until {
        match channel.basic_get(tap.clone(), BasicGetOptions { no_ack: true }).await? {
            Some(message) => {
                let (options, properties) = (BasicPublishOptions::default(), message.properties.clone());
                // The routing key is `<queue>.<kind>`, or `<queue>!high.<kind>` for one that goes to `<queue>.high`.
                let key = message.routing_key.as_str();
                let queue = broker_queue(&key.split_once('.').map_or(key, |(queue, _)| queue).replace('!', "."));
                channel.basic_publish("".into(), queue.into(), options, &message.data, properties).await?;
            }
            None => sleep(PAUSE).await,
        }
    }
    Ok(connection.close(200, "done".into()).await?)
}
