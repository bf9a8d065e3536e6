use futures::FutureExt;
use proptest::prelude::*;

use super::*;
use Priority::{High, Low, Normal};

#[test]
fn levels_are_those_of_the_priorities() {
    assert_eq!(Priority::ALL.map(level_of), [0, 1, 2]);
}

#[test]
fn the_most_urgent_goes_first_and_the_others_after_eight() {
    let mut turns = Turns::default();
    let taken: Vec<_> = (0..20).filter_map(|_| turns.next([true; 3])).collect();
    assert_eq!(taken, [0, 0, 0, 0, 0, 0, 0, 0, 1, 2].repeat(2));
    assert_eq!(turns.next([false; 3]), None);
    assert_eq!(turns.next([false, false, true]), Some(2));
}

proptest! {
    /// Whatever waits when: somebody has the turn if anybody waits; nobody goes before a more urgent one but by the
    /// rule; and who waits all the time is passed over at most so often.
    #[test]
    fn every_turn_has_its_reason_and_nobody_starves(rounds in prop::collection::vec(any::<[bool; 3]>(), 1..400)) {
        let mut turns = Turns::default();
        let mut passed = [0_u32; LEVELS];
        for waiting in rounds {
            let turn = turns.next(waiting);
            prop_assert_eq!(turn.is_some(), waiting.contains(&true));
            let Some(turn) = turn else { continue };
            prop_assert!(waiting[turn]);
            if waiting[..turn].contains(&true) {
                prop_assert!(passed[turn] >= IN_A_ROW_MAX, "level {} went first after {:?}", turn, passed);
            }
            for (level, passed) in passed.iter_mut().enumerate() {
                let over = u32::from(waiting[level] && level > turn);
                *passed = if level == turn { 0 } else { *passed + over };
                // Two levels may be overdue at once, and then one more goes before the other.
                prop_assert!(level == 0 || *passed <= IN_A_ROW_MAX + 1, "level {} was passed {} times", level, passed);
            }
        }
    }

    /// Grants, releases and futures that stop waiting, in any order: as many places as ever, and none is free while
    /// somebody waits.
    #[test]
    fn no_place_is_lost_or_made(places in 1_usize..4, steps in prop::collection::vec((0_u8..4, any::<prop::sample::Index>()), 1..200)) {
        let arbiter = Arbiter::new(places);
        let mut waiting = Vec::new();
        let mut held = Vec::new();
        for (step, index) in steps {
            match step {
                0 | 1 => {
                    let (arbiter, priority) = (arbiter.clone(), *index.get(&Priority::ALL));
                    waiting.push(Box::pin(async move { arbiter.acquire(priority).await }));
                }
                2 if !held.is_empty() => drop(held.swap_remove(index.index(held.len()))),
                // Granted or not: it may have been granted since it was last asked.
                3 if !waiting.is_empty() => drop(waiting.swap_remove(index.index(waiting.len()))),
                _ => {}
            }
            if step < 2 || index.index(2) == 0 {
                let (asked, mut still) = (std::mem::take(&mut waiting), Vec::new());
                for mut future in asked {
                    match (&mut future).now_or_never() {
                        Some(permit) => held.push(permit),
                        None => still.push(future),
                    }
                }
                waiting = still;
                prop_assert_eq!(arbiter.available() + held.len(), places);
                prop_assert!(waiting.is_empty() || arbiter.available() == 0);
            }
        }
        drop((waiting, held));
        prop_assert_eq!(arbiter.available(), places);
    }
}

/// A permit goes to the more urgent of those that wait, whoever came first; among equals to who came first.
#[tokio::test]
async fn a_permit_goes_to_the_most_urgent() {
    let arbiter = Arbiter::new(1);
    let mut held = Some(arbiter.acquire(Low).await);
    let mut asked = [Low, Normal, High, High].map(|priority| Some(Box::pin(arbiter.acquire(priority))));
    assert!(asked.iter_mut().flatten().all(|asked| asked.now_or_never().is_none()), "there is one place");
    for expected in [2, 3, 1, 0] {
        drop(held.take());
        for (index, slot) in asked.iter_mut().enumerate() {
            if let Some(permit) = slot.as_mut().and_then(|asked| asked.now_or_never()) {
                assert_eq!(index, expected);
                (held, *slot) = (Some(permit), None);
            }
        }
        assert!(held.is_some(), "{expected} has the place");
    }
    drop(held);
    assert_eq!(arbiter.available(), 1);
}

/// A grant that reaches somebody who has just stopped waiting goes to the next.
#[tokio::test]
async fn a_grant_to_nobody_goes_on() {
    let arbiter = Arbiter::new(1);
    let held = arbiter.acquire(Normal).await;
    let mut urgent = Box::pin(arbiter.acquire(High));
    let mut patient = Box::pin(arbiter.acquire(Low));
    assert!((&mut urgent).now_or_never().is_none() && (&mut patient).now_or_never().is_none());
    drop(held);
    drop(urgent);
    assert!(patient.now_or_never().is_some());
}
