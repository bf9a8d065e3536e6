//! How each lane stands with the broker: one that cannot be consumed is told and tried again by itself, while the others go on.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tasklane_common::backoff::Backoff;
use tasklane_common::recurring::Recurring;
use tasklane_common::task::Lane;

/// How long a lane that cannot be consumed is left alone.
const RETRY: Backoff = Backoff { base_ms: 1_000, max_ms: 30_000 };
/// How long one is that was consumed until now: most often its queue was deleted, and is declared anew.
const FIRST_WAIT: Duration = Duration::from_millis(100);

static TOLD: Recurring = Recurring::new();

/// How the lanes of a worker stand, over all its connections.
#[derive(Debug, Default)]
pub struct Lanes(Mutex<BTreeMap<Lane, Standing>>);

#[derive(Debug)]
enum Standing {
    /// It is there, and consumed unless it is paused.
    Good,
    Out(Out),
}

/// Why a lane is not consumed, and when it is tried again.
#[derive(Debug)]
struct Out {
    why: String,
    failures: i32,
    again: Instant,
}

impl Lanes {
    /// Whether at least one of them is consumed.
    pub fn any_good(&self) -> bool {
        self.lock().values().any(|standing| matches!(standing, Standing::Good))
    }

    /// Those that cannot be consumed, each with the reason.
    pub fn out(&self) -> Vec<String> {
        let reason = |(lane, standing): (&Lane, &Standing)| match standing {
            Standing::Good => None,
            Standing::Out(Out { why, .. }) => Some(format!("queue {lane} cannot be consumed: {why}")),
        };
        self.lock().iter().filter_map(reason).collect()
    }

    /// How long to wait before this one is tried again; `None` when nothing is wrong with it.
    pub(crate) fn wait(&self, lane: &Lane) -> Option<Duration> {
        match self.lock().get(lane)? {
            Standing::Good => None,
            Standing::Out(Out { again, .. }) => Some(again.saturating_duration_since(Instant::now())),
        }
    }

    /// This one is consumed.
    pub(crate) fn good(&self, lane: &Lane) {
        let before = self.lock().insert(lane.clone(), Standing::Good);
        if matches!(before, Some(Standing::Out(Out { failures: 1.., .. }))) {
            TOLD.forget(&lane.to_string());
            tracing::info!(queue = %lane, "the queue is consumed again");
        }
    }

    /// This one cannot be consumed: from now on, or still.
    pub(crate) fn bad(&self, lane: &Lane, why: String) {
        let failures = match self.lock().get(lane) {
            Some(Standing::Good) => 0,
            Some(Standing::Out(out)) => out.failures.saturating_add(1),
            None => 1,
        };
        let ended = if failures == 0 { " ended" } else { "" };
        if let Some(times) = TOLD.tell(&format!("{lane}{ended}")) {
            if failures == 0 {
                tracing::warn!(queue = %lane, error = why, times, "the broker ended the consumer: consuming the queue anew");
            } else {
                tracing::warn!(queue = %lane, error = why, times, "the queue cannot be consumed, trying again and again");
            }
        }
        self.put(lane, why, failures);
    }

    /// This one, or another that was begun with it, ended the connection.
    pub(crate) fn suspect(&self, lane: &Lane, why: String) {
        let failures = match self.lock().get(lane) {
            Some(Standing::Out(out)) => out.failures,
            Some(Standing::Good) | None => 0,
        };
        self.put(lane, why, failures);
    }

    fn put(&self, lane: &Lane, why: String, failures: i32) {
        let wait = if failures == 0 { FIRST_WAIT } else { RETRY.delay(failures) };
        let out = Out { why, failures, again: Instant::now() + wait };
        self.lock().insert(lane.clone(), Standing::Out(out));
    }

    /// The connection is gone: nothing is consumed any more, and what was bad stays so.
    pub(crate) fn disconnected(&self) {
        self.lock().retain(|_, standing| matches!(standing, Standing::Out(_)));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Lane, Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tasklane_common::task::QueueName;

    use super::*;

    #[test]
    fn what_is_bad_stays_so_over_connections_until_it_is_good() {
        let lanes = Lanes::default();
        let [a, b] = ["a", "b"].map(|name| Lane::all_of(&QueueName::parse(name).unwrap()).next().unwrap());
        lanes.good(&a);
        lanes.bad(&b, "a classic queue".to_owned());
        assert!(lanes.any_good());
        assert_eq!(lanes.wait(&a), None);
        let first = lanes.wait(&b).unwrap();
        assert!(first <= Duration::from_millis(1_500), "{first:?}");
        (0..20).for_each(|_| lanes.bad(&b, "it is down".to_owned()));
        let later = lanes.wait(&b).unwrap();
        assert!(later > Duration::from_secs(10), "the distances grow: {later:?}");
        lanes.disconnected();
        assert!(!lanes.any_good());
        assert_eq!(lanes.out(), [format!("queue {b} cannot be consumed: it is down")]);
        lanes.good(&b);
        assert_eq!((lanes.any_good(), lanes.out()), (true, Vec::new()));
        lanes.bad(&b, "it was deleted".to_owned());
        assert!(lanes.wait(&b).unwrap() <= FIRST_WAIT, "one that was good is begun again at once");
    }
}
