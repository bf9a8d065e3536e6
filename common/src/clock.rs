//! Two clocks: one for dates, one that cannot be set and goes on while the machine sleeps.

use std::time::Duration;

use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};

/// Milliseconds since 1970 by this machine's wall clock, UTC. It can jump.
#[must_use]
pub fn wall_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// Time since the machine booted, suspend included: what leases are measured by.
///
/// `std::time::Instant` stands still while the machine is suspended, and a lease does not.
#[must_use]
pub fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The machine's name, by which workers say where they are.
#[must_use]
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Names this boot of the machine, so that times [since boot](since_boot) of another boot are not compared.
///
/// # Errors
/// When the kernel does not tell, which Linux always does.
pub fn boot_id() -> std::io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned())
}

/// A time as the ledgers store it; one out of range becomes the nearest in range.
#[must_use]
pub fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or(if ms < 0 { Timestamp::MIN } else { Timestamp::MAX })
}

/// Writes times as all JSON has them: RFC 3339 with three digits of fraction, so that they sort as text.
///
/// # Errors
/// What the serializer says.
pub fn text<T: Times, S: Serializer>(time: &T, serializer: S) -> Result<S::Ok, S::Error> {
    time.write(serializer)
}

/// What [`text`] writes.
pub trait Times {
    /// Writes it.
    ///
    /// # Errors
    /// What the serializer says.
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error>;
}

impl Times for Timestamp {
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:.3}"))
    }
}

impl Times for Option<Timestamp> {
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Some(time) => serializer.serialize_some(&Text(time)),
            None => serializer.serialize_none(),
        }
    }
}

impl Times for Vec<Timestamp> {
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter().map(Text))
    }
}

/// A time that is written by [`text`].
struct Text<'t>(&'t Timestamp);

impl Serialize for Text<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.write(serializer)
    }
}

/// So long that nobody waits for it, and so short that ledgers can add it to any time.
const MILLIS_MAX: i64 = i64::MAX / 4;

/// A duration in whole milliseconds, capped at what the ledgers store.
#[must_use]
pub fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).min(MILLIS_MAX)
}
