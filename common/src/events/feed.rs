//! The producer's side of events: says that they are wanted while it has listeners, reads them from a queue of its own,
//! and hands each listener what meets its filter. A listener that is slower than its buffer is told how many it lost.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Events, TaskEvent};
use crate::broker::{self, Address, BrokerError, Generations, within};
use crate::control::Control;
use crate::publisher::Publisher;
use crate::topology::{EVENTS_EXCHANGE, events_queue};

/// How many listeners there may be.
pub const LISTENERS_MAX: usize = 100;
/// How many events wait for one listener.
const BUFFER: usize = 4_096;
/// How often it is said that events are wanted, and for how long each time: two words may get lost.
const SAY_PERIOD: Duration = Duration::from_secs(3);
const WANTED_TIME: Duration = Duration::from_secs(10);
/// How many events are under way from the broker, and after how many of them it is told so.
const PREFETCH: u16 = 1_024;
const ACK_EVERY: u16 = 128;
/// How many events the broker keeps for a producer that stands still, the newest.
const KEPT_MAX: i32 = 10_000;
/// How long a connection that nobody needs any more may take to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// What a listener gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// From here on events come. Another one later means that some are missing: the broker was away in between.
    Listening,
    /// An event, and its JSON.
    Event(Arc<TaskEvent>, Arc<str>),
    /// So many events that meet the filter are missing here: the listener was too slow.
    Lost(u64),
}

/// A filter: whether a listener wants an event.
pub type Filter = Box<dyn Fn(&TaskEvent) -> bool + Send>;

/// A handle to the process's feed of events; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Feed(Arc<Hub>);

#[derive(Debug, Default)]
struct Hub {
    listeners: Mutex<Listeners>,
    joined: Notify,
}

#[derive(Default)]
struct Listeners {
    all: Vec<Listener>,
    /// Whether events come at this moment.
    live: bool,
}

impl std::fmt::Debug for Listeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listeners").field("count", &self.all.len()).field("live", &self.live).finish()
    }
}

struct Listener {
    filter: Filter,
    items: mpsc::Sender<Item>,
    /// What it lost and was not told of yet.
    lost: u64,
    /// Whether it is still to hear that events come.
    to_greet: bool,
}

impl Feed {
    /// Starts the feed, which connects to the broker while there are listeners only.
    #[must_use]
    pub fn spawn(amqp_url: &Address, publisher: Publisher, events: Events, shutdown: CancellationToken) -> Self {
        let feed = Self::default();
        let reader =
            Reader { amqp_url: amqp_url.clone(), control: Control::spawn(publisher), events, hub: Arc::clone(&feed.0) };
        crate::vital::spawn("events feed", reader.run(shutdown));
        feed
    }

    /// Listens, until the receiver is dropped; `None` when there are [`LISTENERS_MAX`] already.
    #[must_use]
    pub fn listen(&self, filter: Filter) -> Option<mpsc::Receiver<Item>> {
        let mut listeners = self.0.lock();
        // Those that have gone are noticed at the next event, which may be long ago.
        listeners.all.retain(|listener| !listener.items.is_closed());
        if listeners.all.len() >= LISTENERS_MAX {
            return None;
        }
        let (items, receiver) = mpsc::channel(BUFFER);
        let mut listener = Listener { filter, items, lost: 0, to_greet: true };
        if listeners.live {
            listener.flush();
        }
        listeners.all.push(listener);
        drop(listeners);
        self.0.joined.notify_one();
        Some(receiver)
    }
}

impl Listener {
    /// Says what is to be said before the next event; whether that was possible.
    fn flush(&mut self) -> bool {
        if self.lost > 0 && self.items.try_send(Item::Lost(self.lost)).is_ok() {
            self.lost = 0;
        }
        if self.lost == 0 && self.to_greet && self.items.try_send(Item::Listening).is_ok() {
            self.to_greet = false;
        }
        self.lost == 0 && !self.to_greet
    }

    fn hand(&mut self, event: &Arc<TaskEvent>, json: &Arc<str>) {
        if !(self.filter)(event) {
            return;
        }
        let item = Item::Event(Arc::clone(event), Arc::clone(json));
        if !self.flush() || matches!(self.items.try_send(item), Err(TrySendError::Full(_))) {
            self.lost += 1;
        }
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody listens.
    fn has_listeners(&self) -> bool {
        let mut listeners = self.lock();
        listeners.all.retain(|listener| !listener.items.is_closed());
        !listeners.all.is_empty()
    }

    fn hand_on(&self, event: TaskEvent) {
        // Made anew from what was read: whatever else a message held goes no further.
        let Ok(json) = serde_json::to_string(&event) else { return };
        let (event, json) = (Arc::new(event), Arc::from(json));
        for listener in &mut self.lock().all {
            listener.hand(&event, &json);
        }
    }

    /// Events come from now on, or do not any more.
    fn set_live(&self, live: bool) {
        let mut listeners = self.lock();
        listeners.live = live;
        for listener in &mut listeners.all {
            if live {
                listener.flush();
            } else {
                listener.to_greet = true;
            }
        }
    }

    /// Tells what has been lost also where no further event follows.
    fn flush(&self) {
        for listener in &mut self.lock().all {
            listener.flush();
        }
    }
}

/// The task that reads.
struct Reader {
    amqp_url: Address,
    control: Control,
    events: Events,
    hub: Arc<Hub>,
}

impl Reader {
    async fn run(self, shutdown: CancellationToken) {
        let mut generations = Generations::of("events");
        while generations.begin(&shutdown) {
            if !self.hub.has_listeners() {
                tokio::select! {
                    () = self.hub.joined.notified() => {}
                    () = shutdown.cancelled() => return,
                }
                continue;
            }
            let outcome = tokio::select! {
                outcome = self.generation() => outcome,
                () = shutdown.cancelled() => return,
            };
            self.hub.set_live(false);
            // It ends well when the last listener has gone.
            if outcome.is_err() {
                generations.ended(outcome, &shutdown).await;
            }
        }
    }

    /// Reads until nobody listens any more.
    async fn generation(&self) -> Result<(), BrokerError> {
        let connection = broker::connect(&self.amqp_url, "tasklane events", broker::HEARTBEAT).await?;
        let outcome = self.read(&connection).await;
        // The queue goes with it.
        let _ = timeout(CLOSE_LIMIT, connection.close(200, "done".into())).await;
        outcome
    }

    async fn read(&self, connection: &lapin::Connection) -> Result<(), BrokerError> {
        let channel = within("channel.open", connection.create_channel()).await?;
        broker::declare_exchanges(&channel).await?;
        let name = events_queue(Uuid::now_v7());
        let declare = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(KEPT_MAX));
        within("queue.declare", channel.queue_declare(name.as_str().into(), declare, arguments)).await?;
        broker::bind(&channel, &name, EVENTS_EXCHANGE, "#").await?;
        // With acks: without them the broker would send more than there is room for.
        within("basic.qos", channel.basic_qos(PREFETCH, BasicQosOptions::default())).await?;
        let (consume, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = channel.basic_consume(name.as_str().into(), "".into(), consume, none);
        let mut messages = within("basic.consume", consuming).await?;
        self.say();
        self.hub.set_live(true);
        let mut said = interval(SAY_PERIOD);
        said.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unacked = 0;
        loop {
            tokio::select! {
                message = messages.next() => {
                    let message = message.ok_or(BrokerError::Ended("the broker cancelled the consumer"))??;
                    // What is no event of ours is nobody's.
                    if let Ok(event) = serde_json::from_slice(&message.data) {
                        self.hub.hand_on(event);
                    }
                    unacked += 1;
                    if unacked >= ACK_EVERY {
                        within("basic.ack", message.acker.ack(BasicAckOptions { multiple: true })).await?;
                        unacked = 0;
                    }
                }
                _ = said.tick() => {
                    if !self.hub.has_listeners() {
                        return Ok(());
                    }
                    if !channel.status().connected() {
                        return Err(BrokerError::Ended("the channel is closed"));
                    }
                    self.hub.flush();
                    self.say();
                }
            }
        }
    }

    fn say(&self) {
        self.events.wanted_for(WANTED_TIME);
        self.control.events_wanted(WANTED_TIME);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::tests::event;

    fn all() -> Filter {
        Box::new(|_| true)
    }

    fn take(items: &mut mpsc::Receiver<Item>) -> Vec<Item> {
        std::iter::from_fn(|| items.try_recv().ok()).collect()
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_how_many_it_lost_and_the_others_lose_nothing() {
        let feed = Feed::default();
        let (mut slow, mut quick) = (feed.listen(all()).unwrap(), feed.listen(all()).unwrap());
        let only = Box::new(|event: &TaskEvent| event.kind.as_str() == "b");
        let mut choosy = feed.listen(only).unwrap();
        feed.0.set_live(true);
        // One place was taken by the greeting.
        let mut seen = 0;
        for _ in 0..BUFFER + 4 {
            feed.0.hand_on(event("a"));
            seen += take(&mut quick).iter().filter(|item| matches!(item, Item::Event(..))).count();
        }
        assert_eq!(seen, BUFFER + 4);
        feed.0.flush();
        assert_eq!(take(&mut slow).len(), BUFFER);
        feed.0.hand_on(event("b"));
        let after = take(&mut slow);
        assert!(
            matches!(&after[..], [Item::Lost(5), Item::Event(event, _)] if event.kind.as_str() == "b"),
            "{after:?}"
        );
        assert_eq!(take(&mut choosy).len(), 2, "the greeting and b: what does not meet a filter is no loss");
    }

    #[tokio::test]
    async fn an_absence_of_the_broker_is_told_by_another_greeting() {
        let feed = Feed::default();
        let mut items = feed.listen(all()).unwrap();
        assert_eq!(take(&mut items), [], "nothing comes yet");
        feed.0.set_live(true);
        feed.0.set_live(false);
        let mut late = feed.listen(all()).unwrap();
        feed.0.set_live(true);
        assert_eq!(take(&mut items), [Item::Listening, Item::Listening]);
        assert_eq!(take(&mut late), [Item::Listening]);
        assert_eq!(take(&mut feed.listen(all()).unwrap()), [Item::Listening], "at once");
    }

    #[tokio::test]
    async fn listeners_have_a_bound_and_leave_room_when_they_go() {
        let feed = Feed::default();
        let mut listeners: Vec<_> = (0..LISTENERS_MAX).map(|_| feed.listen(all()).unwrap()).collect();
        assert!(feed.listen(all()).is_none());
        listeners.pop();
        assert!(feed.listen(all()).is_some());
        drop(listeners);
        assert!(!feed.0.has_listeners());
    }
}
