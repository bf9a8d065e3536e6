//! Queues: a paused one grants nothing, and tasks are only where somebody has put them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::Edit;
use super::{Broken, Evidence, Line, Op, Verdict};

/// How long a claim may take: the ledger reads its clock first, and afterwards what is paused by then.
const CLAIM_TIME: Duration = Duration::from_secs(1);

/// From the answer to a pause until before the request to go on, by the wall clock, which is the ledgers'.
type Pauses<'h> = BTreeMap<&'h str, Vec<(Duration, Duration)>>;

/// Was nothing granted in a pause, and nothing put where nobody has put it?
pub(super) fn check(evidence: &Evidence, verdict: &mut Verdict) {
    let pauses = pauses(&evidence.history);
    verdict.counts.pauses = pauses.values().map(Vec::len).sum();
    let mut moves = BTreeSet::new();
    let mut edits: BTreeSet<(&str, &str)> = BTreeSet::new();
    for line in &evidence.history {
        match &line.op {
            Op::Moved { from, to, count } => {
                moves.insert((from.as_str(), to.as_str()));
                verdict.counts.moved += count.unwrap_or_default();
            }
            // A refused one was asked for before, and that is noted, too.
            Op::Edit(Edit { task, queue: Some(queue), .. }) => drop(edits.insert((task, queue))),
            _ => {}
        }
    }
    for task in &evidence.tasks {
        let queue = task.queue.as_str();
        let submitted_to = task.submitted_to.as_deref().unwrap_or(queue);
        let edited_to =
            edits.range((task.id.as_str(), "")..).take_while(|(id, _)| *id == task.id).map(|(_, queue)| *queue);
        let mut put_into = edited_to.chain([submitted_to]);
        if !put_into.any(|from| from == queue || moves.contains(&(from, queue))) {
            let told = format!("it was submitted to {submitted_to} and is in {queue}");
            verdict.blame(Broken::Misplaced, &task.id, told);
        }
        // A cancelled task may have been moved since its last run; all others ended in the queue in which they ran. What
        // was granted before the pause, and begins or goes on in it, was in hand.
        let Some(granted) = task.started_at.filter(|_| task.state != "cancelled") else { continue };
        let within = |(from, to): &&(Duration, Duration)| *from < granted && granted < to.saturating_sub(CLAIM_TIME);
        let paused = pauses.get(queue).into_iter().flatten().find(within);
        if let Some((from, to)) = paused {
            let told = format!("granted at {granted:?} in {queue}, which was paused from {from:?} to {to:?}");
            verdict.blame(Broken::StartedInPause, &task.id, told);
        }
    }
}

fn pauses(history: &[Line]) -> Pauses<'_> {
    let mut pauses = Pauses::new();
    let mut since: BTreeMap<&str, Duration> = BTreeMap::new();
    for line in history {
        let Some(at) = line.wall_s.and_then(|wall_s| Duration::try_from_secs_f64(wall_s).ok()) else { continue };
        match &line.op {
            Op::Paused { queue } => {
                since.entry(queue).or_insert(at);
            }
            Op::Resumed { queue } => {
                if let Some(from) = since.remove(queue.as_str()) {
                    pauses.entry(queue).or_default().push((from, at));
                }
            }
            _ => {}
        }
    }
    for (queue, from) in since {
        pauses.entry(queue).or_default().push((from, Duration::MAX));
    }
    pauses
}
