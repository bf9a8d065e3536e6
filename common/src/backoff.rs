//! How long a failed attempt waits for the next.

use std::time::Duration;

use rand::Rng;
use serde::Deserialize;

/// Exponential backoff with jitter: `base_ms × 2^(attempt − 1)`, at most `max_ms`, and of that a random part
/// between half and the whole, so that tasks which failed together do not return together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Backoff {
    /// The wait after the first attempt. Defaults to 1,000.
    pub base_ms: u64,
    /// The longest wait. Defaults to 3,600,000, an hour.
    pub max_ms: u64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { base_ms: 1_000, max_ms: 3_600_000 }
    }
}

impl Backoff {
    /// The wait after `attempt` (counted from 1), with a random number of 0 to 1 given by the caller.
    #[must_use]
    pub fn delay_with(&self, attempt: i32, random: f64) -> Duration {
        let exponent = u32::try_from(attempt.saturating_sub(1)).unwrap_or(0).min(62);
        let whole = self.base_ms.saturating_mul(1 << exponent).min(self.max_ms);
        Duration::from_millis(whole).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }

    /// The wait after `attempt` (counted from 1).
    #[must_use]
    pub fn delay(&self, attempt: i32) -> Duration {
        self.delay_with(attempt, rand::rng().random())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn stays_between_half_and_whole_and_under_the_limit(
            base_ms in 1u64..100_000, max_ms in 1u64..10_000_000, attempt in i32::MIN..i32::MAX, random in 0.0..1.0f64,
        ) {
            let backoff = Backoff { base_ms, max_ms };
            let delay = backoff.delay_with(attempt, random);
            prop_assert!(delay <= Duration::from_millis(max_ms));
            prop_assert!(delay >= Duration::from_millis(base_ms.min(max_ms) / 2));
        }

        #[test]
        fn never_shrinks_with_the_attempt(attempt in 1i32..1_000, random in 0.0..1.0f64) {
            let backoff = Backoff::default();
            prop_assert!(backoff.delay_with(attempt + 1, random) >= backoff.delay_with(attempt, random));
        }
    }
}
