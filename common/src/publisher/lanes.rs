//! Which lanes are there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use lapin::Connection;
use tokio::time::Instant;

use super::Job;
use crate::broker::{self, BrokerError, within};
use crate::task::Lane;

/// How many lanes are remembered as declared; the names are client input.
const LANES_MAX: usize = 10_000;
/// How long a queue that cannot be declared is left alone.
const UNDECLARABLE_PAUSE: Duration = Duration::from_secs(10);

/// The lanes that this generation has declared, so that no message is published to nowhere.
pub(super) struct Lanes {
    connection: Arc<Connection>,
    /// Until when a lane counts as declared, or as one that cannot be; `None` is for good.
    known: HashMap<Lane, (bool, Option<Instant>)>,
}

impl Lanes {
    pub(super) fn on(connection: Arc<Connection>) -> Self {
        Self { connection, known: HashMap::new() }
    }

    /// Whether these all go to lanes of which it is known whether they are there.
    pub(super) fn know_all_of(&self, batch: &[Job]) -> bool {
        batch.iter().all(|job| self.known(&job.publication.lane).is_some())
    }

    fn known(&self, lane: &Lane) -> Option<bool> {
        let (there, until) = self.known.get(lane)?;
        until.is_none_or(|until| Instant::now() < until).then_some(*there)
    }

    /// Whether the lane's queue is there. One that cannot be declared, such as a classic queue under our name, refuses its
    /// own tasks for a while and nobody else's: it is declared on a channel of its own, which that closes.
    pub(super) async fn ensure(&mut self, lane: &Lane) -> Result<bool, BrokerError> {
        if let Some(there) = self.known(lane) {
            return Ok(there);
        }
        if self.known.len() >= LANES_MAX {
            self.known.clear();
        }
        let channel = within("channel.open", self.connection.create_channel()).await?;
        let outcome = broker::declare_lane(&channel, lane).await;
        if let Err(error) = &outcome {
            if !self.connection.status().connected() {
                return outcome.map(|()| false);
            }
            tracing::error!(queue = %lane, %error, "the queue cannot be declared: its tasks wait in the ledger");
        }
        // A channel that does not close goes with its connection.
        let _ = within("channel.close", channel.close(200, "done".into())).await;
        let until = outcome.is_err().then(|| Instant::now() + UNDECLARABLE_PAUSE);
        self.known.insert(lane.clone(), (outcome.is_ok(), until));
        Ok(outcome.is_ok())
    }

    /// What was returned as unroutable is not in any queue: somebody deleted it.
    pub(super) fn forget(&mut self, lane: &Lane) {
        self.known.remove(lane);
    }
}
