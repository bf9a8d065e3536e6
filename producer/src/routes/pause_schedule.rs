//! `POST /v1/schedules/{name}/pause` and `POST /v1/schedules/{name}/resume`: whether its ticks are fired.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tasklane_common::schedule::Definition;

use super::put_schedule::change;
use super::schedules::named;
use crate::app::App;
use crate::caller::{Act, Caller};
use crate::error::{ApiError, Problem};
use crate::extract::Path;
use crate::scheduling::ScheduleView;

const PAUSE: Act = Act { call: "pause_schedule", told: "a schedule was paused" };
const RESUME: Act = Act { call: "resume_schedule", told: "a schedule was resumed" };

/// Pause a schedule
///
/// Nothing is fired any more when this answers, until it is resumed; ticks in that time are not made up for, and one that was due
/// and not fired yet counts as missed. A PUT that does not speak of `paused` does not resume it. All else of
/// the definition stays, whoever changes it at the same moment. Pausing one that is paused changes nothing.
#[utoipa::path(
    post, path = "/v1/schedules/{name}/pause", tag = "schedules", operation_id = "pauseSchedule",
    params(("name" = String, Path, description = "The schedule")),
    responses(
        (status = 200, description = "It is paused, perhaps since earlier", body = ScheduleView),
        (status = 404, description = "No such schedule", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn pause(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    caller: Caller,
) -> Result<Json<ScheduleView>, ApiError> {
    set(&app, &name, true, &caller).await
}

/// Resume a schedule
///
/// It goes on with the first tick after this. Resuming one that is not paused changes nothing.
#[utoipa::path(
    post, path = "/v1/schedules/{name}/resume", tag = "schedules", operation_id = "resumeSchedule",
    params(("name" = String, Path, description = "The schedule")),
    responses(
        (status = 200, description = "It goes on", body = ScheduleView),
        (status = 404, description = "No such schedule", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "It has no tick any more", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn resume(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    caller: Caller,
) -> Result<Json<ScheduleView>, ApiError> {
    set(&app, &name, false, &caller).await
}

async fn set(app: &App, name: &str, paused: bool, caller: &Caller) -> Result<Json<ScheduleView>, ApiError> {
    let name = named(name)?;
    let amended = |old: Option<&Definition>| match old {
        Some(old) => Ok(Definition { paused, ..old.clone() }),
        None => Err(ApiError::UnknownSchedule(name.to_string())),
    };
    let (view, _) = change(app, &name, (caller, if paused { PAUSE } else { RESUME }), amended).await?;
    Ok(Json(view))
}
