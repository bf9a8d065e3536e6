//! Which ticks of a schedule that is due are fired now, and where it goes on: a pure decision.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;

use super::{CatchUp, Definition, Overlap, Timetable, TimetableError};
use crate::clock::{millis, timestamp};

/// How many ticks one transaction fires: bounds the memory for their tasks.
pub const BATCH: usize = 20;
/// The most missed ticks that a schedule may want to be caught up with.
pub const CATCH_UP_MAX_MAX: u32 = 1_000;
/// How far missed ticks are counted.
pub const COUNTED_MAX: u32 = 10_000;
/// How far back the newest missed ticks are looked for at first.
const WINDOW: Duration = Duration::from_secs(120);

/// What is done about a schedule that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The ticks that get a task, oldest first.
    pub fire: Vec<Timestamp>,
    /// How many ticks are passed over, at most [`COUNTED_MAX`].
    pub missed: u32,
    /// The tick after all of these.
    pub next: Timestamp,
}

/// The ledger's time, and since when somebody has watched the schedules.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    /// The ledger's time.
    pub now: Timestamp,
    /// A tick before this is missed.
    pub since: Timestamp,
}

/// Decides about a schedule whose next tick, `tick`, has come.
///
/// A tick before `watched.since` is missed, and the catch-up says what becomes of it. All others are fired, however many.
///
/// # Errors
/// When the timetable does not go on, which one that was accepted does.
pub fn plan(
    definition: &Definition,
    timetable: &Timetable,
    tick: Timestamp,
    watched: Watched,
) -> Result<Plan, TimetableError> {
    // The next one of the same batch would overlap with this one.
    let batch = if definition.overlap == Overlap::Skip { 1 } else { BATCH };
    if tick >= watched.since {
        return in_time(timetable, tick, watched.now, batch);
    }
    let before = |time: Timestamp| timestamp(time.as_millisecond() - 1);
    let resumed = timetable.next_after(before(watched.since))?;
    let kept = match definition.catch_up {
        CatchUp::None => 0,
        CatchUp::One => 1,
        CatchUp::All => definition.catch_up_max as usize,
    };
    let mut fire = newest(timetable, tick, resumed, kept);
    let next = fire.get(batch).copied().unwrap_or(resumed);
    fire.truncate(batch);
    let first = fire.first().copied().unwrap_or(resumed);
    let passed = timetable.after(before(tick)).take_while(|tick| *tick < first).take(COUNTED_MAX as usize);
    let missed = u32::try_from(passed.count()).unwrap_or(COUNTED_MAX);
    Ok(Plan { fire, missed, next })
}

/// How many ticks there are from `tick`, which is one, to `now`; at most [`COUNTED_MAX`].
#[must_use]
pub fn due_ticks(timetable: &Timetable, tick: Timestamp, now: Timestamp) -> u32 {
    let after = timetable.after(tick).take_while(|tick| *tick <= now).take(COUNTED_MAX as usize - 1);
    if tick > now { 0 } else { u32::try_from(after.count()).map_or(COUNTED_MAX, |count| count + 1) }
}

/// All ticks up to now, so many as one transaction takes.
fn in_time(timetable: &Timetable, tick: Timestamp, now: Timestamp, batch: usize) -> Result<Plan, TimetableError> {
    let mut fire = vec![tick];
    let mut next = timetable.next_after(tick)?;
    while next <= now && fire.len() < batch {
        fire.push(next);
        next = timetable.next_after(next)?;
    }
    Ok(Plan { fire, missed: 0, next })
}

/// The newest `most` ticks from `from`, which is one, to before `end`.
///
/// Looks back further and further: of a year of seconds only the last minutes are walked.
fn newest(timetable: &Timetable, from: Timestamp, end: Timestamp, most: usize) -> Vec<Timestamp> {
    if most == 0 {
        return Vec::new();
    }
    let mut window_ms = millis(WINDOW);
    loop {
        let begin = timestamp(end.as_millisecond().saturating_sub(window_ms)).max(from);
        let mut kept = VecDeque::new();
        for tick in timetable.after(timestamp(begin.as_millisecond() - 1)).take_while(|tick| *tick < end) {
            kept.push_back(tick);
            if kept.len() > most {
                kept.pop_front();
            }
        }
        if kept.len() == most || begin <= from {
            return kept.into();
        }
        window_ms = window_ms.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests;
