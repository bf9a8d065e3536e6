//! Groups: one more task follows when all members have ended, once, whoever looks.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::join;

use super::{
    HOUR, cancel, cancelled, complete, discard, get, granted, new_task, one, pruned, retry, run, settle, until, worker,
};
use crate::group::{Ended, Group, NewGroup};
use crate::ledger::{
    Caller, EndedGroups, Holder, Idempotency, Ledger, ListQuery, Recorded, Replayed, SharedLedger, Submission,
};
use crate::state::State;
use crate::task::{GroupId, Json, NewTask, OnConflict, TaskId, Unique};
use crate::template::TaskTemplate;

const NOW: Duration = Duration::ZERO;

/// What follows the groups of these tests.
fn then() -> TaskTemplate {
    TaskTemplate {
        args: Json::parse(r#"{ "to" : "Größe" }"#.to_owned()).unwrap(),
        tags: [("of".to_owned(), "x".to_owned())].into(),
        ..TaskTemplate::from(NewTask { kind: super::kind("test.then"), ..new_task() })
    }
}

/// A group of so many members, to be recorded.
pub fn grouped(members: usize) -> Submission {
    let tasks = std::iter::repeat_with(new_task).take(members).collect();
    let group = Some(NewGroup { id: GroupId::new(), then: then() });
    Submission { tasks, idempotency: None, reserve: HOUR, group }
}

/// Records a group; answers its id and those of its members.
pub async fn made(ledger: &dyn Ledger, members: usize) -> (GroupId, Vec<TaskId>) {
    let submission = grouped(members);
    let id = submission.group.as_ref().unwrap().id;
    let ids = submission.tasks.iter().map(|task| task.id).collect();
    assert!(matches!(ledger.record(submission).await.unwrap(), Recorded::New { .. }));
    (id, ids)
}

/// The group as it is now.
pub async fn look(ledger: &dyn Ledger, id: GroupId) -> Group {
    ledger.group(id).await.unwrap().unwrap()
}

/// The open groups whose members have all ended.
pub async fn ended(ledger: &dyn Ledger) -> Vec<GroupId> {
    ledger.ended_groups(None, 1_000).await.unwrap().ended
}

/// Closes the group if it is to be closed.
async fn closes(ledger: &dyn Ledger, id: GroupId) -> Option<Ended> {
    ledger.close_group(id).await.unwrap().map(|closed| closed.ended)
}

/// The tasks that followed, of all groups.
async fn followed(ledger: &dyn Ledger) -> Vec<TaskId> {
    let query = ListQuery { kind: Some(super::kind("test.then")), limit: 1_000, ..ListQuery::default() };
    ledger.list(query).await.unwrap().tasks.iter().map(|task| task.id).collect()
}

/// Group and members are told as they were given; a task of none has none.
pub async fn a_group_is_recorded_with_its_members(ledger: &dyn Ledger) {
    let (id, ids) = made(ledger, 3).await;
    let group = look(ledger, id).await;
    assert_eq!((group.id, group.total, &group.then), (id, 3, &then()));
    assert_eq!((group.then_id, group.ended, group.finished_at), (None, None, None));
    assert_eq!(group.counts, BTreeMap::from([(State::Accepted, 3)]));
    assert_eq!(get(ledger, ids[1]).await.group_id, Some(id));
    let plain = one(ledger).await;
    assert_eq!(get(ledger, plain).await.group_id, None);
    assert_eq!(ledger.group(GroupId::new()).await.unwrap(), None);
    let listed = ledger.list(ListQuery { group: Some(id), limit: 2, ..ListQuery::default() }).await.unwrap();
    assert_eq!(listed.tasks.iter().map(|task| task.id).collect::<Vec<_>>(), [ids[2], ids[1]]);
    let rest = ListQuery { group: Some(id), before: listed.next, limit: 2, ..ListQuery::default() };
    let rest = ledger.list(rest).await.unwrap();
    assert_eq!((rest.tasks[0].id, rest.tasks.len(), rest.next), (ids[0], 1, None));
    run(ledger, ids[0], worker(ledger).await, complete()).await;
    let completed = ListQuery { group: Some(id), state: Some(State::Completed), limit: 9, ..ListQuery::default() };
    assert_eq!(ledger.list(completed).await.unwrap().tasks.len(), 1);
}

/// Not before: a member that waits, runs or is to be retried keeps the group open, and nothing is written.
pub async fn a_group_closes_when_its_last_member_has_ended(ledger: &dyn Ledger) {
    let (id, ids) = made(ledger, 2).await;
    let holder = worker(ledger).await;
    let stays_open = async || {
        assert_eq!((ended(ledger).await, closes(ledger, id).await), (vec![], None));
        assert_eq!((look(ledger, id).await.finished_at, followed(ledger).await), (None, vec![]));
    };
    stays_open().await;
    run(ledger, ids[0], holder, complete()).await;
    stays_open().await;
    run(ledger, ids[1], holder, retry(NOW, "again")).await;
    stays_open().await;
    let granted = granted(ledger, ids[1], holder).await;
    stays_open().await;
    settle(ledger, ids[1], granted.fence, complete()).await;
    assert_eq!(ended(ledger).await, [id]);
    let closed = ledger.close_group(id).await.unwrap().unwrap();
    assert_eq!(closed.ended, Ended { completed: 2, cancelled: 0, discarded: 0 });
    let group = look(ledger, id).await;
    assert_eq!((group.then_id, group.ended), (Some(closed.then_id), Some(closed.ended)));
    assert!(group.finished_at >= Some(group.created_at));
    assert_eq!((ended(ledger).await, closes(ledger, id).await), (vec![], None), "once");
    assert_eq!(followed(ledger).await, [closed.then_id]);
    let task = get(ledger, closed.then_id).await;
    let expected = format!(
        r#"{{"group":{{"id":"{id}","total":2,"completed":2,"cancelled":0,"discarded":0}},"args":{{ "to" : "Größe" }}}}"#
    );
    assert_eq!((task.args.as_str(), task.state, task.group_id), (&expected[..], State::Accepted, None));
    assert_eq!((task.kind.as_str(), &task.tags["of"][..]), ("test.then", "x"));
    let due = ledger.fetch_due(10, HOUR).await.unwrap();
    assert_eq!(due.iter().map(|due| due.id).collect::<Vec<_>>(), [closed.then_id], "any relay publishes it");
}

/// Cancelled while it waited, by its handler, given up, and taken from a dead worker: all of them have ended.
pub async fn every_way_to_end_is_counted(ledger: &dyn Ledger) {
    let (id, ids) = made(ledger, 6).await;
    let (holder, dying) = (worker(ledger).await, worker(ledger).await);
    run(ledger, ids[0], holder, complete()).await;
    run(ledger, ids[1], holder, discard()).await;
    run(ledger, ids[2], holder, cancel()).await;
    cancelled(ledger, ids[3], "no").await;
    let interrupted = granted(ledger, ids[4], dying).await;
    let rescued = granted(ledger, ids[5], dying).await;
    ledger.retire(dying).await.unwrap();
    settle(ledger, ids[4], interrupted.fence, discard()).await;
    settle(ledger, ids[5], rescued.fence, retry(NOW, "its worker died")).await;
    assert_eq!((ended(ledger).await, closes(ledger, id).await), (vec![], None));
    run(ledger, ids[5], holder, complete()).await;
    let counted = Ended { completed: 2, cancelled: 2, discarded: 2 };
    assert_eq!((ended(ledger).await, closes(ledger, id).await), (vec![id], Some(counted)));
}

/// Before the end a member that is retried by a person is waited for; after it the group stays what it was.
pub async fn a_replay_counts_before_the_end_and_not_after(ledger: &dyn Ledger) {
    let (id, ids) = made(ledger, 1).await;
    let holder = worker(ledger).await;
    run(ledger, ids[0], holder, discard()).await;
    assert_eq!(ended(ledger).await, [id]);
    assert_eq!(ledger.replay(ids[0], Caller::UNKNOWN).await.unwrap(), Replayed::From(State::Discarded));
    assert_eq!((ended(ledger).await, closes(ledger, id).await), (vec![], None), "who has looked before writes nothing");
    run(ledger, ids[0], holder, discard()).await;
    assert_eq!(closes(ledger, id).await, Some(Ended { discarded: 1, ..Ended::default() }));
    let closed = look(ledger, id).await;
    ledger.replay(ids[0], Caller::UNKNOWN).await.unwrap();
    run(ledger, ids[0], holder, complete()).await;
    assert_eq!((ended(ledger).await, closes(ledger, id).await), (vec![], None));
    assert_eq!(look(ledger, id).await, Group { counts: BTreeMap::from([(State::Completed, 1)]), ..closed });
    assert_eq!(followed(ledger).await.len(), 1);
}

/// A bounded look goes on where the one before ended, whatever it found.
pub async fn open_groups_are_looked_at_in_portions(ledger: &dyn Ledger) {
    let holder = worker(ledger).await;
    let (mut all, mut expected) = (Vec::new(), Vec::new());
    for index in 0..7 {
        let (id, ids) = made(ledger, 2).await;
        run(ledger, ids[0], holder, complete()).await;
        if index % 3 == 0 {
            run(ledger, ids[1], holder, complete()).await;
            expected.push(id);
        }
        all.push(id);
    }
    let (mut found, mut after) = (Vec::new(), None);
    for portion in all.chunks(3) {
        let EndedGroups { ended, next } = ledger.ended_groups(after, 3).await.unwrap();
        assert_eq!(next, Some(portion[portion.len() - 1]).filter(|_| portion.len() == 3));
        found.extend(ended);
        after = next;
    }
    assert_eq!(found, expected);
}

/// The members stay until the retention after the group's end; then they go, and the group after them.
pub async fn members_are_kept_until_the_group_is_old(ledger: &dyn Ledger) {
    let (id, ids) = made(ledger, 3).await;
    let (plain, holder) = (one(ledger).await, worker(ledger).await);
    for &id in &[ids[0], ids[1], plain] {
        run(ledger, id, holder, complete()).await;
    }
    until("the plain task to be pruned", async || Some(pruned(ledger, NOW, 100).await).filter(|n| *n == 1)).await;
    assert_eq!(pruned(ledger, NOW, 100).await, 0);
    assert_eq!(ledger.purge(ids.clone()).await.unwrap(), 0, "nor are they purged");
    assert_eq!(ledger.get(ids.clone()).await.unwrap().len(), 3, "those of an open group stay");
    run(ledger, ids[2], holder, complete()).await;
    assert_eq!(closes(ledger, id).await, Some(Ended { completed: 3, ..Ended::default() }));
    assert_eq!(pruned(ledger, HOUR, 100).await, 0);
    assert_eq!(ledger.get(ids.clone()).await.unwrap().len(), 3);
    let mut gone = 0;
    while gone < 3 {
        let more =
            until("the members to be pruned", async || Some(pruned(ledger, NOW, 2).await).filter(|count| *count > 0));
        gone += more.await;
    }
    until("the group to be pruned", async || {
        super::prune(ledger, NOW, 100).await;
        ledger.group(id).await.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(followed(ledger).await.len(), 1, "the one that followed is a task like any other");
}

/// A repeated request gives the tasks of the first, and no second group.
pub async fn a_repeated_group_is_the_first(ledger: &dyn Ledger) {
    let asked = |members| Submission {
        idempotency: Some(Idempotency { key: "key".to_owned(), fingerprint: [1; 32] }),
        ..grouped(members)
    };
    for members in [1, 4] {
        let submission = Submission {
            idempotency: Some(Idempotency { key: format!("of {members}"), fingerprint: [1; 32] }),
            ..asked(members)
        };
        let first = (submission.group.as_ref().unwrap().id, submission.tasks.iter().map(|task| task.id).collect());
        let again = Submission { idempotency: submission.idempotency.clone(), ..asked(members) };
        let second = again.group.as_ref().unwrap().id;
        ledger.record(submission).await.unwrap();
        let Recorded::Replayed(ids) = ledger.record(again).await.unwrap() else { panic!("recorded again") };
        assert_eq!((get(ledger, ids[0]).await.group_id, ids), (Some(first.0), first.1));
        assert_eq!(ledger.group(second).await.unwrap(), None);
    }
}

/// A group whose tasks stand in the way of others, or others in theirs, is recorded as a whole or not at all.
pub async fn a_refused_group_leaves_nothing(ledger: &dyn Ledger) {
    let unique = |on_conflict| Some(Unique { key: "key".to_owned(), window: None, on_conflict });
    let mut first = grouped(2);
    first.tasks[1].unique = unique(OnConflict::Reject);
    let (id, held) = (first.group.as_ref().unwrap().id, first.tasks[1].id);
    ledger.record(first).await.unwrap();
    let mut second = grouped(2);
    second.tasks[0].unique = unique(OnConflict::Reject);
    let refused = second.group.as_ref().unwrap().id;
    assert_eq!(
        ledger.record(second).await.unwrap(),
        Recorded::NotUnique(vec![(0, Holder { id: held, state: State::Accepted })])
    );
    assert_eq!(ledger.group(refused).await.unwrap(), None);
    // One that is replaced has been cancelled.
    let mut third = grouped(1);
    third.tasks[0].unique = unique(OnConflict::ReplaceWaiting);
    ledger.record(third).await.unwrap();
    assert_eq!(look(ledger, id).await.counts, BTreeMap::from([(State::Accepted, 1), (State::Cancelled, 1)]));
}

/// The last two members end at the same moment at two processes, and both look: each group is followed once, with the
/// right counts, and none is forgotten.
pub async fn one_task_follows_a_group_that_ends_everywhere_at_once(handles: &[SharedLedger; 2]) {
    let [here, there] = handles;
    let workers = [worker(&**here).await, worker(&**there).await];
    let end = async |ledger: &SharedLedger, id: GroupId, task: TaskId, worker, outcome| {
        let fence = granted(&**ledger, task, worker).await.fence;
        settle(&**ledger, task, fence, outcome).await;
        // Whoever sees nothing unfinished after its own end closes; between them they see it.
        ledger.close_group(id).await.unwrap()
    };
    let mut closers = [0, 0];
    for round in 0..60 {
        let (id, ids) = made(&**here, 3).await;
        run(&**here, ids[0], workers[0], complete()).await;
        let outcome = if round % 2 == 0 { complete() } else { discard() };
        let (one, other) =
            join!(end(here, id, ids[1], workers[0], complete()), end(there, id, ids[2], workers[1], outcome));
        closers[0] += usize::from(one.is_some());
        closers[1] += usize::from(other.is_some());
        let closed = match (one, other) {
            (Some(closed), None) | (None, Some(closed)) => closed,
            (None, None) => {
                // Each overtook the other's look at the last moment: the next look finds it.
                assert_eq!(ended(&**there).await, [id]);
                there.close_group(id).await.unwrap().unwrap()
            }
            both => panic!("closed twice: {both:?}"),
        };
        let completed = if round % 2 == 0 { 3 } else { 2 };
        assert_eq!(closed.ended, Ended { completed, cancelled: 0, discarded: 3 - completed });
        assert_eq!(look(&**here, id).await.then_id, Some(closed.then_id));
    }
    assert_eq!(followed(&**there).await.len(), 60);
    assert!(ended(&**here).await.is_empty());
    println!("closed by each: {closers:?}");
}

/// Closers that are cut off at any moment have done all of it or nothing; in the second case the next one does.
pub async fn a_closer_that_is_cut_off_leaves_it_to_the_next(here: &dyn Ledger, there: &dyn Ledger) {
    let holder = worker(here).await;
    for round in 0..30 {
        let (id, ids) = made(here, 2).await;
        for task in ids {
            run(here, task, holder, complete()).await;
        }
        let cut = tokio::time::timeout(Duration::from_micros(200 * round), here.close_group(id)).await;
        if !matches!(cut, Ok(Ok(Some(_)))) {
            until("the next closer", async || {
                there.close_group(id).await.unwrap();
                look(there, id).await.finished_at
            })
            .await;
        }
        assert_eq!(look(here, id).await.ended, Some(Ended { completed: 2, ..Ended::default() }));
        let followed = followed(here).await;
        assert_eq!((followed.len() as u64, Some(followed[0])), (round + 1, look(there, id).await.then_id));
    }
}

/// Many looks at many groups at once, through both: each group is followed once.
pub async fn one_of_all_closers_wins(here: &dyn Ledger, there: &dyn Ledger) {
    let holder = worker(here).await;
    let mut groups = Vec::new();
    for _ in 0..20 {
        let (id, ids) = made(here, 1).await;
        run(here, ids[0], holder, complete()).await;
        groups.push(id);
    }
    let close = async |ledger: &dyn Ledger| {
        let mut won = 0;
        for id in &groups {
            won += usize::from(ledger.close_group(*id).await.unwrap().is_some());
        }
        won
    };
    let (a, b, c, d) = join!(close(here), close(there), close(here), close(there));
    assert_eq!(a + b + c + d, groups.len());
    assert_eq!(followed(there).await.len(), groups.len());
}
