//! Publishing with confirms, in pipelined batches, over a connection of its own.
//!
//! One owner task has the channels: each publishes whatever waits, awaits all confirms of that batch, and starts over,
//! so that one batch is on its way while the broker writes the other.
//! A confirmed task is marked `queued` in the ledger a moment later ([`marker`]); when a worker claims it before, that
//! write is not needed any more and changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::{Channel, Connection};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use self::batch::{Sent, send_batch};
use self::bundles::Bundles;
use self::lanes::Lanes;
use self::patience::Patience;
use crate::broker::{self, Address, BrokerError, Depth, Generations, within};
use crate::ledger::SharedLedger;
use crate::task::{Fence, Json, Kind, Lane, LedgerId, QueueName, TaskId};
use crate::topology::is_reply_queue;

mod batch;
mod bundles;
mod lanes;
pub mod marker;
mod patience;

/// How many batches are on their way at once, each on a channel of its own.
const CHANNELS: usize = 2;
/// How many publications go out before their confirms are awaited.
const BATCH_MAX: usize = 256;
/// How many publications wait for the owner task.
const WAITING_MAX: usize = 1024;
/// How many bytes of args may be on their way at once; a publisher never holds more.
const IN_FLIGHT_BYTES_MAX: u32 = 64 * 1024 * 1024;
/// How long [`Publisher::publish`] waits in all: for room, then for the confirm.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(20);
/// How long [`Publisher::offer`] waits for room before the relay gets the rest.
const OFFER_TIMEOUT: Duration = Duration::from_secs(1);

/// A task to be published.
#[derive(Debug, Clone)]
pub struct Publication {
    /// The task.
    pub id: TaskId,
    /// The work.
    pub kind: Kind,
    /// Where it goes.
    pub lane: Lane,
    /// The handler's input.
    pub args: Json,
    /// The row's fence at this moment: a later claim makes the mark of this publication void, a later edit or move its message.
    pub fence: Fence,
    /// W3C trace context of the submission.
    pub traceparent: Option<String>,
    /// The queue to which a notice goes when the task has ended.
    pub reply_to: Option<String>,
}

/// What became of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The broker has it durably.
    Confirmed,
    /// The broker does not have it: the queue is full, has failed, or cannot be declared.
    Refused,
    /// The broker does not have it: no queue took the routing key. It is declared anew before the next publication.
    Returned,
    /// The connection failed in between, or was not there.
    Unknown,
}

/// A handle to the process's publisher; clones share it.
#[derive(Debug, Clone)]
pub struct Publisher {
    jobs: mpsc::Sender<Job>,
    notices: mpsc::Sender<(String, TaskId)>,
    room: Arc<Semaphore>,
    connection: watch::Receiver<Option<Arc<Connection>>>,
}

/// A publication on its way; its room in memory is given back when it is dropped.
#[derive(Debug)]
struct Job {
    publication: Publication,
    reply: Option<oneshot::Sender<Published>>,
    _room: OwnedSemaphorePermit,
}

impl Publisher {
    /// Starts the supervised connection. Tasks share a message as long as one place works it off within `bundle`; zero: none do.
    #[must_use]
    pub fn spawn(amqp_url: &Address, ledger: SharedLedger, bundle: Duration, shutdown: CancellationToken) -> Self {
        let (jobs, waiting) = mpsc::channel(WAITING_MAX);
        let (notices, waiting_notices) = mpsc::channel(WAITING_MAX);
        let (connected, connection) = watch::channel(None);
        let owner = Owner {
            amqp_url: amqp_url.clone(),
            ledger: ledger.id(),
            waiting,
            waiting_notices,
            connected,
            bundles: Bundles::spawn(bundle, ledger.clone(), shutdown.clone()),
            marks: marker::spawn(ledger),
        };
        crate::vital::spawn("publisher", owner.run(shutdown));
        Self { jobs, notices, room: Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX as usize)), connection }
    }

    /// Publishes and waits for the outcome, 20 s at most and no longer than the connection lives.
    pub async fn publish(&self, publication: Publication) -> Published {
        let attempt = async {
            let (reply, outcome) = oneshot::channel();
            let job = self.job(publication, Some(reply)).await?;
            self.jobs.send(job).await.ok()?;
            tokio::select! {
                biased;
                outcome = outcome => outcome.ok(),
                // It may still be published by the next connection, which does no harm.
                () = self.disconnected() => None,
            }
        };
        timeout(PUBLISH_TIMEOUT, attempt).await.ok().flatten().unwrap_or(Published::Unknown)
    }

    /// Hands publications over and does not wait for their outcome.
    ///
    /// Waits a second at most for room, which slows a submitter that is faster than the broker; what finds none, or
    /// comes while the broker is away, stays with the relay.
    pub async fn offer(&self, publications: Vec<Publication>) {
        let deadline = Instant::now() + OFFER_TIMEOUT;
        for publication in publications {
            if !self.is_connected() {
                return;
            }
            let hand_over = async {
                let job = self.job(publication, None).await?;
                self.jobs.send(job).await.ok()
            };
            if timeout_at(deadline, hand_over).await.is_err() {
                return;
            }
        }
    }

    /// Tells the producer that listens on `reply_to` that a task has ended; lost without harm, since waiters also look. Any
    /// other queue is told nothing.
    pub fn notify(&self, reply_to: String, id: TaskId) {
        if !is_reply_queue(&reply_to) {
            tracing::debug!(task.id = %id, reply_to, "a message names a queue for its reply that is no producer's");
            return;
        }
        // A full channel drops the notice: waiting clients fall back to looking into the ledger.
        let _ = self.notices.try_send((reply_to, id));
    }

    /// Whether the broker is there and takes messages.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connection.borrow().as_ref().is_some_and(|connection| takes_messages(connection))
    }

    /// The connection, for what is neither a task nor a notice; `None` while the broker is away or takes no messages.
    pub(crate) fn connection(&self) -> Option<Arc<Connection>> {
        self.connection.borrow().clone().filter(|connection| takes_messages(connection))
    }

    /// Waits until the broker is there and takes messages.
    pub async fn connected(&self) {
        let mut connection = self.connection.clone();
        // An error means that the owner is gone, at shutdown: nobody publishes any more.
        let _ = connection.wait_for(|connection| connection.is_some()).await;
    }

    /// Waits until the broker is away.
    async fn disconnected(&self) {
        // An error means that the owner is gone, at shutdown.
        let _ = self.connection.clone().wait_for(Option::is_none).await;
    }

    /// Asks the broker for the depths of whole queues: what is ready in all lanes, and who consumes any of them.
    /// Without the queues that it does not have; `None` when it does not answer.
    pub async fn queue_depths(&self, queues: &[QueueName]) -> Option<BTreeMap<QueueName, Depth>> {
        let lanes: Vec<Lane> = queues.iter().flat_map(Lane::all_of).collect();
        let mut sums = BTreeMap::new();
        for (lane, depth) in self.lane_depths(&lanes).await? {
            let sum = sums.entry(lane.queue).or_insert(Depth { ready: 0, consumers: 0 });
            sum.ready = sum.ready.saturating_add(depth.ready);
            // A worker consumes every lane of its queues, and is counted once.
            sum.consumers = sum.consumers.max(depth.consumers);
        }
        Some(sums)
    }

    /// Asks the broker for the depths of single lanes, without those that it does not have; `None` when it does not
    /// answer.
    pub async fn lane_depths(&self, lanes: &[Lane]) -> Option<BTreeMap<Lane, Depth>> {
        let connection = self.connection.borrow().clone()?;
        match timeout(Duration::from_secs(2), broker::depths(&connection, lanes)).await {
            Ok(Ok(depths)) => Some(depths),
            Ok(Err(error)) => {
                tracing::debug!(%error, "queue depths are not known");
                None
            }
            Err(_) => None,
        }
    }

    /// Waits until everything taken so far has its outcome, or the limit is over.
    pub async fn drain(&self, limit: Duration) {
        // All room is free only when no publication is on its way.
        let _ = timeout(limit, self.room.acquire_many(IN_FLIGHT_BYTES_MAX)).await;
    }

    async fn job(&self, publication: Publication, reply: Option<oneshot::Sender<Published>>) -> Option<Job> {
        let bytes = u32::try_from(publication.args.as_str().len()).unwrap_or(u32::MAX).clamp(1, IN_FLIGHT_BYTES_MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(bytes).await.ok()?;
        Some(Job { publication, reply, _room: room })
    }
}

fn takes_messages(connection: &Connection) -> bool {
    connection.status().connected() && !connection.status().blocked()
}

/// The task that has the channel.
struct Owner {
    amqp_url: Address,
    ledger: LedgerId,
    waiting: mpsc::Receiver<Job>,
    waiting_notices: mpsc::Receiver<(String, TaskId)>,
    connected: watch::Sender<Option<Arc<Connection>>>,
    marks: marker::Marks,
    bundles: Bundles,
}

impl Owner {
    async fn run(mut self, shutdown: CancellationToken) {
        let mut generations = Generations::of("publisher");
        while generations.begin(&shutdown) {
            let outcome = tokio::select! {
                outcome = self.generation() => outcome,
                () = shutdown.cancelled() => Ok(()),
            };
            self.connected.send_replace(None);
            generations.ended(outcome, &shutdown).await;
        }
    }

    async fn generation(&mut self) -> Result<(), BrokerError> {
        let connecting = broker::connect_for(self.ledger, &self.amqp_url, "tasklane publisher", broker::HEARTBEAT);
        let connection = Arc::new(connecting.await?);
        let mut idle = Vec::with_capacity(CHANNELS);
        for _ in 0..CHANNELS {
            let channel = within("channel.open", connection.create_channel()).await?;
            within("confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
            idle.push(channel);
        }
        broker::declare_exchanges(&idle[0]).await?;
        let notices = within("channel.open", connection.create_channel()).await?;
        self.connected.send_replace(Some(Arc::clone(&connection)));
        let mut lanes = Lanes::on(Arc::clone(&connection));
        let mut under_way = FuturesUnordered::new();
        let mut batch = Vec::new();
        let mut health = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                biased;
                // While the broker has an alarm nothing is taken: it would only wait in the socket's buffer.
                notice = self.waiting_notices.recv(), if takes_messages(&connection) => match notice {
                    Some((reply_to, id)) => send_notice(&notices, reply_to, id).await?,
                    None => return Ok(()),
                },
                Some((channel, sent)) = under_way.next() => {
                    self.conclude_batch(&mut lanes, sent).await?;
                    idle.push(channel);
                }
                count = self.waiting.recv_many(&mut batch, BATCH_MAX), if !idle.is_empty() && takes_messages(&connection) => {
                    if count == 0 {
                        return Ok(());
                    }
                    let batch = std::mem::take(&mut batch);
                    if !lanes.know_all_of(&batch) {
                        // Nothing may be on its way then: see `with_lanes`.
                        while let Some((channel, sent)) = under_way.next().await {
                            self.conclude_batch(&mut lanes, sent).await?;
                            idle.push(channel);
                        }
                    }
                    let batch = self.with_lanes(&mut lanes, batch).await?;
                    if let Some(channel) = idle.pop() {
                        under_way.push(send_batch(channel, Patience::with(&connection), self.bundles.of(batch), self.ledger));
                    }
                }
                _ = health.tick() => {
                    if !connection.status().connected() || idle.iter().any(|channel| !channel.status().connected()) {
                        return Err(BrokerError::Ended("the broker closed the connection"));
                    }
                }
            }
        }
    }

    /// Tells everyone of a batch its outcome; an error means that the channel is broken.
    async fn conclude_batch(&self, lanes: &mut Lanes, sent: Sent) -> Result<(), BrokerError> {
        let is_refused = |published| matches!(published, Published::Refused | Published::Returned);
        let refused = sent.settled.iter().filter(|(_, published)| is_refused(*published)).count();
        if refused > 0 {
            tracing::warn!(
                tasks = refused,
                "the broker refused messages: a queue is full, failed, or was deleted; the relay tries again"
            );
        }
        for (job, published) in sent.settled {
            if is_refused(published) {
                lanes.forget(&job.publication.lane);
            }
            self.conclude(job, published).await;
        }
        sent.broken.map_or(Ok(()), Err)
    }

    /// Those of a batch whose lanes are there. All are declared before anything is published: a broker with an alarm blocks
    /// a connection at its first publication, and answers nothing from then on.
    async fn with_lanes(&self, lanes: &mut Lanes, batch: Vec<Job>) -> Result<Vec<Job>, BrokerError> {
        let mut publishable = Vec::with_capacity(batch.len());
        for job in batch {
            if lanes.ensure(&job.publication.lane).await? {
                publishable.push(job);
            } else {
                self.conclude(job, Published::Refused).await;
            }
        }
        Ok(publishable)
    }

    async fn conclude(&self, job: Job, published: Published) {
        metrics::counter!("tasklane_publications_total", "outcome" => match published {
            Published::Confirmed => "confirmed",
            Published::Refused | Published::Returned => "refused",
            Published::Unknown => "unknown",
        })
        .increment(1);
        if published == Published::Confirmed {
            self.marks.confirmed(job.publication.id, job.publication.fence).await;
        }
        if let Some(reply) = job.reply {
            // The caller may have stopped waiting.
            let _ = reply.send(published);
        }
    }
}

/// A notice is one transient message through the default exchange; if nobody listens any more the broker drops it.
async fn send_notice(channel: &Channel, reply_to: String, id: TaskId) -> Result<(), BrokerError> {
    let properties = AMQPProperties::default().with_message_id(id.to_string().into());
    let options = BasicPublishOptions::default();
    within("basic.publish", channel.basic_publish("".into(), reply_to.into(), options, &[], properties)).await?;
    Ok(())
}
