//! Words to all processes at once, over the control exchange: which runs somebody wants cancelled, which queues were
//! paused or resumed or have lost messages, and that somebody looks at events.
//!
//! They only save time, and may get lost: a worker acts on what the ledger says, and asks it now and then anyway; what is
//! wanted of events is said again and again.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::FieldTable;
use lapin::{Channel, Connection};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use uuid::Uuid;

use crate::broker::{self, BrokerError, within};
use crate::publisher::Publisher;
use crate::task::{QueueName, TaskId};
use crate::topology::{CONTROL_EXCHANGE, control_queue};

/// How many words wait to be sent; further ones are dropped.
const WAITING_MAX: usize = 1024;
/// How many tasks one message names.
const IDS_MAX: usize = 1_000;
/// How often a listener makes sure of its binding: somebody may have deleted the exchange.
const BIND_PERIOD: Duration = Duration::from_secs(30);

/// What a message says, of which each part may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// Runs of these shall be cancelled. Always written: earlier releases know nothing else.
    #[serde(default)]
    pub cancel: Vec<TaskId>,
    /// These were paused or resumed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<QueueName>,
    /// Messages of these were lost.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<QueueName>,
    /// Events shall be published for so long, in milliseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub events_ms: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Speaks to the workers; clones share it.
#[derive(Debug, Clone)]
pub struct Control(mpsc::Sender<Word>);

impl Control {
    /// Starts the speaker, on the publisher's connection; it ends with its last handle.
    #[must_use]
    pub fn spawn(publisher: Publisher) -> Self {
        let (words, mut waiting) = mpsc::channel::<Word>(WAITING_MAX);
        crate::vital::spawn("control", async move {
            let mut batch = Vec::new();
            while waiting.recv_many(&mut batch, WAITING_MAX).await > 0 {
                if let Err(error) = send(&publisher, &words_of(&mut batch)).await {
                    tracing::debug!(%error, "the workers were not told of something new: they find it in the ledger");
                }
            }
        });
        Self(words)
    }

    /// Tells the workers that these runs shall be cancelled, after the ledger has it.
    pub fn cancel(&self, ids: Vec<TaskId>) {
        if !ids.is_empty() {
            self.say(Word { cancel: ids, ..Word::default() });
        }
    }

    /// Tells the workers that this queue was paused or resumed, after the ledger has it.
    pub fn queue_changed(&self, queue: QueueName) {
        self.say(Word { queues: vec![queue], ..Word::default() });
    }

    /// Tells the workers that messages of this queue were lost.
    pub fn messages_lost(&self, queue: QueueName) {
        self.say(Word { lost: vec![queue], ..Word::default() });
    }

    /// Tells all processes that somebody looks at events, for so long.
    pub fn events_wanted(&self, time: Duration) {
        self.say(Word { events_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX), ..Word::default() });
    }

    fn say(&self, word: Word) {
        // With no room for it the workers hear of it a little later.
        let _ = self.0.try_send(word);
    }
}

/// All of it in as few words as may be.
fn words_of(batch: &mut Vec<Word>) -> Vec<Word> {
    let (mut cancel, mut queues, mut lost, mut events_ms) = (Vec::new(), BTreeSet::new(), BTreeSet::new(), 0);
    for word in batch.drain(..) {
        cancel.extend(word.cancel);
        queues.extend(word.queues);
        lost.extend(word.lost);
        events_ms = word.events_ms.max(events_ms);
    }
    let mut words: Vec<Word> =
        cancel.chunks(IDS_MAX).map(|ids| Word { cancel: ids.to_vec(), ..Word::default() }).collect();
    if !queues.is_empty() || !lost.is_empty() || events_ms > 0 {
        let [queues, lost] = [queues, lost].map(|names| names.into_iter().collect());
        words.push(Word { queues, lost, events_ms, ..Word::default() });
    }
    words
}

async fn send(publisher: &Publisher, words: &[Word]) -> Result<(), BrokerError> {
    let connection = publisher.connection().ok_or(BrokerError::Ended("the broker is away"))?;
    // A channel of its own: without the exchange the broker closes it, and nobody's confirms with it.
    let channel = within("channel.open", connection.create_channel()).await?;
    broker::declare_exchanges(&channel).await?;
    for word in words {
        let body = serde_json::to_vec(word).unwrap_or_default();
        let (options, properties) = (BasicPublishOptions::default(), AMQPProperties::default());
        let publish = channel.basic_publish(CONTROL_EXCHANGE.into(), "".into(), options, &body, properties);
        within("basic.publish", publish).await?;
    }
    within("channel.close", channel.close(200, "done".into())).await
}

/// Listens in a worker's or a producer's name until the channel fails; `heard` gets what is said to all.
///
/// # Errors
/// Why it does not listen any more.
pub async fn listen(
    connection: &Connection,
    who: Uuid,
    heard: impl Fn(&Word),
) -> Result<std::convert::Infallible, BrokerError> {
    let channel = within("channel.open", connection.create_channel()).await?;
    let name = control_queue(who);
    let declare = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    within("queue.declare", channel.queue_declare(name.as_str().into(), declare, FieldTable::default())).await?;
    bind(&channel, &name).await?;
    let consume = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut words =
        within("basic.consume", channel.basic_consume(name.as_str().into(), "".into(), consume, FieldTable::default()))
            .await?;
    let mut again = interval(BIND_PERIOD);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            word = words.next() => {
                let word = word.ok_or(BrokerError::Ended("the broker cancelled the consumer"))??;
                // What is no word of ours says nothing.
                if let Ok(word) = serde_json::from_slice(&word.data) {
                    heard(&word);
                }
            }
            _ = again.tick() => bind(&channel, &name).await?,
        }
    }
}

async fn bind(channel: &Channel, queue: &str) -> Result<(), BrokerError> {
    broker::declare_exchanges(channel).await?;
    broker::bind(channel, queue, CONTROL_EXCHANGE, "").await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_put_together() {
        let queue = |name: &str| QueueName::parse(name).unwrap();
        let ids: Vec<_> = std::iter::repeat_with(TaskId::new).take(IDS_MAX + 1).collect();
        let of = |name: &str| Word { queues: vec![queue(name)], ..Word::default() };
        let wanted = |events_ms| Word { events_ms, ..Word::default() };
        let lost = Word { lost: vec![queue("c")], ..Word::default() };
        let mut batch = vec![
            of("b"),
            wanted(7),
            Word { cancel: ids.clone(), ..Word::default() },
            of("a"),
            lost,
            of("b"),
            wanted(5),
        ];
        let words = words_of(&mut batch);
        assert_eq!(words.iter().map(|word| word.cancel.len()).collect::<Vec<_>>(), [IDS_MAX, 1, 0]);
        assert_eq!((&words[2].queues[..], words[2].events_ms), (&[queue("a"), queue("b")][..], 7));
        assert_eq!(words[2].lost, [queue("c")]);
        assert!(batch.is_empty() && words_of(&mut batch).is_empty());
    }

    /// Processes of this release and of the one before hear each other.
    #[test]
    fn words_are_understood_by_the_release_before_and_the_other_way_round() {
        #[derive(Deserialize)]
        struct Before {
            cancel: Vec<TaskId>,
        }
        let word = Word { queues: vec![QueueName::default()], events_ms: 5, ..Word::default() };
        let before: Before = serde_json::from_slice(&serde_json::to_vec(&word).unwrap()).unwrap();
        assert_eq!(before.cancel, []);
        let of_before: Word = serde_json::from_str(r#"{"cancel":[]}"#).unwrap();
        assert_eq!(of_before, Word::default());
    }
}
