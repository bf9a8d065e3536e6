//! A schedule that ticks every second through all faults, while its expression is written anew: each tick must have one task in
//! the end, or be counted as missed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tasklane_common::schedule::{SCHEDULE_TAG, TICK_TAG};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::api::Task;
use crate::history::{Answered, Op};
use crate::nemesis::client::{NAME_TAG, QUEUE_TAG};
use crate::nemesis::world::{Lane, World};

/// The schedule, and the name under which its tasks are judged.
const NAME: &str = "beat";

/// How many seconds nobody may be up for its ticks still to be made up for.
const CATCH_UP_MAX: u32 = 1_000;

/// The same second each: another text is another timetable to the producer.
const EXPRESSIONS: [&str; 3] = ["* * * * * *", "*/1 * * * * *", "0-59 * * * * *"];

/// The longest pause between two of them.
const PAUSE_MS_MAX: u64 = 2_000;

fn path() -> String {
    format!("/v1/schedules/{NAME}")
}

fn schedule(cron: &str) -> Value {
    let task = json!({"kind": "test.work", "args": {"work_ms": 20}, "tags": {NAME_TAG: NAME, QUEUE_TAG: "default"}});
    json!({"cron": cron, "catch_up": "all", "catch_up_max": CATCH_UP_MAX, "task": task})
}

/// Makes the schedule.
pub async fn begin(lane: &Lane) -> Result<()> {
    let made = lane.api()?.raw_put(&path(), &schedule(EXPRESSIONS[0])).await?;
    ensure!(made.status < 300, "the schedule was not made: {}", made.text());
    Ok(())
}

/// Writes the expression anew, over and over, in the middle of everything.
///
/// Waits for each answer, or for the end of its connection: a request that came true after the end would make the schedule again.
pub async fn amend(world: Arc<World>, lane: usize, seed: u64, stop: CancellationToken) {
    let mut rng = StdRng::seed_from_u64(seed);
    let producers = world.lanes[lane].producers();
    for expression in EXPRESSIONS.iter().cycle().skip(1) {
        tokio::select! {
            () = sleep(Duration::from_millis(rng.random_range(0..PAUSE_MS_MAX))) => {}
            () = stop.cancelled() => return,
        }
        // One that is refused, or not answered, is no error.
        let _ = producers[rng.random_range(0..producers.len())].probe.raw_put(&path(), &schedule(expression)).await;
    }
}

/// Deletes it; its tasks stay. How many ticks it has counted as missed.
pub async fn end(lane: &Lane) -> Result<usize> {
    let shown: Value = lane.api()?.raw_get(&path()).await?.expect(&[200])?;
    let deleted = lane.api()?.raw_delete(&path()).await?;
    ensure!(deleted.status == 204, "the schedule was not deleted: {}", deleted.text());
    let missed = shown["ticks"]["missed"].as_u64().context("how many ticks were missed is not told")?;
    Ok(usize::try_from(missed)?)
}

/// What the schedule has promised by its first and its last tick: a task for each second between them, but for those that it has
/// counted as missed.
pub fn promised(tasks: &[Task], missed: usize) -> Result<Op> {
    let fired = tasks.iter().filter(|task| task.tags.get(SCHEDULE_TAG).is_some_and(|name| name == NAME));
    let ticks = fired.map(|task| {
        let tick: Timestamp = task.tags.get(TICK_TAG).context("a fired task has its tick")?.parse()?;
        anyhow::Ok(tick.as_second())
    });
    let ticks: BTreeSet<i64> = ticks.collect::<Result<_>>()?;
    let first = ticks.first().context("no tick was fired at all")?;
    let last = ticks.last().context("no tick was fired at all")?;
    let count = usize::try_from(last - first + 1)?.saturating_sub(missed);
    Ok(Op::Submit { name: NAME.to_owned(), outcome: Answered::Ok, count, tasks: Vec::new() })
}
