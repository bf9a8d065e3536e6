//! `POST /v1/tasks/retry`: all failures that meet a filter, some thousands a call.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use jiff::Timestamp;
use serde::Serialize;
use tasklane_common::events::Happening;
use tasklane_common::ledger::{Holder, Replayed};
use tasklane_common::state::{Event, State as TaskState, next};
use tasklane_common::task::{Task, TaskId};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::cancel::BODY_BYTES_MAX;
use crate::app::App;
use crate::caller::{Act, Caller, Deed};
use crate::error::{ApiError, Problem};
use crate::retrying::{self, Retries, RetryTasks};
use crate::sweep::{PAGE, TASKS_MAX, TIME_MAX};
use crate::{extract, listing};

/// How far the retry has come.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct RetriedTasks {
    /// How many will run again; in a dry run, would.
    retried: u64,
    /// How many stay as they are, since another task holds their unique key; in a dry run, would.
    conflicts: u64,
    /// Give it as `cursor` to go on with the older tasks; null when none is left.
    next_cursor: Option<String>,
}

/// Run many failures again
///
/// Or start many tasks that wait for their time: `state` `retryable` or `scheduled`.
/// Goes from the newest task to the oldest, at most 10,000 a call: repeat with `cursor` until `next_cursor` is null. With
/// `per_second` the starts are spread evenly, over all calls that follow each other by `cursor`. What was retried stays so
/// when a later part fails. Tasks with the reason `poison` have taken down the workers that ran them: they are left out unless
/// `reason` asks for them.
#[utoipa::path(
    post, path = "/v1/tasks/retry", tag = "tasks", operation_id = "retryTasks",
    request_body = RetryTasks,
    responses(
        (status = 200, description = "How many tasks will run again, and whether there may be more", body = RetriedTasks),
        (status = 400, description = "Not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is not `application/json`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field does not fit, or there is no filter", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way; repeat the call", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn retry_many(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<RetriedTasks>, ApiError> {
    extract::expect_json(&headers)?;
    let body = app.bodies.reader(&headers, body, "the body", BODY_BYTES_MAX).await?.whole().await?;
    let Retries { mut query, mut pace, replaced, dry_run } = retrying::many(&body, PAGE, Timestamp::now())?;
    let until = Instant::now() + TIME_MAX;
    let (mut done, mut keys) = (RetriedTasks::default(), HashSet::new());
    let act = Act { call: "retry", told: "tasks were started again" };
    let mut deed = (!dry_run).then(|| caller.begins(act, listing::told(&query)));
    loop {
        let mut page = app.gate.look(app.gate.ledger().list(query.clone())).await?;
        page.tasks.retain(|task| retrying::is_meant(&query, task) && (replaced || task.retried_by.is_none()));
        if dry_run {
            let held = held(&app, &page.tasks, &mut keys).await?;
            done.conflicts += held;
            done.retried += page.tasks.len() as u64 - held;
        } else if !page.tasks.is_empty() {
            let now = Timestamp::now();
            let replays: Vec<(TaskId, Duration)> = page.tasks.iter().map(|task| (task.id, pace.delay(now))).collect();
            let replayed = app.gate.ask(app.gate.ledger().replay_many(replays, caller.known())).await?;
            let retried = done.retried;
            done.count(&replayed);
            if let Some(deed) = &mut deed {
                deed.count(done.retried - retried);
            }
            tell_of_each(&app, &page.tasks, &replayed);
        }
        query.before = page.next;
        if page.next.is_none() || done.retried + done.conflicts >= TASKS_MAX || Instant::now() >= until {
            done.next_cursor = page.next.map(|next| pace.cursor(next));
            deed.map(Deed::done).unwrap_or_default();
            return Ok(Json(done));
        }
    }
}

/// How many of these tasks another one keeps from starting: it holds their unique key, or is started first.
async fn held(app: &App, tasks: &[Task], taken: &mut HashSet<String>) -> Result<u64, ApiError> {
    let keyed: Vec<_> = tasks.iter().filter(|task| task.state.is_final()).collect();
    let keys: Vec<String> = keyed.iter().filter_map(|task| task.unique_key.clone()).collect();
    if keys.is_empty() {
        return Ok(0);
    }
    let holders: HashMap<String, Holder> = app.gate.ask(app.gate.ledger().holders(keys)).await?.into_iter().collect();
    let mut held = 0;
    for (task, key) in keyed.iter().filter_map(|task| Some((task, task.unique_key.as_ref()?))) {
        let by_another = holders.get(key).is_some_and(|holder| holder.id != task.id);
        if by_another || !taken.insert(key.clone()) {
            held += 1;
        }
    }
    Ok(held)
}

impl RetriedTasks {
    fn count(&mut self, replayed: &[(TaskId, Replayed)]) {
        for (_, replayed) in replayed {
            match replayed {
                replayed if is_ours(replayed) => self.retried += 1,
                Replayed::KeyHeld(_) => self.conflicts += 1,
                Replayed::From(_) | Replayed::Unknown => {}
            }
        }
    }
}

/// What somebody else has started again in the meantime is none of ours.
fn is_ours(replayed: &Replayed) -> bool {
    matches!(replayed, Replayed::From(before) if next(*before, Event::Replay).is_some())
}

/// Tells those who look of what will run again.
fn tell_of_each(app: &App, tasks: &[Task], replayed: &[(TaskId, Replayed)]) {
    if !app.events.wanted() {
        return;
    }
    let ours: HashSet<TaskId> = replayed.iter().filter(|(_, replayed)| is_ours(replayed)).map(|(id, _)| *id).collect();
    let again = tasks.iter().filter(|task| ours.contains(&task.id));
    again.for_each(|task| app.tell_of(task, (Happening::Replayed, TaskState::Accepted)));
}
