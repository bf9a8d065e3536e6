//! Limits: how many tasks of a queue, of a kind, or with a concurrency key run at once, and how often they start; and how
//! many may wait in a queue.
//!
//! The ledger keeps them, and [`admission`] decides inside of its transactions: no two claims can both take the last
//! place. A task that finds none is held in the ledger, and [`crate::release`] lets it go when there is one.

pub mod admission;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::task::{Kind, NameError, QueueName};

/// How many limits a ledger takes.
pub const LIMITS_MAX: usize = 1_000;
/// Longest concurrency key, in bytes.
pub const KEY_BYTES_MAX: usize = 255;
/// The largest `max_running`.
pub const MAX_RUNNING_MAX: u32 = 100_000;
/// The largest `max_queued`.
pub const MAX_QUEUED_MAX: u32 = 10_000_000;
/// The most starts per period, and the largest burst.
pub const RATE_TASKS_MAX: u32 = 1_000_000;
/// The longest period of a rate: a day.
pub const RATE_PER_MS_MAX: u64 = 86_400_000;

/// What shares a limit: all tasks of a queue, all of a kind, or all with a concurrency key.
///
/// As the name of a limit, a key may end in `*`: then each key that begins so is limited for itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Scope {
    /// A queue's tasks.
    Queue(QueueName),
    /// A kind's tasks, in whatever queues.
    Kind(Kind),
    /// The tasks with a concurrency key, of whatever kinds.
    Key(Arc<str>),
}

/// Why a text is not a scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScopeError {
    /// It does not begin with one of the three words.
    #[error("must be queue, kind or key")]
    Word,
    /// The queue's or kind's name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The key is none.
    #[error(
        "must be 1 to {KEY_BYTES_MAX} bytes without control characters and asterisks, but for one at the end of a limit's name"
    )]
    Key,
}

impl Scope {
    /// The scope of a word and a name: `queue`, `kind` or `key`, and what is so called.
    ///
    /// # Errors
    /// [`ScopeError`] says what is wrong with which.
    pub fn named(word: &str, name: &str) -> Result<Self, ScopeError> {
        match word {
            "queue" => Ok(Self::Queue(QueueName::parse(name)?)),
            "kind" => Ok(Self::Kind(Kind::parse(name)?)),
            "key" if is_key(name.strip_suffix('*').unwrap_or(name)) || name == "*" => Ok(Self::Key(name.into())),
            "key" => Err(ScopeError::Key),
            _ => Err(ScopeError::Word),
        }
    }

    /// Its word: `queue`, `kind` or `key`.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Queue(_) => "queue",
            Self::Kind(_) => "kind",
            Self::Key(_) => "key",
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Queue(name) => name.as_str(),
            Self::Kind(name) => name.as_str(),
            Self::Key(name) => name,
        }
    }

    /// All that a task belongs to.
    pub fn all_of<'t>(
        queue: &'t QueueName,
        kind: &'t Kind,
        key: Option<&'t str>,
    ) -> impl Iterator<Item = Self> + use<'t> {
        [Self::Queue(queue.clone()), Self::Kind(kind.clone())].into_iter().chain(key.map(|key| Self::Key(key.into())))
    }

    /// How well a limit of this name fits tasks of that scope: the longer, the better; `None` not at all.
    fn fit(&self, of: &Self) -> Option<usize> {
        match (self, of) {
            (Self::Key(name), Self::Key(key)) => match name.strip_suffix('*') {
                Some(start) => key.starts_with(start).then_some(start.len()),
                None => (name == key).then_some(usize::MAX),
            },
            _ => (self == of).then_some(usize::MAX),
        }
    }
}

/// Whether a text may be a task's concurrency key.
#[must_use]
pub fn is_key(text: &str) -> bool {
    (1..=KEY_BYTES_MAX).contains(&text.len()) && !text.chars().any(|c| c.is_control() || c == '*')
}

impl fmt::Display for Scope {
    /// `queue:default`, `kind:email.send`, `key:tenant-7`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.word(), self.name())
    }
}

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        let (word, name) = text.split_once(':').ok_or(ScopeError::Word)?;
        Self::named(word, name)
    }
}

impl TryFrom<String> for Scope {
    type Error = ScopeError;

    fn try_from(text: String) -> Result<Self, ScopeError> {
        text.parse()
    }
}

impl From<Scope> for String {
    fn from(scope: Scope) -> Self {
        scope.to_string()
    }
}

/// How often tasks may start: a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// So many starts
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub tasks: u32,
    /// in so long, evenly spread. Defaults to a second.
    #[serde(default = "one_second")]
    #[schema(minimum = 1, maximum = 86_400_000, default = 1_000)]
    pub per_ms: u64,
    /// How many may start at once after a rest. Defaults to 1.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1_000_000, default = 1)]
    pub burst: u32,
}

const fn one_second() -> u64 {
    1_000
}

const fn one() -> u32 {
    1
}

/// What is set for a scope; at least one of the three.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// How many tasks run at once, in all workers.
    #[schema(minimum = 1, maximum = 100_000)]
    pub max_running: Option<u32>,
    /// How often tasks start, in all workers.
    pub rate: Option<Rate>,
    /// How many tasks may wait before submissions are refused; of a queue only.
    #[schema(minimum = 1, maximum = 10_000_000)]
    pub max_queued: Option<u32>,
}

impl Bounds {
    /// What is wrong with them, each with its path.
    #[must_use]
    pub fn faults(&self, scope: Option<&Scope>) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        let mut within = |path, number: u64, max: u64| {
            if !(1..=max).contains(&number) {
                faults.push((path, format!("must be from 1 to {max}, but is {number}")));
            }
        };
        if let Some(most) = self.max_running {
            within("max_running", most.into(), MAX_RUNNING_MAX.into());
        }
        if let Some(rate) = self.rate {
            within("rate.tasks", rate.tasks.into(), RATE_TASKS_MAX.into());
            within("rate.per_ms", rate.per_ms, RATE_PER_MS_MAX);
            within("rate.burst", rate.burst.into(), RATE_TASKS_MAX.into());
        }
        if let Some(most) = self.max_queued {
            within("max_queued", most.into(), MAX_QUEUED_MAX.into());
            if scope.is_some_and(|scope| !matches!(scope, Scope::Queue(_))) {
                faults.push(("max_queued", "is for queues only".to_owned()));
            }
        }
        if *self == Self::default() {
            faults.push(("", "must set max_running, rate or max_queued".to_owned()));
        }
        faults
    }
}

/// Who set a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A producer's settings file.
    File,
    /// A call of the API, which goes before the file.
    Api,
}

/// A limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Whose tasks share it.
    pub scope: Scope,
    /// What is set.
    pub bounds: Bounds,
    /// Who set it.
    pub origin: Origin,
}

/// The limit that fits a scope best.
#[must_use]
pub fn best<'l>(limits: &'l [Limit], of: &Scope) -> Option<&'l Limit> {
    let fits = limits.iter().filter_map(|limit| limit.scope.fit(of).map(|fit| (fit, limit)));
    fits.max_by_key(|(fit, _)| *fit).map(|(_, limit)| limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(scope: &str, most: u32) -> Limit {
        let bounds = Bounds { max_running: Some(most), ..Bounds::default() };
        Limit { scope: scope.parse().unwrap(), bounds, origin: Origin::Api }
    }

    #[test]
    fn a_scope_reads_as_it_is_written() {
        for text in ["queue:default", "kind:email.send", "key:tenant:7", "key:tenant:*", "key:*"] {
            assert_eq!(text.parse::<Scope>().unwrap().to_string(), text);
        }
        for text in ["default", "queue:A", "kind:", "key:", "key:a*b", "key:\n", "tag:x"] {
            assert!(text.parse::<Scope>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_closest_name_wins() {
        let limits = [limit("key:*", 1), limit("key:tenant:*", 2), limit("key:tenant:7", 3), limit("queue:default", 4)];
        let most = |scope: &str| best(&limits, &scope.parse().unwrap()).and_then(|limit| limit.bounds.max_running);
        assert_eq!(most("key:tenant:7"), Some(3));
        assert_eq!(most("key:tenant:8"), Some(2));
        assert_eq!(most("key:other"), Some(1));
        assert_eq!(most("queue:default"), Some(4));
        assert_eq!(most("kind:default"), None);
    }

    #[test]
    fn every_fault_of_bounds_is_named() {
        let rate = Rate { tasks: 0, per_ms: 0, burst: 0 };
        let bounds = Bounds { max_running: Some(0), rate: Some(rate), max_queued: Some(1) };
        let kind = Scope::named("kind", "a").unwrap();
        let paths: Vec<_> = bounds.faults(Some(&kind)).into_iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["max_running", "rate.tasks", "rate.per_ms", "rate.burst", "max_queued"]);
        assert_eq!(Bounds::default().faults(None).len(), 1);
    }
}
