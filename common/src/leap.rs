//! Whether the ledger's clock can be believed: what is destroyed by its age is gone for good, and a wall clock can leap.
//!
//! A leap is told by the time since boot, which nobody sets: the two must go on together. After a leap nothing is destroyed until
//! the clock has either gone back to where it was, or been steady for a while. A process that starts compares with what the
//! ledger says of when its clock was last believed.

use std::time::Duration;

use jiff::Timestamp;

use crate::clock::millis;
use crate::ledger::LedgerClock;

/// How far the clocks may go apart between two looks: NTP adjusts in small steps.
const STEP_MAX: Duration = Duration::from_secs(60);
/// How long a clock that has leapt must be steady.
const STEADY: Duration = Duration::from_secs(15 * 60);
/// How long no process may have looked: for what is longer, a leap in between would go unseen.
const UNSEEN_MAX: Duration = Duration::from_secs(60 * 60);
/// How often it is noted that the clock is believed.
const NOTE_PERIOD: Duration = Duration::from_secs(30);

/// What is known of the ledger's clock.
#[derive(Debug, Default)]
pub struct Trust {
    /// The last look.
    last: Option<Look>,
    /// The last look at which the clock was believed.
    believed: Option<Look>,
    /// When that was noted, and since when the clock is steady, since boot.
    noted: Option<Duration>,
    steady_since: Duration,
}

/// Both clocks at one moment, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Look {
    wall: i64,
    boot: Duration,
}

/// What is thought of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on as it should; `note` when the ledger is to know.
    Believed {
        /// Whether it is to be noted.
        note: bool,
    },
    /// The same, for the first time after a leap.
    BelievedAgain {
        /// Whether it is to be noted.
        note: bool,
    },
    /// It has leapt by so many milliseconds.
    Leapt(i64),
    /// It was not steady for long enough.
    Unsure,
}

impl Look {
    /// How much further the wall clock has gone to a later look than the other one.
    fn drift_to(self, later: Self) -> i64 {
        (later.wall - self.wall) - millis(later.boot.saturating_sub(self.boot))
    }

    fn agrees_with(self, later: Self) -> bool {
        self.drift_to(later).abs() <= millis(STEP_MAX)
    }
}

impl Trust {
    /// Judges a look at the ledger's clock, at a time since boot.
    pub fn judge(&mut self, clock: LedgerClock, boot: Duration) -> Verdict {
        let look = Look { wall: clock.now.as_millisecond(), boot };
        let Some(last) = self.last.replace(look) else { return self.first(clock.believed, look) };
        let believed = self.believed.is_some_and(|believed| believed.agrees_with(look));
        if !last.agrees_with(look) && !believed {
            self.steady_since = boot;
            return Verdict::Leapt(last.drift_to(look));
        }
        if believed || boot.saturating_sub(self.steady_since) >= STEADY {
            return self.believe(look);
        }
        Verdict::Unsure
    }

    fn first(&mut self, believed: Option<Timestamp>, look: Look) -> Verdict {
        self.steady_since = look.boot;
        let gone = believed.map(|believed| look.wall - believed.as_millisecond());
        match gone {
            Some(gone) if (-millis(STEP_MAX)..=millis(UNSEEN_MAX)).contains(&gone) => {
                self.believed = Some(look);
                self.believe(look)
            }
            Some(gone) => Verdict::Leapt(gone),
            None => Verdict::Unsure,
        }
    }

    fn believe(&mut self, look: Look) -> Verdict {
        let again = self.believed.is_none_or(|believed| self.steady_since > believed.boot);
        let note = again || self.noted.is_none_or(|noted| look.boot.saturating_sub(noted) >= NOTE_PERIOD);
        if note {
            self.noted = Some(look.boot);
        }
        self.believed = Some(look);
        if again { Verdict::BelievedAgain { note } } else { Verdict::Believed { note } }
    }
}

impl Verdict {
    /// Logs what is new.
    pub fn tell(self) {
        match self {
            Self::Leapt(by_ms) => tracing::warn!(
                by_s = by_ms / 1_000,
                steady_for_s = STEADY.as_secs(),
                "the ledger's clock has leapt, or nobody has looked at it for as long: nothing is deleted by its age until it is \
                 back, or has been steady for a while"
            ),
            Self::BelievedAgain { .. } => {
                tracing::info!("the ledger's clock is believed: what is old is deleted again")
            }
            Self::Believed { .. } | Self::Unsure => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::timestamp;

    const HOURS: i64 = 3_600;
    const NOW: i64 = 1_800_000_000;

    /// Looks at a clock every half minute; the ledger has believed it a minute before the first.
    struct World {
        trust: Trust,
        boot: i64,
    }

    impl World {
        fn new() -> Self {
            Self { trust: Trust::default(), boot: 0 }
        }

        fn look_after(&mut self, seconds: i64, offset: i64) -> Verdict {
            self.boot += seconds;
            let now = timestamp((NOW + self.boot + offset) * 1_000);
            let believed = Some(timestamp((NOW - 60) * 1_000));
            self.trust.judge(LedgerClock { now, believed }, Duration::from_secs(self.boot.unsigned_abs()))
        }

        fn believes(&mut self, offset: i64) -> bool {
            matches!(self.look_after(30, offset), Verdict::Believed { .. } | Verdict::BelievedAgain { .. })
        }
    }

    #[test]
    fn a_leap_there_and_back_is_believed_before_and_after() {
        for leap in [8 * HOURS, -8 * HOURS, 8 * 24 * HOURS, -8 * 24 * HOURS] {
            let mut world = World::new();
            assert!((0..100).all(|_| world.believes(0)));
            assert_eq!(world.look_after(30, leap), Verdict::Leapt(leap * 1_000));
            assert_eq!(world.look_after(1, leap), Verdict::Unsure, "told once");
            assert_eq!(world.look_after(30, 0), Verdict::BelievedAgain { note: true }, "{leap}");
            assert!((0..100).all(|_| world.believes(0)));
        }
    }

    #[test]
    fn a_clock_that_stays_where_it_has_leapt_is_believed_when_it_was_steady() {
        let mut world = World::new();
        assert!(world.believes(0));
        assert_eq!(world.look_after(30, 8 * HOURS), Verdict::Leapt(8 * HOURS * 1_000));
        let unsure = (0..100).take_while(|_| !world.believes(8 * HOURS)).count();
        assert_eq!(unsure, 29, "a quarter of an hour less one look");
        assert!(world.believes(8 * HOURS));
        // From now on that is the right time.
        assert_eq!(world.look_after(30, 0), Verdict::Leapt(-8 * HOURS * 1_000));
    }

    #[test]
    fn small_steps_and_long_pauses_are_no_leaps() {
        let mut world = World::new();
        let steps = (0..100).map(|step| step % 7 * 5);
        assert!(steps.into_iter().all(|offset| world.believes(offset)));
        assert_eq!(
            world.look_after(8 * 24 * HOURS, 0),
            Verdict::Believed { note: true },
            "both clocks went on: it slept"
        );
    }

    #[test]
    fn a_process_that_starts_in_a_leap_compares_with_what_the_ledger_knows() {
        let first = |offset| World::new().look_after(0, offset);
        assert_eq!(first(0), Verdict::Believed { note: true });
        assert_eq!(first(30 * 60), Verdict::Believed { note: true }, "a restart");
        assert!(matches!(first(8 * HOURS), Verdict::Leapt(_)));
        assert!(matches!(first(-8 * HOURS), Verdict::Leapt(_)));
        let mut trust = Trust::default();
        let unknown = LedgerClock { now: timestamp(NOW), believed: None };
        assert_eq!(trust.judge(unknown, Duration::ZERO), Verdict::Unsure);
        let later = LedgerClock { now: timestamp(NOW + millis(STEADY)), believed: None };
        assert_eq!(trust.judge(later, STEADY), Verdict::BelievedAgain { note: true });
    }

    #[test]
    fn that_it_is_believed_is_noted_now_and_then() {
        let mut world = World::new();
        let noted = (0..61).filter(|_| world.look_after(1, 0) == Verdict::Believed { note: true }).count();
        assert_eq!(noted, 3);
    }
}
