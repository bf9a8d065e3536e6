//! Times in which this process stood still: it was stopped, or its machine slept.
//!
//! Whatever ran on the machine stood still with it and could renew no lease, which says nothing about the tasks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::clock::since_boot;

/// How often the process shows that it goes on.
const PERIOD: Duration = Duration::from_millis(250);
/// A pause of this length is one in which the process stood still; a busy machine makes shorter ones.
const STANDSTILL_MIN: Duration = Duration::from_secs(2);
/// How long after it a lease may end because of it: what is left of a lease may be too short to be renewed.
const AFTERWARDS: Duration = Duration::from_secs(5);
/// How many are remembered.
const REMEMBERED: usize = 16;

/// The times in which this process stood still; clones share them.
#[derive(Debug, Clone)]
pub struct Standstills(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    seen: Duration,
    times: VecDeque<(Duration, Duration)>,
}

impl Standstills {
    /// None so far.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Inner { seen: since_boot(), times: VecDeque::new() })))
    }

    /// Notices them, until the shutdown.
    pub async fn watch(self, shutdown: CancellationToken) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = period.tick() => self.see(since_boot()),
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Whether what happened so long ago happened while the process stood still, or because of it. Also one is known from which
    /// the process has awoken in this moment.
    #[must_use]
    pub fn explain(&self, ago: Duration) -> bool {
        self.explain_at(ago, since_boot())
    }

    fn explain_at(&self, ago: Duration, now: Duration) -> bool {
        self.see(now);
        let at = now.saturating_sub(ago);
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.times.iter().any(|&(from, to)| (from..=to + AFTERWARDS).contains(&at))
    }

    /// By the time since boot, which goes on while the machine sleeps.
    fn see(&self, now: Duration) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut inner.seen, now);
        if now.saturating_sub(before) >= STANDSTILL_MIN {
            tracing::info!(
                ms = (now - before).as_millis(),
                "this process stood still, as it does when its machine sleeps"
            );
            inner.times.truncate(REMEMBERED - 1);
            inner.times.push_front((before, now));
        }
    }
}

impl Default for Standstills {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_while_the_process_stood_still_is_explained() {
        let standstills = Standstills::new();
        let begin = since_boot();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let ended = |ago: u64, now: u64| standstills.explain_at(Duration::from_secs(ago), at(now));
        standstills.see(at(0));
        standstills.see(at(1));
        assert!(!ended(0, 1), "a second is nothing");
        // From 1 to 41 it stands still, and a lease of those 40 s is asked about before anybody has noticed.
        assert!(ended(15, 41));
        assert!(!ended(41, 41), "that was before");
        standstills.see(at(42));
        standstills.see(at(43));
        assert!(ended(1, 43), "what was left of the lease was too short");
        for second in 44..60 {
            standstills.see(at(second));
        }
        assert!(!ended(1, 60), "and that has other causes");
        assert!(ended(30, 60), "however late it is found");
    }
}
