//! Tells a waiting client within milliseconds that its task has ended.
//!
//! The producer consumes an exclusive queue and names it in the messages of tasks that somebody waits for; the worker
//! sends a notice there after settling. Notices may get lost: whoever waits also looks into the ledger now and then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::broker::{self, Address, BrokerError, Generations, within};
use crate::task::TaskId;
use crate::topology::reply_queue;

/// A handle to the process's queue of notices; clones share it.
#[derive(Debug, Clone)]
pub struct Completions {
    watched: Arc<Watched>,
    queue: watch::Receiver<Option<String>>,
}

#[derive(Debug, Default)]
struct Watched(Mutex<HashMap<TaskId, Arc<Notify>>>);

impl Watched {
    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, id: TaskId) {
        if let Some(waiting) = self.lock().get(&id) {
            waiting.notify_one();
        }
    }
}

/// Waits for the notice of one task; ends its registration when dropped.
#[derive(Debug)]
pub struct Watch {
    id: TaskId,
    notice: Arc<Notify>,
    watched: Arc<Watched>,
}

impl Completions {
    /// Starts the supervised consumer.
    #[must_use]
    pub fn spawn(amqp_url: &Address, shutdown: CancellationToken) -> Self {
        let (named, queue) = watch::channel(None);
        let watched = Arc::new(Watched::default());
        let (amqp_url, notices) = (amqp_url.clone(), Arc::clone(&watched));
        crate::vital::spawn("completions", async move {
            let mut generations = Generations::of("completions");
            while generations.begin(&shutdown) {
                let outcome = tokio::select! {
                    outcome = consume(&amqp_url, &named, &notices) => outcome,
                    () = shutdown.cancelled() => Ok(()),
                };
                named.send_replace(None);
                generations.ended(outcome, &shutdown).await;
            }
        });
        Self { watched, queue }
    }

    /// The queue to name in a message; `None` while the broker is away.
    #[must_use]
    pub fn reply_to(&self) -> Option<String> {
        self.queue.borrow().clone()
    }

    /// Tells whoever watches for it here that a task has ended, as a notice would.
    pub fn tell(&self, id: TaskId) {
        self.watched.tell(id);
    }

    /// Watches for the end of a task. Begin before its publication: a notice that nobody watches for is forgotten.
    ///
    /// One watch a task: a second one takes the first one's place.
    #[must_use]
    pub fn watch(&self, id: TaskId) -> Watch {
        let notice = Arc::new(Notify::new());
        self.watched.lock().insert(id, Arc::clone(&notice));
        Watch { id, notice, watched: Arc::clone(&self.watched) }
    }
}

impl Watch {
    /// Resolves when a notice has come, also one from before the call.
    pub async fn ended(&mut self) {
        self.notice.notified().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.watched.lock();
        if watched.get(&self.id).is_some_and(|notice| Arc::ptr_eq(notice, &self.notice)) {
            watched.remove(&self.id);
        }
    }
}

async fn consume(
    amqp_url: &Address,
    named: &watch::Sender<Option<String>>,
    watched: &Watched,
) -> Result<(), BrokerError> {
    let connection = broker::connect(amqp_url, "tasklane completions", broker::HEARTBEAT).await?;
    let channel = within("channel.open", connection.create_channel()).await?;
    let declare = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let name = reply_queue(uuid::Uuid::now_v7());
    let declared = channel.queue_declare(name.as_str().into(), declare, FieldTable::default());
    within("queue.declare", declared).await?;
    let consume = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut notices =
        within("basic.consume", channel.basic_consume(name.as_str().into(), "".into(), consume, FieldTable::default()))
            .await?;
    named.send_replace(Some(name));
    while let Some(notice) = notices.next().await {
        if let Some(id) = notice?.properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok()) {
            watched.tell(id);
        }
    }
    Err(BrokerError::Ended("the broker cancelled the consumer"))
}
