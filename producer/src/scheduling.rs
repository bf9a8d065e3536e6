//! From what a client wants a schedule to be to its definition, and back to what is shown: pure, and all faults at once.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tasklane_common::ledger::{GivenUp, NextTick};
use tasklane_common::schedule::plan::{CATCH_UP_MAX_MAX, due_ticks};
use tasklane_common::schedule::{
    CATCH_UP_MAX_DEFAULT, CatchUp, Definition, JITTER_MS_MAX, Overlap, SCHEDULE_TAG, Schedule, ScheduleName, TICK_TAG,
    TickCounts, Timetable,
};
use tasklane_common::task::TaskId;
use tasklane_common::template::TaskTemplate;
use utoipa::ToSchema;

use crate::error::{ApiError, FieldError};
use crate::extract::{self, JsonFault, Params};
use crate::request::{Rules, SubmitTask};
use crate::template::{ARGS_BYTES_MAX, Place, template};

/// The largest body: the largest args, and room for the other fields.
pub const BODY_BYTES_MAX: usize = ARGS_BYTES_MAX + 64 * 1024;
/// The most schedules on one page.
pub const LIMIT_MAX: u32 = 200;
/// How many schedules a page has when the request does not say.
pub const LIMIT_DEFAULT: u32 = 50;
/// What each tick submits.
const TASK: Place = Place {
    path: "task",
    of: "schedule",
    no_time: "the schedule says when",
    no_unique_key: "each tick has one task, and overlap says whether they may meet",
    reserved_tags: &[SCHEDULE_TAG, TICK_TAG],
};
/// How many of the next ticks are shown.
const RUNS_SHOWN: usize = 5;
/// Tells this form of cursor from later ones.
const CURSOR_VERSION: char = '1';

/// A schedule as a client wants it. `null` stands for a field left out.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PutSchedule {
    /// When: five fields (minute, hour, day of month, month, day of week), six with the second first, or `@hourly`,
    /// `@daily`, `@weekly`, `@monthly`, `@yearly`. Required.
    #[schema(required, value_type = String, max_length = 256, examples("30 2 * * MON-FRI"))]
    cron: Option<String>,
    /// The IANA name of the zone in which `cron` is read. Defaults to `UTC`.
    #[schema(max_length = 64, default = "UTC", examples("Europe/Berlin"))]
    timezone: Option<String>,
    /// What each tick submits, as `POST /v1/tasks` takes it, but without a time, and with args of 64 KiB at most. Required.
    #[serde(default, deserialize_with = "extract::part")]
    #[schema(required, value_type = SubmitTask)]
    task: Option<SubmitTask>,
    /// What becomes of ticks that passed while nothing was there to fire them. Defaults to `one`.
    catch_up: Option<CatchUp>,
    /// How many missed ticks `catch_up: all` makes up for, the newest. Defaults to 100.
    #[schema(minimum = 1, maximum = 1000, default = 100)]
    catch_up_max: Option<i64>,
    /// What becomes of a tick while the task of an earlier one is unfinished. Defaults to `allow`.
    overlap: Option<Overlap>,
    /// Spreads the starts: each task waits up to so long after its tick, always as long for the same tick. Defaults to 0.
    #[schema(minimum = 0, maximum = 86_400_000, default = 0)]
    jitter_ms: Option<i64>,
    /// Fires nothing for now; ticks in that time are not made up for. Left out, it stays as it is, and a new schedule is
    /// not paused.
    paused: Option<bool>,
}

/// A schedule as the API shows it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ScheduleView {
    /// Its name.
    name: ScheduleName,
    /// The cron expression.
    cron: String,
    /// The zone in which it is read.
    timezone: String,
    /// What each tick submits.
    task: TaskTemplate,
    /// What becomes of missed ticks.
    catch_up: CatchUp,
    /// How many of them are made up for at most.
    catch_up_max: u32,
    /// What becomes of a tick while the task of an earlier one is unfinished.
    overlap: Overlap,
    /// The longest time a task waits after its tick.
    jitter_ms: i64,
    /// Whether nothing is fired for now.
    paused: bool,
    /// Since when it is paused; null when it is not.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    paused_at: Option<Timestamp>,
    /// Who paused it, as `Tasklane-Actor` said; null when it did not.
    paused_by: Option<String>,
    /// The tick that is fired next: in the past when nobody has fired it yet; null while it is paused.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    next_at: Option<Timestamp>,
    /// The next five ticks; none while it is paused.
    #[schema(value_type = Vec<String>, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    next_runs: Vec<Timestamp>,
    /// The newest tick that was fired.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    last_tick: Option<Timestamp>,
    /// The task of that tick, while it is kept.
    last_task_id: Option<TaskId>,
    /// The newest tick that was skipped for an unfinished task.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    last_skipped: Option<Timestamp>,
    /// How many ticks were skipped since one was fired.
    skipped_in_a_row: i64,
    /// With `overlap: skip`, an unfinished task of it, for which ticks are skipped; null when there is none.
    blocked_by: Option<TaskId>,
    /// What became of all ticks.
    ticks: TickCounts,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    created_at: Timestamp,
    /// When its definition last changed.
    #[schema(value_type = String, format = DateTime)]
    #[serde(serialize_with = "tasklane_common::clock::text")]
    updated_at: Timestamp,
}

/// A schedule's definition as a client asks for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    definition: Definition,
    paused: Option<bool>,
}

impl Asked {
    /// What holds when `old` held before: who does not speak of `paused` neither pauses nor resumes.
    #[must_use]
    pub fn after(&self, old: Option<&Definition>) -> Definition {
        let paused = self.paused.unwrap_or_else(|| old.is_some_and(|old| old.paused));
        Definition { paused, ..self.definition.clone() }
    }
}

/// Reads the body of a PUT.
///
/// # Errors
/// [`ApiError::InvalidJson`], or [`ApiError::InvalidSchedule`] naming every fault.
pub fn asked(body: &[u8], rules: &Rules) -> Result<Asked, ApiError> {
    let asked: PutSchedule = extract::object(body).map_err(|fault| match fault {
        JsonFault::Syntax(message) => ApiError::InvalidJson(message),
        JsonFault::Shape(error) => ApiError::InvalidSchedule(vec![error]),
    })?;
    let mut faults = Vec::new();
    let (cron, zone) = (asked.cron.unwrap_or_default(), asked.timezone.unwrap_or_else(|| "UTC".to_owned()));
    let timetable = timetable(&cron, &zone, &mut faults);
    let task = template(asked.task, TASK, rules, &mut faults);
    let catch_up_max = asked.catch_up_max.unwrap_or(CATCH_UP_MAX_DEFAULT.into());
    let catch_up_max = within("catch_up_max", catch_up_max, 1, CATCH_UP_MAX_MAX.into(), &mut faults);
    let jitter_ms = within("jitter_ms", asked.jitter_ms.unwrap_or(0), 0, JITTER_MS_MAX, &mut faults);
    match (timetable, task, catch_up_max, jitter_ms) {
        (Some(timetable), Some(task), Some(catch_up_max), Some(jitter_ms)) => Ok(Asked {
            paused: asked.paused,
            definition: Definition {
                cron,
                timezone: timetable.zone_name().to_owned(),
                task,
                catch_up: asked.catch_up.unwrap_or_default(),
                catch_up_max: u32::try_from(catch_up_max).unwrap_or(CATCH_UP_MAX_DEFAULT),
                overlap: asked.overlap.unwrap_or_default(),
                jitter_ms,
                paused: false,
            },
        }),
        _ => Err(ApiError::InvalidSchedule(faults)),
    }
}

fn timetable(cron: &str, zone: &str, faults: &mut Vec<FieldError>) -> Option<Timetable> {
    let mut checked = |cron, zone| {
        let parsed = Timetable::parse(cron, zone);
        parsed.map_err(|error| faults.push(FieldError::new(error.field(), error.to_string()))).ok()
    };
    // Each alone, so that two faults are told together.
    let (cron_good, zone_good) = (checked(cron, "UTC").is_some(), checked("@daily", zone).is_some());
    if cron_good && zone_good { checked(cron, zone) } else { None }
}

fn within(path: &str, number: i64, min: i64, max: i64, faults: &mut Vec<FieldError>) -> Option<i64> {
    if (min..=max).contains(&number) {
        return Some(number);
    }
    faults.push(FieldError::new(path, format!("must be from {min} to {max}, but is {number}")));
    None
}

/// Whether a schedule whose definition becomes `new` goes on where it stands: expression and zone stay, and neither is paused.
fn stays(old: &Definition, new: &Definition) -> bool {
    !old.paused && !new.paused && old.cron == new.cron && old.timezone == new.timezone
}

/// Where a schedule goes on whose definition becomes `new`.
///
/// One whose expression and zone stay goes on where it stands; else, or after a pause, it begins with the first tick
/// after `now`.
///
/// # Errors
/// [`ApiError::InvalidSchedule`] when there is no such tick.
pub fn next(old: Option<&Schedule>, new: &Definition, now: Timestamp) -> Result<NextTick, ApiError> {
    if new.paused {
        return Ok(NextTick::Paused);
    }
    if old.is_some_and(|old| stays(&old.definition, new)) {
        return Ok(NextTick::Stays);
    }
    let next = new.timetable().and_then(|timetable| timetable.next_after(now));
    next.map(NextTick::At)
        .map_err(|error| ApiError::InvalidSchedule(vec![FieldError::new(error.field(), error.to_string())]))
}

/// The ticks that are due by `now` under the old definition, and that nobody fires once `new` holds.
#[must_use]
pub fn given_up(old: Option<&Schedule>, new: &Definition, now: Timestamp) -> Option<GivenUp> {
    let old = old.filter(|old| !stays(&old.definition, new))?;
    let tick = old.next_at.filter(|tick| *tick <= now)?;
    // An expression that this release cannot read has this one tick for certain.
    let ticks = old.definition.timetable().map_or(1, |timetable| due_ticks(&timetable, tick, now));
    Some(GivenUp { tick, ticks })
}

/// A schedule as it is shown at a time.
pub(crate) fn view(schedule: Schedule, now: Timestamp) -> ScheduleView {
    let next_runs = next_runs(&schedule, now);
    let Schedule { name, definition, last_tick, last_task_id, last_skipped, ticks, paused: pause, .. } = schedule;
    let (paused_at, paused_by) = pause.map_or((None, None), |pause| (Some(pause.at), pause.by));
    let Definition { cron, timezone, task, catch_up, catch_up_max, overlap, jitter_ms, paused } = definition;
    ScheduleView {
        name,
        cron,
        timezone,
        task,
        catch_up,
        catch_up_max,
        overlap,
        jitter_ms,
        paused,
        paused_at,
        paused_by,
        next_at: schedule.next_at,
        next_runs,
        last_tick,
        last_task_id,
        last_skipped,
        skipped_in_a_row: schedule.skipped_in_a_row,
        blocked_by: schedule.blocked_by,
        ticks,
        created_at: schedule.created_at,
        updated_at: schedule.updated_at,
    }
}

/// From where it stands, or from now when it is behind: what is missed is no run to come.
fn next_runs(schedule: &Schedule, now: Timestamp) -> Vec<Timestamp> {
    let (Some(standing), Ok(timetable)) = (schedule.next_at, schedule.definition.timetable()) else {
        return Vec::new();
    };
    let first = Some(standing).filter(|standing| *standing > now);
    let behind = first.unwrap_or(now);
    first.into_iter().chain(timetable.after(behind)).take(RUNS_SHOWN).collect()
}

/// Reads the parameters of a list: where it begins, and how many there may be.
///
/// # Errors
/// [`ApiError::InvalidQuery`] naming every parameter that does not fit.
pub fn page(text: Option<&str>) -> Result<(Option<ScheduleName>, u32), ApiError> {
    let mut params = Params::parse(text, &["limit", "cursor"], &[]);
    let after = params.read("cursor", |cursor| {
        let name = cursor.strip_prefix(CURSOR_VERSION).and_then(|name| ScheduleName::parse(name).ok());
        name.ok_or("is not a cursor of this API".to_owned())
    });
    let limit = params.integer("limit", 1, LIMIT_MAX).unwrap_or(LIMIT_DEFAULT);
    params.finish()?;
    Ok((after, limit))
}

/// Where the next page begins, as an opaque text.
pub(crate) fn cursor(after: &ScheduleName) -> String {
    format!("{CURSOR_VERSION}{after}")
}
