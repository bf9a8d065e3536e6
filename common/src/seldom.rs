//! Log lines that would repeat: one in a while, with the number of those left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets one line through in each period, and counts the others.
///
/// ```
/// use std::time::Duration;
/// use tasklane_common::seldom::Seldom;
///
/// static FAILED: Seldom = Seldom::once_in(Duration::from_secs(60));
/// if let Some(left_out) = FAILED.admit() {
///     eprintln!("it failed, and {left_out} more times since this was said last");
/// }
/// # assert_eq!(FAILED.admit(), None);
/// ```
#[derive(Debug)]
pub struct Seldom {
    period: Duration,
    /// When a line was let through last, and how many were left out since.
    last: Mutex<Option<(Instant, u64)>>,
}

impl Seldom {
    /// One line in each of these periods; the first at once.
    #[must_use]
    pub const fn once_in(period: Duration) -> Self {
        Self { period, last: Mutex::new(None) }
    }

    /// Whether to say it now, and how many times it was left out since the last time.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *last {
            Some((at, left_out)) if now.saturating_duration_since(*at) < self.period => {
                *left_out += 1;
                None
            }
            known => Some(known.replace((now, 0)).map_or(0, |(_, left_out)| left_out)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_period_counts_the_others() {
        let seldom = Seldom::once_in(Duration::from_secs(60));
        let began = Instant::now();
        let admitted = [0, 1, 59, 60, 61, 200].map(|s| seldom.admit_at(began + Duration::from_secs(s)));
        assert_eq!(admitted, [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
