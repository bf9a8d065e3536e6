//! Groups at the API: what may follow one, and how one is shown. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use tasklane_common::group::{Ended, Group};
use tasklane_common::state::State;
use tasklane_common::task::{GroupId, Kind, TaskId};
use tasklane_common::template::TaskTemplate;
use utoipa::ToSchema;

use crate::args;
use crate::error::FieldError;
use crate::request::{Rules, SubmitTask};
use crate::template::{Place, template};

const THEN: Place = Place {
    path: "then",
    of: "group",
    no_time: "it starts when all tasks have ended",
    no_unique_key: "a group is followed by one task",
    reserved_tags: &[],
};

/// Checks what is to follow a group.
pub fn then(asked: SubmitTask, rules: &Rules, faults: &mut Vec<FieldError>) -> Option<TaskTemplate> {
    let then = template(Some(asked), THEN, rules, faults)?;
    // It gets them in an object, one level deeper than they were given.
    if let Err(message) = args::check(&format!("[{}]", then.args.as_str())) {
        faults.push(FieldError::new("then.args", message));
        return None;
    }
    Some(then)
}

/// A group as the API shows it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GroupView {
    /// Its identity.
    id: GroupId,
    /// How many tasks it was submitted with.
    total: i64,
    /// Where the tasks that are still kept stand now; states without tasks are left out.
    counts: BTreeMap<State, u64>,
    /// How the tasks had ended, as the one that follows was told; null while the group is open.
    ended: Option<Ended>,
    /// What follows.
    then: Then,
    /// When it was recorded.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    created_at: Timestamp,
    /// When all tasks had ended; null while the group is open.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    finished_at: Option<Timestamp>,
}

/// The task that follows a group.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Then {
    /// Its id; null while the group is open.
    id: Option<TaskId>,
    /// The work to do.
    kind: Kind,
}

impl From<Group> for GroupView {
    fn from(group: Group) -> Self {
        let Group { id, total, then, then_id, ended, counts, created_at, finished_at } = group;
        Self { id, total, counts, ended, then: Then { id: then_id, kind: then.kind }, created_at, finished_at }
    }
}
