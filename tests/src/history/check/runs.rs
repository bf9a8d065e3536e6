//! Runs and freezes, put together from the lines of a history.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Ending, Line, Op, Run};

/// One run, put together from its lines.
#[derive(Clone, Debug)]
pub(super) struct Ran {
    pub(super) run: Run,
    /// The number of the change that its args are of.
    pub(super) edition: u64,
    /// The queue from which its task came, where that is told.
    pub(super) queue: Option<String>,
    pub(super) process: i32,
    pub(super) began: Duration,
    /// Its own last line: when and how.
    pub(super) ended: Option<(Duration, Ending)>,
    /// When its process was surely dead, if it has no last line.
    pub(super) killed: Option<Duration>,
    pub(super) effect: bool,
}

impl Ran {
    /// When it was surely over.
    pub(super) fn over(&self) -> Option<Duration> {
        self.ended.map(|(at, _)| at).or(self.killed)
    }
}

/// When each process stood still: from, and until if it went on.
pub(super) type Freezes = BTreeMap<i32, Vec<(Duration, Option<Duration>)>>;

pub(super) fn freezes(history: &[Line]) -> Freezes {
    let mut freezes = Freezes::new();
    for line in history {
        match line.op {
            Op::Frozen { process } => {
                let all = freezes.entry(process).or_default();
                // Who stands still already does not stand still any more.
                if all.last().is_none_or(|(_, thawed)| thawed.is_some()) {
                    all.push((line.at, None));
                }
            }
            Op::Thawed { process } => {
                if let Some((_, thawed)) = freezes.get_mut(&process).and_then(|all| all.last_mut()) {
                    thawed.get_or_insert(line.at);
                }
            }
            _ => {}
        }
    }
    freezes
}

/// The runs of each task.
pub(super) type Runs<'h> = BTreeMap<&'h str, Vec<Ran>>;

/// The runs of each task in the order of their starts, and the lines of runs that never began.
pub(super) fn runs(history: &[Line]) -> (Runs<'_>, Vec<&Line>) {
    let mut runs = Runs::new();
    let mut deaths: BTreeMap<i32, Vec<Duration>> = BTreeMap::new();
    for line in history {
        match &line.op {
            Op::Start { run, edition, queue } => {
                let of_task = runs.entry(&run.task).or_default();
                let (run, queue, edition, process, began) = (run.clone(), queue.clone(), *edition, line.pid, line.at);
                of_task.push(Ran { run, edition, queue, process, began, ended: None, killed: None, effect: false });
            }
            Op::Gone { process, .. } => deaths.entry(*process).or_default().push(line.at),
            _ => {}
        }
    }
    let mut orphans = Vec::new();
    for line in history {
        let (Op::Effect(run) | Op::End { run, .. }) = &line.op else { continue };
        let mut of_task = runs.get_mut(run.task.as_str()).into_iter().flatten();
        match (of_task.find(|ran| ran.run == *run && ran.process == line.pid), &line.op) {
            (Some(ran), Op::End { how, .. }) => ran.ended = Some((line.at, *how)),
            (Some(ran), _) => ran.effect = true,
            (None, _) => orphans.push(line),
        }
    }
    for ran in runs.values_mut().flatten().filter(|ran| ran.ended.is_none()) {
        let deaths = deaths.get(&ran.process).into_iter().flatten();
        ran.killed = deaths.copied().filter(|at| *at >= ran.began).min();
    }
    for of_task in runs.values_mut() {
        of_task.sort_by_key(|ran| ran.began);
    }
    (runs, orphans)
}
