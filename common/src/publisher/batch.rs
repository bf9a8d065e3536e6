//! One batch on one channel: out together, then all its confirms.

use std::borrow::Cow;
use std::collections::HashSet;

use futures::stream::{self, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::{Channel, Confirmation, PublisherConfirm};

use super::patience::Patience;
use super::{Job, Publication, Published};
use crate::broker::BrokerError;
use crate::envelope::{Envelope, Message};
use crate::task::{LedgerId, TaskId};
use crate::topology::{TASKS_EXCHANGE, routing_key};

/// How many publications of a batch are handed to the socket together.
const WRITTEN_TOGETHER: usize = 64;

/// Sends one message with all these tasks, which are of one lane and kind.
async fn send(channel: &Channel, jobs: &[Job], ledger: LedgerId) -> Result<PublisherConfirm, BrokerError> {
    let [first, ..] = jobs else { return Err(BrokerError::Ended("there is nothing to publish")) };
    let (properties, body) = match jobs {
        [only] => {
            let envelope = envelope(&only.publication, ledger);
            (envelope.properties(), Cow::Borrowed(only.publication.args.as_str().as_bytes()))
        }
        several => {
            let bundle = Message::bundle(several.iter().map(|job| envelope(&job.publication, ledger)).collect());
            let (properties, body) = bundle.map_err(|_| BrokerError::Ended("a bundle has no JSON form"))?;
            (properties, Cow::Owned(body))
        }
    };
    let Publication { lane, kind, .. } = &first.publication;
    let confirm = channel
        .basic_publish(
            TASKS_EXCHANGE.into(),
            routing_key(lane, kind).into(),
            BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() },
            &body,
            properties,
        )
        .await?;
    Ok(confirm)
}

fn envelope(publication: &Publication, ledger: LedgerId) -> Envelope {
    Envelope {
        id: publication.id,
        kind: publication.kind.clone(),
        args: publication.args.clone(),
        fence: Some(publication.fence),
        traceparent: publication.traceparent.clone(),
        reply_to: publication.reply_to.clone(),
        ledger: Some(ledger),
    }
}

/// What became of a batch; an error means that its channel is broken.
pub(super) struct Sent {
    pub(super) settled: Vec<(Job, Published)>,
    pub(super) broken: Option<BrokerError>,
}

/// Publishes a batch, of which each element becomes a message, and awaits its confirms.
pub(super) async fn send_batch(
    channel: Channel,
    mut patience: Patience,
    batch: Vec<Vec<Job>>,
    ledger: LedgerId,
) -> (Channel, Sent) {
    // Together: one by one, each would wait for its own write to the socket.
    let sends: Vec<_> = batch.iter().map(|jobs| send(&channel, jobs, ledger)).collect();
    let sends = stream::iter(sends).buffered(WRITTEN_TOGETHER).collect();
    let Some(sends): Option<Vec<_>> = patience.wait(sends).await else {
        let settled = batch.into_iter().flatten().map(|job| (job, Published::Unknown)).collect();
        return (channel, Sent { settled, broken: Some(BrokerError::Timeout("basic.publish")) });
    };
    let mut broken = None;
    let mut confirms = Vec::with_capacity(batch.len());
    for (jobs, sent) in batch.into_iter().zip(sends) {
        match sent {
            Ok(confirm) => confirms.push((jobs, confirm)),
            // Nobody waits for it any more: its connection ends.
            Err(error) => broken = Some(error),
        }
    }
    let (settled, missing) = settle(confirms, &mut patience).await;
    let broken = broken.or_else(|| missing.then_some(BrokerError::Timeout("publisher confirm")));
    (channel, Sent { settled, broken })
}

/// Awaits the confirms of one batch; also tells whether any is missing.
///
/// lapin hands a returned message to whichever confirm of its channel completes next, so within a batch the blame is put
/// right by message id. The batches of a channel follow each other in lockstep, which keeps a return inside its own.
async fn settle(confirms: Vec<(Vec<Job>, PublisherConfirm)>, patience: &mut Patience) -> (Vec<(Job, Published)>, bool) {
    let mut returned = HashSet::new();
    let mut settled = Vec::with_capacity(confirms.len());
    let mut missing = false;
    for (jobs, confirm) in confirms {
        let published = match patience.wait(confirm).await {
            Some(Ok(confirmation)) => {
                let acked = confirmation.is_ack();
                returned.extend(returned_id(confirmation));
                if acked { Published::Confirmed } else { Published::Refused }
            }
            Some(Err(_)) | None => {
                missing = true;
                Published::Unknown
            }
        };
        settled.push((jobs, published));
    }
    for (jobs, published) in &mut settled {
        let id = jobs.first().map(|job| job.publication.id);
        if *published == Published::Confirmed && id.is_some_and(|id| returned.contains(&id)) {
            *published = Published::Returned;
        }
    }
    let each = settled.into_iter().flat_map(|(jobs, published)| jobs.into_iter().map(move |job| (job, published)));
    (each.collect(), missing)
}

fn returned_id(confirmation: Confirmation) -> Option<TaskId> {
    let message = confirmation.take_message()?;
    message.properties.message_id().as_ref()?.as_str().parse().ok()
}
