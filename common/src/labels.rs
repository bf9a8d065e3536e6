//! Names as labels of metrics. Every value of a label is a time series, and names have no end: the first hundred keep their own,
//! all others share one.

use std::collections::HashSet;
use std::sync::{OnceLock, PoisonError, RwLock};

/// How many names have a label of their own.
const NAMES_MAX: usize = 100;
/// The label of all others.
pub const OTHERS: &str = "other";

/// The names that have a label of their own.
#[derive(Debug, Default)]
pub struct Labels(OnceLock<RwLock<HashSet<String>>>);

impl Labels {
    /// No names yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The label of a name.
    pub fn of(&self, name: &str) -> String {
        let names = self.0.get_or_init(RwLock::default);
        if names.read().unwrap_or_else(PoisonError::into_inner).contains(name) {
            return name.to_owned();
        }
        let mut names = names.write().unwrap_or_else(PoisonError::into_inner);
        if names.contains(name) || names.len() < NAMES_MAX {
            names.insert(name.to_owned());
            return name.to_owned();
        }
        OTHERS.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_an_end_to_labels() {
        let labels = Labels::new();
        let all: HashSet<_> = (0..1000).map(|n| labels.of(&format!("n{n}"))).collect();
        assert_eq!(all.len(), NAMES_MAX + 1);
        assert_eq!((labels.of("n0"), labels.of("n999")), ("n0".to_owned(), OTHERS.to_owned()));
    }
}
