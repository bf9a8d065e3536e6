//! What is said between a ledger and those who make, show and fire schedules.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::Caller;
use crate::schedule::{Definition, Overlap, Schedule, ScheduleName};
use crate::task::{NewTask, TaskId};

/// A new schedule, or a new definition of one.
#[derive(Debug, Clone)]
pub struct ScheduleChange {
    /// Which.
    pub name: ScheduleName,
    /// The revision that is replaced; `None` when there is to be no such schedule yet.
    pub replaces: Option<Uuid>,
    /// What it is to do.
    pub definition: Definition,
    /// Where it goes on.
    pub next: NextTick,
    /// Ticks of the definition before that are given up by this change.
    pub given_up: Option<GivenUp>,
    /// Who changes it.
    pub caller: Caller,
}

/// Ticks that were due and are not fired any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenUp {
    /// The first of them, where the schedule stood: when it has moved on since, nothing is written.
    pub tick: Timestamp,
    /// How many: they are counted as missed.
    pub ticks: u32,
}

/// Where a schedule goes on after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextTick {
    /// Where it stands, wherever that is by then: ticks may be fired since it was read.
    Stays,
    /// At this tick.
    At(Timestamp),
    /// Nowhere: it is paused.
    Paused,
}

impl NextTick {
    /// The tick as a ledger stores it.
    #[must_use]
    pub fn millis(self) -> Option<i64> {
        match self {
            Self::At(tick) => Some(tick.as_millisecond()),
            Self::Stays | Self::Paused => None,
        }
    }
}

/// What became of a change.
#[derive(Debug, Clone, PartialEq)]
pub enum Changed {
    /// It is durable.
    Applied(Box<Schedule>),
    /// Another change came first: nothing was written.
    Overtaken,
    /// The ledger has as many schedules as it takes: nothing was written.
    Full,
}

/// A page of schedules.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulePage {
    /// The ledger's time.
    pub now: Timestamp,
    /// By name.
    pub schedules: Vec<Schedule>,
    /// Those of this page whose definition this build cannot read.
    pub unreadable: Vec<Unreadable>,
    /// Where the next page begins: behind this name; `None` at the end.
    pub next: Option<ScheduleName>,
}

/// Schedules whose next tick has come.
#[derive(Debug, Clone, PartialEq)]
pub struct DueSchedules {
    /// The ledger's time.
    pub now: Timestamp,
    /// How long until the next tick of any: zero when there is one already, `None` when there will be none.
    pub wait: Option<Duration>,
    /// Those that are due, longest first.
    pub due: Vec<Schedule>,
    /// Those whose next tick was computed by a clock that was ahead: it has gone back since.
    pub ahead: Vec<Schedule>,
    /// Those that are due and whose definition this build cannot read: they keep the others from nothing.
    pub unreadable: Vec<Unreadable>,
}

/// A schedule whose definition this build cannot read: one of a later release, say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Which.
    pub name: ScheduleName,
    /// Its definition's revision.
    pub revision: Uuid,
    /// What is wrong with it.
    pub problem: String,
}

/// Moves a schedule on from its next tick, and records the tasks of the ticks that are fired by that.
#[derive(Debug, Clone)]
pub struct Firing {
    /// Which.
    pub name: ScheduleName,
    /// The definition by which this was decided.
    pub revision: Uuid,
    /// The next tick, as it was read.
    pub tick: Timestamp,
    /// The next tick after this.
    pub next: Timestamp,
    /// The ticks that get a task, oldest first.
    pub tasks: Vec<(Timestamp, NewTask)>,
    /// How many ticks are passed over.
    pub missed: u32,
    /// Whether the tasks are skipped while one of an earlier tick is unfinished.
    pub overlap: Overlap,
}

/// What became of a firing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fired {
    /// The schedule has moved on, and so many tasks are recorded; a tick that had a task before gets no second one.
    Recorded(u32),
    /// The schedule has moved on without tasks: this one of an earlier tick is unfinished.
    Skipped(TaskId),
    /// Somebody else fires this tick, or the definition has changed: nothing was written.
    Overtaken,
}

/// How far ahead of the clock the computation of a next tick may be: a clock is adjusted in small steps.
pub(super) const AHEAD_MS: i64 = 1_000;

/// Those that can be read, and those that cannot.
pub(super) fn parted(found: Vec<Result<Schedule, Unreadable>>) -> (Vec<Schedule>, Vec<Unreadable>) {
    let (mut schedules, mut unreadable) = (Vec::new(), Vec::new());
    for one in found {
        match one {
            Ok(schedule) => schedules.push(schedule),
            Err(one) => unreadable.push(one),
        }
    }
    (schedules, unreadable)
}
