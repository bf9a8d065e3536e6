//! Takes deliveries from the lanes of the queues, of each as many as can run and as many to follow; none starts without a place.
//!
//! Each lane has a pull of its own; which of them gets the next free place is the [`arbiter`](crate::arbiter)'s affair. One that
//! cannot be consumed is tried again by itself, and costs the others nothing ([`lanes`](crate::lanes)).
//! A worker that has no room gives back what it has prefetched, so that an idle worker gets it: a message must not
//! wait behind a long task while others have nothing to do.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::FuturesUnordered;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tasklane_common::broker::{self, BrokerError, Generations, within};
use tasklane_common::reconcile;
use tasklane_common::task::Lane;
use tasklane_common::topology::broker_queue;
use tokio::time::{Instant, interval, interval_at, sleep, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use crate::acks::Acks;
use crate::arbiter::Permit;
use crate::delivery::Delivery;
use crate::life::Life;
use crate::lookout::{self, Pulse};
use crate::{cancel, execute};

/// How long a delivery waits for room before everything prefetched is given back.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// How long a connection may take to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// The code with which a broker that stops, or an operator, ends a connection.
const CONNECTION_FORCED: u16 = 320;
/// The longest time for which a word of lost messages is not believed again.
const LOSSES_PAUSE_MAX: Duration = Duration::from_secs(600);
/// How often an idle consumer looks after its channel.
const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// Consumes until the life ends, over as many generations of the connection as it takes.
pub async fn run(life: Arc<Life>) {
    let mut generations = Generations::of("consumer");
    let mut losses = Losses::default();
    // While draining nothing new is wanted, and what runs is acked by the ledger alone.
    while generations.begin(&life.ended) && !life.draining.is_cancelled() {
        let outcome = generation(&life, &mut losses).await;
        life.stats.lanes.disconnected();
        generations.ended(outcome, &life.ended).await;
    }
}

async fn generation(life: &Arc<Life>, losses: &mut Losses) -> Result<(), BrokerError> {
    let connection = tokio::select! {
        connection = connect(life) => Arc::new(connection?),
        () = life.ended.cancelled() => return Ok(()),
    };
    let acks = TaskTracker::new();
    let outcome = tokio::select! {
        outcome = consume_all(life, &connection, &acks) => outcome,
        () = cancel::listen(life, &connection) => Ok(()),
        () = messages_lost(life, losses) => Ok(()),
        () = life.ended.cancelled() => Ok(()),
    };
    // The last acks are on their way; a delivery that still runs has one of these tasks for as long.
    acks.close();
    if life.ended.is_cancelled() {
        let _ = timeout(CLOSE_LIMIT, acks.wait()).await;
    }
    // Closing gives everything unacked back at once. A connection that is broken may never answer, and the next
    // generation, or the next life, waits for this one's end.
    let _ = timeout(CLOSE_LIMIT, connection.close(200, "done".into())).await;
    outcome
}

async fn connect(life: &Life) -> Result<Connection, BrokerError> {
    let name = format!("tasklane worker {}", life.lease.worker());
    // A frozen worker must be dead to the broker before it is dead to the ledger: messages that are published again
    // after its lease has ended would otherwise still be handed to it.
    let heartbeat = life.settings.lease_ttl / 3;
    broker::connect_for(life.ledger.id(), &life.settings.common.amqp_url, &name, heartbeat).await
}

/// Returns when messages were lost that the consumers of this generation may have been sent.
///
/// When a queue is deleted and declared anew before a consumer's channel has heard of it, RabbitMQ consumes the new one in
/// that consumer's name and drops what it is handed (`rabbit_channel`: the queue's state is removed after the recovery).
/// Nobody else can see such a consumer, and its end gives everything back.
async fn messages_lost(life: &Life, losses: &mut Losses) {
    let began = Instant::now();
    loop {
        life.messages_lost.notified().await;
        // Messages count as lost so long after they were published: younger consumers have nothing to do with them.
        if began.elapsed() >= reconcile::SLACK && !life.draining.is_cancelled() && losses.admit(Instant::now()) {
            tracing::warn!("messages were lost, perhaps between the broker and this worker: connecting anew");
            return;
        }
    }
}

/// How often a word of lost messages is believed: at growing distances while it comes again and again, for a new connection
/// has not helped then, and whoever may publish can say it.
#[derive(Debug, Default)]
struct Losses {
    /// When it was believed last, and how long it is not after that.
    last: Option<(Instant, Duration)>,
}

impl Losses {
    fn admit(&mut self, now: Instant) -> bool {
        let pause = match self.last {
            Some((at, pause)) if now < at + pause => return false,
            Some((at, pause)) if now < at + pause * 2 => (pause * 2).min(LOSSES_PAUSE_MAX),
            _ => reconcile::SLACK * 2,
        };
        self.last = Some((now, pause));
        true
    }
}

async fn consume_all(life: &Arc<Life>, connection: &Arc<Connection>, acks: &TaskTracker) -> Result<(), BrokerError> {
    let channel = within("channel.open", connection.create_channel()).await?;
    broker::declare_exchanges(&channel).await?;
    let _ = within("channel.close", channel.close(200, "done".into())).await;
    let lanes: Vec<Lane> = life.settings.queues.iter().flat_map(Lane::all_of).collect();
    let pulses: Vec<_> = lanes.iter().map(|_| Pulse::default()).collect();
    tracing::info!(queues = life.settings.queues.len(), "consuming");
    let all = lanes.iter().zip(&pulses).map(|(lane, pulse)| Keeper { life, connection, acks, lane, pulse }.run());
    tokio::select! {
        ended = try_join_all(all) => drop(ended?),
        stuck = lookout::watch(life, connection, &lanes, &pulses) => return Err(stuck),
        () = lost(connection) => return Err(BrokerError::Ended("the broker closed the connection")),
    }
    // Draining: the connection stays for the acks of what still runs.
    life.ended.cancelled().await;
    Ok(())
}

/// Returns when the connection is gone: a lane that waits for its next try would not notice.
async fn lost(connection: &Connection) {
    let mut look = interval(LOOK_PERIOD);
    while connection.status().connected() {
        look.tick().await;
    }
}

/// Keeps one lane consumed as long as the connection lives.
struct Keeper<'a> {
    life: &'a Arc<Life>,
    connection: &'a Arc<Connection>,
    acks: &'a TaskTracker,
    lane: &'a Lane,
    pulse: &'a Pulse,
}

impl Keeper<'_> {
    /// Ends without an error when the worker is draining.
    async fn run(self) -> Result<(), BrokerError> {
        let lanes = &self.life.stats.lanes;
        loop {
            let beginning = AtomicBool::new(true);
            let Err(error) = self.attempt(&beginning).await else { return Ok(()) };
            if self.connection.status().connected() {
                lanes.bad(self.lane, error.to_string());
                continue;
            }
            // With some refusals, such as that of a queue whose members are down, the broker closes the whole connection:
            // what was just begun may be the cause, and is tried elsewhere before it is begun here again.
            if error.code().is_some_and(|code| code != CONNECTION_FORCED) && beginning.into_inner() {
                lanes.suspect(self.lane, error.to_string());
            }
            return Err(error);
        }
    }

    async fn attempt(&self, beginning: &AtomicBool) -> Result<(), BrokerError> {
        let Self { life, connection, acks, lane, pulse } = *self;
        if let Some(wait) = life.stats.lanes.wait(lane) {
            tokio::select! {
                () = sleep(wait) => {}
                () = life.draining.cancelled() => return Ok(()),
            }
            try_elsewhere(life, lane).await?;
        }
        let channel = within("channel.open", connection.create_channel()).await?;
        let acks = Acks::of(channel.clone(), acks);
        let outcome = Pull { life, connection, channel: channel.clone(), acks, lane, pulse, beginning }.run().await;
        if outcome.is_err() {
            // What it has not acked must not stay with it; one that does not close goes with its connection.
            let _ = timeout(CLOSE_LIMIT, channel.close(200, "done".into())).await;
        }
        outcome
    }
}

/// Declares a lane and has it consumed, on a connection of its own, whose end gives back what that may have brought.
async fn try_elsewhere(life: &Life, lane: &Lane) -> Result<(), BrokerError> {
    let connection = connect(life).await?;
    let trial = async {
        let channel = within("channel.open", connection.create_channel()).await?;
        broker::declare_lane(&channel, lane).await?;
        within("basic.qos", channel.basic_qos(1, BasicQosOptions::default())).await?;
        consume(&channel, lane).await.map(drop)
    };
    let outcome = trial.await;
    let _ = timeout(CLOSE_LIMIT, connection.close(200, "done".into())).await;
    outcome
}

async fn consume(channel: &Channel, lane: &Lane) -> Result<Consumer, BrokerError> {
    let (queue, options) = (broker_queue(lane), BasicConsumeOptions::default());
    within("basic.consume", channel.basic_consume(queue.into(), "".into(), options, FieldTable::default())).await
}

/// Pulls from one lane over one channel.
struct Pull<'a> {
    life: &'a Arc<Life>,
    connection: &'a Arc<Connection>,
    channel: Channel,
    acks: Arc<Acks>,
    lane: &'a Lane,
    pulse: &'a Pulse,
    /// Whether it is not yet known that the lane can be consumed.
    beginning: &'a AtomicBool,
}

/// Why a consumer was stopped without anything being wrong.
enum Stopped {
    Draining,
    Paused,
    /// It gave back so many messages.
    NoRoom(usize),
    /// The lookout thinks that it is not served.
    Stuck,
}

impl Pull<'_> {
    async fn run(self) -> Result<(), BrokerError> {
        broker::declare_lane(&self.channel, self.lane).await?;
        let mut given_back = 0;
        loop {
            if self.life.pauses.has(&self.lane.queue) && !self.wait_for_resume().await? {
                return Ok(());
            }
            // Only what had no room is asked for: a consumer that gets nothing must look stuck to the lookout.
            if given_back > 0 {
                self.seek(given_back).await?;
            }
            if self.life.draining.is_cancelled() {
                return Ok(());
            }
            let mut consumer = self.start().await?;
            let stopped = self.take(&mut consumer).await?;
            self.stop(consumer).await?;
            given_back = match stopped {
                Stopped::Draining => return Ok(()),
                Stopped::NoRoom(messages) => messages,
                Stopped::Stuck | Stopped::Paused => 0,
            };
        }
    }

    /// Waits for places, for so many messages at once as are known to wait, and takes one message for each: until the
    /// lane has none, there are places to spare, or the draining begins.
    ///
    /// A place must not stand empty for a lane that may have nothing, so this asks the broker instead of consuming.
    async fn seek(&self, wanted: usize) -> Result<(), BrokerError> {
        let mut places: FuturesUnordered<_> = (0..wanted).map(|_| self.place()).collect();
        loop {
            let permit = tokio::select! {
                biased;
                () = self.life.draining.cancelled() => return Ok(()),
                () = self.life.pauses.until(&self.lane.queue, true) => return Ok(()),
                Some(permit) = places.next() => permit,
            };
            let Some(delivery) = self.get().await? else { return Ok(()) };
            if self.life.draining.is_cancelled() {
                delivery.give_back().await;
                return Ok(());
            }
            self.process(delivery, permit);
            if self.life.permits.available() > 0 {
                return Ok(());
            }
            places.push(self.place());
        }
    }

    /// Consumes nothing until the queue is resumed; false when the worker is draining before that.
    async fn wait_for_resume(&self) -> Result<bool, BrokerError> {
        self.begun();
        tracing::info!(queue = %self.lane, "the queue is paused");
        let mut look = interval(LOOK_PERIOD);
        loop {
            tokio::select! {
                () = self.life.pauses.until(&self.lane.queue, false) => {
                    tracing::info!(queue = %self.lane, "the queue goes on");
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

    fn place(&self) -> impl Future<Output = Permit> {
        self.life.permits.acquire(self.lane.priority)
    }

    /// Takes one message, if there is one.
    async fn get(&self) -> Result<Option<Delivery>, BrokerError> {
        let queue = broker_queue(self.lane);
        let got = within("basic.get", self.channel.basic_get(queue.into(), BasicGetOptions::default())).await?;
        Ok(got.map(|message| {
            self.pulse.beat();
            self.delivery(message.delivery)
        }))
    }

    async fn start(&self) -> Result<Consumer, BrokerError> {
        // As many as can run and as many to follow at once: a place that becomes free while the next message is on its
        // way would go to a less urgent lane.
        let prefetch = self.life.settings.concurrency.saturating_mul(2);
        within("basic.qos", self.channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let consumer = consume(&self.channel, self.lane).await?;
        self.begun();
        Ok(consumer)
    }

    fn begun(&self) {
        self.beginning.store(false, Ordering::Relaxed);
        self.life.stats.lanes.good(self.lane);
    }

    /// Takes deliveries until there is a reason to stop. Each waits for a place of its own, so that places which become
    /// free together all go to the most urgent.
    async fn take(&self, consumer: &mut Consumer) -> Result<Stopped, BrokerError> {
        let mut look = interval_at(Instant::now() + LOOK_PERIOD, LOOK_PERIOD);
        let (mut waiting, mut places) = (VecDeque::new(), FuturesUnordered::new());
        let mut give_up = Instant::now();
        let stopped = loop {
            tokio::select! {
                biased;
                () = self.life.draining.cancelled() => break Stopped::Draining,
                // Before the next delivery: what is given back because of a pause would come again at once.
                () = self.life.pauses.until(&self.lane.queue, true) => break Stopped::Paused,
                Some(permit) = places.next() => {
                    give_up = Instant::now() + PATIENCE;
                    if let Some(delivery) = waiting.pop_front() {
                        self.process(delivery, permit);
                    }
                }
                next = consumer.next() => {
                    let message = next.ok_or(BrokerError::Ended("the broker cancelled the consumer"))??;
                    self.pulse.beat();
                    if waiting.is_empty() {
                        give_up = Instant::now() + PATIENCE;
                    }
                    match self.life.permits.try_acquire() {
                        Some(permit) => self.process(self.delivery(message), permit),
                        None => {
                            waiting.push_back(self.delivery(message));
                            places.push(self.place());
                        }
                    }
                }
                () = sleep_until(give_up), if !waiting.is_empty() => break Stopped::NoRoom(waiting.len()),
                () = self.pulse.refresh.notified() => break Stopped::Stuck,
                _ = look.tick() => if !self.channel.status().connected() {
                    return Err(BrokerError::Ended("the channel is closed"));
                },
            }
        };
        drop(places);
        for delivery in waiting {
            delivery.give_back().await;
        }
        Ok(stopped)
    }

    fn process(&self, delivery: Delivery, permit: Permit) {
        self.life.deliveries.spawn(execute::process(Arc::clone(self.life), delivery, permit));
    }

    fn delivery(&self, message: lapin::message::Delivery) -> Delivery {
        Delivery::new(Arc::clone(self.connection), Arc::clone(&self.acks), self.lane.clone(), message)
    }

    /// Stops the consumer and gives back what it had prefetched.
    async fn stop(&self, mut consumer: Consumer) -> Result<(), BrokerError> {
        within("basic.cancel", self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default())).await?;
        // The stream ends behind the last prefetched delivery; the limit is for the case that it does not.
        while let Ok(Some(Ok(message))) = timeout(PATIENCE, consumer.next()).await {
            self.delivery(message).give_back().await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_loss_each_second_is_believed_at_growing_distances() {
        let (mut losses, begin) = (Losses::default(), Instant::now());
        let believed: Vec<u64> =
            (0..3_600).filter(|&second| losses.admit(begin + Duration::from_secs(second))).collect();
        assert_eq!(believed, [0, 30, 90, 210, 450, 930, 1530, 2130, 2730, 3330]);
        // After a rest it is as at first.
        let later = begin + Duration::from_secs(10_000);
        assert!(losses.admit(later) && losses.admit(later + Duration::from_secs(30)));
    }
}
