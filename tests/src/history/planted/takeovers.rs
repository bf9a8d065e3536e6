//! Takeovers are counted without the time in which nothing could have started.

use std::time::Duration;

use super::super::check::check;
use super::super::{Line, Op};
use super::{clean, line, ms};

fn fault(at_ms: u64, what: &str) -> Line {
    line(at_ms, 1, Op::Fault { what: what.to_owned() })
}

fn healed(at_ms: u64, what: &str) -> Line {
    line(at_ms, 1, Op::Healed { what: what.to_owned() })
}

/// The only takeover of the clean history, from 200 to 3,000, with these faults in it.
fn takeover(faults: &[Line]) -> (Duration, Duration) {
    let mut evidence = clean();
    evidence.history.extend(faults.iter().cloned());
    let counts = check(&evidence).counts;
    assert_eq!((counts.takeovers.len(), counts.takeovers_in_all.len()), (1, 1));
    (counts.takeovers[0], counts.takeovers_in_all[0])
}

#[test]
fn a_takeover_waits_for_what_is_away_and_that_is_not_counted() {
    let (death, broker, queue) =
        ("worker killed (victim 1)", "broker node killed (victim 2)", "queue paused (victim 3)");
    assert_eq!(takeover(&[]), (ms(2_800), ms(2_800)));
    assert_eq!(takeover(&[fault(190, death), healed(2_000, death)]), (ms(2_800), ms(2_800)));
    assert_eq!(takeover(&[fault(1_000, broker), healed(2_000, broker)]), (ms(1_800), ms(2_800)));
    let overlapping = [fault(1_000, broker), fault(1_500, queue), healed(2_000, broker), healed(2_500, queue)];
    assert_eq!(takeover(&overlapping), (ms(1_300), ms(2_800)));
    let around = [fault(100, broker), healed(9_000, broker), fault(500, queue), healed(600, queue)];
    assert_eq!(takeover(&around), (ms(0), ms(2_800)));
    assert_eq!(takeover(&[fault(2_000, broker)]), (ms(1_800), ms(2_800)), "it is never healed");
    assert_eq!(takeover(&[fault(3_100, broker), healed(9_000, broker)]), (ms(2_800), ms(2_800)), "it came later");
}
