//! From a task as a client submits it to one that is recorded later: for schedules, and for what follows a group. Pure.

use jiff::Timestamp;
use tasklane_common::template::TaskTemplate;

use crate::error::FieldError;
use crate::request::{Circumstances, Rules, SubmitTask, TAGS_MAX};

/// The largest args of a template, in bytes of JSON: they are read whenever it is looked at.
pub const ARGS_BYTES_MAX: usize = 64 * 1024;

/// Where in a request a template stands, and what it cannot have there.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The path of the field.
    pub path: &'static str,
    /// What it is part of.
    pub of: &'static str,
    /// Why it has no time of its own.
    pub no_time: &'static str,
    /// Why it has no unique key.
    pub no_unique_key: &'static str,
    /// The tags that are set otherwise.
    pub reserved_tags: &'static [&'static str],
}

/// Checks every field of a template.
pub fn template(
    asked: Option<SubmitTask>,
    place: Place,
    rules: &Rules,
    faults: &mut Vec<FieldError>,
) -> Option<TaskTemplate> {
    let Some(asked) = asked else {
        faults.push(FieldError::new(place.path, "is required"));
        return None;
    };
    let before = faults.len();
    check_place(&asked, place, faults);
    let asked =
        SubmitTask { delay_ms: None, run_at: None, unique_key: None, unique_for_ms: None, on_conflict: None, ..asked };
    match asked.validate(rules, Circumstances { now: Timestamp::now(), traceparent: None }) {
        Ok(task) if faults.len() == before => Some(task.into()),
        Ok(_) => None,
        Err(more) => {
            let path = |path: &str| format!("{}.{path}", place.path);
            faults.extend(more.iter().map(|error| FieldError::new(path(&error.path), &error.message)));
            None
        }
    }
}

/// Finds what a task may have and a template may not.
fn check_place(asked: &SubmitTask, place: Place, faults: &mut Vec<FieldError>) {
    let mut fault =
        |path: &str, message: String| faults.push(FieldError::new(format!("{}.{path}", place.path), message));
    let unfit = [
        ("delay_ms", asked.delay_ms.is_some(), place.no_time),
        ("run_at", asked.run_at.is_some(), place.no_time),
        ("unique_key", asked.unique_key.is_some(), place.no_unique_key),
        ("unique_for_ms", asked.unique_for_ms.is_some(), place.no_unique_key),
        ("on_conflict", asked.on_conflict.is_some(), place.no_unique_key),
    ];
    for (path, _, why) in unfit.into_iter().filter(|(_, given, _)| *given) {
        fault(path, format!("must not be given: {why}"));
    }
    if let Some(bytes) = asked.args.as_ref().map(|args| args.get().len()).filter(|bytes| *bytes > ARGS_BYTES_MAX) {
        fault("args", format!("must be at most {ARGS_BYTES_MAX} bytes of JSON in a {}, but has {bytes}", place.of));
    }
    let (reserved, tags) = (place.reserved_tags, asked.tags.iter().flatten().map(|(key, _)| key.as_str()));
    for key in tags.filter(|key| reserved.contains(key)) {
        fault(&format!("tags.{key}"), format!("is set by the {} itself", place.of));
    }
    let room = TAGS_MAX - reserved.len();
    if asked.tags.as_ref().is_some_and(|tags| (room + 1..=TAGS_MAX).contains(&tags.len())) {
        fault("tags", format!("must be at most {room}: the {} adds two", place.of));
    }
}
