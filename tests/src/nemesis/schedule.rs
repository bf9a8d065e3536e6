//! Which fault comes when, where, and for how long: all drawn from the seed.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use crate::ledger::LedgerKind;
use crate::nemesis::fault::Fault;

/// How long a fault lasts that lasts at all. The longest is well over a lease.
const HOLD_MS: std::ops::Range<u64> = 300..6_000;

/// The pause before the next fault.
pub const PAUSE: Duration = Duration::from_millis(300);

/// What decides who may run a task, and so comes more often.
const FAVOURITES: &[Fault] = &[Fault::WorkerKilled, Fault::WorkerFrozen, Fault::MachineFrozen, Fault::ProducerKilled];

/// How often one of them comes.
const OFTEN: f64 = 0.35;

/// One fault, about to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// What.
    pub fault: Fault,
    /// In which lane.
    pub lane: usize,
    /// To which process of the lane, or node of the cluster; counted around.
    pub victim: usize,
    /// How long it lasts.
    pub hold: Duration,
}

/// The faults to come in one lane.
#[derive(Debug)]
pub struct Schedule {
    rng: StdRng,
    lane: usize,
    possible: Vec<Fault>,
    each: Vec<Fault>,
}

impl Schedule {
    /// The faults of a seed in a lane.
    pub fn new(seed: u64, lane: usize, ledger: LedgerKind) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(lane as u64));
        let possible: Vec<Fault> = Fault::ALL.iter().copied().filter(|fault| fault.befalls(ledger)).collect();
        let mut each = possible.clone();
        each.shuffle(&mut rng);
        Self { rng, lane, possible, each }
    }

    /// Are there faults that have not been there yet?
    pub fn has_new(&self) -> bool {
        !self.each.is_empty()
    }

    /// The next fault: those that have not been there yet come first, then any, some more often than others.
    pub fn another(&mut self) -> Injection {
        let often = self.rng.random_bool(OFTEN);
        let any = if often { FAVOURITES } else { &self.possible }.choose(&mut self.rng).copied();
        let fault = self.each.pop().or(any).unwrap_or(Fault::WorkerKilled);
        let hold = Duration::from_millis(self.rng.random_range(HOLD_MS));
        Injection { fault, lane: self.lane, victim: self.rng.random_range(0..60), hold }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_plays_the_same_again_and_every_fault_comes_first_once() {
        let [mut one, mut same, mut other] = [7, 7, 8].map(|seed| Schedule::new(seed, 1, LedgerKind::Postgres));
        let play = |schedule: &mut Schedule| (0..100).map(|_| schedule.another()).collect::<Vec<_>>();
        let played = play(&mut one);
        assert_eq!(played, play(&mut same));
        assert_ne!(played, play(&mut other));
        let possible: BTreeSet<Fault> =
            Fault::ALL.iter().copied().filter(|fault| fault.befalls(LedgerKind::Postgres)).collect();
        let first: BTreeSet<Fault> = played[..possible.len()].iter().map(|drawn| drawn.fault).collect();
        assert_eq!(first, possible);
        let other_ledger = play(&mut Schedule::new(7, 0, LedgerKind::Sqlite));
        assert!(other_ledger.iter().all(|drawn| drawn.lane == 0 && drawn.fault.befalls(LedgerKind::Sqlite)));
    }
}
