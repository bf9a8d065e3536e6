//! A model of a world that keeps its promises: whatever befalls it, the checker finds nothing.

use proptest::prelude::*;

use super::super::check::limits::{Bound, Limit, Scope};
use super::super::check::{Evidence, FinalTask, check};
use super::super::{Answered, Ending, Op};
use super::{completed, done, end, gone, interrupted, line, start, submit};

/// How a run that is not the last may end.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Killed,
    Dropped,
    Failed,
    Frozen,
}

/// What happens to one submission, in the model.
#[derive(Clone, Debug)]
enum Fate {
    Refused,
    Unrecorded,
    Recorded { unknown_first: u8, answered: bool, size: usize, once: bool, cuts: Vec<Cut>, finished: bool },
}

fn fate() -> impl Strategy<Value = Fate> {
    let cut = prop_oneof![Just(Cut::Killed), Just(Cut::Dropped), Just(Cut::Failed), Just(Cut::Frozen)];
    let recorded =
        (0..3u8, any::<bool>(), 1..4usize, any::<bool>(), proptest::collection::vec(cut, 0..4), any::<bool>());
    let recorded = recorded.prop_map(|(unknown_first, answered, size, once, cuts, finished)| Fate::Recorded {
        unknown_first: unknown_first.max(u8::from(!answered)),
        answered,
        size,
        once,
        cuts,
        finished,
    });
    prop_oneof![1 => Just(Fate::Refused), 1 => Just(Fate::Unrecorded), 8 => recorded]
}

/// All tasks share one place: the next begins when the one before has ended, or has lost it.
fn keyed(task: FinalTask) -> FinalTask {
    FinalTask { concurrency_key: Some("key".to_owned()), ..task }
}

/// A world that keeps its promises: it plays each fate, and writes the history down.
#[derive(Default)]
struct Model {
    evidence: Evidence,
    now_ms: u64,
    next_process: i32,
}

impl Model {
    fn play(&mut self, name: &str, fate: &Fate) {
        match fate {
            Fate::Refused => self.evidence.history.push(submit(name, Answered::Fail, 1, &[])),
            Fate::Unrecorded => self.evidence.history.push(submit(name, Answered::Unknown, 1, &[])),
            Fate::Recorded { unknown_first, answered, size, once, cuts, finished } => {
                let ids: Vec<String> = (0..*size).map(|at| format!("{name}.{at}")).collect();
                let unknown = submit(name, Answered::Unknown, *size, &[]);
                self.evidence.history.extend(std::iter::repeat_n(unknown, usize::from(*unknown_first)));
                if *answered {
                    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
                    self.evidence.history.push(submit(name, Answered::Ok, *size, &ids));
                }
                for id in &ids {
                    self.run(id, name, if *once { &[] } else { cuts }, *once && !finished);
                }
            }
        }
    }

    fn run(&mut self, id: &str, name: &str, cuts: &[Cut], interrupted_at_once: bool) {
        let mut fence = 1;
        for cut in cuts {
            self.cut(id, fence, *cut);
            fence += 1;
        }
        if interrupted_at_once {
            self.cut(id, fence, Cut::Killed);
            return self.evidence.tasks.push(keyed(interrupted(id, name)));
        }
        let (now_ms, process) = self.tick();
        self.evidence.history.extend(done(now_ms, process, id, fence));
        self.evidence.tasks.push(keyed(completed(id, name, fence)));
    }

    fn cut(&mut self, id: &str, fence: u64, cut: Cut) {
        let (now_ms, process) = self.tick();
        let history = &mut self.evidence.history;
        history.push(start(now_ms, process, id, fence));
        match cut {
            Cut::Killed => history.push(gone(now_ms + 50, process, true)),
            Cut::Dropped => history.push(end(now_ms + 50, process, id, fence, Ending::Dropped)),
            Cut::Failed => history.push(end(now_ms + 50, process, id, fence, Ending::Again)),
            Cut::Frozen => {
                history.push(line(now_ms + 50, 1, Op::Frozen { process }));
                history.push(line(now_ms + 5_000, 1, Op::Thawed { process }));
                history.push(end(now_ms + 5_020, process, id, fence, Ending::Dropped));
            }
        }
    }

    /// The next run begins later, and in another process.
    fn tick(&mut self) -> (u64, i32) {
        self.now_ms += 1_000;
        self.next_process += 1;
        (self.now_ms, self.next_process)
    }
}

proptest! {
    #[test]
    fn a_history_that_keeps_every_promise_passes(fates in proptest::collection::vec(fate(), 0..40)) {
        let mut model = Model::default();
        model.evidence.limits = vec![Limit { scope: Scope::Keys("key".to_owned()), bound: Bound::Running(1) }];
        for (at, fate) in fates.iter().enumerate() {
            model.play(&format!("s{at}"), fate);
        }
        // The file's order is that of the writes, which for lines of one moment is nobody's promise.
        model.evidence.history.reverse();
        model.evidence.history.sort_by_key(|line| line.at);
        prop_assert_eq!(check(&model.evidence).violations, []);
    }
}
