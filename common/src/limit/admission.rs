//! Whether a task may start: the same decision in both ledgers, about what they have read under their lock.

use std::collections::HashMap;

use super::{Rate, Scope};

/// What is known of a scope that a limit fits.
#[derive(Debug, Clone, Default)]
pub struct Gate {
    /// How many may run at once.
    pub max_running: Option<u32>,
    /// How often they may start.
    pub rate: Option<Rate>,
    /// Tasks that run, or that are on their way with a place kept for them.
    pub used: u32,
    /// Those of them that are on their way: each will take a start of the rate.
    pub kept: u32,
    /// Where the bucket stands: the theoretical arrival time of the next start, in microseconds since 1970.
    pub next_us: i64,
    /// Whether tasks are held by it already, before which no other may go.
    pub crowded: bool,
}

/// The gates of one transaction.
#[derive(Debug, Default)]
pub struct Gates {
    /// The ledger's time, in microseconds since 1970.
    pub now_us: i64,
    /// Those that a limit fits; all others are open.
    pub by_scope: HashMap<Scope, Gate>,
}

impl Rate {
    /// Microseconds between two starts, rounded up so that the rate is never exceeded.
    fn interval_us(self) -> i64 {
        let interval = (self.per_ms * 1_000).div_ceil(u64::from(self.tasks.max(1)));
        i64::try_from(interval.max(1)).unwrap_or(i64::MAX)
    }

    /// How far ahead of the even spread starts may run.
    fn slack_us(self) -> i64 {
        self.interval_us().saturating_mul(i64::from(self.burst.max(1)) - 1)
    }
}

impl Gate {
    /// Takes back a bucket that stands further ahead than a burst can take it: it was written before the clock was set
    /// back, or under another rate. Whether it did, and the standing must be written.
    pub fn take_back(&mut self, now_us: i64) -> bool {
        let Some(rate) = self.rate else { return false };
        let furthest = now_us.saturating_add(rate.slack_us()).saturating_add(rate.interval_us());
        let ahead = self.next_us > furthest;
        self.next_us = self.next_us.min(furthest);
        ahead
    }

    fn standing(&self, now_us: i64) -> i64 {
        self.next_us.max(now_us)
    }

    /// How many could start now.
    #[must_use]
    pub fn room(&self, now_us: i64) -> u32 {
        let places = self.max_running.map_or(u32::MAX, |most| most.saturating_sub(self.used));
        places.min(self.starts(now_us).saturating_sub(self.kept))
    }

    /// How many its rate lets start now.
    fn starts(&self, now_us: i64) -> u32 {
        self.rate.map_or(u32::MAX, |rate| {
            let ahead = now_us.saturating_add(rate.slack_us()) - self.standing(now_us);
            if ahead < 0 { 0 } else { u32::try_from(ahead / rate.interval_us() + 1).unwrap_or(u32::MAX) }
        })
    }

    /// How long until its rate lets one more start, in microseconds: zero when only places are missing.
    #[must_use]
    pub fn wait_us(&self, now_us: i64) -> i64 {
        self.rate.map_or(0, |rate| {
            let on_their_way = rate.interval_us().saturating_mul(self.kept.into());
            (self.standing(now_us).saturating_add(on_their_way) - rate.slack_us() - now_us).max(0)
        })
    }

    fn start(&mut self, now_us: i64, kept: bool) {
        if kept {
            self.kept = self.kept.saturating_sub(1);
        } else {
            self.used = self.used.saturating_add(1);
        }
        if let Some(rate) = self.rate {
            self.next_us = self.standing(now_us).saturating_add(rate.interval_us());
        }
    }
}

impl Gates {
    /// Starts a task: takes a place and a start in each of these scopes, or in none.
    ///
    /// Where a place is `kept` for it only the start is missing, and wherever one is, it has queued already.
    ///
    /// # Errors
    /// The first scope that has no room, and must hold the task.
    pub fn start(&mut self, scopes: &[Scope], kept: impl Fn(&Scope) -> bool) -> Result<(), Scope> {
        let (now_us, has_queued) = (self.now_us, scopes.iter().any(&kept));
        let open = |scope: &Scope, gate: &Gate| match kept(scope) {
            true => gate.starts(now_us) > 0,
            false => gate.room(now_us) > 0 && (has_queued || !gate.crowded),
        };
        self.check(scopes, open)?;
        for scope in scopes {
            if let Some(gate) = self.by_scope.get_mut(scope) {
                gate.start(now_us, kept(scope));
            }
        }
        Ok(())
    }

    /// Lets a held task go: keeps a place in each of these scopes for it, or in none.
    ///
    /// # Errors
    /// The first scope that has no room, and must hold the task.
    pub fn let_go(&mut self, scopes: &[Scope]) -> Result<(), Scope> {
        let now_us = self.now_us;
        self.check(scopes, |_, gate| gate.room(now_us) > 0)?;
        for scope in scopes {
            if let Some(gate) = self.by_scope.get_mut(scope) {
                gate.used = gate.used.saturating_add(1);
                gate.kept = gate.kept.saturating_add(1);
            }
        }
        Ok(())
    }

    fn check(&self, scopes: &[Scope], open: impl Fn(&Scope, &Gate) -> bool) -> Result<(), Scope> {
        let shut = |scope: &&Scope| self.by_scope.get(*scope).is_some_and(|gate| !open(scope, gate));
        scopes.iter().find(shut).map_or(Ok(()), |shut| Err(shut.clone()))
    }

    /// Those of these scopes that a limit fits.
    #[must_use]
    pub fn limited(&self, scopes: impl Iterator<Item = Scope>) -> Vec<Scope> {
        scopes.filter(|scope| self.by_scope.contains_key(scope)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(name: &str) -> Scope {
        Scope::named("key", name).unwrap()
    }

    fn gates(now_us: i64, gates: impl IntoIterator<Item = (Scope, Gate)>) -> Gates {
        Gates { now_us, by_scope: gates.into_iter().collect() }
    }

    #[test]
    fn a_task_takes_a_place_everywhere_or_nowhere() {
        let gate = |most| Gate { max_running: Some(most), ..Gate::default() };
        let mut gates = gates(0, [(key("a"), gate(2)), (key("b"), gate(1))]);
        let both = [key("a"), key("b"), key("open")];
        let no = |_: &Scope| false;
        assert_eq!(gates.start(&both, no), Ok(()));
        assert_eq!(gates.start(&both, no), Err(key("b")));
        assert_eq!(gates.let_go(&both), Err(key("b")));
        assert_eq!(gates.by_scope[&key("a")].used, 1, "nothing was taken");
        assert_eq!(gates.start(&both[..1], no), Ok(()));
        assert_eq!(gates.start(&both[..1], no), Err(key("a")));
    }

    #[test]
    fn nobody_goes_before_those_who_are_held() {
        let gate = Gate { max_running: Some(2), crowded: true, ..Gate::default() };
        let mut gates = gates(0, [(key("a"), gate)]);
        assert_eq!(gates.start(&[key("a")], |_| false), Err(key("a")));
        assert_eq!(gates.let_go(&[key("a")]), Ok(()));
        assert_eq!(gates.by_scope[&key("a")].used, 1);
        assert_eq!(gates.start(&[key("a")], |_| true), Ok(()), "its place is kept");
        assert_eq!((gates.by_scope[&key("a")].used, gates.by_scope[&key("a")].kept), (1, 0));
    }

    #[test]
    fn a_start_of_the_rate_waits_for_who_was_let_go() {
        let rate = Rate { tasks: 1, per_ms: 1_000, burst: 1 };
        let mut gates = gates(0, [(key("a"), Gate { rate: Some(rate), ..Gate::default() })]);
        assert_eq!(gates.let_go(&[key("a")]), Ok(()));
        assert_eq!(gates.let_go(&[key("a")]), Err(key("a")));
        assert_eq!(gates.start(&[key("a")], |_| false), Err(key("a")));
        assert_eq!(gates.by_scope[&key("a")].wait_us(0), 1_000_000);
        assert_eq!(gates.start(&[key("a")], |_| true), Ok(()));
    }

    #[test]
    fn a_clock_that_is_set_back_stops_nothing_for_long() {
        let rate = Rate { tasks: 10, per_ms: 1_000, burst: 1 };
        let mut gate = Gate { rate: Some(rate), next_us: 3_600_000_000, ..Gate::default() };
        assert!(gate.take_back(0));
        assert!(!gate.take_back(0));
        assert_eq!(gate.room(0), 0);
        assert_eq!(gate.wait_us(0), 100_000, "one interval, not an hour");
        assert_eq!(gate.room(100_000), 1);
    }

    proptest! {
        /// In every window no more start than the burst and what the window's length allows.
        #[test]
        fn a_rate_is_never_exceeded(
            tasks in 1u32..50, per_ms in 1u64..2_000, burst in 1u32..20,
            steps in prop::collection::vec((0i64..500_000, 1usize..10), 1..100),
        ) {
            let rate = Rate { tasks, per_ms, burst };
            let mut gates = gates(0, [(key("a"), Gate { rate: Some(rate), ..Gate::default() })]);
            let mut starts = Vec::new();
            for (step, tries) in steps {
                gates.now_us += step;
                for _ in 0..tries {
                    let room = gates.by_scope[&key("a")].room(gates.now_us);
                    let admitted = gates.start(&[key("a")], |_| false).is_ok();
                    prop_assert_eq!(admitted, room > 0);
                    if admitted {
                        starts.push(gates.now_us);
                    }
                }
                let wait = gates.by_scope[&key("a")].wait_us(gates.now_us);
                prop_assert_eq!(wait == 0, gates.by_scope[&key("a")].room(gates.now_us) > 0);
            }
            for (first, from) in starts.iter().enumerate() {
                for (count, until) in starts[first..].iter().enumerate() {
                    let window = f64::from(u32::try_from(until - from).unwrap());
                    let allowed = f64::from(burst) + window / 1e3 * f64::from(tasks) / per_ms as f64;
                    prop_assert!((count + 1) as f64 <= allowed + 1e-6, "{} starts in {window} us", count + 1);
                }
            }
        }
    }
}
