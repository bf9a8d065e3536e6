//! How full the queues with a `max_queued` are: submissions beyond it are refused here, before the ledger.
//!
//! Looked at regularly and not at every submission, so the bound is kept to within what all producers take between two
//! looks; this one counts its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tasklane_common::ledger::{Ledger, LedgerError};
use tasklane_common::limit::{Limit, Scope};
use tasklane_common::task::QueueName;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::error::ApiError;

/// How often the queues are looked at.
const PERIOD: Duration = Duration::from_millis(500);
/// How much the newest look counts in the drain rate.
const NEWEST: f64 = 0.3;
/// What a client is told to wait while the drain rate is not known, or hardly anything drains.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// What is known of the queues that have a bound.
#[derive(Debug, Default)]
pub struct Intake(Mutex<HashMap<QueueName, Level>>);

/// One queue.
#[derive(Debug, Clone)]
struct Level {
    most: u32,
    /// Waiting tasks at the last look.
    waiting: u32,
    /// Tasks that this process has taken since.
    taken: u32,
    looked: Instant,
    /// Tasks that leave in a second.
    drain: Option<f64>,
}

impl Level {
    fn looked(&mut self, waiting: u32, now: Instant) {
        let seconds = now.duration_since(self.looked).as_secs_f64();
        if seconds > 0.0 {
            let left = f64::from(self.waiting) + f64::from(self.taken) - f64::from(waiting);
            let newest = left.max(0.0) / seconds;
            self.drain = Some(self.drain.map_or(newest, |before| before + NEWEST * (newest - before)));
        }
        (self.waiting, self.taken, self.looked) = (waiting, 0, now);
    }

    /// How long until there is room for so many, as the queue drains now.
    fn wait(&self, tasks: u32) -> Duration {
        let beyond = f64::from(self.waiting) + f64::from(self.taken) + f64::from(tasks) - f64::from(self.most);
        let seconds = self.drain.filter(|drain| *drain > 0.0).map_or(f64::INFINITY, |drain| beyond / drain);
        Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(RETRY_AFTER_MAX).min(RETRY_AFTER_MAX)
    }
}

impl Intake {
    /// Takes tasks in, by queue: all or none.
    ///
    /// # Errors
    /// [`ApiError::QueueFull`] names the queue that has no room for its part.
    pub(crate) fn take(&self, tasks: &[(QueueName, u32)]) -> Result<(), ApiError> {
        let mut levels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if levels.is_empty() {
            return Ok(());
        }
        for (queue, count) in tasks {
            let Some(level) = levels.get(queue) else { continue };
            if u64::from(level.waiting) + u64::from(level.taken) + u64::from(*count) > u64::from(level.most) {
                metrics::counter!("tasklane_submissions_refused_total", "queue" => queue.as_str().to_owned())
                    .increment(1);
                let (queue, most, wait) = (queue.clone(), level.most, level.wait(*count));
                return Err(ApiError::QueueFull { queue, most, wait });
            }
        }
        for (queue, count) in tasks {
            if let Some(level) = levels.get_mut(queue) {
                level.taken = level.taken.saturating_add(*count);
            }
        }
        Ok(())
    }

    /// Looks at the queues that have a bound.
    ///
    /// # Errors
    /// What the ledger says.
    pub(crate) async fn look(&self, ledger: &dyn Ledger) -> Result<(), LedgerError> {
        let limits = ledger.limits().await?;
        let mut seen = HashMap::new();
        for Limit { scope, bounds, .. } in limits {
            if let (Scope::Queue(queue), Some(most)) = (scope, bounds.max_queued) {
                // Beyond the bound it is counted on a little, to see it drain.
                let waiting = ledger.waiting(queue.clone(), most.saturating_mul(2)).await?;
                seen.insert(queue, (most, waiting));
            }
        }
        let now = Instant::now();
        let mut levels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        levels.retain(|queue, _| seen.contains_key(queue));
        for (queue, (most, waiting)) in seen {
            let fresh = Level { most, waiting, taken: 0, looked: now, drain: None };
            let level = levels.entry(queue).or_insert(fresh);
            level.most = most;
            level.looked(waiting, now);
        }
        Ok(())
    }
}

/// Looks until the end. A ledger that is away takes no submissions either.
pub(crate) async fn run(app: Arc<App>, ended: CancellationToken) {
    loop {
        if let Err(error) = app.intake.look(&**app.gate.ledger()).await {
            tracing::debug!(%error, "how full the queues are is not known");
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = ended.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> QueueName {
        QueueName::default()
    }

    fn intake(most: u32, waiting: u32, drain: Option<f64>) -> Intake {
        let level = Level { most, waiting, taken: 0, looked: Instant::now(), drain };
        Intake(Mutex::new([(queue(), level)].into()))
    }

    #[test]
    fn a_full_queue_takes_nothing_more() {
        let intake = intake(10, 7, Some(2.0));
        intake.take(&[(queue(), 2)]).unwrap();
        let refused = intake.take(&[(queue(), 5)]).unwrap_err();
        let ApiError::QueueFull { most: 10, wait, .. } = refused else { panic!("{refused}") };
        assert_eq!(wait, Duration::from_secs(2), "four too many, two leave in a second");
        intake.take(&[(queue(), 1)]).unwrap();
        intake.take(&[(queue(), 1)]).unwrap_err();
        intake.take(&[(QueueName::parse("other").unwrap(), 1_000)]).unwrap();
    }

    #[test]
    fn what_does_not_drain_is_waited_for_at_most_a_minute() {
        let ApiError::QueueFull { wait, .. } = intake(1, 1, None).take(&[(queue(), 1)]).unwrap_err() else { panic!() };
        assert_eq!(wait, RETRY_AFTER_MAX);
    }

    #[test]
    fn the_drain_is_what_left_between_two_looks() {
        let then = Instant::now();
        let mut level = Level { most: 10, waiting: 8, taken: 4, looked: then, drain: None };
        level.looked(2, then + Duration::from_secs(2));
        assert_eq!(level.drain, Some(5.0));
        level.looked(2, then + Duration::from_secs(3));
        assert_eq!(level.drain, Some(3.5));
        assert_eq!((level.waiting, level.taken), (2, 0));
    }
}
