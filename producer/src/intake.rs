//! How full the queues with a `max_queued` are: submissions beyond it are refused here, before the ledger.
//!
//! Looked at regularly and not at every submission, so the bound is kept to within what the other producers take between two
//! looks. What this one takes is counted from the first moment: it never goes beyond the bound by itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    /// Tasks that this process has recorded, ever.
    recorded: u64,
    /// Of them those of before the last look, which has counted them.
    counted: u64,
    /// Tasks that this process is recording: a look that comes meanwhile may miss them.
    under_way: u32,
    looked: Instant,
    /// Tasks that leave in a second.
    drain: Option<f64>,
}

impl Level {
    fn of(most: u32, waiting: u32) -> Self {
        Self { most, waiting, recorded: 0, counted: 0, under_way: 0, looked: Instant::now(), drain: None }
    }

    /// Takes over what was counted by a look before which so many had been recorded.
    fn looked(&mut self, waiting: u32, recorded: u64, now: Instant) {
        let seconds = now.duration_since(self.looked).as_secs_f64();
        if seconds > 0.0 {
            let came = recorded.saturating_sub(self.counted) as f64;
            let left = f64::from(self.waiting) + came - f64::from(waiting);
            let newest = left.max(0.0) / seconds;
            self.drain = Some(self.drain.map_or(newest, |before| before + NEWEST * (newest - before)));
        }
        (self.waiting, self.counted, self.looked) = (waiting, recorded, now);
    }

    /// How many would be too many if so many more came.
    fn beyond(&self, more: u32) -> u64 {
        let since = self.recorded.saturating_sub(self.counted);
        let all = since.saturating_add(u64::from(self.waiting) + u64::from(self.under_way) + u64::from(more));
        all.saturating_sub(self.most.into())
    }

    /// How long until there is room for so many, as the queue drains now.
    fn wait(&self, tasks: u32) -> Duration {
        let beyond = self.beyond(tasks) as f64;
        let seconds = self.drain.filter(|drain| *drain > 0.0).map_or(f64::INFINITY, |drain| beyond / drain);
        Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(RETRY_AFTER_MAX).min(RETRY_AFTER_MAX)
    }
}

/// Tasks that were taken in and are being recorded, until this is dropped.
#[derive(Debug)]
#[must_use = "the tasks are being recorded until it is dropped"]
pub(crate) struct Taken<'a> {
    intake: &'a Intake,
    tasks: Vec<(QueueName, u32)>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.tasks.is_empty() {
            return;
        }
        let mut levels = self.intake.levels();
        for (queue, count) in &self.tasks {
            if let Some(level) = levels.get_mut(queue) {
                level.under_way = level.under_way.saturating_sub(*count);
                // Whether or not it succeeded: what was not recorded is found out by the next look.
                level.recorded += u64::from(*count);
            }
        }
    }
}

impl Intake {
    fn levels(&self) -> MutexGuard<'_, HashMap<QueueName, Level>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes tasks in, by queue: all or none.
    ///
    /// # Errors
    /// [`ApiError::QueueFull`] names the queue that has no room for its part.
    pub(crate) fn take(&self, mut tasks: Vec<(QueueName, u32)>) -> Result<Taken<'_>, ApiError> {
        let mut levels = self.levels();
        tasks.retain(|(queue, _)| levels.contains_key(queue));
        for (queue, count) in &tasks {
            let Some(level) = levels.get(queue).filter(|level| level.beyond(*count) > 0) else { continue };
            metrics::counter!("tasklane_submissions_refused_total", "queue" => queue.as_str().to_owned()).increment(1);
            let (queue, most, wait) = (queue.clone(), level.most, level.wait(*count));
            return Err(ApiError::QueueFull { queue, most, wait });
        }
        for (queue, count) in &tasks {
            if let Some(level) = levels.get_mut(queue) {
                level.under_way = level.under_way.saturating_add(*count);
            }
        }
        Ok(Taken { intake: self, tasks })
    }

    /// Looks at the queues that have a bound.
    ///
    /// # Errors
    /// What the ledger says.
    pub(crate) async fn look(&self, ledger: &dyn Ledger) -> Result<(), LedgerError> {
        // Before the count: what is recorded while it goes on may be part of it or not, and counts on until the next one.
        let before: HashMap<_, _> =
            self.levels().iter().map(|(queue, level)| (queue.clone(), level.recorded)).collect();
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
        let mut levels = self.levels();
        levels.retain(|queue, _| seen.contains_key(queue));
        for (queue, (most, waiting)) in seen {
            let recorded = before.get(&queue).copied().unwrap_or_default();
            let level = levels.entry(queue).or_insert_with(|| Level::of(most, waiting));
            level.most = most;
            level.looked(waiting, recorded, now);
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
        let level = Level { drain, ..Level::of(most, waiting) };
        Intake(Mutex::new([(queue(), level)].into()))
    }

    #[test]
    fn a_full_queue_takes_nothing_more() {
        let intake = intake(10, 7, Some(2.0));
        drop(intake.take(vec![(queue(), 2)]).unwrap());
        let refused = intake.take(vec![(queue(), 5)]).unwrap_err();
        let ApiError::QueueFull { most: 10, wait, .. } = refused else { panic!("{refused}") };
        assert_eq!(wait, Duration::from_secs(2), "four too many, two leave in a second");
        let last = intake.take(vec![(queue(), 1)]).unwrap();
        intake.take(vec![(queue(), 1)]).unwrap_err();
        drop(last);
        intake.take(vec![(queue(), 1)]).unwrap_err();
        drop(intake.take(vec![(QueueName::parse("other").unwrap(), 1_000)]).unwrap());
    }

    #[test]
    fn what_does_not_drain_is_waited_for_at_most_a_minute() {
        let ApiError::QueueFull { wait, .. } = intake(1, 1, None).take(vec![(queue(), 1)]).unwrap_err() else {
            panic!()
        };
        assert_eq!(wait, RETRY_AFTER_MAX);
    }

    #[test]
    fn the_drain_is_what_left_between_two_looks() {
        let then = Instant::now();
        let mut level = Level { recorded: 4, looked: then, ..Level::of(10, 8) };
        level.looked(2, 4, then + Duration::from_secs(2));
        assert_eq!(level.drain, Some(5.0));
        level.looked(2, 4, then + Duration::from_secs(3));
        assert_eq!(level.drain, Some(3.5));
        assert_eq!(level.beyond(8), 0);
        assert_eq!(level.beyond(9), 1);
    }

    #[test]
    fn what_a_look_may_have_missed_still_counts() {
        let intake = intake(10, 0, None);
        let recorded_before = 0;
        let taken = intake.take(vec![(queue(), 10)]).unwrap();
        let look = |waiting, recorded| {
            intake.levels().get_mut(&queue()).unwrap().looked(waiting, recorded, Instant::now());
        };
        look(0, recorded_before);
        intake.take(vec![(queue(), 1)]).unwrap_err();
        drop(taken);
        look(0, recorded_before);
        intake.take(vec![(queue(), 1)]).unwrap_err();
        look(9, 10);
        drop(intake.take(vec![(queue(), 1)]).unwrap());
        intake.take(vec![(queue(), 1)]).unwrap_err();
    }
}
