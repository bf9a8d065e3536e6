//! Batches with an end: one task follows each, when all of its tasks have ended, and is told how.

use std::collections::BTreeMap;
use std::time::Duration;

use tasklane_common::task::Guarantee;

use super::{Broken, Evidence, FinalTask, Followed, Ran, Runs, Verdict};

/// Has one task followed each group, and no sooner?
pub(super) fn check(evidence: &Evidence, runs: &Runs<'_>, verdict: &mut Verdict) {
    let mut groups: BTreeMap<&str, Vec<&FinalTask>> = BTreeMap::new();
    let mut followers: BTreeMap<&str, Vec<(&FinalTask, &Followed)>> = BTreeMap::new();
    for task in &evidence.tasks {
        if let Some(group) = &task.group {
            groups.entry(group).or_default().push(task);
        }
        if let Some(told) = &task.follows {
            followers.entry(&told.id).or_default().push((task, told));
        }
    }
    for (group, members) in &groups {
        match &followers.remove(group).unwrap_or_default()[..] {
            // Of what has not ended the checker tells elsewhere.
            [] if members.iter().any(|member| !is_final(member)) => {}
            [] => verdict.blame(Broken::Unfollowed, group, format!("all of {members:?} have ended")),
            [(follower, told)] => {
                verdict.counts.followed += 1;
                check_told(group, members, told, verdict);
                check_order(follower, members, runs, verdict);
            }
            more => verdict.blame(Broken::FollowedTwice, group, format!("{more:?}")),
        }
    }
    for (group, tasks) in followers {
        verdict.blame(Broken::Unasked, group, format!("no task is a member of it, and there is {tasks:?}"));
    }
}

fn is_final(task: &FinalTask) -> bool {
    matches!(task.state.as_str(), "completed" | "cancelled" | "discarded")
}

/// Nobody replays a member here, so they stand as they stood then.
fn check_told(group: &str, members: &[&FinalTask], told: &Followed, verdict: &mut Verdict) {
    let count = |state| members.iter().filter(|member| member.state == state).count();
    let found = Followed {
        id: group.to_owned(),
        total: members.len(),
        completed: count("completed"),
        cancelled: count("cancelled"),
        discarded: count("discarded"),
    };
    if found != *told {
        verdict.blame(Broken::FollowedWrongly, group, format!("told {told:?}, and there is {found:?}"));
    }
}

fn check_order(follower: &FinalTask, members: &[&FinalTask], runs: &Runs<'_>, verdict: &mut Verdict) {
    let ran = |task: &FinalTask| runs.get(task.id.as_str()).map_or(&[][..], Vec::as_slice);
    let Some(began) = ran(follower).first().map(|run| run.began) else { return };
    for member in members {
        let later = ran(member).iter().find(|run| run.began > began || !has_ended(member, run, began));
        if let Some(run) = later {
            let told = format!("{} began at {began:?}, and of its group {run:?}", follower.id);
            verdict.blame(Broken::FollowedEarly, &member.id, told);
        }
    }
}

/// Whether the run was over by then, of which the task was completed. Others were given up by the ledger, and may go on for
/// a moment; a transactional one is over with its commit, and says so a moment later.
fn has_ended(member: &FinalTask, run: &Ran, by: Duration) -> bool {
    !member.is_completed_by(&run.run)
        || member.guarantee == Guarantee::Transactional
        || run.over().is_some_and(|over| over <= by)
}
