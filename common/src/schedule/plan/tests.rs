use proptest::prelude::*;

use super::*;
use crate::task::{Json, Kind, QueueName};
use crate::template::TaskTemplate;

fn second(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn definition(cron: &str, catch_up: CatchUp, overlap: Overlap) -> Definition {
    Definition {
        cron: cron.to_owned(),
        timezone: "UTC".to_owned(),
        task: TaskTemplate {
            kind: Kind::parse("a").unwrap(),
            queue: QueueName::default(),
            args: Json::null(),
            priority: Default::default(),
            max_attempts: 1,
            timeout_ms: None,
            result_ttl_ms: None,
            concurrency_key: None,
            tags: Default::default(),
        },
        catch_up,
        catch_up_max: 30,
        overlap,
        jitter_ms: 0,
        paused: false,
    }
}

/// Goes on until nothing is due; answers every fired tick and how many were passed over.
fn until_none_is_due(definition: &Definition, tick: i64, now: i64, since: i64) -> (Vec<i64>, u32, i64) {
    let timetable = definition.timetable().unwrap();
    let watched = Watched { now: second(now), since: second(since) };
    let (mut fired, mut missed, mut next) = (Vec::new(), 0, second(tick));
    while next <= watched.now {
        let plan = plan(definition, &timetable, next, watched).unwrap();
        assert!(plan.next > next && plan.fire.len() <= BATCH);
        assert!(plan.fire.iter().all(|tick| (next..plan.next).contains(tick)), "{plan:?}");
        fired.extend(plan.fire.iter().map(|tick| tick.as_second()));
        missed += plan.missed;
        next = plan.next;
    }
    (fired, missed, next.as_second())
}

#[test]
fn a_tick_in_time_is_fired_and_so_are_those_behind_it() {
    let every_second = definition("* * * * * *", CatchUp::None, Overlap::Allow);
    assert_eq!(until_none_is_due(&every_second, 100, 100, 50), (vec![100], 0, 101));
    assert_eq!(until_none_is_due(&every_second, 100, 103, 100), (vec![100, 101, 102, 103], 0, 104));
    assert_eq!(until_none_is_due(&every_second, 100, 160, 100).0.len(), 61, "however late");
}

#[test]
fn none_passes_over_what_was_missed() {
    let every_second = definition("* * * * * *", CatchUp::None, Overlap::Allow);
    assert_eq!(until_none_is_due(&every_second, 100, 112, 110), (vec![110, 111, 112], 10, 113));
    let hourly = definition("0 * * * *", CatchUp::None, Overlap::Allow);
    assert_eq!(until_none_is_due(&hourly, 3_600, 10_000, 9_999), (vec![], 2, 10_800));
}

#[test]
fn one_fires_the_newest_that_was_missed() {
    let every_second = definition("* * * * * *", CatchUp::One, Overlap::Allow);
    assert_eq!(until_none_is_due(&every_second, 100, 112, 110), (vec![109, 110, 111, 112], 9, 113));
    let hourly = definition("0 * * * *", CatchUp::One, Overlap::Allow);
    assert_eq!(until_none_is_due(&hourly, 3_600, 10_000, 9_999), (vec![7_200], 1, 10_800));
    assert_eq!(until_none_is_due(&hourly, 3_600, 4_000, 4_000), (vec![3_600], 0, 7_200), "the only one");
}

#[test]
fn all_fires_each_up_to_the_bound_and_keeps_the_newest() {
    let minutely = definition("* * * * *", CatchUp::All, Overlap::Allow);
    let (fired, missed, next) = until_none_is_due(&minutely, 60, 600, 590);
    assert_eq!((fired, missed, next), ((1..=10).map(|minute| minute * 60).collect(), 0, 660));
    let (fired, missed, next) = until_none_is_due(&minutely, 60, 6_010, 6_005);
    assert_eq!((fired, missed, next), ((71..=100).map(|minute| minute * 60).collect(), 70, 6_060));
}

/// A year of seconds is neither walked nor kept.
#[test]
fn a_long_absence_costs_no_long_walk() {
    let every_second = definition("* * * * * *", CatchUp::All, Overlap::Allow);
    let year = 365 * 86_400;
    let (fired, missed, next) = until_none_is_due(&every_second, 100, year, year);
    let expected: Vec<_> = (year - 30..=year).collect();
    assert_eq!((fired, missed, next), (expected, COUNTED_MAX, year + 1));
}

#[test]
fn what_must_not_overlap_goes_one_by_one() {
    let minutely = definition("* * * * *", CatchUp::All, Overlap::Skip);
    let timetable = minutely.timetable().unwrap();
    for since in [0, 590] {
        let watched = Watched { now: second(600), since: second(since) };
        let plan = plan(&minutely, &timetable, second(60), watched).unwrap();
        assert_eq!((plan.fire, plan.next), (vec![second(60)], second(120)));
    }
    assert_eq!(until_none_is_due(&minutely, 60, 600, 590).0.len(), 10);
}

proptest! {
    /// Every tick is fired, or counted as missed, once.
    #[test]
    fn no_tick_is_lost_or_doubled(
        step in 1..60_u32, absent in 0..20_000_i64, late in 0..100_i64, kept in 0..3, skip: bool
    ) {
        let catch_up = [CatchUp::None, CatchUp::One, CatchUp::All][kept as usize];
        let overlap = if skip { Overlap::Skip } else { Overlap::Allow };
        let definition = definition(&format!("*/{step} * * * * *"), catch_up, overlap);
        let since = 120 + absent;
        let now = since + late;
        let (fired, missed, next) = until_none_is_due(&definition, 120, now, since);
        let all: Vec<_> = (120..=now).filter(|second| second % 60 % i64::from(step) == 0).collect();
        prop_assert!(next > now);
        prop_assert!(fired.is_sorted_by(|a, b| a < b));
        prop_assert!(fired.iter().all(|tick| all.contains(tick)));
        prop_assert_eq!(fired.len() + missed.min(COUNTED_MAX) as usize >= all.len().min(COUNTED_MAX as usize), true);
        if missed < COUNTED_MAX {
            prop_assert_eq!(fired.len() + missed as usize, all.len());
        }
        let in_time = all.iter().filter(|tick| **tick >= since).count();
        let caught_up = fired.len() - in_time;
        let bound = match catch_up { CatchUp::None => 0, CatchUp::One => 1, CatchUp::All => 30 };
        prop_assert_eq!(caught_up, (all.len() - in_time).min(bound));
    }
}
