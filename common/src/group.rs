//! Batches with an end: tasks that were submitted together, and one more that follows when all of them have ended.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::state::State;
use crate::task::{GroupId, Json, NewTask, TaskId};
use crate::template::TaskTemplate;

/// A group to be recorded together with its members.
#[derive(Debug, Clone)]
pub struct NewGroup {
    /// The id that it will have.
    pub id: GroupId,
    /// What follows.
    pub then: TaskTemplate,
}

/// A group as the ledger has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Its identity.
    pub id: GroupId,
    /// How many members it was recorded with.
    pub total: i64,
    /// What follows, as it was given.
    pub then: TaskTemplate,
    /// The task that followed; `None` while the group is open.
    pub then_id: Option<TaskId>,
    /// The members' ends, as that task was told.
    pub ended: Option<Ended>,
    /// Where the members that are still kept stand now.
    pub counts: BTreeMap<State, u64>,
    /// When it was recorded.
    pub created_at: Timestamp,
    /// When all its members had ended.
    pub finished_at: Option<Timestamp>,
}

/// How many of a group's members ended in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ended {
    /// Those with a result.
    pub completed: i64,
    /// Those that somebody, or their handlers, said stop to.
    pub cancelled: i64,
    /// Those that were given up.
    pub discarded: i64,
}

impl Ended {
    /// From where the members stand; `None` while one of them is unfinished.
    #[must_use]
    pub fn of(counts: &BTreeMap<State, u64>) -> Option<Self> {
        let mut ended = Self::default();
        for (state, count) in counts.iter().filter(|(_, count)| **count > 0) {
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            match state {
                State::Completed => ended.completed = count,
                State::Cancelled => ended.cancelled = count,
                State::Discarded => ended.discarded = count,
                State::Accepted | State::Scheduled | State::Queued | State::Running | State::Retryable => return None,
            }
        }
        Some(ended)
    }
}

/// The input of the task that follows.
#[derive(Serialize)]
struct FollowUpArgs<'a> {
    group: GroupArgs,
    args: &'a Json,
}

#[derive(Serialize)]
struct GroupArgs {
    id: GroupId,
    total: i64,
    #[serde(flatten)]
    ended: Ended,
}

/// The task that follows a group: with the group's counts, and what the client gave, in its args.
///
/// # Errors
/// None: the args are JSON already.
pub fn follow_up(id: GroupId, total: i64, ended: Ended, then: TaskTemplate) -> Result<NewTask, serde_json::Error> {
    let args = Json::of(&FollowUpArgs { group: GroupArgs { id, total, ended }, args: &then.args })?;
    Ok(NewTask::from(TaskTemplate { args, ..then }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_unfinished_member_leaves_a_group_open() {
        for state in State::ALL {
            let ended = Ended::of(&BTreeMap::from([(State::Completed, 3), (state, 1)]));
            assert_eq!(ended.is_some(), state.is_final(), "{state}");
        }
        let counts = BTreeMap::from([(State::Completed, 5), (State::Cancelled, 2), (State::Discarded, 1)]);
        assert_eq!(Ended::of(&counts), Some(Ended { completed: 5, cancelled: 2, discarded: 1 }));
        assert_eq!(Ended::of(&BTreeMap::from([(State::Running, 0)])), Some(Ended::default()));
    }

    #[test]
    fn what_the_client_gave_goes_on_as_it_was_written() {
        let text = r#"{"kind":"a","queue":"q","args":{ "x" : 1.0 },"max_attempts":3,"timeout_ms":5,"tags":{"k":"v"}}"#;
        let then: TaskTemplate = serde_json::from_str(text).unwrap();
        let id: GroupId = "01a20751-1f82-705d-a198-4567bb46f288".parse().unwrap();
        let task = follow_up(id, 3, Ended { completed: 1, cancelled: 0, discarded: 2 }, then).unwrap();
        let expected = r#"{"group":{"id":"01a20751-1f82-705d-a198-4567bb46f288","total":3,"completed":1,"cancelled":0,"discarded":2},"args":{ "x" : 1.0 }}"#;
        assert_eq!(task.args.as_str(), expected);
        assert_eq!(
            (task.max_attempts, task.timeout, &task.tags["k"][..]),
            (3, Some(std::time::Duration::from_millis(5)), "v")
        );
    }
}
