//! What is said between a ledger and those who close groups.

use crate::group::Ended;
use crate::task::{GroupId, TaskId};

/// A look at some of the open groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedGroups {
    /// Those whose members have all ended, by id.
    pub ended: Vec<GroupId>,
    /// Where the next look begins: behind this one; `None` when all open groups were looked at.
    pub next: Option<GroupId>,
}

/// A group that was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    /// The task that follows.
    pub then_id: TaskId,
    /// What it was told of the members.
    pub ended: Ended,
}
