//! The tasks that this life holds, or may hold: those it asks for, and those it was granted and has not settled.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tasklane_common::task::{Fence, TaskId};
use tokio_util::sync::CancellationToken;

/// What one life holds; the ledger's view of it is compared with this one by the audit.
#[derive(Debug, Default)]
pub struct Held(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    tasks: HashMap<TaskId, Entry>,
    /// Runs that had begun when whoever led them ended without an outcome.
    broken: HashMap<TaskId, Fence>,
}

#[derive(Debug, Default)]
struct Entry {
    /// How many claims are on their way, and may be granted or have been.
    asked: u32,
    /// The granted run, and what cancels it on somebody's word.
    run: Option<(Fence, CancellationToken)>,
}

/// A claim on its way, until it is dropped.
#[derive(Debug)]
pub struct Asked<'h> {
    held: &'h Held,
    id: TaskId,
}

/// A granted run, until it is dropped.
#[derive(Debug)]
pub struct Holding<'h> {
    held: &'h Held,
    id: TaskId,
    fence: Fence,
    /// Whether a handler was started.
    pub begun: bool,
    /// Whether the outcome is in the ledger.
    pub settled: bool,
}

impl Held {
    /// Notes that the ledger is being asked for a task.
    pub fn ask(&self, id: TaskId) -> Asked<'_> {
        self.lock().tasks.entry(id).or_default().asked += 1;
        Asked { held: self, id }
    }

    /// Notes a granted run; false when the task is held already.
    pub fn hold(&self, id: TaskId, fence: Fence) -> bool {
        let mut inner = self.lock();
        let run = &mut inner.tasks.entry(id).or_default().run;
        let free = run.is_none();
        run.get_or_insert_with(|| (fence, CancellationToken::new()));
        free
    }

    /// What [`Held::hold`] has noted, for whoever leads the run. Dropped, it lets go of it.
    pub fn holding(&self, id: TaskId, fence: Fence) -> Holding<'_> {
        Holding { held: self, id, fence, begun: false, settled: false }
    }

    /// Is cancelled when somebody wants the run cancelled.
    pub fn unwanted(&self, id: TaskId) -> CancellationToken {
        let inner = self.lock();
        let run = inner.tasks.get(&id).and_then(|entry| entry.run.as_ref());
        run.map(|(_, unwanted)| unwanted.clone()).unwrap_or_default()
    }

    /// Cancels a run, if it is this one.
    pub fn cancel(&self, id: TaskId, fence: Fence) {
        let inner = self.lock();
        let run = inner.tasks.get(&id).and_then(|entry| entry.run.as_ref());
        if let Some((_, unwanted)) = run.filter(|(held, unwanted)| *held == fence && !unwanted.is_cancelled()) {
            tracing::info!(task.id = %id, "somebody wants the run cancelled");
            unwanted.cancel();
        }
    }

    /// Whether a run is under way.
    pub fn runs_anything(&self) -> bool {
        self.lock().tasks.values().any(|entry| entry.run.is_some())
    }

    /// Whether one of these tasks runs here.
    pub fn runs_any_of(&self, ids: &[TaskId]) -> bool {
        let inner = self.lock();
        ids.iter().any(|id| inner.tasks.get(id).is_some_and(|entry| entry.run.is_some()))
    }

    /// Whether this run is under way here, or may become so at any moment.
    pub fn has(&self, id: TaskId, fence: Fence) -> bool {
        let inner = self.lock();
        let entry = inner.tasks.get(&id);
        entry.is_some_and(|entry| entry.asked > 0 || entry.run.as_ref().is_some_and(|(held, _)| *held == fence))
    }

    /// Whether this run had begun and was left without an outcome.
    pub fn is_broken(&self, id: TaskId, fence: Fence) -> bool {
        self.lock().broken.get(&id) == Some(&fence)
    }

    /// A run that was left without an outcome has one.
    pub fn forget_broken(&self, id: TaskId) {
        self.lock().broken.remove(&id);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn tidy(&mut self, id: TaskId) {
        if self.tasks.get(&id).is_some_and(|entry| entry.asked == 0 && entry.run.is_none()) {
            self.tasks.remove(&id);
        }
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let mut inner = self.held.lock();
        if let Some(entry) = inner.tasks.get_mut(&self.id) {
            entry.asked = entry.asked.saturating_sub(1);
        }
        inner.tidy(self.id);
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        let mut inner = self.held.lock();
        if let Some(entry) = inner.tasks.get_mut(&self.id) {
            entry.run = None;
        }
        inner.tidy(self.id);
        if self.begun && !self.settled {
            inner.broken.insert(self.id, self.fence);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_held_from_its_claim_to_its_outcome() {
        let (held, id, fence) = (Held::default(), TaskId::new(), Fence(3));
        assert!(!held.has(id, fence));
        let asked = held.ask(id);
        assert!(held.has(id, fence) && held.has(id, Fence(9)), "under whichever fence it may be granted");
        assert!(held.hold(id, fence) && !held.hold(id, fence), "one run of a task");
        drop(asked);
        assert!(held.has(id, fence) && !held.has(id, Fence(4)));
        let mut holding = held.holding(id, fence);
        (holding.begun, holding.settled) = (true, true);
        drop(holding);
        assert!(!held.has(id, fence) && !held.is_broken(id, fence));
        assert!(held.lock().tasks.is_empty(), "nothing is left of it");
    }

    #[test]
    fn a_run_that_is_left_without_an_outcome_is_known() {
        let (held, id, fence) = (Held::default(), TaskId::new(), Fence(3));
        assert!(held.hold(id, fence));
        drop(held.holding(id, fence));
        assert!(!held.is_broken(id, fence), "it had not begun");
        assert!(held.hold(id, fence));
        held.holding(id, fence).begun = true;
        assert!(!held.has(id, fence) && held.is_broken(id, fence) && !held.is_broken(id, Fence(4)));
        held.forget_broken(id);
        assert!(!held.is_broken(id, fence));
    }
}
