//! Runs that somebody wants cancelled.
//!
//! Which ones only the ledger says, asked as often as the lease is renewed; a word over the control exchange makes it be
//! asked at once. So a lost word costs a little time, and a false one nothing.

use std::time::Duration;

use lapin::Connection;
use tasklane_common::control;
use tasklane_common::task::QueueName;
use tokio::time::sleep;

use crate::life::Life;

/// How long until words are listened to again when that failed.
const PAUSE: Duration = Duration::from_secs(30);

/// Stops what shall be cancelled, until the life ends.
pub async fn watch(life: &Life, period: Duration) {
    loop {
        tokio::select! {
            () = sleep(period) => {}
            () = life.asked.notified() => {}
            () = life.ended.cancelled() => return,
        }
        if !life.held.runs_anything() {
            continue;
        }
        match life.ledger.cancelling(life.lease.worker()).await {
            Ok(runs) => runs.into_iter().for_each(|(id, fence)| life.held.cancel(id, fence)),
            Err(error) => tracing::debug!(%error, "the ledger does not say what to cancel, asking again"),
        }
    }
}

/// Listens to the words, for as long as the connection is there; without them cancelling and pausing only take longer.
pub(crate) async fn listen(life: &Life, connection: &Connection) {
    loop {
        let heard = |word: &control::Word| {
            if life.held.runs_any_of(&word.cancel) {
                life.asked.notify_one();
            }
            if word.events_ms > 0 {
                life.events.wanted_for(Duration::from_millis(word.events_ms));
            }
            let ours = |queues: &[QueueName]| queues.iter().any(|queue| life.settings.queues.contains(queue));
            if ours(&word.queues) {
                life.pauses.look_soon();
            }
            if ours(&word.lost) {
                life.messages_lost.notify_one();
            }
        };
        let Err(error) = control::listen(connection, life.lease.worker().0, heard).await;
        tracing::warn!(%error, "the control exchange cannot be listened to: cancelling and pausing take until a renewal of the lease");
        sleep(PAUSE).await;
    }
}
