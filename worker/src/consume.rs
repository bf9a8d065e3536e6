//! Takes deliveries from the queues, never more than there is room for.
//!
//! A worker that has no room gives back what it has prefetched, so that an idle worker gets it: a message must not
//! wait behind a long task while others have nothing to do.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use futures::future::try_join_all;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tasklane_common::broker::{self, BrokerError, Generations, within};
use tasklane_common::task::QueueName;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::delivery::Delivery;
use crate::life::Life;
use crate::lookout::{self, Pulse};
use crate::{cancel, execute};

/// How long a delivery waits for room before everything prefetched is given back.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a connection may take to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// How often an idle consumer looks after its channel and its prefetch.
const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// Consumes until the life ends, over as many generations of the connection as it takes.
pub async fn run(life: Arc<Life>) {
    let mut generations = Generations::of("consumer");
    // While draining nothing new is wanted, and what runs is acked by the ledger alone.
    while generations.begin(&life.ended) && !life.draining.is_cancelled() {
        let outcome = generation(&life).await;
        life.stats.consuming.store(false, Ordering::Relaxed);
        generations.ended(outcome, &life.ended).await;
    }
}

async fn generation(life: &Arc<Life>) -> Result<(), BrokerError> {
    let name = format!("tasklane worker {}", life.lease.worker());
    // A frozen worker must be dead to the broker before it is dead to the ledger: messages that are published again
    // after its lease has ended would otherwise still be handed to it.
    let heartbeat = life.settings.lease_ttl / 3;
    let connection = tokio::select! {
        connection = broker::connect(&life.settings.common.amqp_url, &name, heartbeat) => Arc::new(connection?),
        () = life.ended.cancelled() => return Ok(()),
    };
    let outcome = tokio::select! {
        outcome = consume_all(life, &connection) => outcome,
        () = cancel::listen(life, &connection) => Ok(()),
        () = life.ended.cancelled() => Ok(()),
    };
    // Closing gives everything unacked back at once. A connection that is broken may never answer, and the next
    // generation, or the next life, waits for this one's end.
    let _ = timeout(CLOSE_LIMIT, connection.close(200, "done".into())).await;
    outcome
}

async fn consume_all(life: &Arc<Life>, connection: &Arc<Connection>) -> Result<(), BrokerError> {
    let channel = within("channel.open", connection.create_channel()).await?;
    broker::declare_exchanges(&channel).await?;
    let _ = within("channel.close", channel.close(200, "done".into())).await;
    let pulses: Vec<_> = life.settings.queues.iter().map(|_| Pulse::default()).collect();
    let mut pulls = Vec::new();
    for (queue, pulse) in life.settings.queues.iter().zip(&pulses) {
        let channel = within("channel.open", connection.create_channel()).await?;
        broker::declare_queue(&channel, queue).await?;
        pulls.push(Pull { life, connection, channel, queue, pulse }.run());
    }
    life.stats.consuming.store(true, Ordering::Relaxed);
    tracing::info!(queues = life.settings.queues.len(), "consuming");
    tokio::select! {
        ended = try_join_all(pulls) => drop(ended?),
        stuck = lookout::watch(life, connection, &pulses) => return Err(stuck),
    }
    // Draining: the connection stays for the acks of what still runs.
    life.ended.cancelled().await;
    Ok(())
}

/// Pulls from one queue over one channel.
struct Pull<'a> {
    life: &'a Arc<Life>,
    connection: &'a Arc<Connection>,
    channel: Channel,
    queue: &'a QueueName,
    pulse: &'a Pulse,
}

/// Why a consumer was stopped without anything being wrong.
enum Stopped {
    Draining,
    Paused,
    NoRoom,
    MoreRoom,
}

impl Pull<'_> {
    async fn run(self) -> Result<(), BrokerError> {
        loop {
            if self.life.pauses.has(self.queue) && !self.wait_for_resume().await? {
                return Ok(());
            }
            let permit = tokio::select! {
                permit = Arc::clone(&self.life.permits).acquire_owned() => permit.map_err(|_| BrokerError::Ended("no permits"))?,
                () = self.life.pauses.until(self.queue, true) => continue,
                () = self.life.draining.cancelled() => return Ok(()),
            };
            let room = self.life.permits.available_permits() + 1;
            let prefetch = u16::try_from(room).unwrap_or(u16::MAX).min(self.life.settings.concurrency);
            let mut consumer = self.start(prefetch).await?;
            let stopped = self.take(&mut consumer, prefetch, permit).await?;
            self.stop(consumer).await?;
            if matches!(stopped, Stopped::Draining) {
                return Ok(());
            }
        }
    }

    /// Consumes nothing until the queue is resumed; false when the worker is draining before that.
    async fn wait_for_resume(&self) -> Result<bool, BrokerError> {
        tracing::info!(queue = %self.queue, "the queue is paused");
        let mut look = tokio::time::interval(LOOK_PERIOD);
        loop {
            tokio::select! {
                () = self.life.pauses.until(self.queue, false) => {
                    tracing::info!(queue = %self.queue, "the queue goes on");
                    return Ok(true);
                }
                () = self.life.draining.cancelled() => return Ok(false),
                // Without a consumer nobody else would notice.
                _ = look.tick() => if !self.channel.status().connected() {
                    return Err(BrokerError::Ended("the channel is closed"));
                }
            }
        }
    }

    async fn start(&self, prefetch: u16) -> Result<Consumer, BrokerError> {
        within("basic.qos", self.channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let queue = tasklane_common::topology::broker_queue(self.queue);
        let options = BasicConsumeOptions::default();
        within("basic.consume", self.channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()))
            .await
    }

    /// Takes deliveries until there is a reason to stop. The first may use the permit that was waited for.
    async fn take(
        &self,
        consumer: &mut Consumer,
        prefetch: u16,
        permit: OwnedSemaphorePermit,
    ) -> Result<Stopped, BrokerError> {
        let mut held = Some(permit);
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK_PERIOD, LOOK_PERIOD);
        loop {
            let delivery = tokio::select! {
                biased;
                () = self.life.draining.cancelled() => return Ok(Stopped::Draining),
                // Before the next delivery: what is given back because of a pause would come again at once.
                () = self.life.pauses.until(self.queue, true) => return Ok(Stopped::Paused),
                delivery = consumer.next() => self.delivery(delivery)?,
                () = self.pulse.refresh.notified() => return Ok(Stopped::MoreRoom),
                _ = look.tick() => {
                    // Nothing has come: the permit is for whichever queue has work.
                    held = None;
                    if !self.channel.status().connected() {
                        return Err(BrokerError::Ended("the channel is closed"));
                    }
                    if prefetch < self.life.settings.concurrency && self.life.permits.available_permits() > usize::from(prefetch) {
                        return Ok(Stopped::MoreRoom);
                    }
                    continue;
                }
            };
            self.pulse.beat();
            let permit = match held.take() {
                Some(permit) => permit,
                None => match timeout(PATIENCE, Arc::clone(&self.life.permits).acquire_owned()).await {
                    Ok(permit) => permit.map_err(|_| BrokerError::Ended("no permits"))?,
                    Err(_) => {
                        delivery.give_back().await;
                        return Ok(Stopped::NoRoom);
                    }
                },
            };
            self.life.deliveries.spawn(execute::process(Arc::clone(self.life), delivery, permit));
        }
    }

    fn delivery(&self, next: Option<Result<lapin::message::Delivery, lapin::Error>>) -> Result<Delivery, BrokerError> {
        let message = next.ok_or(BrokerError::Ended("the broker cancelled the consumer"))??;
        Ok(Delivery::new(Arc::clone(self.connection), self.channel.clone(), self.queue.clone(), message))
    }

    /// Stops the consumer and gives back what it had prefetched.
    async fn stop(&self, mut consumer: Consumer) -> Result<(), BrokerError> {
        within("basic.cancel", self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default())).await?;
        // The stream ends behind the last prefetched delivery; the limit is for the case that it does not.
        while let Ok(Some(Ok(message))) = timeout(PATIENCE, consumer.next()).await {
            self.delivery(Some(Ok(message)))?.give_back().await;
        }
        Ok(())
    }
}
