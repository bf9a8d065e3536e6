//! What three witnesses say: the demo itself, the API, and the file into which the handlers write each start.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result};
use tasklane_common::state::State;
use tasklane_common::task::{Fence, Task, TaskId};
use tasklane_examples::client::Client;
use tasklane_worker::Handler;

use crate::broker::{Broker, Left};
use crate::worker::DigestFile;

pub(crate) struct Evidence {
    /// What the producer has accepted.
    pub(crate) submitted: HashSet<TaskId>,
    /// What the API says.
    pub(crate) tasks: Vec<Task>,
    /// What the handlers wrote down.
    pub(crate) starts: HashMap<TaskId, Vec<Start>>,
    /// What is left in the broker, the dead letters counted from the beginning of the demo.
    pub(crate) left: Left,
}

/// One start of a handler.
pub(crate) struct Start {
    pub(crate) fence: Fence,
    pub(crate) pid: u32,
}

impl Evidence {
    pub(crate) async fn gather(
        client: &Client,
        starts: &Path,
        ids: Vec<TaskId>,
        (broker, before): (&Broker, Left),
    ) -> Result<Self> {
        let tasks = client.tasks_of(DigestFile::KIND).await?;
        let log = std::fs::read_to_string(starts).with_context(|| format!("reading {}", starts.display()))?;
        let mut starts: HashMap<_, Vec<_>> = HashMap::new();
        for line in log.lines() {
            let (id, start) = parse(line).with_context(|| format!("the start log has the line {line:?}"))?;
            starts.entry(id).or_default().push(start);
        }
        let left = broker.left().await?;
        let left = Left { dead: left.dead.saturating_sub(before.dead), ..left };
        Ok(Self { submitted: ids.into_iter().collect(), tasks, starts, left })
    }

    /// The fewest and the most starts that a task had.
    pub(crate) fn starts_per_task(&self) -> (usize, usize) {
        let counts = || self.submitted.iter().map(|id| self.starts.get(id).map_or(0, Vec::len));
        (counts().min().unwrap_or(0), counts().max().unwrap_or(0))
    }

    pub(crate) fn starts_total(&self) -> usize {
        self.starts.values().map(Vec::len).sum()
    }

    pub(crate) fn completed(&self) -> usize {
        self.tasks.iter().filter(|task| task.state == State::Completed).count()
    }

    /// How many tasks each process has started, by process id.
    pub(crate) fn shares(&self) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        for start in self.starts.values().flatten() {
            *shares.entry(start.pid).or_default() += 1;
        }
        shares
    }

    /// Where the witnesses disagree, with each other or with the promise.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault)
            }
        };
        let known: HashSet<_> = self.tasks.iter().map(|task| task.id).collect();
        check(known == self.submitted, format!("the API lists {} tasks, not those submitted", known.len()));
        check(self.completed() == self.submitted.len(), format!("{} tasks are completed", self.completed()));
        let (fewest, most) = self.starts_per_task();
        check((fewest, most) == (1, 1), format!("tasks were started {fewest} to {most} times"));
        check(
            self.starts.keys().all(|id| self.submitted.contains(id)),
            "tasks were started that nobody submitted".into(),
        );
        let witnessed =
            |task: &Task| self.starts.get(&task.id).is_some_and(|starts| starts.iter().any(|s| s.fence == task.fence));
        let unseen = self.tasks.iter().filter(|task| !witnessed(task)).count();
        check(unseen == 0, format!("{unseen} tasks have a fence under which no handler was started"));
        check(self.left.ready == 0, format!("{} messages are left in the broker", self.left.ready));
        check(self.left.dead == 0, format!("{} dead letters have come", self.left.dead));
        faults
    }
}

fn parse(line: &str) -> Option<(TaskId, Start)> {
    let mut words = line.split(' ');
    let (id, fence, pid) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().is_none().then_some((id, Start { fence: Fence(fence), pid }))
}
