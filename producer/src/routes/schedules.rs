//! `GET` and `DELETE /v1/schedules/{name}`, and `GET /v1/schedules`: what fires when.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use serde::Serialize;
use tasklane_common::ledger::Unreadable;
use tasklane_common::schedule::ScheduleName;
use tasklane_common::task::truncate;
use utoipa::ToSchema;

use crate::app::App;
use crate::caller::{Act, Caller};
use crate::error::{ApiError, Problem};
use crate::extract::Path;
use crate::scheduling::{self, ScheduleView};

/// A page of schedules.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ScheduleList {
    /// By name.
    schedules: Vec<ScheduleView>,
    /// Those of this page whose definition this producer cannot read, as one of a later release; it does not fire them.
    unreadable: Vec<UnreadableSchedule>,
    /// Give it as `cursor` for the next page; null on the last.
    next_cursor: Option<String>,
}

/// A schedule that this producer cannot read.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct UnreadableSchedule {
    /// Its name.
    name: ScheduleName,
    /// What is wrong with its definition.
    problem: String,
}

/// List the schedules
#[utoipa::path(
    get, path = "/v1/schedules", tag = "schedules", operation_id = "listSchedules",
    params(
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "How many schedules; defaults to 50"),
        ("cursor" = Option<String>, Query, description = "The `next_cursor` of the page before"),
    ),
    responses(
        (status = 200, description = "A page of schedules", body = ScheduleList),
        (status = 400, description = "A parameter that does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Json<ScheduleList>, ApiError> {
    let (after, limit) = scheduling::page(query.as_deref())?;
    let page = app.gate.look(app.gate.ledger().schedules(after, limit)).await?;
    let schedules = page.schedules.into_iter().map(|schedule| scheduling::view(schedule, page.now)).collect();
    let unreadable = page.unreadable.into_iter();
    let unreadable = unreadable.map(|Unreadable { name, problem, .. }| UnreadableSchedule { name, problem }).collect();
    Ok(Json(ScheduleList { schedules, unreadable, next_cursor: page.next.as_ref().map(scheduling::cursor) }))
}

/// Look at a schedule
#[utoipa::path(
    get, path = "/v1/schedules/{name}", tag = "schedules", operation_id = "getSchedule",
    params(("name" = String, Path, description = "The schedule")),
    responses(
        (status = 200, description = "The schedule, with its next ticks", body = ScheduleView),
        (status = 404, description = "No such schedule", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn one(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<ScheduleView>, ApiError> {
    let name = named(&name)?;
    let (now, schedule) = app.gate.look(app.gate.ledger().schedule(name.clone())).await?;
    let schedule = schedule.ok_or_else(|| ApiError::UnknownSchedule(name.to_string()))?;
    Ok(Json(scheduling::view(schedule, now)))
}

/// Delete a schedule
///
/// Nothing is fired any more when this answers. Tasks that were fired stay as they are.
#[utoipa::path(
    delete, path = "/v1/schedules/{name}", tag = "schedules", operation_id = "deleteSchedule",
    params(("name" = String, Path, description = "The schedule")),
    responses(
        (status = 204, description = "It is deleted"),
        (status = 404, description = "No such schedule", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    caller: Caller,
) -> Result<StatusCode, ApiError> {
    let name = named(&name)?;
    let act = Act { call: "delete_schedule", told: "a schedule was deleted" };
    let deed = caller.begins(act, format_args!("schedule={name}"));
    if app.gate.ask(app.gate.ledger().delete_schedule(name.clone())).await? {
        deed.done();
        return Ok(StatusCode::NO_CONTENT);
    }
    deed.nothing();
    Err(ApiError::UnknownSchedule(name.to_string()))
}

/// A text that is no name is the name of no schedule.
pub(super) fn named(text: &str) -> Result<ScheduleName, ApiError> {
    ScheduleName::parse(text).map_err(|_| ApiError::UnknownSchedule(truncate(text, 64)))
}
