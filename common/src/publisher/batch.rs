//! One batch on one channel: out together, then all its confirms.

use std::collections::HashSet;

use futures::stream::{self, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::{Channel, Confirmation, PublisherConfirm};

use super::patience::Patience;
use super::{Job, Publication, Published};
use crate::broker::BrokerError;
use crate::envelope::Envelope;
use crate::task::TaskId;
use crate::topology::{TASKS_EXCHANGE, routing_key};

/// How many publications of a batch are handed to the socket together.
const WRITTEN_TOGETHER: usize = 64;

async fn send(channel: &Channel, publication: &Publication) -> Result<PublisherConfirm, BrokerError> {
    let envelope = Envelope {
        id: publication.id,
        kind: publication.kind.clone(),
        args: publication.args.clone(),
        fence: Some(publication.fence),
        traceparent: publication.traceparent.clone(),
        reply_to: publication.reply_to.clone(),
    };
    let confirm = channel
        .basic_publish(
            TASKS_EXCHANGE.into(),
            routing_key(&publication.lane, &publication.kind).into(),
            BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() },
            envelope.args.as_str().as_bytes(),
            envelope.properties(),
        )
        .await?;
    Ok(confirm)
}

/// What became of a batch; an error means that its channel is broken.
pub(super) struct Sent {
    pub(super) settled: Vec<(Job, Published)>,
    pub(super) broken: Option<BrokerError>,
}

/// Publishes a batch and awaits its confirms.
pub(super) async fn send_batch(channel: Channel, mut patience: Patience, batch: Vec<Job>) -> (Channel, Sent) {
    // Together: one by one, each would wait for its own write to the socket.
    let sends: Vec<_> = batch.iter().map(|job| send(&channel, &job.publication)).collect();
    let sends = stream::iter(sends).buffered(WRITTEN_TOGETHER).collect();
    let Some(sends): Option<Vec<_>> = patience.wait(sends).await else {
        let settled = batch.into_iter().map(|job| (job, Published::Unknown)).collect();
        return (channel, Sent { settled, broken: Some(BrokerError::Timeout("basic.publish")) });
    };
    let mut broken = None;
    let mut confirms = Vec::with_capacity(batch.len());
    for (job, sent) in batch.into_iter().zip(sends) {
        match sent {
            Ok(confirm) => confirms.push((job, confirm)),
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
async fn settle(confirms: Vec<(Job, PublisherConfirm)>, patience: &mut Patience) -> (Vec<(Job, Published)>, bool) {
    let mut returned = HashSet::new();
    let mut settled = Vec::with_capacity(confirms.len());
    let mut missing = false;
    for (job, confirm) in confirms {
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
        settled.push((job, published));
    }
    for (job, published) in &mut settled {
        if *published == Published::Confirmed && returned.contains(&job.publication.id) {
            *published = Published::Returned;
        }
    }
    (settled, missing)
}

fn returned_id(confirmation: Confirmation) -> Option<TaskId> {
    let message = confirmation.take_message()?;
    message.properties.message_id().as_ref()?.as_str().parse().ok()
}
