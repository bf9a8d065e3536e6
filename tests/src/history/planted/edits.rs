//! Changes of waiting tasks, in a history that keeps to them and in some that do not.

use super::super::check::{Evidence, FinalTask, check};
use super::super::{Answered, Broken, Edit, Line, Op};
use super::{Planted, completed, done, gone, line, ms, start, start_of, submit, task};

const HERE: i32 = 50;
const KILLED: i32 = 51;

fn edit(task: &str, number: u64, outcome: Answered, fence: Option<u64>) -> Edit {
    Edit { task: task.to_owned(), number, args: true, queue: None, outcome, fence, run_at: None }
}

/// What is written before a change is sent, and once it is answered.
fn edited(at_ms: u64, edit: Edit) -> Vec<Line> {
    let sent = Edit { outcome: Answered::Unknown, fence: None, run_at: None, ..edit.clone() };
    [sent, edit].map(|edit| line(at_ms, 1, Op::Edit(edit))).into()
}

/// Adds tasks that were changed: twice before the first run; by a change without an answer that came true after a later
/// one; in vain; between two runs; and one that was put off and given to another queue.
pub(super) fn keep(evidence: &mut Evidence) {
    let mut history = vec![submit("edited", Answered::Ok, 5, &["e1", "e2", "e3", "e4", "e5"])];
    history.extend(edited(10, edit("e1", 1, Answered::Ok, Some(1))));
    history.extend(edited(20, edit("e1", 2, Answered::Ok, Some(2))));
    history.extend(edited(10, edit("e2", 1, Answered::Unknown, None)));
    history.extend(edited(20, edit("e2", 2, Answered::Ok, Some(1))));
    history.extend(edited(3_000, edit("e3", 1, Answered::Fail, None)));
    history.push(start(100, KILLED, "e4", 1));
    history.push(gone(150, KILLED, true));
    history.extend(edited(200, edit("e4", 1, Answered::Ok, Some(2))));
    let (queue, run_at) = (Some("third".to_owned()), Some(ms(2_800)));
    history.extend(edited(200, Edit { args: false, queue, run_at, ..edit("e5", 1, Answered::Ok, Some(1)) }));
    let ran = [("e1", 3, 2), ("e2", 3, 1), ("e3", 1, 0), ("e4", 3, 1), ("e5", 2, 0)];
    for (id, fence, edition) in ran {
        history.extend(done(2_900, HERE, id, fence));
        evidence.tasks.push(FinalTask { edition, ..completed(id, "edited", fence) });
    }
    evidence.history.extend(history);
    for (id, fence, edition) in ran {
        give(evidence, id, fence, edition);
    }
    let put_off = task(evidence, "e5");
    (put_off.queue, put_off.started_at) = ("third".to_owned(), Some(ms(2_890)));
}

pub(super) const PLANTED: [Planted; 10] = [
    ("a run with the args of before", |e| give(e, "e1", 3, 0), &[Broken::Misedited]),
    ("the change before the last", |e| both(e, "e1", 3, 1), &[Broken::Misedited]),
    ("a change is lost", |e| both(e, "e4", 3, 0), &[Broken::Misedited]),
    ("a change is lost before any run", lose_unrun, &[Broken::Misedited]),
    ("the ledger has another change than its run", |e| task(e, "e2").edition = 2, &[Broken::Misedited]),
    ("a change was refused and made", |e| both(e, "e3", 1, 1), &[Broken::Misedited]),
    ("a change that came true before it was sent", |e| give(e, "e4", 1, 1), &[Broken::Misedited]),
    ("a change of nobody", |e| both(e, "o", 1, 1), &[Broken::Misedited]),
    ("a start before the new time", |e| task(e, "e5").started_at = Some(ms(2_799)), &[Broken::Misedited]),
    ("a queue that no change was about", |e| e.history.retain(|line| !is_edit_of(line, "e5")), &[Broken::Misplaced]),
];

fn is_edit_of(line: &Line, id: &str) -> bool {
    matches!(&line.op, Op::Edit(edit) if edit.task == id)
}

/// Lets a run have been given other args.
fn give(evidence: &mut Evidence, id: &str, fence: u64, given: u64) {
    if let Op::Start { edition, .. } = &mut start_of(evidence, id, fence).op {
        *edition = given;
    }
}

fn both(evidence: &mut Evidence, id: &str, fence: u64, edition: u64) {
    give(evidence, id, fence, edition);
    task(evidence, id).edition = edition;
}

/// A task that was changed and cancelled has the change in the end.
fn lose_unrun(evidence: &mut Evidence) {
    evidence.history.extend(edited(40, edit("w", 1, Answered::Ok, Some(0))));
}

#[test]
fn edits_are_counted() {
    let counts = check(&super::clean()).counts;
    assert_eq!((counts.edits, counts.edits_unknown, counts.edits_refused), (5, 1, 1));
}
