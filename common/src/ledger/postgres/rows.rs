//! Between rows and what they stand for.

use std::collections::BTreeMap;

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::fault::Fault;
use crate::clock::timestamp;
use crate::ledger::caller::last_change;
use crate::state::{Event, State, TRANSITIONS};
use crate::task::{Fence, GroupId, Guarantee, Json, Kind, Lane, Priority, QueueName, Task, TaskId, WorkerId};

/// The codes of the states in which an event may happen: the condition of its write.
pub(super) fn codes_for(event: Event) -> Vec<i16> {
    TRANSITIONS.iter().filter(|(_, by, _)| *by == event).map(|(from, _, _)| from.code()).collect()
}

pub(super) const fn guarantee_code(guarantee: Guarantee) -> i16 {
    match guarantee {
        Guarantee::AtLeastOnce => 0,
        Guarantee::AtMostOnce => 1,
        Guarantee::Transactional => 2,
    }
}

pub(super) fn guarantee_of(code: i16) -> Result<Guarantee, Fault> {
    [Guarantee::AtLeastOnce, Guarantee::AtMostOnce, Guarantee::Transactional]
        .into_iter()
        .find(|guarantee| guarantee_code(*guarantee) == code)
        .ok_or_else(|| Fault::corrupt(format!("{code} is not a guarantee")))
}

pub(super) fn state_of(code: i16) -> Result<State, Fault> {
    State::from_code(code).ok_or_else(|| Fault::corrupt(format!("{code} is not a state")))
}

fn priority_of(code: i16) -> Result<Priority, Fault> {
    Priority::from_code(code).ok_or_else(|| Fault::corrupt(format!("{code} is not a priority")))
}

pub(super) fn lane_of(queue: &str, priority: i16) -> Result<Lane, Fault> {
    Ok(Lane { queue: QueueName::parse(queue).map_err(Fault::corrupt)?, priority: priority_of(priority)? })
}

/// Free text without NUL, the one character that PostgreSQL's text cannot hold.
pub(super) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// The task behind a row with all columns of the table.
pub(super) fn task_of(row: &PgRow) -> Result<Task, Fault> {
    let text = |column: &str| row.try_get::<&str, _>(column);
    let optional = |column: &str| row.try_get::<Option<&str>, _>(column);
    let time = |column: &str| row.try_get::<i64, _>(column).map(timestamp);
    let result = optional("result")?.map(json_of).transpose()?;
    let optional_time = |column: &str| row.try_get::<Option<i64>, _>(column).map(|at| at.map(timestamp));
    let state = state_of(row.try_get("state")?)?;
    let held = state == State::Accepted && row.try_get::<Option<i64>, _>("due_at")?.is_none();
    Ok(Task {
        id: TaskId(row.try_get("id")?),
        kind: Kind::parse(text("kind")?).map_err(Fault::corrupt)?,
        queue: QueueName::parse(text("queue")?).map_err(Fault::corrupt)?,
        state,
        args: json_of(text("args")?)?,
        tags: optional("tags")?.map_or_else(|| Ok(BTreeMap::new()), serde_json::from_str).map_err(Fault::corrupt)?,
        priority: priority_of(row.try_get("priority")?)?,
        attempt: row.try_get("attempt")?,
        max_attempts: row.try_get("max_attempts")?,
        fence: Fence(row.try_get("fence")?),
        result_expired: state == State::Completed && result.is_none(),
        result,
        errors: optional("errors")?.map_or_else(|| Ok(Vec::new()), serde_json::from_str).map_err(Fault::corrupt)?,
        reason: row.try_get("reason")?,
        created_at: time("created_at")?,
        run_at: time("run_at")?,
        started_at: optional_time("started_at")?,
        finished_at: optional_time("finished_at")?,
        cancel_requested_at: optional_time("cancel_requested_at")?,
        worker_id: row.try_get::<Option<Uuid>, _>("worker_id")?.map(WorkerId),
        timeout_ms: row.try_get("timeout_ms")?,
        result_ttl_ms: row.try_get("result_ttl_ms")?,
        unique_key: row.try_get("unique_key")?,
        group_id: row.try_get::<Option<Uuid>, _>("group_id")?.map(GroupId),
        concurrency_key: row.try_get("concurrency_key")?,
        limited_by: row.try_get::<Option<String>, _>("limited_by")?.filter(|_| held),
        retried_from: row.try_get::<Option<Uuid>, _>("retried_from")?.map(TaskId),
        retried_by: row.try_get::<Option<Uuid>, _>("retried_by")?.map(TaskId),
        last_change: optional("last_change")?.map(last_change).transpose().map_err(Fault::corrupt)?,
    })
}

pub(super) fn json_of(text: &str) -> Result<Json, Fault> {
    Json::parse(text.to_owned()).map_err(Fault::corrupt)
}
