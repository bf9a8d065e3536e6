//! Failures that come again and again: told at once, and then once a minute with their number.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the same failure is counted in silence.
const SILENCE: Duration = Duration::from_secs(60);
/// How many failures are told apart; the texts may have names of clients in them.
const APART_MAX: usize = 64;

/// What was told lately, by what is the same: a text, or the thing that fails.
#[derive(Debug, Default)]
pub struct Recurring(Mutex<BTreeMap<String, Seen>>);

#[derive(Debug)]
struct Seen {
    told: Instant,
    /// How often it came since.
    silent: u64,
}

impl Recurring {
    /// With nothing told so far.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// How often this has come since it was last told, this time included; `None` when it is not to be told now.
    pub fn tell(&self, what: &str) -> Option<u64> {
        self.tell_at(what, Instant::now())
    }

    /// The next time it is told at once.
    pub fn forget(&self, what: &str) {
        self.lock().remove(what);
    }

    fn tell_at(&self, what: &str, now: Instant) -> Option<u64> {
        let mut all = self.lock();
        if let Some(seen) = all.get_mut(what) {
            if now.saturating_duration_since(seen.told) < SILENCE {
                seen.silent += 1;
                return None;
            }
            let times = seen.silent + 1;
            *seen = Seen { told: now, silent: 0 };
            return Some(times);
        }
        if all.len() >= APART_MAX
            && let Some(oldest) = all.iter().min_by_key(|(_, seen)| seen.told).map(|(what, _)| what.clone())
        {
            all.remove(&oldest);
        }
        all.insert(what.to_owned(), Seen { told: now, silent: 0 });
        Some(1)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_recurs_is_told_at_once_and_then_once_a_minute_with_its_number() {
        let (failures, start) = (Recurring::new(), Instant::now());
        let at = |seconds| failures.tell_at("a", start + Duration::from_secs(seconds));
        assert_eq!(at(0), Some(1));
        assert_eq!((1..60).filter_map(at).count(), 0);
        assert_eq!(at(60), Some(60));
        assert_eq!(at(61), None);
        assert_eq!(failures.tell_at("b", start), Some(1), "another failure is told at once");
        assert_eq!(at(600), Some(2));
        failures.forget("a");
        assert_eq!(at(601), Some(1));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (failures, start) = (Recurring::new(), Instant::now());
        for number in 0..1_000 {
            failures.tell_at(&number.to_string(), start + Duration::from_millis(number));
        }
        assert_eq!(failures.lock().len(), APART_MAX);
        assert_eq!(failures.tell_at("999", start), None, "the newest are remembered");
    }
}
