//! What one task costs the ledger: steps of SQLite's machine, which are the same on every computer at every load.
//!
//! A statement more, an index more on the way of every task, or a look at rows that do not matter shows here. Who means
//! to make it dearer changes the figure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::super::*;
use crate::ledger::conformance::{complete, new_task, submission, worker_record};
use crate::task::{Guarantee, NewTask};

/// Tasks measured together.
const TASKS: u64 = 100;
/// How far above the figure a measurement may lie, in percent.
const MARGIN: u64 = 3;

/// A ledger's connection, and the steps that it has made.
struct Counted {
    db: rusqlite::Connection,
    steps: Arc<AtomicU64>,
    worker: WorkerId,
    boot_id: String,
    _folder: tempfile::TempDir,
}

impl Counted {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let db = schema::open_writer(&folder.path().join("ledger.db")).unwrap();
        let boot_id = crate::clock::boot_id().unwrap();
        let record = worker_record();
        write::register(&db, &record, Duration::from_secs(3_600), &boot_id).unwrap();
        let steps = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&steps);
        let count = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            false
        };
        db.progress_handler(1, Some(count)).unwrap();
        Self { db, steps, worker: record.id, boot_id, _folder: folder }
    }

    /// How many steps a task's part of some work takes.
    fn steps_of<T>(&self, work: impl FnOnce(&Self) -> T) -> (u64, T) {
        let before = self.steps.load(Ordering::Relaxed);
        let done = work(self);
        ((self.steps.load(Ordering::Relaxed) - before) / TASKS, done)
    }

    fn record(&self) -> Vec<TaskId> {
        let tasks: Vec<NewTask> = std::iter::repeat_with(new_task).take(TASKS as usize).collect();
        let ids = tasks.iter().map(|task| task.id).collect();
        record::record(&self.db, &submission(tasks)).unwrap();
        ids
    }

    fn mark(&self, ids: &[TaskId]) {
        let published: Vec<_> = ids.iter().map(|id| Mark { id: *id, fence: Fence(0), ago: Duration::ZERO }).collect();
        write::mark_queued(&self.db, &published).unwrap();
    }

    fn claim(&self, ids: &[TaskId]) {
        for id in ids {
            let request = ClaimRequest {
                id: *id,
                worker: self.worker,
                guarantee: Guarantee::AtLeastOnce,
                belief: Belief { kind: new_task().kind, published: Some(Fence(0)), args: new_task().args.digest() },
                crashes_below: 2,
            };
            let claimed = claim::claim(&self.db, &request, &self.boot_id).unwrap();
            assert!(matches!(claimed, Claim::Granted(_)), "{claimed:?}");
        }
    }

    fn settle(&self, ids: &[TaskId]) {
        for id in ids {
            let settlement = Settlement { id: *id, fence: Fence(1), transition: complete() };
            assert_eq!(write::settle(&self.db, &settlement).unwrap(), Settled::Applied);
        }
    }
}

#[track_caller]
fn assert_costs(what: &str, measured: u64, known: u64) {
    let most = known + known * MARGIN / 100;
    assert!(measured <= most, "{what} takes {measured} steps a task, and took {known}");
    assert!(measured >= known - known * MARGIN / 100, "{what} has become cheaper: {measured} steps, say so here");
}

#[test]
fn no_step_has_become_dearer() {
    let ledger = Counted::new();
    // A ledger in use: what has finished and what waits must not matter.
    for _ in 0..10 {
        let ids = ledger.record();
        ledger.claim(&ids);
        ledger.settle(&ids);
        ledger.mark(&ledger.record());
    }
    let (recorded, ids) = ledger.steps_of(Counted::record);
    let (marked, ()) = ledger.steps_of(|ledger| ledger.mark(&ids));
    let (claimed, ()) = ledger.steps_of(|ledger| ledger.claim(&ids));
    let (settled, ()) = ledger.steps_of(|ledger| ledger.settle(&ids));
    assert_costs("recording", recorded, 178);
    assert_costs("marking", marked, 170);
    assert_costs("claiming", claimed, 224);
    assert_costs("settling", settled, 190);
}
