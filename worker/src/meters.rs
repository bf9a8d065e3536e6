//! The metrics of each kind that every task of it touches: found once, since a look by name and labels for each task costs
//! more than what is counted.

use std::collections::BTreeMap;

use metrics::{Counter, Histogram, counter, histogram};
use tasklane_common::task::Kind;
use tasklane_common::telemetry::SETTLED;

/// Those of all kinds that a worker handles.
#[derive(Debug)]
pub struct Meters(BTreeMap<Kind, KindMeters>);

/// Those of one kind.
#[derive(Debug)]
pub struct KindMeters {
    /// How long its tasks waited from due to claimed.
    pub wait_seconds: Histogram,
    /// How long its runs took.
    pub run_seconds: Histogram,
    /// How many of its runs completed their task.
    pub completed: Counter,
}

impl Meters {
    /// Finds them, at the recorder that the process has by now.
    #[must_use]
    pub fn of(kinds: Vec<Kind>) -> Self {
        Self(kinds.into_iter().map(|kind| (kind.clone(), KindMeters::of(&kind))).collect())
    }

    /// Those of a kind, if the worker handles it.
    #[must_use]
    pub fn get(&self, kind: &Kind) -> Option<&KindMeters> {
        self.0.get(kind)
    }
}

impl KindMeters {
    fn of(kind: &Kind) -> Self {
        let kind = || kind.as_str().to_owned();
        for outcome in SETTLED {
            counter!("tasklane_tasks_settled_total", "kind" => kind(), "outcome" => *outcome).increment(0);
        }
        Self {
            wait_seconds: histogram!("tasklane_task_wait_seconds", "kind" => kind()),
            run_seconds: histogram!("tasklane_task_run_seconds", "kind" => kind()),
            completed: counter!("tasklane_tasks_settled_total", "kind" => kind(), "outcome" => "completed"),
        }
    }
}
