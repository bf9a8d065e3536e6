//! A cron expression in a zone: when the ticks are. Croner reads the expression and tells which times of a wall clock match,
//! jiff knows when a zone's clock shows them, and both are in this program: the machine's own zone files are not asked.
//!
//! An expression with one second, one minute and one hour (`30 2 * * *`) fires once a day whatever the clocks do: in a
//! gap at its end, even where that is another day, in a fold the first time. Every other one fires at each time that the wall
//! clock shows and that matches: none in a gap, twice in a fold.

use std::fmt;

use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use croner::{Cron, JobType};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone, db};

/// The longest expression, in bytes.
pub const CRON_BYTES_MAX: usize = 256;
/// The longest name of a zone, in bytes.
pub const ZONE_BYTES_MAX: usize = 64;

/// When a schedule's ticks are. There is always a next one.
#[derive(Clone)]
pub struct Timetable {
    cron: Cron,
    zone: TimeZone,
    /// Whether a day has one time.
    daily: bool,
}

/// Why an expression in a zone is no timetable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TimetableError {
    /// The expression cannot be read.
    #[error("{0}")]
    Cron(String),
    /// The expression has no tick.
    #[error("never fires: no date matches")]
    Never,
    /// Nobody knows the zone.
    #[error("{0}")]
    Zone(String),
}

impl TimetableError {
    /// The field of the API that is at fault.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Cron(_) | Self::Never => "cron",
            Self::Zone(_) => "timezone",
        }
    }
}

impl fmt::Debug for Timetable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timetable({} in {})", self.cron.pattern, self.zone_name())
    }
}

impl Timetable {
    /// Reads an expression of five fields, or six with seconds first, or a nickname such as `@daily`, and the IANA name of
    /// a zone.
    ///
    /// # Errors
    /// [`TimetableError`] says which field is wrong.
    pub fn parse(cron: &str, zone: &str) -> Result<Self, TimetableError> {
        let (cron, zone) = (parse_cron(cron)?, parse_zone(zone)?);
        let daily = cron.determine_job_type() == JobType::FixedTime;
        let table = Self { cron, zone, daily };
        // Without years the calendar repeats: what fires once fires for ever.
        table.next_after(Timestamp::UNIX_EPOCH).map(|_| table)
    }

    /// The zone's name as IANA writes it.
    #[must_use]
    pub fn zone_name(&self) -> &str {
        self.zone.iana_name().unwrap_or("UTC")
    }

    /// The first tick after a time.
    ///
    /// # Errors
    /// [`TimetableError::Never`] when there is none.
    pub fn next_after(&self, time: Timestamp) -> Result<Timestamp, TimetableError> {
        // Ticks are whole seconds: the first after a part of one is the first after the whole.
        let second = time.as_millisecond().div_euclid(1000);
        let from = Timestamp::from_second(second).map_err(|_| TimetableError::Never)?;
        let next = if self.daily { self.next_of_a_day(from) } else { self.next_shown(from) };
        next.ok_or(TimetableError::Never)
    }

    /// The first moment after `from` at which the clock comes to a time that matches, or passes it in a gap.
    fn next_of_a_day(&self, from: Timestamp) -> Option<Timestamp> {
        let mut wall = self.zone.to_datetime(from);
        loop {
            wall = self.cron.find_next_occurrence(&wall, false).ok()?;
            // In a fold's second half it was there before.
            let tick = self.first_at(wall)?;
            if tick > from {
                return Some(tick);
            }
        }
    }

    /// When the clock first shows a time, or jumps over it.
    fn first_at(&self, wall: DateTime) -> Option<Timestamp> {
        let times = self.zone.to_ambiguous_timestamp(wall);
        match times.offset() {
            // By the offset of after the gap its times lie before its end, and nothing else is between.
            AmbiguousOffset::Gap { after, .. } => {
                let before = after.to_timestamp(wall).ok()?;
                self.zone.following(before).next().map(|end| end.timestamp())
            }
            AmbiguousOffset::Unambiguous { .. } | AmbiguousOffset::Fold { .. } => times.earlier().ok(),
        }
    }

    /// The first time after `from` that the clock shows and that matches. From change to change of the clock, since a fold shows
    /// earlier times again.
    fn next_shown(&self, from: Timestamp) -> Option<Timestamp> {
        let (mut from, mut inclusive) = (from, false);
        let mut changes = self.zone.following(from);
        loop {
            let offset = self.zone.to_offset(from);
            let wall = self.cron.find_next_occurrence(&offset.to_datetime(from), inclusive).ok()?;
            let tick = offset.to_timestamp(wall).ok()?;
            match changes.next().map(|change| change.timestamp()).filter(|change| *change <= tick) {
                Some(change) => (from, inclusive) = (change, true),
                None => return Some(tick),
            }
        }
    }

    /// The ticks after a time, as long as there are any.
    pub fn after(&self, time: Timestamp) -> impl Iterator<Item = Timestamp> {
        std::iter::successors(self.next_after(time).ok(), |tick| self.next_after(*tick).ok())
    }
}

fn parse_cron(text: &str) -> Result<Cron, TimetableError> {
    if text.len() > CRON_BYTES_MAX {
        let message = format!("must be at most {CRON_BYTES_MAX} bytes long, but has {}", text.len());
        return Err(TimetableError::Cron(message));
    }
    let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
    parser.parse(text).map_err(|error| TimetableError::Cron(explain(&parser, text, &error)))
}

/// Says which field is wrong: the one with which an expression that is otherwise `*` cannot be read.
fn explain(parser: &CronParser, text: &str, error: &CronError) -> String {
    const FIELDS: [&str; 6] = ["second", "minute", "hour", "day of month", "month", "day of week"];
    let fields: Vec<_> = text.split_whitespace().collect();
    let names = match fields.len() {
        5 => &FIELDS[1..],
        6 => &FIELDS[..],
        _ => {
            return "must have five fields (minute, hour, day of month, month, day of week), or six with the second first"
                .to_owned();
        }
    };
    for (index, (field, name)) in fields.iter().zip(names).enumerate() {
        let mut alone = vec!["*"; fields.len()];
        alone[index] = field;
        if let Err(error) = parser.parse(&alone.join(" ")) {
            return format!("the field {name}, {field}: {}", reason(&error));
        }
    }
    reason(error)
}

fn reason(error: &CronError) -> String {
    match error {
        CronError::ComponentError(text) | CronError::InvalidPattern(text) | CronError::IllegalCharacters(text) => {
            text.clone()
        }
        other => other.to_string(),
    }
}

fn parse_zone(name: &str) -> Result<TimeZone, TimetableError> {
    // Etc/Unknown is known to jiff and no zone.
    let known = Some(name).filter(|name| name.len() <= ZONE_BYTES_MAX).and_then(|name| TimeZone::get(name).ok());
    known.filter(|zone| zone.iana_name().is_some()).ok_or_else(|| {
        let nearest = nearest_zone(name).unwrap_or_else(|| "Europe/Berlin or UTC".to_owned());
        TimetableError::Zone(format!("must be the IANA name of a time zone, such as {nearest}"))
    })
}

/// The zone that ends in the same word: `berlin` stands for `Europe/Berlin`.
fn nearest_zone(name: &str) -> Option<String> {
    let last = |name: &str| name.rsplit('/').next().unwrap_or_default().replace(' ', "_").to_ascii_lowercase();
    let wanted = last(name);
    db().available().map(|zone| zone.to_string()).find(|zone| last(zone) == wanted)
}

#[cfg(test)]
mod tests;
