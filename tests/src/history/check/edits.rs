//! Changes of waiting tasks: what was answered holds for each start after it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::{Answered, Edit};
use super::{Broken, Evidence, FinalTask, Line, Op, Ran, Runs, Verdict};

/// A change.
#[derive(Debug)]
struct Change<'h> {
    /// Before it was sent.
    asked: Duration,
    /// As the client knew it in the end.
    edit: &'h Edit,
}

/// The changes of one task by their numbers.
type Edits<'h> = BTreeMap<u64, Change<'h>>;

/// Did each run have what was changed before it, and nothing that was refused?
pub(super) fn check(evidence: &Evidence, runs: &Runs<'_>, verdict: &mut Verdict) {
    let edits = edits(&evidence.history);
    for edit in edits.values().flat_map(Edits::values) {
        let counts = &mut verdict.counts;
        match edit.edit.outcome {
            Answered::Ok => counts.edits += 1,
            Answered::Unknown => counts.edits_unknown += 1,
            Answered::Fail => counts.edits_refused += 1,
        }
    }
    let none = Edits::new();
    for task in &evidence.tasks {
        let edits = edits.get(task.id.as_str()).unwrap_or(&none);
        let ran = runs.get(task.id.as_str()).map_or(&[][..], Vec::as_slice);
        for run in ran {
            check_args(
                task,
                edits,
                (run.edition, run.run.fence, run.began),
                &format!("it started as {run:?}"),
                verdict,
            );
        }
        check_args(task, edits, (task.edition, u64::MAX, Duration::MAX), "it ended so", verdict);
        check_last(task, edits, ran, verdict);
    }
}

fn edits(history: &[Line]) -> BTreeMap<&str, Edits<'_>> {
    let mut all: BTreeMap<&str, Edits<'_>> = BTreeMap::new();
    for line in history {
        let Op::Edit(edit) = &line.op else { continue };
        let new = Change { asked: line.at, edit };
        let change = all.entry(&edit.task).or_default().entry(edit.number).or_insert(new);
        change.asked = change.asked.min(line.at);
        // Its answer tells more than what was noted before it was sent.
        if change.edit.outcome == Answered::Unknown {
            change.edit = edit;
        }
    }
    all
}

/// Were the args of this edition right under that fence, at that moment?
fn check_args(task: &FinalTask, edits: &Edits<'_>, given: (u64, u64, Duration), what: &str, verdict: &mut Verdict) {
    let (edition, fence, at) = given;
    let allowed = allowed(edits, fence, at);
    if !allowed.contains(&edition) {
        let told = format!("with the args of change {edition}, and those of {allowed:?} are right: {what}");
        verdict.blame(Broken::Misedited, &task.id, format!("{told}, after {edits:?}"));
    }
}

/// The editions that the args may be of under a fence: of the last change that was surely made before, of those after it
/// that were made at about that time, and of those that may be made at any time, since nobody has answered.
fn allowed(edits: &Edits<'_>, fence: u64, at: Duration) -> BTreeSet<u64> {
    let mut allowed = BTreeSet::from([0]);
    let asked = edits.iter().filter(|(_, change)| change.edit.args && change.asked <= at);
    for (number, Change { edit, .. }) in asked.clone().filter(|(_, change)| change.edit.outcome == Answered::Ok) {
        if edit.fence.is_some_and(|told| told < fence) {
            allowed.clear();
        }
        allowed.insert(*number);
    }
    let open = asked.filter(|(_, change)| change.edit.outcome == Answered::Unknown);
    allowed.extend(open.map(|(number, _)| *number));
    allowed
}

/// Did the run that completed it have the args that the ledger has, and was it granted no sooner than asked for last?
fn check_last(task: &FinalTask, edits: &Edits<'_>, ran: &[Ran], verdict: &mut Verdict) {
    let Some(last) = ran.iter().find(|run| task.is_completed_by(&run.run)) else { return };
    if last.edition != task.edition {
        let told = format!("the args in the ledger are of change {}, and it ran as {last:?}", task.edition);
        verdict.blame(Broken::Misedited, &task.id, told);
    }
    let open = edits.values().any(|change| change.edit.outcome == Answered::Unknown);
    let timed = edits.values().rev().find_map(|Change { edit, .. }| Some((edit.fence?, edit.run_at?)));
    let Some((told, run_at)) = timed.filter(|(told, _)| !open && *told < task.fence) else { return };
    let granted = task.started_at.unwrap_or(Duration::MAX);
    if granted < run_at {
        let told = format!("granted at {granted:?}, not to start before {run_at:?} since fence {told}: {last:?}");
        verdict.blame(Broken::Misedited, &task.id, told);
    }
}
