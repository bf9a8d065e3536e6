//! How long tasks wait whose worker has died: alone, and while something else was broken as well.

use std::time::Duration;

use super::{Evidence, Line, Op, Ran, Runs, Verdict};

/// The fault that takes a single worker away, and nothing else with it.
pub const WORKER_DEATH: &str = "worker killed";

/// How long before a death is known its fault may have been over.
const BEFORE: Duration = Duration::from_secs(1);

/// Counts from each death to the next start of what ran there.
pub(super) fn count(evidence: &Evidence, runs: &Runs<'_>, verdict: &mut Verdict) {
    let others = other_faults(&evidence.history);
    let counts = &mut verdict.counts;
    for task in evidence.tasks.iter().filter(|task| !task.is_once()) {
        let ran = runs.get(task.id.as_str()).map_or(&[][..], Vec::as_slice);
        for (at, pair) in ran.windows(2).enumerate() {
            let (Some(killed), next) = (pair[0].killed, pair[1].began) else { continue };
            // Whoever stood still before it was killed was given up by then.
            let Some(took) = next.checked_sub(killed) else { continue };
            let undisturbed = !others.iter().any(|(from, to)| *from < next && killed < *to + BEFORE);
            // From its second crash on a task has to wait.
            let first = ran[..at].iter().all(|run: &Ran| run.killed.is_none());
            if undisturbed && first { &mut counts.takeovers } else { &mut counts.late_takeovers }.push(took);
        }
    }
    counts.takeovers.sort();
    counts.late_takeovers.sort();
}

/// When there were other faults: from, and to.
fn other_faults(history: &[Line]) -> Vec<(Duration, Duration)> {
    let mut faults: Vec<(&str, Duration, Duration)> = Vec::new();
    for line in history {
        match &line.op {
            Op::Fault { what } if !what.starts_with(WORKER_DEATH) => faults.push((what, line.at, Duration::MAX)),
            Op::Healed { what } => {
                for (_, _, to) in faults.iter_mut().filter(|(fault, ..)| fault.starts_with(what.as_str())) {
                    *to = line.at.min(*to);
                }
            }
            _ => {}
        }
    }
    faults.into_iter().map(|(_, from, to)| (from, to.min(Duration::MAX - BEFORE))).collect()
}
