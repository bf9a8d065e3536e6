//! Who gets the next place to run: the most urgent lane that waits for one, but not for ever the same.
//!
//! All pulls of a worker ask one [`Arbiter`]. A free permit goes to the most urgent of those that wait, in the order in
//! which they came; after [`IN_A_ROW_MAX`] permits to others a lane that waited through all of them has its turn.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tasklane_common::task::Priority;
use tokio::sync::oneshot;

/// How many permits go to more urgent lanes in a row while a less urgent one waits.
pub const IN_A_ROW_MAX: u32 = 8;
const LEVELS: usize = Priority::ALL.len();

/// Hands out the places of a worker; clones share them.
#[derive(Debug, Clone)]
pub struct Arbiter(Arc<Mutex<Places>>);

/// A place to run, given back when it is dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once bounds nothing"]
pub struct Permit(Arbiter);

/// Free places, and those who wait for one: while somebody waits, none is free.
#[derive(Debug, Default)]
struct Places {
    free: usize,
    waiting: [VecDeque<oneshot::Sender<Permit>>; LEVELS],
    turns: Turns,
}

/// Whose turn it is. Levels are those of [`Priority::ALL`], the most urgent first.
#[derive(Debug, Default)]
struct Turns {
    /// How often each level was passed over, while it waited, since its last turn.
    passed: [u32; LEVELS],
}

impl Turns {
    /// Takes the next turn among the levels that wait.
    fn next(&mut self, waiting: [bool; LEVELS]) -> Option<usize> {
        let mut levels = (0..LEVELS).filter(|level| waiting[*level]);
        let overdue = levels.clone().find(|level| self.passed[*level] >= IN_A_ROW_MAX);
        let turn = overdue.or_else(|| levels.next())?;
        for (passed, waits) in self.passed.iter_mut().zip(waiting).skip(turn + 1) {
            *passed += u32::from(waits);
        }
        self.passed[turn] = 0;
        Some(turn)
    }
}

impl Arbiter {
    /// With so many places.
    #[must_use]
    pub fn new(places: usize) -> Self {
        Self(Arc::new(Mutex::new(Places { free: places, ..Places::default() })))
    }

    /// How many places nobody wants at this moment.
    #[must_use]
    pub fn available(&self) -> usize {
        self.lock().free
    }

    /// A place, if one is free: then nobody waits.
    #[must_use]
    pub fn try_acquire(&self) -> Option<Permit> {
        let mut places = self.lock();
        places.free = places.free.checked_sub(1)?;
        Some(Permit(self.clone()))
    }

    /// Waits for a place. One that is granted to a future that is dropped goes to the next.
    pub async fn acquire(&self, priority: Priority) -> Permit {
        let granted = {
            let mut places = self.lock();
            if places.free > 0 {
                places.free -= 1;
                return Permit(self.clone());
            }
            let (grant, granted) = oneshot::channel();
            places.waiting[level_of(priority)].push_back(grant);
            granted
        };
        match granted.await {
            Ok(permit) => permit,
            // Nobody drops a waiting sender but the last handle of all, and this is one.
            Err(_) => std::future::pending().await,
        }
    }

    /// Gives a place to whose turn it is.
    fn pass_on(&self) {
        let grant = {
            let mut places = self.lock();
            for waiting in &mut places.waiting {
                waiting.retain(|grant| !grant.is_closed());
            }
            let waiting = places.waiting.each_ref().map(|waiting| !waiting.is_empty());
            let turn = places.turns.next(waiting);
            let grant = turn.and_then(|level| places.waiting[level].pop_front());
            if grant.is_none() {
                places.free += 1;
            }
            grant
        };
        if let Some(grant) = grant {
            // Not under the lock: whoever has stopped waiting just now drops the permit here, which passes it on.
            drop(grant.send(Permit(self.clone())));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

fn level_of(priority: Priority) -> usize {
    match priority {
        Priority::High => 0,
        Priority::Normal => 1,
        Priority::Low => 2,
    }
}

#[cfg(test)]
mod tests;
