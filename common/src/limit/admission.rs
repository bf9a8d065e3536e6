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
    /// When the last of these was let go, in microseconds since 1970; none where none is on its way.
    pub let_go_us: Option<i64>,
    /// Where the bucket stands: the theoretical arrival time of the next start, in microseconds since 1970.
    pub next_us: i64,
    /// Whether tasks are held by it already, before which no other may go.
    pub crowded: bool,
    /// Where the bucket stood before the first start of this transaction; none before that.
    pub stood_us: Option<i64>,
}

/// For how much time ahead tasks are let go to whom the rate does not let start yet: as long as they may be on their way.
const AHEAD_US: i64 = 1_000_000;

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
        self.places().min(self.starts(now_us).saturating_sub(self.kept))
    }

    /// How many could be let go now.
    #[must_use]
    pub fn room_to_go(&self, now_us: i64) -> u32 {
        self.places().min(self.starts(now_us).saturating_sub(self.kept).max(self.paced(now_us)))
    }

    fn places(&self) -> u32 {
        self.max_running.map_or(u32::MAX, |most| most.saturating_sub(self.used))
    }

    /// How many the pace of the rate lets go, whatever it lets start at this moment: it lets more start while they are on
    /// their way. Without them a rate is used in part only if that takes long. Who comes too soon is refused and held again.
    fn paced(&self, now_us: i64) -> u32 {
        let (Some(rate), Some(last)) = (self.rate, self.let_go_us) else { return 0 };
        let steps = u32::try_from((now_us - last) / rate.interval_us()).unwrap_or(0);
        steps.min(rate.burst).min(self.may_go_ahead(rate))
    }

    /// How many more may be on their way at once.
    fn may_go_ahead(&self, rate: Rate) -> u32 {
        let ahead = u32::try_from(AHEAD_US / rate.interval_us()).unwrap_or(u32::MAX);
        rate.burst.saturating_add(ahead).saturating_sub(self.kept)
    }

    /// Sends one on its way: the next in the pace, if it keeps to it, so that a look that comes late delays only one.
    fn let_go(&mut self, now_us: i64) {
        let next = |rate: Rate, last: i64| last.saturating_add(rate.interval_us()).max(now_us - rate.slack_us());
        let in_pace = self.rate.zip(self.let_go_us).map(|(rate, last)| next(rate, last));
        self.let_go_us = Some(in_pace.map_or(now_us, |slot| slot.min(now_us)));
        self.used = self.used.saturating_add(1);
        self.kept = self.kept.saturating_add(1);
    }

    /// How many its rate lets start now.
    fn starts(&self, now_us: i64) -> u32 {
        self.rate.map_or(u32::MAX, |rate| {
            let ahead = now_us.saturating_add(rate.slack_us()) - self.standing(now_us);
            if ahead < 0 { 0 } else { u32::try_from(ahead / rate.interval_us() + 1).unwrap_or(u32::MAX) }
        })
    }

    /// How long until its rate lets one more go, in microseconds: zero when only places are missing.
    #[must_use]
    pub fn wait_us(&self, now_us: i64) -> i64 {
        let Some(rate) = self.rate else { return 0 };
        let on_their_way = rate.interval_us().saturating_mul(self.kept.into());
        let start = self.standing(now_us).saturating_add(on_their_way) - rate.slack_us();
        let in_pace = self.let_go_us.filter(|_| self.may_go_ahead(rate) > 0);
        let in_pace = in_pace.map_or(i64::MAX, |last| last.saturating_add(rate.interval_us()));
        (start.min(in_pace) - now_us).max(0)
    }

    fn start(&mut self, now_us: i64, kept: bool) {
        if kept {
            self.kept = self.kept.saturating_sub(1);
        } else {
            self.used = self.used.saturating_add(1);
        }
        if let Some(rate) = self.rate {
            self.stood_us.get_or_insert(self.next_us);
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

    /// Moves this transaction's starts to when they were written. A connection may stall after the look, and until then a bucket
    /// counts as refilled for whoever looks next, so that the starts would come together with theirs.
    pub fn started_at(&mut self, at_us: i64) {
        for gate in self.by_scope.values_mut() {
            if let Some(stood) = gate.stood_us {
                let late = stood.max(at_us) - stood.max(self.now_us);
                gate.next_us = gate.next_us.saturating_add(late.max(0));
            }
        }
    }

    /// Lets a held task go: keeps a place in each of these scopes for it, or in none.
    ///
    /// # Errors
    /// The first scope that has no room, and must hold the task.
    pub fn let_go(&mut self, scopes: &[Scope]) -> Result<(), Scope> {
        let now_us = self.now_us;
        self.check(scopes, |_, gate| gate.room_to_go(now_us) > 0)?;
        for scope in scopes {
            if let Some(gate) = self.by_scope.get_mut(scope) {
                gate.let_go(now_us);
            }
        }
        Ok(())
    }

    /// When the task that was let go last in a scope was, in whole milliseconds since 1970: never sooner than it was.
    #[must_use]
    pub fn let_go_ms(&self, scope: &Scope) -> i64 {
        let told = self.by_scope.get(scope).and_then(|gate| gate.let_go_us).unwrap_or(self.now_us);
        told.div_euclid(1_000) + i64::from(told.rem_euclid(1_000) > 0)
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

    /// Tasks that are let go and claimed as the rate lets for ten seconds, each so long on its way; when they started, and how
    /// many were refused.
    fn travel(rate: Rate, on_their_way_us: impl Fn(usize) -> i64) -> (Vec<i64>, usize) {
        let mut gates = gates(0, [(key("a"), Gate { rate: Some(rate), ..Gate::default() })]);
        // Those on their way: when they arrive, and when they were let go.
        let mut under_way: Vec<(i64, i64)> = Vec::new();
        let (mut starts, mut refused, mut sent) = (Vec::new(), 0, 0);
        while gates.now_us < 10_000_000 {
            let arrived: Vec<_> = under_way.extract_if(.., |(at, _)| *at <= gates.now_us).collect();
            for _ in arrived {
                match gates.start(&[key("a")], |_| true) {
                    Ok(()) => starts.push(gates.now_us),
                    Err(_) => refused += 1,
                }
            }
            // As a ledger reads it: only of those that are still on their way it is known when they were let go.
            let gate = gates.by_scope.get_mut(&key("a")).unwrap();
            gate.kept = u32::try_from(under_way.len()).unwrap();
            gate.let_go_us = under_way.iter().map(|(_, let_go)| *let_go).max();
            while gates.let_go(&[key("a")]).is_ok() {
                under_way.push((gates.now_us + on_their_way_us(sent), gates.let_go_ms(&key("a")) * 1_000));
                sent += 1;
            }
            gates.now_us += 1_000;
        }
        (starts, refused)
    }

    #[test]
    fn a_rate_is_used_though_tasks_are_long_on_their_way() {
        let rate = Rate { tasks: 100, per_ms: 1_000, burst: 5 };
        let (steady, refused) = travel(rate, |_| 200_000);
        assert!((950..=1_005).contains(&steady.len()) && refused < 20, "{} of 1,000, {refused} refused", steady.len());
        // Some overtake others, and a bucket of five makes up for that.
        let (unsteady, refused) = travel(rate, |sent| 150_000 + 13_000 * (sent as i64 * 7 % 5));
        assert!((900..=1_005).contains(&unsteady.len()) && refused < 100, "{}, {refused} refused", unsteady.len());
        // With the smallest bucket one in about two comes too soon, and no more than the rate are sent for nothing.
        let (strict, refused) = travel(Rate { burst: 1, ..rate }, |sent| 150_000 + 13_000 * (sent as i64 * 7 % 5));
        assert!((300..=1_001).contains(&strict.len()) && refused < 1_000, "{}, {refused} refused", strict.len());
        for (starts, burst) in [(steady, 5), (unsteady, 5), (strict, 1)] {
            let too_soon =
                |from: usize, more: usize| more > burst + (starts[from + more - 1] - starts[from]) as usize / 10_000;
            let exceeded = (0..starts.len()).any(|from| (1..=starts.len() - from).any(|more| too_soon(from, more)));
            assert!(!exceeded, "more than the rate lets, with a burst of {burst}");
        }
    }

    #[test]
    fn no_more_are_on_their_way_than_start_in_a_second() {
        let rate = Rate { tasks: 10, per_ms: 1_000, burst: 3 };
        let gate = Gate { rate: Some(rate), kept: 3, let_go_us: Some(0), ..Gate::default() };
        let mut gates = gates(0, [(key("a"), gate)]);
        let mut gone = 3;
        for _ in 0..60 {
            gates.now_us += 100_000;
            gone += usize::from(gates.let_go(&[key("a")]).is_ok());
        }
        assert_eq!(gone, 13, "ten in a second, and the burst");
        assert!(gates.by_scope[&key("a")].wait_us(gates.now_us) > 0, "nothing to wait for in vain");
    }

    #[test]
    fn a_place_is_asked_for_whatever_the_pace() {
        let rate = Rate { tasks: 100, per_ms: 1_000, burst: 1 };
        let gate = Gate { max_running: Some(2), rate: Some(rate), ..Gate::default() };
        let mut gates = gates(0, [(key("a"), gate)]);
        for second in 0..10 {
            gates.now_us = second * 1_000_000;
            assert_eq!(gates.let_go(&[key("a")]).is_ok(), second < 2, "{second}");
        }
    }

    #[test]
    fn starts_that_are_written_late_are_counted_then() {
        let rate = Rate { tasks: 5, per_ms: 1_000, burst: 5 };
        let start_all = |gates: &mut Gates| (0..20).filter(|_| gates.start(&[key("a")], |_| false).is_ok()).count();
        let mut gates = gates(0, [(key("a"), Gate { rate: Some(rate), ..Gate::default() })]);
        assert_eq!(start_all(&mut gates), 5);
        gates.started_at(3_000_000);
        (gates.now_us, gates.by_scope.get_mut(&key("a")).unwrap().stood_us) = (3_010_000, None);
        assert_eq!(start_all(&mut gates), 0, "the burst was used a moment ago");
        // A bucket that stands ahead of both is where it was.
        let gate = Gate { rate: Some(rate), next_us: 3_500_000, ..Gate::default() };
        let mut ahead = Gates { now_us: 3_000_000, by_scope: [(key("a"), gate)].into() };
        assert_eq!(ahead.start(&[key("a")], |_| false), Ok(()));
        ahead.started_at(3_400_000);
        assert_eq!(ahead.by_scope[&key("a")].next_us, 3_700_000);
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
