//! What is measured beside the verdict: counters of workers that come and go, memory, speed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use tasklane_common::clock::since_boot;
use tokio::time::timeout;

use crate::history::{Answered, Line, Op};
use crate::nemesis::client::Submission;
use crate::nemesis::member::Role;
use crate::nemesis::world::{Lane, World};
use crate::process::rss_bytes;
use crate::wait::eventually;

/// How many tasks one measurement of the speed has.
const BATCH: usize = 500;

/// How often the speed is measured.
const MEASUREMENTS: usize = 3;

/// How long one batch may take.
const BATCH_LIMIT: Duration = Duration::from_secs(60);

/// How long a process may take to show its metrics.
const SCRAPE_LIMIT: Duration = Duration::from_millis(800);

/// Counters of all workers that were there, as last seen of each process.
#[derive(Debug, Default)]
pub struct Counters {
    last: Mutex<BTreeMap<i32, Counted>>,
}

/// What one worker process has counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    /// Results refused because the task was somebody else's.
    pub fenced: f64,
    /// Claims refused.
    pub refused: f64,
}

impl Counters {
    /// Looks at all workers of a lane that answer.
    pub async fn look(&self, lane: &Lane) {
        for worker in lane.workers() {
            let Some(process) = worker.process() else { continue };
            // A worker that is down or stands still is looked at again later.
            let Ok(Ok(metrics)) = timeout(SCRAPE_LIMIT, worker.probe.metrics()).await else { continue };
            let counted = Counted {
                fenced: metrics.sum("tasklane_results_fenced_total", &[]),
                refused: metrics.sum("tasklane_claims_refused_total", &[]),
            };
            self.last.lock().unwrap_or_else(PoisonError::into_inner).insert(process, counted);
        }
    }

    /// The sums over all processes that were there.
    pub fn total(&self) -> Counted {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.values().fold(Counted::default(), |sum, counted| Counted {
            fenced: sum.fenced + counted.fenced,
            refused: sum.refused + counted.refused,
        })
    }
}

/// The memory of the largest process of a role in a lane, in bytes.
pub fn rss(lane: &Lane, role: Role) -> u64 {
    let members = lane.members.iter().filter(|member| member.role == role);
    members.filter_map(|member| rss_bytes(member.process()?).ok()).max().unwrap_or_default()
}

/// The memory of the first broker node, in bytes.
pub async fn broker_rss(world: &World) -> u64 {
    let cluster = world.broker.lock().await;
    let process = cluster.nodes.first().and_then(|broker| broker.process().ok());
    process.and_then(|process| process.rss_bytes().ok()).unwrap_or_default()
}

/// One measurement of the speed: the name of its batch, and when it was sent.
#[derive(Clone, Debug)]
pub struct Sprint {
    name: String,
    began: Duration,
}

/// Sends fixed batches, one after the other, and waits for the end of each.
pub async fn sprints(lane: &Lane, when: &str) -> Result<Vec<Sprint>> {
    let api = lane.api()?;
    let mut sprints = Vec::new();
    for number in 0..MEASUREMENTS {
        let batch = Submission::of(&format!("speed-{when}-{number}"), BATCH, "test.work", &json!({}));
        let began = since_boot();
        let (outcome, _) = batch.send(api, &lane.history).await?;
        ensure!(outcome == Answered::Ok, "{}: a batch without any fault was answered {outcome:?}", lane.kind);
        eventually(BATCH_LIMIT, &format!("{} to complete {BATCH} tasks", lane.kind), async || {
            Ok(api.under_way().await?.is_empty().then_some(()))
        })
        .await?;
        sprints.push(Sprint { name: batch.name, began });
    }
    Ok(sprints)
}

/// The speeds of some sprints, in tasks a second, as the history tells them; the slowest first.
pub fn speeds(sprints: &[Sprint], history: &[Line]) -> Vec<f64> {
    let times = sprints.iter().filter_map(|sprint| time(sprint, history));
    let mut speeds: Vec<f64> = times.map(|time| BATCH as f64 / time.as_secs_f64()).collect();
    speeds.sort_by(f64::total_cmp);
    speeds
}

/// From the submission to the end of its last handler.
fn time(sprint: &Sprint, history: &[Line]) -> Option<Duration> {
    let tasks: BTreeSet<&str> = history
        .iter()
        .filter_map(|line| match &line.op {
            Op::Submit { name, tasks, .. } if *name == sprint.name => Some(tasks),
            _ => None,
        })
        .flatten()
        .map(String::as_str)
        .collect();
    let ends =
        history.iter().filter(|line| matches!(&line.op, Op::End { run, .. } if tasks.contains(run.task.as_str())));
    Some(ends.map(|line| line.at).max()?.saturating_sub(sprint.began))
}
