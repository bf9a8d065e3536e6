//! How long the confirms of a batch are waited for.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use lapin::Connection;
use tokio::time::{Instant, timeout_at};

/// How long confirms of one batch may take before the channel counts as broken; an alarm of the broker not counted.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one batch still has. This stands still while the broker has an alarm: what was on its way when that came
/// arrives when it is over, and a new connection would only be blocked with more.
pub(super) struct Patience {
    connection: Arc<Connection>,
    deadline: Instant,
}

impl Patience {
    pub(super) fn with(connection: &Arc<Connection>) -> Self {
        Self { connection: Arc::clone(connection), deadline: Instant::now() + CONFIRM_TIMEOUT }
    }

    /// Waits for one step of the batch; `None` when the time is over.
    pub(super) async fn wait<T>(&mut self, step: impl Future<Output = T>) -> Option<T> {
        let mut step = pin!(step);
        loop {
            match timeout_at(self.deadline, &mut step).await {
                Ok(done) => return Some(done),
                Err(_) if self.connection.status().blocked() && self.connection.status().connected() => {
                    self.deadline = Instant::now() + CONFIRM_TIMEOUT;
                }
                Err(_) => return None,
            }
        }
    }
}
