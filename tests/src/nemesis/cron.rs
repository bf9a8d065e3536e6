//! A schedule that ticks every second through all faults: each tick must have one task in the end.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use serde_json::json;
use tasklane_common::schedule::{SCHEDULE_TAG, TICK_TAG};

use crate::api::Task;
use crate::history::{Answered, Op};
use crate::nemesis::client::{NAME_TAG, QUEUE_TAG};
use crate::nemesis::world::Lane;

/// The schedule, and the name under which its tasks are judged.
const NAME: &str = "beat";

/// How many seconds nobody may be up for its ticks still to be made up for.
const CATCH_UP_MAX: u32 = 1_000;

/// Makes the schedule.
pub async fn begin(lane: &Lane) -> Result<()> {
    let task = json!({"kind": "test.work", "args": {"work_ms": 20}, "tags": {NAME_TAG: NAME, QUEUE_TAG: "default"}});
    let schedule = json!({"cron": "* * * * * *", "catch_up": "all", "catch_up_max": CATCH_UP_MAX, "task": task});
    let made = lane.api()?.raw_put(&format!("/v1/schedules/{NAME}"), &schedule).await?;
    ensure!(made.status < 300, "the schedule was not made: {}", made.text());
    Ok(())
}

/// Deletes it; its tasks stay.
pub async fn end(lane: &Lane) -> Result<()> {
    let deleted = lane.api()?.raw_delete(&format!("/v1/schedules/{NAME}")).await?;
    ensure!(deleted.status == 204, "the schedule was not deleted: {}", deleted.text());
    Ok(())
}

/// What the schedule has promised by its first and its last tick: a task for each second between them.
pub fn promised(tasks: &[Task]) -> Result<Op> {
    let fired = tasks.iter().filter(|task| task.tags.get(SCHEDULE_TAG).is_some_and(|name| name == NAME));
    let ticks = fired.map(|task| {
        let tick: Timestamp = task.tags.get(TICK_TAG).context("a fired task has its tick")?.parse()?;
        anyhow::Ok(tick.as_second())
    });
    let ticks: BTreeSet<i64> = ticks.collect::<Result<_>>()?;
    let first = ticks.first().context("no tick was fired at all")?;
    let last = ticks.last().context("no tick was fired at all")?;
    let count = usize::try_from(last - first + 1)?;
    Ok(Op::Submit { name: NAME.to_owned(), outcome: Answered::Ok, count, tasks: Vec::new() })
}
