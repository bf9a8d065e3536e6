//! `PUT /v1/schedules/{name}`: makes a schedule, or gives it another definition.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tasklane_common::ledger::{Changed, GivenUp, ScheduleChange};
use tasklane_common::schedule::{Definition, Schedule, ScheduleName};
use tasklane_common::ticker;
use tokio::time::{Instant, sleep};

use crate::app::App;
use crate::caller::{Act, Caller, Deed};
use crate::error::{ApiError, FieldError, Problem};
use crate::extract;
use crate::extract::Path;
use crate::scheduling::{self, BODY_BYTES_MAX, PutSchedule, ScheduleView};

/// How often a change is made again that others overtake.
const TRIES: u32 = 20;
/// How long due ticks of the old definition are given to be fired: every process looks several times a second.
const TICKS_PATIENCE: Duration = Duration::from_secs(3);
const TICKS_PAUSE: Duration = Duration::from_millis(20);
const MAKE: Act = Act { call: "put_schedule", told: "a schedule was made" };
const REPLACE: Act = Act { call: "put_schedule", told: "a schedule was replaced" };

/// Make or replace a schedule
///
/// From then on each tick of `cron` in `timezone` submits `task`, once, with the tags `schedule` and `tick`. The same
/// request may be repeated: a definition that stays the same changes nothing. While `cron` and `timezone` stay, the
/// schedule goes on where it stands; else it begins with the next tick, once what was due before is fired or counted as missed.
/// Without `paused` a paused schedule stays paused.
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
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let name = ScheduleName::parse(&name)
        .map_err(|error| ApiError::InvalidSchedule(vec![FieldError::new("name", error.to_string())]))?;
    let asked = scheduling::asked(&body, &app.rules)?;
    let (view, made) = change(&app, &name, (&caller, REPLACE), |old| Ok(asked.after(old))).await?;
    Ok(answer(view, &name, made))
}

/// Makes of the definition that is there, if there is one, another; tells what holds then, and whether it was made.
///
/// The ledger writes only where the schedule still is as it was read, so nobody else's change is lost. Ticks that are due under
/// the old definition are given a moment to be fired, unless somebody pauses it; after that they count as missed.
pub(super) async fn change(
    app: &App,
    name: &ScheduleName,
    (caller, act): (&Caller, Act),
    new: impl Fn(Option<&Definition>) -> Result<Definition, ApiError>,
) -> Result<(ScheduleView, bool), ApiError> {
    let patience = Instant::now() + TICKS_PATIENCE;
    let mut tries: u32 = 0;
    while tries < TRIES {
        let (now, old) = app.gate.look(app.gate.ledger().schedule(name.clone())).await?;
        let definition = new(old.as_ref().map(|old| &old.definition))?;
        if let Some(same) = old.as_ref().filter(|old| old.definition == definition) {
            return Ok((scheduling::view(same.clone(), now), false));
        }
        let given_up = scheduling::given_up(old.as_ref(), &definition, now);
        if given_up.is_some() && !definition.paused && Instant::now() < patience {
            sleep(TICKS_PAUSE).await;
            continue;
        }
        let change = ScheduleChange {
            name: name.clone(),
            replaces: old.as_ref().map(|old| old.revision),
            next: scheduling::next(old.as_ref(), &definition, now)?,
            definition,
            given_up,
            caller: caller.known(),
        };
        let deed = begins(caller, act, old.as_ref(), &change);
        if let Some(schedule) = written(app, deed, change).await? {
            return Ok((scheduling::view(schedule, now), old.is_none()));
        }
        tries += 1;
        // In step with a rival it would come second again and again.
        sleep(Duration::from_millis(tries.into())).await;
    }
    Err(ApiError::Overloaded)
}

fn begins(caller: &Caller, act: Act, old: Option<&Schedule>, change: &ScheduleChange) -> Deed {
    let Some(old) = old else { return caller.begins(MAKE, format_args!("schedule={}", change.name)) };
    let mut deed = caller.begins(act, format_args!("schedule={}", change.name));
    let mut detail = format!("changed: {}", old.definition.differences(&change.definition).join(", "));
    if change.definition.paused && old.definition.paused {
        detail.push_str("; it stays paused");
    }
    if let Some(GivenUp { ticks, .. }) = change.given_up {
        detail.push_str(&format!("; {ticks} due ticks are not fired any more"));
    }
    deed.detail(detail);
    deed
}

/// `None` when somebody else has changed or deleted it, or has fired a tick that was to be given up: it is to be read again.
async fn written(app: &App, deed: Deed, change: ScheduleChange) -> Result<Option<Schedule>, ApiError> {
    let (name, given_up) = (change.name.clone(), change.given_up.map_or(0, |given_up| given_up.ticks));
    match app.gate.ask(app.gate.ledger().change_schedule(change)).await? {
        Changed::Applied(schedule) => {
            deed.done();
            ticker::count_missed(&name, given_up);
            Ok(Some(*schedule))
        }
        Changed::Full => {
            deed.nothing();
            Err(ApiError::TooManySchedules)
        }
        Changed::Overtaken => {
            deed.nothing();
            Ok(None)
        }
    }
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
