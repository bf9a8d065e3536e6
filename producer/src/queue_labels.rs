//! Names of queues as labels of metrics. Names are client input, and every label value is a time series: the first
//! hundred names keep their own, all others share one.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use tasklane_common::task::QueueName;

const NAMES_MAX: usize = 100;
const OTHERS: &str = "other";

/// The names that have a label of their own.
#[derive(Debug, Default)]
pub(crate) struct QueueLabels(RwLock<HashSet<QueueName>>);

impl QueueLabels {
    /// The label of a queue.
    pub(crate) fn of(&self, queue: &QueueName) -> String {
        if self.0.read().unwrap_or_else(PoisonError::into_inner).contains(queue) {
            return queue.to_string();
        }
        let mut names = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if names.contains(queue) || names.len() < NAMES_MAX {
            names.insert(queue.clone());
            return queue.to_string();
        }
        OTHERS.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_an_end_to_labels() {
        let labels = QueueLabels::default();
        let label = |n: usize| labels.of(&QueueName::parse(&format!("q{n}")).unwrap());
        let all: HashSet<_> = (0..1000).map(label).collect();
        assert_eq!(all.len(), NAMES_MAX + 1);
        assert_eq!((label(0), label(999)), ("q0".to_owned(), OTHERS.to_owned()));
    }
}
