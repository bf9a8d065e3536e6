//! Takeovers are told apart by what else was broken.

use super::super::check::check;
use super::super::check::takeovers::WORKER_DEATH;
use super::super::{Line, Op};
use super::{clean, gone, line, ms, start};

#[test]
fn a_takeover_amid_other_faults_is_told_apart() {
    let fault = |at_ms, what: &str| line(at_ms, 1, Op::Fault { what: what.to_owned() });
    let healed = |at_ms, what: &str| line(at_ms, 1, Op::Healed { what: what.to_owned() });
    let takeovers = |faults: &[Line]| {
        let mut evidence = clean();
        evidence.history.extend(faults.iter().cloned());
        let counts = check(&evidence).counts;
        (counts.takeovers.len(), counts.late_takeovers.len())
    };
    let (death, broker) = (format!("{WORKER_DEATH} (victim 1, 7 ms)"), "broker node killed (victim 2, 8 ms)");
    assert_eq!(takeovers(&[fault(190, &death), healed(210, &death)]), (1, 0));
    assert_eq!(takeovers(&[fault(1_000, broker), healed(2_000, broker)]), (0, 1));
    assert_eq!(takeovers(&[fault(1_000, broker)]), (0, 1), "it is never healed");
    assert_eq!(takeovers(&[fault(3_100, broker), healed(9_000, broker)]), (1, 0), "it came later");
    // The worker had crashed with the task before.
    let mut evidence = clean();
    evidence.history.extend([start(20, 30, "k", 0), gone(40, 30, true)]);
    let counts = check(&evidence).counts;
    assert_eq!((counts.takeovers, counts.late_takeovers), (vec![ms(60)], vec![ms(2_800)]));
}
