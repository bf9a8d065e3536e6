//! One connection after another, for as long as the process lives.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{Address, BrokerError};
use crate::backoff::Backoff;
use crate::recurring::Recurring;

const RECONNECT: Backoff = Backoff { base_ms: 100, max_ms: 5_000 };
/// A generation that lived so long was healthy: the next reconnection begins with the shortest wait again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Under which word a success is remembered among the failures.
const CONNECTED: &str = "connected";

/// What was told of the connections of this process: one broker that is away is one failure for all of them.
static TOLD: Recurring = Recurring::new();

/// Counts the generations of one connection, and paces them: a growing wait between those that fail.
#[derive(Debug)]
pub struct Generations {
    role: &'static str,
    failures: i32,
    began: Instant,
}

impl Generations {
    /// For the connection that plays this role; the name is used in logs and metrics.
    #[must_use]
    pub fn of(role: &'static str) -> Self {
        Self { role, failures: 0, began: Instant::now() }
    }

    /// Whether another generation shall begin now: always, until the shutdown.
    pub fn begin(&mut self, shutdown: &CancellationToken) -> bool {
        self.began = Instant::now();
        !shutdown.is_cancelled()
    }

    /// Tells why a generation has ended, and waits before the next.
    pub async fn ended(&mut self, outcome: Result<(), BrokerError>, shutdown: &CancellationToken) {
        if shutdown.is_cancelled() {
            return;
        }
        self.failures = if self.began.elapsed() >= HEALTHY_AFTER { 1 } else { self.failures + 1 };
        let wait = RECONNECT.delay(self.failures);
        match outcome {
            Ok(()) => tracing::info!(role = self.role, "the broker connection is renewed"),
            Err(error) => {
                if let Some(times) = TOLD.tell(&error.to_string()) {
                    TOLD.forget(CONNECTED);
                    tracing::warn!(role = self.role, %error, times, "the broker connection failed, trying again and again");
                }
            }
        }
        metrics::counter!("tasklane_broker_reconnects_total", "role" => self.role).increment(1);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => {}
        }
    }
}

/// Tells that a connection is there, once after it was told that one failed.
pub(super) fn connected(address: &Address) {
    if TOLD.tell(CONNECTED).is_some() {
        tracing::info!("connected to RabbitMQ at {address}");
    }
}
