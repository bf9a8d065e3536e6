//! Who of several tasks with one unique key stands: decided here for both ledgers, inside their transactions.

use std::collections::{HashMap, HashSet};

use super::Submission;
use crate::state::{Event, State, next};
use crate::task::{OnConflict, TaskId, Unique};

/// The task that holds a key, and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// The task.
    pub id: TaskId,
    /// Its state at this moment.
    pub state: State,
}

/// What a submission comes to.
#[derive(Debug)]
pub(super) struct Plan {
    /// What is to be recorded.
    pub(super) fresh: Submission,
    /// What is not, by index, and the task that stands for it.
    pub(super) existing: Vec<(usize, TaskId)>,
    /// What is to be cancelled first, and the task that comes in its place.
    pub(super) replaced: Vec<(TaskId, TaskId)>,
}

/// The unique keys of a submission.
pub(super) fn keys(submission: &Submission) -> Vec<&str> {
    submission.tasks.iter().filter_map(|task| task.unique.as_ref()).map(|unique| unique.key.as_str()).collect()
}

/// Judges a submission by those who hold its keys; a key that it has twice stands in its own way.
///
/// # Errors
/// The tasks that cannot be recorded, by index, each with the task in its way.
pub(super) fn decide(submission: &Submission, holders: &HashMap<String, Holder>) -> Result<Plan, Vec<(usize, Holder)>> {
    let mut own = HashMap::new();
    let (mut conflicts, mut existing, mut replaced) = (Vec::new(), Vec::new(), Vec::new());
    for (index, task) in submission.tasks.iter().enumerate() {
        let Some(Unique { key, on_conflict, .. }) = &task.unique else { continue };
        if let Some(first) = own.insert(key.as_str(), task.id) {
            conflicts.push((index, Holder { id: first, state: State::Accepted }));
            continue;
        }
        match (holders.get(key), on_conflict) {
            (None, _) => {}
            (Some(holder), OnConflict::ReturnExisting) => existing.push((index, holder.id)),
            (Some(holder), OnConflict::ReplaceWaiting) if waits(holder.state) => replaced.push((holder.id, task.id)),
            (Some(holder), OnConflict::ReplaceWaiting | OnConflict::Reject) => conflicts.push((index, *holder)),
        }
    }
    if !conflicts.is_empty() {
        return Err(conflicts);
    }
    let mut fresh = submission.clone();
    let left_out: HashSet<TaskId> = existing.iter().map(|(index, _)| submission.tasks[*index].id).collect();
    fresh.tasks.retain(|task| !left_out.contains(&task.id));
    Ok(Plan { fresh, existing, replaced })
}

/// Why a task was cancelled that another one replaced.
pub(super) fn replaced_by(id: TaskId) -> String {
    format!("replaced by {id}")
}

fn waits(state: State) -> bool {
    next(state, Event::Claim).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::conformance::{new_task, submission};

    fn asked(on_conflict: OnConflict) -> Submission {
        let unique = |key: &str| Some(Unique { key: key.to_owned(), window: None, on_conflict });
        let task = |key| crate::task::NewTask { unique: unique(key), ..new_task() };
        submission(vec![new_task(), task("held"), task("free")])
    }

    #[test]
    fn the_holder_decides_what_may_be_done() {
        for state in State::ALL {
            let holder = Holder { id: TaskId::new(), state };
            let holders = HashMap::from([("held".to_owned(), holder)]);
            let judge = |on_conflict| decide(&asked(on_conflict), &holders);
            assert_eq!(judge(OnConflict::Reject).unwrap_err(), [(1, holder)]);
            let plan = judge(OnConflict::ReturnExisting).unwrap();
            assert_eq!((plan.fresh.tasks.len(), plan.existing, plan.replaced), (2, vec![(1, holder.id)], vec![]));
            match (judge(OnConflict::ReplaceWaiting), waits(state)) {
                (Ok(plan), true) => assert_eq!((plan.fresh.tasks.len(), plan.replaced.len()), (3, 1)),
                (Err(conflicts), false) => assert_eq!(conflicts, [(1, holder)]),
                (judged, waits) => panic!("{state}: {judged:?} although waiting is {waits}"),
            }
        }
    }

    #[test]
    fn a_submission_does_not_contradict_itself() {
        for on_conflict in [OnConflict::Reject, OnConflict::ReturnExisting, OnConflict::ReplaceWaiting] {
            let mut twice = asked(on_conflict);
            twice.tasks[2].unique = twice.tasks[1].unique.clone();
            assert_eq!(decide(&twice, &HashMap::new()).unwrap_err()[0].1.id, twice.tasks[1].id);
        }
    }
}
