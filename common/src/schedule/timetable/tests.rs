use std::collections::BTreeSet;

use jiff::civil::{Date, date};
use jiff::{SignedDuration, Zoned};
use proptest::prelude::*;

use super::*;

const BERLIN: &str = "Europe/Berlin";
const NEW_YORK: &str = "America/New_York";

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// The ticks after `from`, as the wall clock shows them.
fn walls(cron: &str, zone: &str, from: &str, count: usize) -> Vec<String> {
    let table = Timetable::parse(cron, zone).unwrap();
    let wall = |tick: Timestamp| tick.to_zoned(table.zone.clone()).strftime("%m-%d %H:%M:%S %z").to_string();
    table.after(time(from)).take(count).map(wall).collect()
}

fn refused(cron: &str, zone: &str) -> (&'static str, String) {
    let error = Timetable::parse(cron, zone).unwrap_err();
    (error.field(), error.to_string())
}

#[test]
fn seconds_come_first_and_may_be_left_out() {
    let from = "2026-11-23T10:00:00Z";
    assert_eq!(walls("*/20 * * * * *", "UTC", from, 2), ["11-23 10:00:20 +0000", "11-23 10:00:40 +0000"]);
    assert_eq!(walls("*/20 * * * *", "UTC", from, 2), ["11-23 10:20:00 +0000", "11-23 10:40:00 +0000"]);
    assert_eq!(walls("@daily", NEW_YORK, from, 1), ["11-24 00:00:00 -0500"]);
}

#[test]
fn a_tick_is_after_a_part_of_its_second() {
    let every_second = Timetable::parse("* * * * * *", BERLIN).unwrap();
    for (from, next) in [("10:00:00Z", "10:00:01Z"), ("10:00:00.001Z", "10:00:01Z"), ("10:00:00.999Z", "10:00:01Z")] {
        let day = |at: &str| time(&format!("2026-11-23T{at}"));
        assert_eq!(every_second.next_after(day(from)).unwrap(), day(next));
    }
    assert_eq!(every_second.next_after(time("1969-12-31T23:59:58.5Z")).unwrap(), time("1969-12-31T23:59:59Z"));
}

#[test]
fn in_the_spring_gap_a_daily_tick_comes_at_its_end_and_others_are_left_out() {
    // Berlin goes from 2:00 to 3:00 on March 28th, 2027; New York on March 14th.
    assert_eq!(
        walls("30 2 * * *", BERLIN, "2027-03-26T23:00:00Z", 3),
        ["03-27 02:30:00 +0100", "03-28 03:00:00 +0200", "03-29 02:30:00 +0200"]
    );
    assert_eq!(
        walls("*/30 1-3 * * *", BERLIN, "2027-03-27T23:30:00Z", 5),
        [
            "03-28 01:00:00 +0100",
            "03-28 01:30:00 +0100",
            "03-28 03:00:00 +0200",
            "03-28 03:30:00 +0200",
            "03-29 01:00:00 +0200"
        ]
    );
    assert_eq!(
        walls("0 30 2 * * *", NEW_YORK, "2027-03-14T05:00:00Z", 2),
        ["03-14 03:00:00 -0400", "03-15 02:30:00 -0400"]
    );
}

#[test]
fn in_the_autumn_fold_a_daily_tick_comes_once_and_others_twice() {
    // Berlin goes from 3:00 back to 2:00 on October 31st, 2027; New York from 2:00 to 1:00 on November 7th.
    assert_eq!(
        walls("30 2 * * *", BERLIN, "2027-10-30T22:00:00Z", 2),
        ["10-31 02:30:00 +0200", "11-01 02:30:00 +0100"]
    );
    assert_eq!(
        walls("*/30 2 * * *", BERLIN, "2027-10-30T22:00:00Z", 5),
        [
            "10-31 02:00:00 +0200",
            "10-31 02:30:00 +0200",
            "10-31 02:00:00 +0100",
            "10-31 02:30:00 +0100",
            "11-01 02:00:00 +0100"
        ]
    );
    assert_eq!(
        walls("0 1 * * *", NEW_YORK, "2027-11-07T04:00:00Z", 2),
        ["11-07 01:00:00 -0400", "11-08 01:00:00 -0500"]
    );
    let hours = walls("0 * * * *", NEW_YORK, "2027-11-07T04:00:00Z", 3);
    assert_eq!(hours, ["11-07 01:00:00 -0400", "11-07 01:00:00 -0500", "11-07 02:00:00 -0500"]);
}

/// The end of such a gap is another day, month or year, and matches the expression no more.
#[test]
fn in_a_gap_across_midnight_a_daily_tick_comes_at_its_end() {
    // Nuuk goes from 23:00 to 24:00 on March 27th, 2027.
    let nuuk = |cron| walls(cron, "America/Nuuk", "2027-03-26T12:00:00Z", 2);
    assert_eq!(nuuk("30 23 27 3 *"), ["03-28 00:00:00 -0100", "03-27 23:30:00 -0100"]);
    assert_eq!(nuuk("30 23 * * SAT"), ["03-28 00:00:00 -0100", "04-03 23:30:00 -0100"]);
    assert_eq!(nuuk("0 0 * * *"), ["03-27 00:00:00 -0200", "03-28 00:00:00 -0100"]);
    assert_eq!(nuuk("59 59 23 L,27 3 *"), ["03-28 00:00:00 -0100", "03-31 23:59:59 -0100"]);
    assert_eq!(nuuk("*/15 23 * * *"), ["03-26 23:00:00 -0200", "03-26 23:15:00 -0200"]);
    let quarters = walls("*/15 23 * * *", "America/Nuuk", "2027-03-27T12:00:00Z", 1);
    assert_eq!(quarters, ["03-28 23:00:00 -0100"], "a range is left out");
    // Apia had no December 30th in 2011, Kiritimati no last day of 1994, Azores' clocks go from 0:00 to 1:00.
    let apia = |cron, from| walls(cron, "Pacific/Apia", from, 2);
    assert_eq!(apia("30 2 * * *", "2011-12-29T13:00:00Z"), ["12-31 00:00:00 +1400", "12-31 02:30:00 +1400"]);
    assert_eq!(apia("0 0 * * *", "2011-12-29T13:00:00Z"), ["12-31 00:00:00 +1400", "01-01 00:00:00 +1400"]);
    assert_eq!(apia("0 12 30 12 *", "2011-12-29T13:00:00Z")[0], "12-31 00:00:00 +1400");
    assert_eq!(apia("0 */12 * * *", "2011-12-29T13:00:00Z"), ["12-29 12:00:00 -1000", "12-31 00:00:00 +1400"]);
    let kiritimati = walls("0 12 31 12 *", "Pacific/Kiritimati", "1994-12-30T12:00:00Z", 2);
    assert_eq!(kiritimati, ["01-01 00:00:00 +1400", "12-31 12:00:00 +1400"]);
    assert_eq!(walls("30 0 28 3 *", "Atlantic/Azores", "2027-03-27T12:00:00Z", 1), ["03-28 01:00:00 +0000"]);
    // Half an hour: from 2:00 to 2:30.
    let lord_howe = walls("15 2 * * *", "Australia/Lord_Howe", "2027-10-02T12:00:00Z", 2);
    assert_eq!(lord_howe, ["10-03 02:30:00 +1100", "10-04 02:15:00 +1100"]);
}

/// Nuuk goes from 24:00 back to 23:00 on October 30th, 2027: the day before comes again.
#[test]
fn in_a_fold_across_midnight_a_daily_tick_comes_once_and_others_twice() {
    let noon = "2027-10-30T12:00:00Z";
    let daily = Timetable::parse("30 23 30 10 *", "America/Nuuk").unwrap();
    let ticks: Vec<_> = daily.after(time(noon)).take(2).map(|tick| tick.to_string()).collect();
    assert_eq!(ticks, ["2027-10-31T00:30:00Z", "2028-10-31T01:30:00Z"]);
    assert_eq!(
        walls("*/30 23 30 10 *", "America/Nuuk", noon, 4),
        ["10-30 23:00:00 -0100", "10-30 23:30:00 -0100", "10-30 23:00:00 -0200", "10-30 23:30:00 -0200"]
    );
    assert_eq!(walls("0 0 31 10 *", "America/Nuuk", noon, 1), ["10-31 00:00:00 -0200"]);
}

#[test]
fn leap_days_and_ends_of_months() {
    assert_eq!(walls("0 12 29 2 *", "UTC", "2026-01-01T00:00:00Z", 1), ["02-29 12:00:00 +0000"]);
    let leap = Timetable::parse("0 12 29 2 *", "UTC").unwrap();
    let years: Vec<_> = leap.after(time("2095-01-01T00:00:00Z")).take(3).map(|tick| tick.to_string()).collect();
    assert_eq!(years, ["2096-02-29T12:00:00Z", "2104-02-29T12:00:00Z", "2108-02-29T12:00:00Z"]);
    let months = |cron| -> Vec<_> {
        let ends = walls(cron, "UTC", "2027-01-01T12:00:00Z", 4);
        ends.into_iter().map(|end| end[..5].to_owned()).collect()
    };
    assert_eq!(months("0 0 31 * *"), ["01-31", "03-31", "05-31", "07-31"]);
    assert_eq!(months("0 0 L * *"), ["01-31", "02-28", "03-31", "04-30"]);
    assert_eq!(months("0 0 * * FRI#L"), ["01-29", "02-26", "03-26", "04-30"]);
}

#[test]
fn the_field_at_fault_is_named() {
    let named = |cron: &str| {
        let (field, message) = refused(cron, "UTC");
        assert_eq!(field, "cron", "{message}");
        message
    };
    assert!(named("61 * * * *").starts_with("the field minute, 61: "));
    assert!(named("* * * * * 8").starts_with("the field day of week, 8: "));
    assert!(named("99 * * * * *").starts_with("the field second, 99: "));
    assert!(named("* * 0 * *").starts_with("the field day of month, 0: "));
    assert!(named("* 5-1 * * *").starts_with("the field hour, 5-1: "));
    assert!(named("* * * FOO *").starts_with("the field month, FOO: "));
    for shape in ["", " ", "* * * *", "* * * * * * *", "@reboot", "0 0 0 1 1 * 2030"] {
        assert!(named(shape).starts_with("must have five fields"), "{shape:?}");
    }
    assert!(named(&"1".repeat(300)).contains("at most 256 bytes"));
    for never in ["0 0 30 2 *", "0 0 31 4,6,9,11 *"] {
        assert_eq!(named(never), "never fires: no date matches", "{never}");
    }
}

#[test]
fn zones_are_those_of_iana_and_none_of_the_machine() {
    assert_eq!(Timetable::parse("@daily", "europe/berlin").unwrap().zone_name(), BERLIN);
    assert_eq!(Timetable::parse("@daily", "UTC").unwrap().zone_name(), "UTC");
    let told = |zone: &str| {
        let (field, message) = refused("@daily", zone);
        assert_eq!(field, "timezone", "{message}");
        message
    };
    assert_eq!(told("Berlin"), "must be the IANA name of a time zone, such as Europe/Berlin");
    assert_eq!(told("US/New York"), "must be the IANA name of a time zone, such as America/New_York");
    for unknown in ["", "Mars/Base", "../../etc/passwd", "localtime", "Etc/Unknown", "+02:00", &"x".repeat(10_000)] {
        assert!(told(unknown).contains("IANA"), "{unknown:?}");
    }
}

/// An expression as sets, and its text.
#[derive(Debug, Clone)]
struct Sets {
    minutes: BTreeSet<i8>,
    hours: BTreeSet<i8>,
    days: Option<BTreeSet<i8>>,
    months: Option<BTreeSet<i8>>,
    weekdays: Option<BTreeSet<i8>>,
}

impl Sets {
    fn text(&self) -> String {
        let list = |set: &BTreeSet<i8>| set.iter().map(i8::to_string).collect::<Vec<_>>().join(",");
        let any = |set: &Option<BTreeSet<i8>>| set.as_ref().map_or("*".to_owned(), list);
        let (days, months, weekdays) = (any(&self.days), any(&self.months), any(&self.weekdays));
        format!("{} {} {days} {months} {weekdays}", list(&self.minutes), list(&self.hours))
    }

    fn is_daily(&self) -> bool {
        self.minutes.len() == 1 && self.hours.len() == 1
    }

    fn has_date(&self, date: Date) -> bool {
        let has = |set: &Option<BTreeSet<i8>>, value| set.as_ref().is_none_or(|set| set.contains(&value));
        let weekday = date.weekday().to_sunday_zero_offset();
        // Where both kinds of day are given, either will do.
        let day = match (&self.days, &self.weekdays) {
            (Some(days), Some(weekdays)) => days.contains(&date.day()) || weekdays.contains(&weekday),
            (days, weekdays) => has(days, date.day()) && has(weekdays, weekday),
        };
        has(&self.months, date.month()) && day
    }

    fn has(&self, wall: &Zoned) -> bool {
        self.has_date(wall.date()) && self.hours.contains(&wall.hour()) && self.minutes.contains(&wall.minute())
    }

    /// The ticks of some days by looking at the wall clock every half minute: some offsets of the past have seconds.
    fn by_brute_force(&self, zone: &TimeZone, begin: Timestamp, days: i64) -> Vec<Timestamp> {
        let half_minutes = (1..days * 2_880).map(|half| begin + SignedDuration::from_secs(30 * half));
        let walls = half_minutes.map(|time| (time, time.to_zoned(zone.clone())));
        if !self.is_daily() {
            return walls.filter(|(_, wall)| wall.second() == 0 && self.has(wall)).map(|(time, _)| time).collect();
        }
        // The first look at which the clock is there, or past it.
        let (hour, minute) = (*self.hours.first().unwrap(), *self.minutes.first().unwrap());
        let began = begin.to_zoned(zone.clone()).datetime();
        let first = began.date().checked_sub(jiff::Span::new().days(1)).unwrap();
        let dates = first.series(jiff::Span::new().days(1)).filter(|date| self.has_date(*date));
        let mut to_come = dates.map(|date| date.at(hour, minute, 0, 0)).filter(|wall| *wall > began).peekable();
        let mut ticks = Vec::new();
        for (time, wall) in walls {
            let mut here = false;
            while to_come.next_if(|next| *next <= wall.datetime()).is_some() {
                here = true;
            }
            if here {
                ticks.push(time);
            }
        }
        ticks
    }
}

fn sets() -> impl Strategy<Value = Sets> {
    let some = |max: i8, most: usize| prop::collection::btree_set(0..=max, 1..=most);
    let days = prop::option::of(prop::collection::btree_set(1..=31_i8, 1..=20));
    let months = prop::option::weighted(0.2, prop::collection::btree_set(1..=12_i8, 6..=12));
    let weekdays = prop::option::of(prop::collection::btree_set(0..=6_i8, 1..=5));
    (some(59, 6), prop_oneof![some(23, 8), some(4, 3)], days, months, weekdays)
        .prop_map(|(minutes, hours, days, months, weekdays)| Sets { minutes, hours, days, months, weekdays })
}

/// Zones and days whose clocks do odd things: gaps and folds across midnight, of half an hour and of two hours, of whole days, at
/// the end of a month and of a year, and none at all.
const ODD: [(&str, i16, i8, i8); 24] = [
    (BERLIN, 2027, 3, 27),
    (BERLIN, 2027, 10, 30),
    (NEW_YORK, 2027, 3, 13),
    (NEW_YORK, 2027, 11, 6),
    ("Australia/Lord_Howe", 2027, 4, 3),
    ("Australia/Lord_Howe", 2027, 10, 2),
    ("America/Nuuk", 2027, 3, 26),
    ("America/Nuuk", 2027, 10, 29),
    ("America/Scoresbysund", 2030, 3, 29),
    ("Atlantic/Azores", 2027, 3, 26),
    ("Asia/Beirut", 2027, 3, 26),
    ("Asia/Beirut", 2027, 10, 29),
    ("Africa/Cairo", 2027, 4, 28),
    ("America/Santiago", 2027, 4, 2),
    ("America/Havana", 2027, 3, 13),
    ("Antarctica/Troll", 2027, 3, 27),
    ("Pacific/Apia", 2011, 12, 28),
    ("Pacific/Kwajalein", 1993, 8, 19),
    ("Pacific/Kiritimati", 1994, 12, 29),
    ("America/Caracas", 2016, 4, 29),
    ("Africa/Monrovia", 1972, 1, 5),
    ("Asia/Pyongyang", 2018, 5, 3),
    ("Asia/Kathmandu", 2028, 2, 28),
    ("UTC", 2027, 12, 30),
];

/// A zone, and the beginning of a few days in which its clocks change, or of some days.
fn place() -> impl Strategy<Value = (String, Timestamp)> {
    let odd = prop::sample::select(&ODD[..]).prop_map(|(zone, year, month, day)| {
        let begin = date(year, month, day).to_zoned(TimeZone::get(zone).unwrap()).unwrap();
        (zone.to_owned(), begin.timestamp())
    });
    // Any change of any zone's clocks from 1970 to 2037.
    let zones: Vec<String> =
        db().available().map(|zone| zone.to_string()).filter(|name| parse_zone(name).is_ok()).collect();
    let any = (prop::sample::select(zones), any::<prop::sample::Index>(), 3_600..200_000_i64).prop_map(
        |(name, pick, before)| {
            let zone = TimeZone::get(&name).unwrap();
            let last = time("2038-01-01T00:00:00Z");
            let mut changes: Vec<_> = zone
                .following(time("1970-01-03T00:00:00Z"))
                .map(|change| change.timestamp())
                .take_while(|at| *at < last)
                .collect();
            changes.push(last);
            let begin = changes[pick.index(changes.len())].as_second() - before;
            (name, Timestamp::from_second(begin - begin.rem_euclid(60)).unwrap())
        },
    );
    prop_oneof![2 => odd, 1 => any]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Expression, zone and days against a look at every half minute.
    #[test]
    fn ticks_are_those_of_a_minute_walk(sets in sets(), (name, begin) in place()) {
        let table = Timetable::parse(&sets.text(), &name).unwrap();
        let expected = sets.by_brute_force(&table.zone, begin, 4);
        let end = begin + SignedDuration::from_hours(96);
        let ticks: Vec<_> = table.after(begin).take_while(|tick| *tick < end).collect();
        prop_assert_eq!(ticks, expected, "{} in {} from {}", sets.text(), name, begin);
    }

    /// Wherever the look begins, the next tick is the same one: what processes agree by.
    #[test]
    fn the_next_tick_does_not_depend_on_where_the_look_begins(
        sets in sets(), (name, begin) in place(), offsets in prop::collection::vec(0..259_200_000_i64, 6)
    ) {
        let table = Timetable::parse(&sets.text(), &name).unwrap();
        let walked: Vec<_> = table.after(begin).take_while(|tick| *tick < begin + SignedDuration::from_hours(80)).collect();
        for offset in offsets {
            let from = begin + SignedDuration::from_millis(offset);
            // Of a rare one none may be near.
            if let Some(after) = walked.iter().copied().find(|tick| *tick > from) {
                prop_assert_eq!(table.next_after(from).unwrap(), after, "{} in {} from {}", sets.text(), name, from);
            }
        }
    }

    #[test]
    fn any_text_is_read_or_refused(cron in "[-0-9*/,LW#?A-Z@ +é]{0,40}", zone in "\\PC{0,20}") {
        if let Ok(table) = Timetable::parse("@daily", &zone) {
            prop_assert!(!table.zone_name().is_empty());
        }
        if let Ok(table) = Timetable::parse(&cron, BERLIN) {
            let now = time("2026-11-23T00:00:00Z");
            prop_assert!(table.next_after(now).unwrap() > now);
        }
    }
}
