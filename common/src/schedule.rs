//! Periodic tasks: what a schedule is, when its ticks are, and which of them are to be fired. All of it is pure; the
//! [`ticker`](crate::ticker) asks the ledger and acts.

pub mod plan;
pub mod timetable;

use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

pub use self::timetable::{Timetable, TimetableError};
use crate::clock::timestamp;
use crate::ledger::{LedgerError, Paused};
use crate::task::{Kind, NameError, NewTask, TaskId};
use crate::template::TaskTemplate;

/// How many schedules a ledger takes.
pub const SCHEDULES_MAX: i64 = 10_000;
/// Longest name of a schedule, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// How many missed ticks are caught up with, when a schedule does not say.
pub const CATCH_UP_MAX_DEFAULT: u32 = 100;
/// The longest jitter: a day.
pub const JITTER_MS_MAX: i64 = 86_400_000;
/// The tag of a fired task that names its schedule.
pub const SCHEDULE_TAG: &str = "schedule";
/// The tag of a fired task that tells its tick.
pub const TICK_TAG: &str = "tick";

/// Names a schedule: dot-separated words of `A-Z a-z 0-9 _ -`, at most 128 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, max_length = 128, pattern = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", examples("reports.nightly"))]
pub struct ScheduleName(Arc<str>);

impl ScheduleName {
    /// Checks a name against the grammar, which is that of kinds.
    ///
    /// # Errors
    /// [`NameError`] says which rule the name breaks.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        Kind::parse(name).map(|name| Self(name.as_str().into()))
    }

    /// The name's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ScheduleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ScheduleName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        Self::parse(&name)
    }
}

impl From<ScheduleName> for String {
    fn from(name: ScheduleName) -> Self {
        name.as_str().to_owned()
    }
}

/// What becomes of ticks that passed while nothing was there to fire them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CatchUp {
    /// They are passed over.
    None,
    /// One task for all of them, that of the newest. The default.
    #[default]
    One,
    /// A task for each, of the newest `catch_up_max`.
    All,
}

/// What becomes of a tick while a task of an earlier one is unfinished.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// Its task is recorded all the same. The default.
    #[default]
    Allow,
    /// It is skipped.
    Skip,
}

/// What a schedule is to do; kept as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// The cron expression, as it was given.
    pub cron: String,
    /// The IANA name of the zone in which it is read.
    pub timezone: String,
    /// What is recorded at each tick.
    pub task: TaskTemplate,
    /// What becomes of missed ticks.
    pub catch_up: CatchUp,
    /// How many missed ticks are caught up with at most.
    pub catch_up_max: u32,
    /// What becomes of a tick while an earlier one's task is unfinished.
    pub overlap: Overlap,
    /// The longest time that a task waits after its tick.
    pub jitter_ms: i64,
    /// Whether nothing is fired for now.
    pub paused: bool,
}

/// A schedule as the ledger has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Its name.
    pub name: ScheduleName,
    /// What it is to do.
    pub definition: Definition,
    /// New with every change of the definition.
    pub revision: Uuid,
    /// The next tick to be fired; `None` while it is paused.
    pub next_at: Option<Timestamp>,
    /// The newest tick that was fired.
    pub last_tick: Option<Timestamp>,
    /// The task of that tick, while it is kept.
    pub last_task_id: Option<TaskId>,
    /// The newest tick that was skipped.
    pub last_skipped: Option<Timestamp>,
    /// How many ticks were skipped since one was fired.
    pub skipped_in_a_row: i64,
    /// With [`Overlap::Skip`], an unfinished task of it: its ticks are skipped as long as there is one.
    pub blocked_by: Option<TaskId>,
    /// How many ticks it had.
    pub ticks: TickCounts,
    /// Since when it is paused, and by whom; `None` when it is not.
    pub paused: Option<Paused>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When its definition last changed.
    pub updated_at: Timestamp,
}

/// What became of a schedule's ticks since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TickCounts {
    /// Those with a task.
    pub fired: i64,
    /// Those without, since an earlier one's task was unfinished.
    pub skipped: i64,
    /// Those without, since nothing was there to fire them; at most 10,000 a downtime are counted.
    pub missed: i64,
}

impl Definition {
    /// The task of a tick.
    #[must_use]
    pub fn task_at(&self, name: &ScheduleName, tick: Timestamp) -> NewTask {
        let mut task = NewTask::from(self.task.clone());
        task.tags.insert(SCHEDULE_TAG.to_owned(), name.to_string());
        task.tags.insert(TICK_TAG.to_owned(), tick.to_string());
        task.run_at = (self.jitter_ms > 0).then(|| {
            let offset = jitter(name, tick, self.jitter_ms);
            timestamp(tick.as_millisecond().saturating_add(offset))
        });
        task
    }

    /// The names of the fields in which another definition differs.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let Self { cron, timezone, task, catch_up, catch_up_max, overlap, jitter_ms, paused } = self;
        let differs = [
            (*cron != other.cron, "cron"),
            (*timezone != other.timezone, "timezone"),
            (*task != other.task, "task"),
            (*catch_up != other.catch_up, "catch_up"),
            (*catch_up_max != other.catch_up_max, "catch_up_max"),
            (*overlap != other.overlap, "overlap"),
            (*jitter_ms != other.jitter_ms, "jitter_ms"),
            (*paused != other.paused, "paused"),
        ];
        differs.into_iter().filter(|(differs, _)| *differs).map(|(_, name)| name).collect()
    }

    /// As the ledgers keep it.
    ///
    /// # Errors
    /// None: every definition has a JSON form.
    pub fn to_json(&self) -> Result<String, LedgerError> {
        serde_json::to_string(self).map_err(|error| LedgerError::Corrupt(error.to_string()))
    }

    /// When its ticks are.
    ///
    /// # Errors
    /// When this build does not know the zone or the expression.
    pub fn timetable(&self) -> Result<Timetable, TimetableError> {
        Timetable::parse(&self.cron, &self.timezone)
    }
}

/// How long after its tick a task may start, in milliseconds from 0 to `most`: the same in every process.
fn jitter(name: &ScheduleName, tick: Timestamp, most: i64) -> i64 {
    // FNV-1a, and the finish of MurmurHash3, so that neighbouring ticks lie far from each other.
    let bytes = name.as_str().bytes().chain(tick.as_millisecond().to_be_bytes());
    let mut hash = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    i64::try_from(hash % (most.unsigned_abs() + 1)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn jitter_is_spread_within_its_limit_and_the_same_everywhere() {
        let name = ScheduleName::parse("reports.nightly").unwrap();
        let offsets: Vec<_> = (0..1000).map(|second| jitter(&name, at(second), 999)).collect();
        assert!(offsets.iter().all(|offset| (0..=999).contains(offset)));
        let tenths: BTreeMap<_, usize> = offsets.iter().fold(BTreeMap::new(), |mut counts, offset| {
            *counts.entry(offset / 100).or_default() += 1;
            counts
        });
        assert!(tenths.len() == 10 && tenths.values().all(|count| (50..150).contains(count)), "{tenths:?}");
        // Another release, another machine: these numbers stay.
        assert_eq!(offsets[..4], [183, 806, 80, 784]);
        assert_eq!(jitter(&name, at(7), 0), 0);
    }

    #[test]
    fn a_ticks_task_carries_its_schedule_and_its_tick() {
        let definition: Definition = serde_json::from_str(
            r#"{"cron":"* * * * *","timezone":"UTC","task":{"kind":"a","queue":"q","args":{ "x" : 1},"max_attempts":3,
                "timeout_ms":5,"tags":{"of":"x"}},"catch_up":"one","catch_up_max":100,"overlap":"allow","jitter_ms":50,
                "paused":false,"of a later release":true}"#,
        )
        .unwrap();
        let name = ScheduleName::parse("n").unwrap();
        let task = definition.task_at(&name, at(60));
        assert_eq!(task.tags["schedule"], "n");
        assert_eq!(task.tags["tick"], "1970-01-01T00:01:00Z");
        assert_eq!((task.tags["of"].as_str(), task.args.as_str()), ("x", r#"{ "x" : 1}"#));
        let run_at = task.run_at.unwrap();
        assert!(at(60) <= run_at && run_at <= timestamp(60_050), "{run_at}");
        assert_eq!(definition.task_at(&name, at(60)).run_at, Some(run_at));
        assert_eq!(
            TaskTemplate::from(Definition { jitter_ms: 0, ..definition }.task_at(&name, at(60))).timeout_ms,
            Some(5)
        );
    }
}
