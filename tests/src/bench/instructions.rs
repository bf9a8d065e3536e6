//! How many instructions one task takes: each program by itself under valgrind, which counts the same whatever else the
//! machine does.
//!
//! A program is counted with few tasks and with more: the difference has neither its start nor its end. What the kernel
//! does is not in it. The ledger is SQLite: a sign-in to PostgreSQL takes as much as a hundred tasks.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tokio::time::sleep;

use super::world::{World, task};
use crate::ledger::LedgerKind;
use crate::stack::{Program, Start};
use crate::wait::within;

/// How many tasks a program is counted with.
pub const TASKS: [usize; 2] = [2_000, 6_000];
/// How many tasks a batch has.
const BATCH: usize = 200;

/// How long a program may take for them under valgrind, and how long to start or end.
const LIMIT: Duration = Duration::from_secs(300);
/// How often the ledger is asked how far they are, past the program: its answer would be counted.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

const PUBLISHED: &str = "SELECT count(*) FROM tasks WHERE state = 2";
const COMPLETED: &str = "SELECT count(*) FROM tasks WHERE state = 5";

/// What is counted.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    /// A worker works off a backlog.
    Worker,
    /// A producer takes batches, and publishes and marks their tasks.
    Batch,
    /// As many tasks one by one.
    Single,
}

/// The instructions of one task. The profiles go into `folder`, for `callgrind_annotate`.
pub async fn of_a_task(part: Part, folder: &Path) -> Result<u64> {
    let mut counts = Vec::new();
    for tasks in TASKS {
        let profile = folder.join(format!("callgrind.{part:?}.{tasks}").to_lowercase());
        counts.push(count(part, tasks, &profile).await?);
    }
    Ok((counts[1] - counts[0]) / (TASKS[1] - TASKS[0]) as u64)
}

/// The instructions of a program from its start to its end, with so many tasks.
async fn count(part: Part, tasks: usize, profile: &Path) -> Result<u64> {
    let counted = Counted { profile };
    let is_worker = matches!(part, Part::Worker);
    let mut world =
        World::with(LedgerKind::Sqlite, |producer| if is_worker { producer } else { counted.start(producer) }).await?;
    match part {
        Part::Single => world.singles(tasks).await?,
        // One after the other: what waits for longer than its reserve would be published by the relay as well.
        Part::Worker | Part::Batch => {
            let body = serde_json::to_vec(&json!({"tasks": vec![task(); BATCH]}))?;
            for published in (BATCH..=tasks).step_by(BATCH) {
                world.submit(1, "/v1/tasks/batch", &body, &AtomicUsize::new(1)).await?;
                reach(&world, PUBLISHED, published).await?;
            }
        }
    }
    reach(&world, PUBLISHED, tasks).await?;
    let process = if is_worker {
        world.hire_as(1, |worker| counted.start(worker)).await?;
        reach(&world, COMPLETED, tasks).await?;
        &mut world.workers[0].process
    } else {
        &mut world.producer.process
    };
    process.terminate()?;
    process.exited(LIMIT).await?;
    counted.instructions()
}

/// Waits until so many tasks are where they are to be.
async fn reach(world: &World, state: &'static str, tasks: usize) -> Result<()> {
    let reached = async {
        while world.stack.ledger.number(state).await? < i64::try_from(tasks)? {
            sleep(LOOK_PERIOD).await;
        }
        anyhow::Ok(())
    };
    within(LIMIT, "all tasks", reached).await?
}

/// A program whose instructions are counted.
struct Counted<'p> {
    profile: &'p Path,
}

impl Counted<'_> {
    fn start<P: Program>(&self, program: Start<P>) -> Start<P> {
        let out = format!("--callgrind-out-file={}", self.profile.display());
        let valgrind = ["valgrind", "--tool=callgrind", "--quiet", "--fair-sched=try", &out];
        // Slow as it is, its lease must not end.
        program.under(&valgrind).env("TASKLANE_LEASE_TTL_MS", 120_000).env("TASKLANE_LEASE_RENEW_MS", 20_000)
    }

    fn instructions(&self) -> Result<u64> {
        let profile = fs::read_to_string(self.profile).with_context(|| self.profile.display().to_string())?;
        let total = profile.lines().rev().find_map(|line| line.strip_prefix("totals:")).context("no total")?;
        Ok(total.trim().parse()?)
    }
}
