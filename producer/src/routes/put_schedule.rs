//! `PUT /v1/schedules/{name}`: makes a schedule, or gives it another definition.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tasklane_common::ledger::{Changed, ScheduleChange};
use tasklane_common::schedule::{Definition, ScheduleName};
use tokio::time::sleep;

use crate::app::App;
use crate::error::{ApiError, FieldError, Problem};
use crate::extract;
use crate::scheduling::{self, BODY_BYTES_MAX, PutSchedule, ScheduleView};

/// How often a change is made again that others overtake.
const TRIES: u32 = 20;

/// Make or replace a schedule
///
/// From then on each tick of `cron` in `timezone` submits `task`, once, with the tags `schedule` and `tick`. The same
/// request may be repeated: a definition that stays the same changes nothing. While `cron` and `timezone` stay, the
/// schedule goes on where it stands; else it begins with the next tick.
#[utoipa::path(
    put, path = "/v1/schedules/{name}", tag = "schedules", operation_id = "putSchedule",
    params(("name" = String, Path, max_length = 128, description = "Dot-separated words of `A-Z a-z 0-9 _ -`")),
    request_body = PutSchedule,
    responses(
        (status = 201, description = "Made", body = ScheduleView, headers(
            ("Location" = String, description = "Where to look at it"),
        )),
        (status = 200, description = "Replaced, or the same as before", body = ScheduleView),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "There are as many schedules as there may be", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn put(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let name = ScheduleName::parse(&name)
        .map_err(|error| ApiError::InvalidSchedule(vec![FieldError::new("name", error.to_string())]))?;
    let definition = scheduling::definition(&body, &app.rules)?;
    let (view, made) = change(&app, &name, |_| Ok(definition.clone())).await?;
    Ok(answer(view, &name, made))
}

/// Makes of the definition that is there, if there is one, another; tells what holds then, and whether it was made.
///
/// The ledger writes only where the schedule still is as it was read, so nobody else's change is lost.
pub(super) async fn change(
    app: &App,
    name: &ScheduleName,
    new: impl Fn(Option<&Definition>) -> Result<Definition, ApiError>,
) -> Result<(ScheduleView, bool), ApiError> {
    let ledger = app.gate.ledger();
    for tried in 1..=TRIES {
        let (now, old) = app.gate.ask(ledger.schedule(name.clone())).await?;
        let definition = new(old.as_ref().map(|old| &old.definition))?;
        if let Some(same) = old.as_ref().filter(|old| old.definition == definition) {
            return Ok((scheduling::view(same.clone(), now), false));
        }
        let change = ScheduleChange {
            name: name.clone(),
            replaces: old.as_ref().map(|old| old.revision),
            next: scheduling::next(old.as_ref(), &definition, now)?,
            definition,
        };
        match app.gate.ask(ledger.change_schedule(change)).await? {
            Changed::Applied(schedule) => return Ok((scheduling::view(*schedule, now), old.is_none())),
            Changed::Full => return Err(ApiError::TooManySchedules),
            // Somebody has changed or deleted it: what is to be replaced is read again. In step with him it would come second
            // again and again.
            Changed::Overtaken => sleep(Duration::from_millis(tried.into())).await,
        }
    }
    Err(ApiError::Overloaded)
}

fn answer(view: ScheduleView, name: &ScheduleName, made: bool) -> Response {
    if !made {
        return Json(view).into_response();
    }
    let mut response = (StatusCode::CREATED, Json(view)).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/schedules/{name}")) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}
