//! How long tasks wait whose worker has died, with and without the time in which nothing could have started.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Evidence, FinalTask, Line, Op, Ran, Runs, Verdict};

/// How the faults begin in whose time nothing starts: no broker, no ledger, no queue, no other worker.
pub const ABSENCES: [&str; 8] = [
    "broker node",
    "memory alarm",
    "database",
    "ledger locked",
    "table of tasks",
    "queue",
    "all workers",
    "rolling restart",
];

/// Counts from each death to the next start of what ran there. What waited for a place, or was changed and maybe put off,
/// does not count.
pub(super) fn count(evidence: &Evidence, runs: &Runs<'_>, verdict: &mut Verdict) {
    let absences = absences(&evidence.history);
    let edited: BTreeSet<&str> = evidence
        .history
        .iter()
        .filter_map(|line| if let Op::Edit(edit) = &line.op { Some(edit.task.as_str()) } else { None })
        .collect();
    let waits =
        |task: &FinalTask, next: &Ran| evidence.limits.iter().any(|limit| limit.scope.of_run(task, next).is_some());
    let counts = &mut verdict.counts;
    for task in evidence.tasks.iter().filter(|task| !task.is_once() && !edited.contains(task.id.as_str())) {
        let ran = runs.get(task.id.as_str()).map_or(&[][..], Vec::as_slice);
        for pair in ran.windows(2).filter(|pair| !waits(task, &pair[1])) {
            let (Some(killed), next) = (pair[0].killed, pair[1].began) else { continue };
            // Whoever stood still before it was killed was given up by then.
            let Some(took) = next.checked_sub(killed) else { continue };
            counts.takeovers.push(took - within(&absences, killed, next));
            counts.takeovers_in_all.push(took);
        }
    }
    counts.takeovers.sort();
    counts.takeovers_in_all.sort();
}

/// How much of a time is covered by any of these, which are sorted by their beginnings.
fn within(absences: &[(Duration, Duration)], from: Duration, to: Duration) -> Duration {
    let (mut covered, mut reached) = (Duration::ZERO, from);
    for (begin, end) in absences {
        let (begin, end) = ((*begin).max(reached), (*end).min(to));
        if end > begin {
            covered += end - begin;
            reached = end;
        }
    }
    covered
}

fn absences(history: &[Line]) -> Vec<(Duration, Duration)> {
    let mut faults: Vec<(&str, Duration, Duration)> = Vec::new();
    for line in history {
        match &line.op {
            Op::Fault { what } if ABSENCES.iter().any(|absence| what.starts_with(absence)) => {
                faults.push((what, line.at, Duration::MAX));
            }
            // What is told of a fault in between begins with its name.
            Op::Healed { what } => {
                for (_, _, to) in faults.iter_mut().filter(|(fault, ..)| fault.starts_with(what.as_str())) {
                    *to = line.at.min(*to);
                }
            }
            _ => {}
        }
    }
    let mut times: Vec<_> = faults.into_iter().map(|(_, from, to)| (from, to)).collect();
    times.sort();
    times
}
