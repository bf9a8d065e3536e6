//! The acks of one channel: those that come together go out together, as few frames as they can be.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::join_all;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tasklane_common::broker::within;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

/// Settles the deliveries of one channel; a task of its own sends the acks, until nobody holds this any more.
#[derive(Debug)]
pub struct Acks {
    channel: Channel,
    unsettled: Arc<Mutex<Unsettled>>,
    waiting: mpsc::UnboundedSender<u64>,
}

impl Acks {
    /// For a channel on which nothing was delivered yet.
    pub fn of(channel: Channel, tasks: &TaskTracker) -> Arc<Self> {
        // Never more than was delivered and not acked, which the prefetch bounds.
        let (waiting, acks) = mpsc::unbounded_channel();
        let unsettled = Arc::default();
        tasks.spawn(send(channel.clone(), Arc::clone(&unsettled), acks));
        Arc::new(Self { channel, unsettled, waiting })
    }

    /// A delivery with this tag has come.
    pub fn delivered(&self, tag: u64) {
        lock(&self.unsettled).deliver(tag);
    }

    /// The broker may forget the message: it hears so in a moment.
    pub fn ack(&self, tag: u64) {
        // The receiver ends after the last sender.
        let _ = self.waiting.send(tag);
    }

    /// The broker shall deliver the message to somebody else.
    pub async fn give_back(&self, tag: u64) {
        let options = BasicNackOptions { requeue: true, multiple: false };
        if let Err(error) = within("basic.nack", self.channel.basic_nack(tag, options)).await {
            tracing::debug!(%error, "not given back: the broker does so by itself");
        }
        // Afterwards: an ack of everything up to a later tag must not overtake it.
        lock(&self.unsettled).settle(&[tag]);
    }
}

fn lock(unsettled: &Mutex<Unsettled>) -> MutexGuard<'_, Unsettled> {
    unsettled.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn send(channel: Channel, unsettled: Arc<Mutex<Unsettled>>, mut acks: mpsc::UnboundedReceiver<u64>) {
    let mut tags = Vec::new();
    while let Some(tag) = acks.recv().await {
        tags.push(tag);
        // What was settled in one commit comes in one go.
        tokio::task::yield_now().await;
        while let Ok(tag) = acks.try_recv() {
            tags.push(tag);
        }
        let frames = lock(&unsettled).settle(&tags);
        tags.clear();
        let sent = frames.into_iter().map(|(tag, multiple)| {
            let channel = &channel;
            async move { within("basic.ack", channel.basic_ack(tag, BasicAckOptions { multiple })).await }
        });
        for error in join_all(sent).await.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "not acked: the broker will deliver it again, and the ledger will refuse it");
        }
    }
}

/// The delivery tags that the broker waits for.
#[derive(Debug, Default)]
struct Unsettled {
    tags: BTreeSet<u64>,
    newest: u64,
}

impl Unsettled {
    /// Tags rise by one. One that was passed over has come and nobody has it, so nothing may ack it along.
    fn deliver(&mut self, tag: u64) {
        self.tags.extend(self.newest + 1..=tag);
        self.newest = self.newest.max(tag);
    }

    /// Takes these tags out, and tells the acks for them: those below everything unsettled need only one.
    fn settle(&mut self, tags: &[u64]) -> Vec<(u64, bool)> {
        for tag in tags {
            self.tags.remove(tag);
        }
        let oldest = self.tags.first().copied().unwrap_or(u64::MAX);
        let (below, apart): (Vec<u64>, Vec<u64>) = tags.iter().partition(|tag| **tag < oldest);
        let together = below.iter().max().map(|newest| (*newest, below.len() > 1));
        together.into_iter().chain(apart.into_iter().map(|tag| (tag, false))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivered(tags: impl IntoIterator<Item = u64>) -> Unsettled {
        let mut unsettled = Unsettled::default();
        tags.into_iter().for_each(|tag| unsettled.deliver(tag));
        unsettled
    }

    #[test]
    fn what_lies_below_everything_unsettled_is_one_ack() {
        let mut unsettled = delivered(1..=6);
        assert_eq!(unsettled.settle(&[2, 1, 5, 3]), [(3, true), (5, false)]);
        assert_eq!(unsettled.settle(&[4]), [(4, false)]);
        assert_eq!(unsettled.settle(&[6]), [(6, false)]);
        assert!(unsettled.tags.is_empty());
    }

    #[test]
    fn what_still_runs_is_never_acked_along() {
        let mut unsettled = delivered(1..=4);
        assert_eq!(unsettled.settle(&[2, 3]), [(2, false), (3, false)]);
        assert_eq!(unsettled.settle(&[4]), [(4, false)]);
        assert_eq!(unsettled.settle(&[1]), [(1, false)]);
    }

    #[test]
    fn a_tag_that_nobody_has_is_never_acked_along() {
        let mut unsettled = delivered([1, 2, 5, 6]);
        assert_eq!(unsettled.settle(&[1, 2, 5, 6]), [(2, true), (5, false), (6, false)]);
    }

    #[test]
    fn what_was_given_back_is_not_named() {
        let mut unsettled = delivered(1..=3);
        unsettled.settle(&[3]);
        assert_eq!(unsettled.settle(&[1, 2]), [(2, true)]);
    }
}
