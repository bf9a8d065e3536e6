//! How long a failed attempt waits for the next, and whether there is one.

use std::time::Duration;

use rand::Rng;
use serde::Deserialize;

/// The longest time that a policy may name, in milliseconds: 365 days.
pub const POLICY_MS_MAX: u64 = 365 * 86_400_000;
/// How many delays a policy may list.
pub const DELAYS_MAX: usize = 1_000;

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
        jittered(whole, random)
    }

    /// The wait after `attempt` (counted from 1).
    #[must_use]
    pub fn delay(&self, attempt: i32) -> Duration {
        self.delay_with(attempt, rand::rng().random())
    }
}

/// How failed attempts of one kind are followed by others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RetryTable")]
pub struct Retry {
    /// How long each waits. `None`, the default, leaves it to the worker's `backoff`.
    pub delays: Option<Delays>,
    /// No other attempt starts when the task is older than this, counted from its recording; then it is discarded as
    /// `too_old`. `None`, the default, is no limit.
    pub max_age: Option<Duration>,
}

/// How long failed attempts wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delays {
    /// Twice as long each time, with jitter.
    Exponential(Backoff),
    /// `base_ms` longer each time, at most `max_ms`, with the same jitter.
    Linear(Backoff),
    /// These, one after the other, without jitter; the last repeats. None at all is no wait.
    Fixed(Vec<Duration>),
}

impl From<Backoff> for Delays {
    fn from(backoff: Backoff) -> Self {
        Self::Exponential(backoff)
    }
}

impl Delays {
    /// The wait after `attempt` (counted from 1), with a random number of 0 to 1 given by the caller.
    #[must_use]
    pub fn delay_with(&self, attempt: i32, random: f64) -> Duration {
        let before = usize::try_from(attempt.saturating_sub(1)).unwrap_or(0);
        match self {
            Self::Exponential(backoff) => backoff.delay_with(attempt, random),
            Self::Linear(Backoff { base_ms, max_ms }) => {
                let factor = u64::try_from(before).unwrap_or(u64::MAX).saturating_add(1);
                jittered(base_ms.saturating_mul(factor).min(*max_ms), random)
            }
            Self::Fixed(delays) => delays.get(before).or(delays.last()).copied().unwrap_or_default(),
        }
    }
}

/// A random part of it between half and the whole.
fn jittered(ms: u64, random: f64) -> Duration {
    Duration::from_millis(ms).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

/// `retry = { … }` of a settings file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RetryTable {
    policy: Option<PolicyName>,
    base_ms: Option<u64>,
    max_ms: Option<u64>,
    delays_ms: Option<Vec<u64>>,
    max_age_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PolicyName {
    Exponential,
    Linear,
    Fixed,
}

impl TryFrom<RetryTable> for Retry {
    type Error = String;

    fn try_from(table: RetryTable) -> Result<Self, String> {
        let max_age = table.max_age_ms.map(|ms| within("max_age_ms", ms, 1)).transpose()?.map(Duration::from_millis);
        let grows = table.base_ms.is_some() || table.max_ms.is_some();
        let policy = match table.policy {
            None if table.delays_ms.is_some() => return Err("delays_ms needs policy = \"fixed\"".to_owned()),
            None if grows => PolicyName::Exponential,
            None => return Ok(Self { delays: None, max_age }),
            Some(policy) => policy,
        };
        let delays = match (policy, table.delays_ms) {
            (PolicyName::Fixed, _) if grows => {
                return Err("base_ms and max_ms are of policy exponential or linear; fixed takes delays_ms".to_owned());
            }
            (PolicyName::Fixed, delays_ms) => fixed(&delays_ms.unwrap_or_default())?,
            (_, Some(_)) => return Err("delays_ms is of policy fixed; this one takes base_ms and max_ms".to_owned()),
            (PolicyName::Exponential, None) => Delays::Exponential(growing(table.base_ms, table.max_ms)?),
            (PolicyName::Linear, None) => Delays::Linear(growing(table.base_ms, table.max_ms)?),
        };
        Ok(Self { delays: Some(delays), max_age })
    }
}

fn within(key: &str, ms: u64, min: u64) -> Result<u64, String> {
    match ms {
        ms if (min..=POLICY_MS_MAX).contains(&ms) => Ok(ms),
        ms => Err(format!("{key} must be from {min} to {POLICY_MS_MAX}, but is {ms}")),
    }
}

fn growing(base_ms: Option<u64>, max_ms: Option<u64>) -> Result<Backoff, String> {
    let default = Backoff::default();
    let base_ms = within("base_ms", base_ms.unwrap_or(default.base_ms), 1)?;
    let max_ms = within("max_ms", max_ms.unwrap_or(default.max_ms), 1)?;
    match base_ms <= max_ms {
        true => Ok(Backoff { base_ms, max_ms }),
        false => Err(format!("max_ms must be at least base_ms, but max_ms is {max_ms} and base_ms is {base_ms}")),
    }
}

fn fixed(delays_ms: &[u64]) -> Result<Delays, String> {
    if delays_ms.is_empty() || delays_ms.len() > DELAYS_MAX {
        let given = delays_ms.len();
        return Err(format!("policy fixed needs delays_ms: 1 to {DELAYS_MAX} of them, but there are {given}"));
    }
    let delays = delays_ms.iter().map(|ms| within("each of delays_ms", *ms, 0).map(Duration::from_millis));
    delays.collect::<Result<_, _>>().map(Delays::Fixed)
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

    fn table(text: &str) -> Result<Retry, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| error.message().to_owned())
    }

    fn backoff(base_ms: u64, max_ms: u64) -> Backoff {
        Backoff { base_ms, max_ms }
    }

    #[test]
    fn tables_are_policies() {
        assert_eq!(table("").unwrap(), Retry::default());
        let aged = Retry { max_age: Some(Duration::from_secs(60)), ..Retry::default() };
        assert_eq!(table("max_age_ms = 60000").unwrap(), aged);
        for (text, delays) in [
            ("policy = 'exponential'", Delays::Exponential(Backoff::default())),
            ("base_ms = 5", Delays::Exponential(backoff(5, 3_600_000))),
            ("policy = 'linear'\nbase_ms = 5\nmax_ms = 10", Delays::Linear(backoff(5, 10))),
            ("policy = 'fixed'\ndelays_ms = [0, 7]", Delays::Fixed(vec![Duration::ZERO, Duration::from_millis(7)])),
        ] {
            assert_eq!(table(text).unwrap().delays, Some(delays), "{text}");
        }
    }

    #[test]
    fn a_table_that_makes_no_sense_is_refused() {
        for (text, fault) in [
            ("policy = 'quadratic'", "expected one of `exponential`, `linear`, `fixed`"),
            ("base = 5", "unknown field `base`, expected one of `policy`, `base_ms`"),
            ("policy = 'fixed'", "policy fixed needs delays_ms: 1 to 1000 of them, but there are 0"),
            ("policy = 'fixed'\ndelays_ms = []", "but there are 0"),
            ("policy = 'fixed'\ndelays_ms = [1]\nbase_ms = 5", "fixed takes delays_ms"),
            ("delays_ms = [1]", "delays_ms needs policy = \"fixed\""),
            ("policy = 'linear'\ndelays_ms = [1]", "delays_ms is of policy fixed"),
            ("policy = 'fixed'\ndelays_ms = [31536000001]", "each of delays_ms must be from 0 to 31536000000"),
            ("base_ms = 0", "base_ms must be from 1 to 31536000000, but is 0"),
            ("base_ms = 10\nmax_ms = 9", "max_ms must be at least base_ms, but max_ms is 9 and base_ms is 10"),
            ("max_age_ms = 0", "max_age_ms must be from 1 to 31536000000, but is 0"),
        ] {
            let error = table(text).unwrap_err();
            assert!(error.contains(fault), "{text}\n{error}");
        }
    }

    #[test]
    fn the_last_of_fixed_delays_repeats() {
        let fixed = Delays::Fixed([10, 20, 5].map(Duration::from_millis).to_vec());
        let waits: Vec<u128> = (0..6).map(|attempt| fixed.delay_with(attempt, 0.3).as_millis()).collect();
        assert_eq!(waits, [10, 10, 20, 5, 5, 5], "attempts count from 1");
        assert_eq!(fixed.delay_with(i32::MAX, 0.0).as_millis(), 5);
        assert_eq!(Delays::Fixed(Vec::new()).delay_with(1, 0.0), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn linear_waits_grow_by_the_base_up_to_the_limit(
            base_ms in 1..100_000u64, max_ms in 1..10_000_000u64, attempt in 1..i32::MAX, random in 0.0..1.0f64,
        ) {
            let linear = Delays::Linear(backoff(base_ms, max_ms));
            let whole = Duration::from_millis(base_ms.saturating_mul(attempt.unsigned_abs().into()).min(max_ms));
            let delay = linear.delay_with(attempt, random);
            prop_assert!(whole / 2 <= delay && delay <= whole, "{delay:?} of {whole:?}");
            prop_assert!(linear.delay_with(attempt.saturating_add(1), random) >= delay);
        }
    }
}
