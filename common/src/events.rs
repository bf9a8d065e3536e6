//! What happens to tasks, told to whoever looks at this moment: submitted, started, completed and so on.
//!
//! Nothing is published while nobody looks. A producer with listeners says over the [`control`] exchange
//! that events are wanted for some seconds, again and again; whoever has heard it publishes, transient and unconfirmed, and
//! the producer's [`feed`] hands on what comes. Telling never waits: what has no room is dropped and counted.
//!
//! Events are for looking, not for deciding: they may get lost, and those of two processes may overtake each other.

pub mod feed;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use lapin::Channel;
use lapin::options::BasicPublishOptions;
use lapin::protocol::basic::AMQPProperties;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::broker::{self, BrokerError, within};
use crate::control;
use crate::ledger::Transition;
use crate::publisher::Publisher;
use crate::state::State;
use crate::task::{Kind, QueueName, TaskId, WorkerId};
use crate::topology::{EVENTS_EXCHANGE, event_key};

/// How many events wait to be sent: those of the largest batch, and some more.
const WAITING_MAX: usize = 16_384;
/// How many of them are taken at once.
const BATCH_MAX: usize = 256;
/// For how long one word can make events wanted.
const WANTED_MAX: Duration = Duration::from_secs(60);
/// How long until words are listened to again when that failed.
const PAUSE: Duration = Duration::from_secs(5);
/// How long the channel may take to close that nobody needs any more.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// What happened to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Happening {
    /// It was recorded.
    Submitted,
    /// A handler was started.
    Started,
    /// The handler finished.
    Completed,
    /// The attempt failed, and another follows.
    Retried,
    /// The handler asked for a later time.
    Snoozed,
    /// Somebody, or its handler, said stop.
    Cancelled,
    /// It will not be tried again.
    Discarded,
    /// A shutdown cut the run short, and another follows.
    Interrupted,
    /// The worker's lease has ended in mid-run, and another attempt follows.
    Rescued,
    /// Somebody wanted a failed one to run again.
    Replayed,
}

impl Happening {
    /// The name, as in JSON, routing keys and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Submitted => "submitted",
            Self::Started => "started",
            Self::Completed => "completed",
            Self::Retried => "retried",
            Self::Snoozed => "snoozed",
            Self::Cancelled => "cancelled",
            Self::Discarded => "discarded",
            Self::Interrupted => "interrupted",
            Self::Rescued => "rescued",
            Self::Replayed => "replayed",
        }
    }

    /// How a run has ended, and the state to which that leads.
    #[must_use]
    pub const fn of(transition: &Transition) -> (Self, State) {
        match transition {
            Transition::Complete { .. } => (Self::Completed, State::Completed),
            Transition::Retry { .. } => (Self::Retried, State::Retryable),
            Transition::Snooze { .. } => (Self::Snoozed, State::Scheduled),
            Transition::Interrupt => (Self::Interrupted, State::Accepted),
            Transition::Cancel { .. } => (Self::Cancelled, State::Cancelled),
            Transition::Discard { .. } => (Self::Discarded, State::Discarded),
        }
    }
}

/// Something that happened to a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskEvent {
    /// When, by the clock of the process that tells.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "crate::clock::text")]
    pub at: Timestamp,
    /// The task.
    pub id: TaskId,
    /// Its work.
    pub kind: Kind,
    /// Its queue.
    pub queue: QueueName,
    /// What happened.
    pub event: Happening,
    /// Where it stands after that.
    pub state: State,
    /// The attempt; 0 before the first start.
    pub attempt: i32,
    /// The worker that ran it, if one did.
    pub worker_id: Option<WorkerId>,
}

/// Tells of events while somebody looks; clones share it.
#[derive(Debug, Clone)]
pub struct Events {
    wish: Arc<Wish>,
    waiting: mpsc::Sender<TaskEvent>,
}

/// Whether events are wanted, and until when.
#[derive(Debug)]
struct Wish {
    wanted: AtomicBool,
    began: Instant,
    /// In milliseconds since `began`.
    until_ms: AtomicU64,
    extended: Notify,
}

impl Events {
    /// Starts the speaker, on the publisher's connection; it ends with its last handle.
    #[must_use]
    pub fn spawn(publisher: Publisher) -> Self {
        let (waiting, events) = mpsc::channel(WAITING_MAX);
        crate::vital::spawn("events", speak(publisher, events));
        Self::over(waiting)
    }

    fn over(waiting: mpsc::Sender<TaskEvent>) -> Self {
        let wish = Arc::new(Wish {
            wanted: AtomicBool::new(false),
            began: Instant::now(),
            until_ms: AtomicU64::new(0),
            extended: Notify::new(),
        });
        let events = Self { wish: Arc::clone(&wish), waiting };
        // Without a handle nobody asks any more.
        crate::vital::spawn("events wish", forget_in_time(Arc::downgrade(&wish)));
        events
    }

    /// Whether somebody looks: one relaxed load.
    #[must_use]
    pub fn wanted(&self) -> bool {
        self.wish.wanted.load(Ordering::Relaxed)
    }

    /// Events are wanted from now on for so long, a minute at most.
    pub fn wanted_for(&self, time: Duration) {
        let until = self.wish.began.elapsed() + time.min(WANTED_MAX);
        let until_ms = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
        self.wish.until_ms.fetch_max(until_ms, Ordering::SeqCst);
        self.wish.wanted.store(true, Ordering::SeqCst);
        self.wish.extended.notify_one();
    }

    /// Tells of an event if somebody looks. Never waits: what has no room is dropped and counted.
    pub fn tell(&self, event: impl FnOnce() -> TaskEvent) {
        if self.wanted() && self.waiting.try_send(event()).is_err() {
            count_dropped(1);
        }
    }

    /// Listens to what is wanted, until the shutdown; for processes that listen to no other words.
    pub async fn listen(&self, publisher: Publisher, shutdown: CancellationToken) {
        let who = Uuid::now_v7();
        let heard = |word: &control::Word| {
            if word.events_ms > 0 {
                self.wanted_for(Duration::from_millis(word.events_ms));
            }
        };
        let listening = async {
            loop {
                publisher.connected().await;
                if let Some(connection) = publisher.connection() {
                    let Err(error) = control::listen(&connection, who, heard).await;
                    tracing::debug!(%error, "whether somebody looks at events is not heard of");
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = listening => {}
            () = shutdown.cancelled() => {}
        }
    }
}

fn count_dropped(events: usize) {
    metrics::counter!("tasklane_events_dropped_total").increment(events as u64);
}

/// Ends the wish when its time is over.
async fn forget_in_time(wish: std::sync::Weak<Wish>) {
    loop {
        let Some(wish) = wish.upgrade() else { return };
        let until = wish.began + Duration::from_millis(wish.until_ms.load(Ordering::SeqCst));
        if Instant::now() >= until {
            wish.wanted.store(false, Ordering::SeqCst);
            // A wish that came between the look and the store would be forgotten: its time says so.
            let again = wish.began + Duration::from_millis(wish.until_ms.load(Ordering::SeqCst));
            if again > until {
                wish.wanted.store(true, Ordering::SeqCst);
            }
            let idle = Instant::now() + WANTED_MAX;
            tokio::select! {
                () = wish.extended.notified() => {}
                () = sleep_until(idle) => {}
            }
        } else {
            sleep_until(until).await;
        }
    }
}

/// Publishes what waits, over a channel of its own that lasts as long as its connection.
async fn speak(publisher: Publisher, mut waiting: mpsc::Receiver<TaskEvent>) {
    let mut batch = Vec::new();
    let mut channel: Option<Channel> = None;
    while waiting.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let count = batch.len();
        match publish(&publisher, &mut channel, &batch).await {
            Ok(()) => metrics::counter!("tasklane_events_published_total").increment(count as u64),
            Err(error) => {
                tracing::debug!(%error, events = count, "events were dropped");
                count_dropped(count);
                if let Some(channel) = channel.take() {
                    let _ = timeout(CLOSE_LIMIT, channel.close(200, "done".into())).await;
                }
            }
        }
        batch.clear();
    }
}

async fn publish(publisher: &Publisher, channel: &mut Option<Channel>, batch: &[TaskEvent]) -> Result<(), BrokerError> {
    // While the broker has an alarm there is none: nothing may wait in the socket's buffer.
    let connection = publisher.connection().ok_or(BrokerError::Ended("the broker is away"))?;
    let open = match channel.take().filter(|channel| channel.status().connected()) {
        Some(open) => open,
        None => {
            let open = within("channel.open", connection.create_channel()).await?;
            broker::declare_exchanges(&open).await?;
            open
        }
    };
    let open = channel.insert(open);
    for event in batch {
        let body = serde_json::to_vec(event).unwrap_or_default();
        let key = event_key(event.event.as_str(), &event.queue, &event.kind);
        let (options, properties) = (BasicPublishOptions::default(), AMQPProperties::default());
        let publish = open.basic_publish(EVENTS_EXCHANGE.into(), key.as_str().into(), options, &body, properties);
        // Unconfirmed: the confirm of a channel without confirms is there at once.
        within("basic.publish", publish).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Failure;
    use crate::task::{ErrorKind, Json};

    /// An event of the kind that is given.
    pub(crate) fn event(kind: &str) -> TaskEvent {
        TaskEvent {
            at: Timestamp::UNIX_EPOCH,
            id: TaskId::new(),
            kind: Kind::parse(kind).unwrap(),
            queue: QueueName::default(),
            event: Happening::Started,
            state: State::Running,
            attempt: 1,
            worker_id: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_made_while_nobody_looks_and_nothing_waits_for_room() {
        let (waiting, mut events) = mpsc::channel(2);
        let teller = Events::over(waiting);
        teller.tell(|| panic!("an event is made although nobody looks"));
        teller.wanted_for(Duration::from_secs(10));
        for kind in ["a", "b", "c"] {
            teller.tell(|| event(kind));
        }
        let mut told = Vec::new();
        events.recv_many(&mut told, 9).await;
        assert_eq!(told.iter().map(|event| event.kind.as_str()).collect::<Vec<_>>(), ["a", "b"], "no room for c");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wish_ends_unless_it_is_repeated() {
        let (waiting, _events) = mpsc::channel(1);
        let teller = Events::over(waiting);
        let pass = async |seconds| tokio::time::sleep(Duration::from_secs(seconds)).await;
        for _ in 0..3 {
            teller.wanted_for(Duration::from_secs(10));
            pass(9).await;
            assert!(teller.wanted(), "said again in time");
        }
        pass(2).await;
        assert!(!teller.wanted(), "not said any more");
        teller.wanted_for(Duration::from_secs(1_000_000));
        pass(59).await;
        assert!(teller.wanted());
        pass(2).await;
        assert!(!teller.wanted(), "no word is for longer than a minute");
    }

    #[test]
    fn an_event_has_a_json_form_that_later_releases_can_add_to() {
        let text = r#"{"at":"1970-01-01T00:00:00Z","id":"01a20751-1f82-705d-a198-4567bb46f288","kind":"a.b","queue":"default",
            "event":"started","state":"running","attempt":1,"worker_id":null,"more":1}"#;
        let read: TaskEvent = serde_json::from_str(text).unwrap();
        assert_eq!(read, TaskEvent { id: read.id, ..event("a.b") });
        assert_eq!(event_key(read.event.as_str(), &read.queue, &read.kind), "started.default.a.b");
    }

    /// The state that an event names is the one to which the state machine leads.
    #[test]
    fn ends_of_runs_lead_where_the_state_machine_says() {
        let error = Failure { kind: ErrorKind::Error, message: String::new() };
        let reason = String::new();
        for transition in [
            Transition::Complete { result: Json::null() },
            Transition::Retry { delay: Duration::ZERO, error: error.clone() },
            Transition::Snooze { delay: Duration::ZERO },
            Transition::Interrupt,
            Transition::Cancel { reason: reason.clone() },
            Transition::Discard { reason, error },
        ] {
            let leads_to = crate::state::next(State::Running, transition.event());
            assert_eq!(leads_to, Some(Happening::of(&transition).1), "{transition:?}");
        }
    }
}
