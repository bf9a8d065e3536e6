//! Schedules: kept as they were given, and each tick fired once, whoever fires.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::{complete, get, queue, run, until, worker};
use crate::ledger::{Caller, Changed, Fired, Firing, GivenUp, Ledger, ListQuery, NextTick, ScheduleChange};
use crate::schedule::{CatchUp, Definition, Overlap, Schedule, ScheduleName, TickCounts};
use crate::state::State;
use crate::task::{Json, Priority, Task};
use crate::template::TaskTemplate;

/// A schedule's name.
pub fn name(text: &str) -> ScheduleName {
    ScheduleName::parse(text).unwrap()
}

/// A definition, whose expression no ledger looks at.
pub fn definition() -> Definition {
    Definition {
        cron: "*/10 * * * * *".to_owned(),
        timezone: "Europe/Berlin".to_owned(),
        task: TaskTemplate {
            kind: super::kind("test.work"),
            queue: queue("default"),
            args: Json::parse(r#"{ "n" : 1.0 }"#.to_owned()).unwrap(),
            priority: Priority::High,
            max_attempts: 3,
            timeout_ms: Some(5_000),
            result_ttl_ms: Some(60_000),
            concurrency_key: None,
            tags: [("of".to_owned(), "Größe".to_owned())].into(),
        },
        catch_up: CatchUp::All,
        catch_up_max: 7,
        overlap: Overlap::Allow,
        jitter_ms: 0,
        paused: false,
    }
}

/// A time in seconds since 1970: long past for a ledger that is asked what is due.
pub fn tick(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// Makes a schedule that stands at a tick.
pub async fn made(ledger: &dyn Ledger, text: &str, next: i64) -> Schedule {
    let change = anew(text, definition(), NextTick::At(tick(next)));
    applied(ledger.change_schedule(change).await.unwrap())
}

/// What makes a schedule.
pub fn anew(text: &str, definition: Definition, next: NextTick) -> ScheduleChange {
    ScheduleChange { name: name(text), replaces: None, definition, next, given_up: None, caller: Caller::UNKNOWN }
}

fn applied(changed: Changed) -> Schedule {
    match changed {
        Changed::Applied(schedule) => *schedule,
        other => panic!("{other:?}"),
    }
}

/// What fires some ticks of a schedule.
pub fn firing(schedule: &Schedule, ticks: &[i64], next: i64) -> Firing {
    let tasks = ticks.iter().map(|second| (tick(*second), schedule.definition.task_at(&schedule.name, tick(*second))));
    Firing {
        name: schedule.name.clone(),
        revision: schedule.revision,
        tick: schedule.next_at.unwrap(),
        next: tick(next),
        tasks: tasks.collect(),
        missed: 0,
        overlap: schedule.definition.overlap,
    }
}

/// The schedule as it is now.
pub async fn now(ledger: &dyn Ledger, text: &str) -> Schedule {
    ledger.schedule(name(text)).await.unwrap().1.unwrap()
}

/// Its tasks, newest first.
pub async fn tasks(ledger: &dyn Ledger, text: &str) -> Vec<Task> {
    let tags = vec![("schedule".to_owned(), text.to_owned())];
    ledger.list(ListQuery { tags, limit: 1_000, ..ListQuery::default() }).await.unwrap().tasks
}

/// Definition, next tick and times are told as they were given.
pub async fn a_schedule_is_kept_as_it_was_given(ledger: &dyn Ledger) {
    assert_eq!(ledger.schedule(name("a")).await.unwrap().1, None);
    let schedule = made(ledger, "a", 100).await;
    assert_eq!((&schedule.definition, schedule.next_at), (&definition(), Some(tick(100))));
    assert_eq!((schedule.last_tick, schedule.last_task_id, schedule.last_skipped), (None, None, None));
    assert_eq!((schedule.ticks, schedule.created_at), (TickCounts::default(), schedule.updated_at));
    let (now, found) = ledger.schedule(name("a")).await.unwrap();
    assert_eq!(found, Some(schedule.clone()));
    assert!(schedule.created_at <= now);
}

/// A change says what it replaces, and of two that replace the same one is applied.
pub async fn a_change_replaces_what_was_read(ledger: &dyn Ledger) {
    let first = made(ledger, "a", 100).await;
    let again = |replaces| ScheduleChange { replaces, ..anew("a", definition(), NextTick::Paused) };
    assert_eq!(ledger.change_schedule(again(None)).await.unwrap(), Changed::Overtaken);
    assert_eq!(ledger.change_schedule(again(Some(Uuid::nil()))).await.unwrap(), Changed::Overtaken);
    let second = applied(ledger.change_schedule(again(Some(first.revision))).await.unwrap());
    assert_eq!((second.next_at, second.created_at), (None, first.created_at));
    assert_ne!(second.revision, first.revision);
    assert_eq!(ledger.change_schedule(again(Some(first.revision))).await.unwrap(), Changed::Overtaken);
    assert_eq!(now(ledger, "a").await, second);
}

/// Who has read the definition of before pauses nothing, so that what another has changed since is not taken back.
pub async fn a_pause_keeps_what_another_has_changed(ledger: &dyn Ledger) {
    let read = made(ledger, "a", 100).await;
    let changed = Definition { jitter_ms: 7, ..definition() };
    let replaced = Some(read.revision);
    let other = ScheduleChange { replaces: replaced, ..anew("a", changed, NextTick::Stays) };
    let other = applied(ledger.change_schedule(other).await.unwrap());
    let pause = |of: &Schedule| {
        let definition = Definition { paused: true, ..of.definition.clone() };
        ScheduleChange { replaces: Some(of.revision), ..anew("a", definition, NextTick::Paused) }
    };
    assert_eq!(ledger.change_schedule(pause(&read)).await.unwrap(), Changed::Overtaken);
    assert_eq!(now(ledger, "a").await, other);
    let paused = applied(ledger.change_schedule(pause(&other)).await.unwrap());
    assert_eq!((paused.definition.jitter_ms, paused.definition.paused, paused.next_at), (7, true, None));
    // A tick that was read before the pause is not fired any more.
    assert_eq!(ledger.fire(firing(&other, &[100], 110)).await.unwrap(), Fired::Overtaken);
}

/// Ticks that a change gives up are missed ones, and none is given up that was fired meanwhile.
pub async fn a_change_gives_up_what_was_due_and_counts_it(ledger: &dyn Ledger) {
    let read = made(ledger, "a", 100).await;
    let change = |of: &Schedule, at: i64, ticks| ScheduleChange {
        replaces: Some(of.revision),
        next: NextTick::At(tick(1_000)),
        given_up: Some(GivenUp { tick: tick(at), ticks }),
        ..anew("a", Definition { cron: "@daily".to_owned(), ..definition() }, NextTick::Stays)
    };
    assert_eq!(ledger.fire(firing(&read, &[100], 110)).await.unwrap(), Fired::Recorded(1));
    assert_eq!(ledger.change_schedule(change(&read, 100, 3)).await.unwrap(), Changed::Overtaken);
    assert_eq!(now(ledger, "a").await.ticks, TickCounts { fired: 1, skipped: 0, missed: 0 });
    let changed = applied(ledger.change_schedule(change(&read, 110, 2)).await.unwrap());
    assert_eq!(changed.ticks, TickCounts { fired: 1, skipped: 0, missed: 2 });
    assert_eq!((changed.next_at, changed.definition.cron.as_str()), (Some(tick(1_000)), "@daily"));
    assert_eq!(ledger.fire(firing(&read, &[110], 120)).await.unwrap(), Fired::Overtaken);
}

/// Who paused it first, until it is resumed, whatever else is changed.
pub async fn a_schedules_pause_tells_who_made_it(ledger: &dyn Ledger) {
    let by = |name: &str| Caller { actor: Some(name.to_owned()), request_id: None };
    let put = async |of: &Schedule, jitter_ms, paused, name| {
        let next = if paused { NextTick::Paused } else { NextTick::At(tick(100)) };
        let change = anew("a", Definition { jitter_ms, paused, ..definition() }, next);
        applied(
            ledger
                .change_schedule(ScheduleChange { replaces: Some(of.revision), caller: by(name), ..change })
                .await
                .unwrap(),
        )
    };
    let read = made(ledger, "a", 100).await;
    assert_eq!(read.paused, None);
    let paused = put(&read, 0, true, "anna").await;
    let pause = paused.paused.clone().unwrap();
    assert_eq!((pause.by.as_deref(), pause.at), (Some("anna"), paused.updated_at));
    let changed = put(&paused, 5, true, "ben").await;
    assert_eq!(changed.paused, Some(pause));
    let resumed = put(&changed, 5, false, "ben").await;
    assert_eq!((&resumed.paused, now(ledger, "a").await.paused), (&None, None));
    let again = put(&resumed, 5, true, "ben").await;
    assert_eq!(again.paused.unwrap().by.as_deref(), Some("ben"));
    let born = anew("b", Definition { paused: true, ..definition() }, NextTick::Paused);
    let born = applied(ledger.change_schedule(ScheduleChange { caller: by("carl"), ..born }).await.unwrap());
    assert_eq!(born.paused.map(|pause| (pause.by, pause.at)), Some((Some("carl".to_owned()), born.created_at)));
}

/// What was deleted is gone, and its tasks are not.
pub async fn a_deleted_schedule_leaves_its_tasks(ledger: &dyn Ledger) {
    let schedule = made(ledger, "a", 100).await;
    assert_eq!(ledger.fire(firing(&schedule, &[100], 110)).await.unwrap(), Fired::Recorded(1));
    let stale = Firing { tick: tick(110), ..firing(&schedule, &[110], 120) };
    assert!(ledger.delete_schedule(name("a")).await.unwrap());
    assert!(!ledger.delete_schedule(name("a")).await.unwrap());
    assert_eq!(ledger.schedule(name("a")).await.unwrap().1, None);
    assert_eq!(ledger.fire(stale.clone()).await.unwrap(), Fired::Overtaken);
    assert_eq!(tasks(ledger, "a").await.len(), 1);
    // Made anew, it may stand at the same tick: who read the old one does not fire the new one.
    made(ledger, "a", 110).await;
    assert_eq!(ledger.fire(stale).await.unwrap(), Fired::Overtaken);
    assert_eq!(tasks(ledger, "a").await.len(), 1);
}

/// Pages follow the names' bytes, and end.
pub async fn schedules_are_listed_by_name(ledger: &dyn Ledger) {
    for text in ["b", "a.b", "B", "a", "a-b", "c"] {
        made(ledger, text, 100).await;
    }
    let (mut names, mut after) = (Vec::new(), None);
    loop {
        let page = ledger.schedules(after, 2).await.unwrap();
        assert_eq!(page.schedules.len(), 2);
        names.extend(page.schedules.iter().map(|schedule| schedule.name.to_string()));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(names, ["B", "a", "a-b", "a.b", "b", "c"]);
    assert_eq!(ledger.schedules(Some(name("c")), 2).await.unwrap().schedules, []);
}

/// The oldest first; one that is paused, or whose time is to come, is not due.
pub async fn due_schedules_are_those_whose_tick_has_come(ledger: &dyn Ledger) {
    assert_eq!(ledger.due_schedules(10).await.unwrap().wait, None);
    let paused = anew("p", definition(), NextTick::Paused);
    applied(ledger.change_schedule(paused).await.unwrap());
    let looked = ledger.due_schedules(10).await.unwrap();
    assert_eq!((looked.wait, looked.due), (None, vec![]));
    let soon = looked.now.as_second() + 2;
    let later = made(ledger, "later", soon).await;
    let looked = ledger.due_schedules(10).await.unwrap();
    assert!(looked.due.is_empty() && looked.wait.is_some_and(|wait| !wait.is_zero() && wait.as_secs() <= 2));
    let (b, a) = (made(ledger, "b", 200).await, made(ledger, "a", 300).await);
    let looked = ledger.due_schedules(10).await.unwrap();
    assert_eq!((looked.wait, looked.due), (Some(Duration::ZERO), vec![b.clone(), a.clone()]));
    assert_eq!(ledger.due_schedules(1).await.unwrap().due, std::slice::from_ref(&b));
    let due =
        until("the tick", async || Some(ledger.due_schedules(10).await.unwrap()).filter(|all| all.due.len() == 3));
    let due = due.await;
    assert!(due.now >= tick(soon));
    assert_eq!(due.due, [b, a, later]);
}

/// The task is there with its tags, due at once, and the schedule has moved on.
pub async fn a_fired_tick_has_its_task(ledger: &dyn Ledger) {
    let schedule = made(ledger, "a", 100).await;
    let firing = Firing { missed: 4, ..firing(&schedule, &[100, 110], 120) };
    let ids: Vec<_> = firing.tasks.iter().map(|(_, task)| task.id).collect();
    assert_eq!(ledger.fire(firing).await.unwrap(), Fired::Recorded(2));
    let task = get(ledger, ids[1]).await;
    assert_eq!((task.state, task.args.as_str()), (State::Accepted, r#"{ "n" : 1.0 }"#));
    assert_eq!((task.timeout_ms, task.result_ttl_ms), (Some(5_000), Some(60_000)));
    let tags: Vec<_> = task.tags.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(tags, [("of", "Größe"), ("schedule", "a"), ("tick", "1970-01-01T00:01:50Z")]);
    let mut due: Vec<_> = ledger.fetch_due(10, super::HOUR).await.unwrap().into_iter().map(|due| due.id).collect();
    due.sort_unstable();
    assert_eq!(due, ids, "any relay publishes it");
    let schedule = now(ledger, "a").await;
    assert_eq!((schedule.next_at, schedule.last_tick), (Some(tick(120)), Some(tick(110))));
    assert_eq!(schedule.last_task_id, Some(ids[1]));
    assert_eq!(schedule.ticks, TickCounts { fired: 2, skipped: 0, missed: 4 });
    run(ledger, ids[0], worker(ledger).await, complete()).await;
}

/// With a jitter the task waits for its own time.
pub async fn a_jittered_task_is_scheduled(ledger: &dyn Ledger) {
    let schedule = made(ledger, "a", 100).await;
    let mut firing = firing(&schedule, &[100], 110);
    let run_at = Timestamp::now() + Duration::from_secs(600);
    firing.tasks[0].1.run_at = Some(run_at);
    assert_eq!(ledger.fire(firing).await.unwrap(), Fired::Recorded(1));
    let task = tasks(ledger, "a").await.pop().unwrap();
    assert_eq!((task.state, task.run_at.as_millisecond()), (State::Scheduled, run_at.as_millisecond()));
}

/// Nobody fires a tick that was fired, or of a definition that has changed since.
pub async fn a_stale_firing_writes_nothing(ledger: &dyn Ledger) {
    let schedule = made(ledger, "a", 100).await;
    assert_eq!(ledger.fire(firing(&schedule, &[100], 110)).await.unwrap(), Fired::Recorded(1));
    assert_eq!(ledger.fire(firing(&schedule, &[100], 110)).await.unwrap(), Fired::Overtaken);
    let read = now(ledger, "a").await;
    let mut definition = definition();
    definition.task.args = Json::null();
    let change = ScheduleChange { replaces: Some(read.revision), ..anew("a", definition, NextTick::Stays) };
    applied(ledger.change_schedule(change).await.unwrap());
    assert_eq!(ledger.fire(firing(&read, &[110], 120)).await.unwrap(), Fired::Overtaken, "under the old definition");
    let changed = now(ledger, "a").await;
    assert_eq!((changed.next_at, changed.ticks.fired, changed.last_tick), (Some(tick(110)), 1, Some(tick(100))));
    assert_eq!(tasks(ledger, "a").await.len(), 1);
    assert_eq!(ledger.fire(firing(&changed, &[110], 120)).await.unwrap(), Fired::Recorded(1));
    assert_eq!(tasks(ledger, "a").await[0].args.as_str(), "null");
}

/// Even when the clock was set back and the schedule stands at an old tick again.
pub async fn a_tick_that_comes_back_gets_no_second_task(ledger: &dyn Ledger) {
    let schedule = made(ledger, "a", 100).await;
    assert_eq!(ledger.fire(firing(&schedule, &[100, 110], 120)).await.unwrap(), Fired::Recorded(2));
    ledger.delete_schedule(name("a")).await.unwrap();
    let again = made(ledger, "a", 110).await;
    assert_eq!(ledger.fire(firing(&again, &[110, 120], 130)).await.unwrap(), Fired::Recorded(1));
    let mut ticks: Vec<_> = tasks(ledger, "a").await.into_iter().map(|task| task.tags["tick"].clone()).collect();
    ticks.sort_unstable();
    assert_eq!(ticks, ["1970-01-01T00:01:40Z", "1970-01-01T00:01:50Z", "1970-01-01T00:02:00Z"]);
    // Another schedule has ticks of its own.
    let other = made(ledger, "b", 100).await;
    assert_eq!(ledger.fire(firing(&other, &[100], 110)).await.unwrap(), Fired::Recorded(1));
}

/// While a task of the schedule waits, runs or is to be retried, its ticks are skipped; afterwards they are not.
pub async fn an_unfinished_task_skips_the_next_tick(ledger: &dyn Ledger) {
    let mut schedule = made(ledger, "a", 100).await;
    schedule.definition.overlap = Overlap::Skip;
    assert_eq!(ledger.fire(firing(&schedule, &[100], 110)).await.unwrap(), Fired::Recorded(1));
    let id = tasks(ledger, "a").await[0].id;
    let holder = worker(ledger).await;
    // Of others it takes no notice.
    made(ledger, "b", 100).await;
    super::one(ledger).await;
    let skip = async |at: i64| {
        let firing = Firing { tick: tick(at), ..firing(&schedule, &[at], at + 10) };
        ledger.fire(firing).await.unwrap()
    };
    assert_eq!(skip(110).await, Fired::Skipped(id));
    run(ledger, id, holder, super::retry(Duration::ZERO, "again")).await;
    assert_eq!(skip(120).await, Fired::Skipped(id));
    let granted = super::granted(ledger, id, holder).await;
    assert_eq!(skip(130).await, Fired::Skipped(id));
    super::settle(ledger, id, granted.fence, complete()).await;
    assert_eq!(skip(140).await, Fired::Recorded(1));
    let shown = now(ledger, "a").await;
    assert_eq!((shown.last_tick, shown.last_skipped), (Some(tick(140)), Some(tick(130))));
    assert_eq!(shown.ticks, TickCounts { fired: 2, skipped: 3, missed: 0 });
    assert_eq!(tasks(ledger, "a").await.len(), 2);
    assert_eq!(
        ledger.cancel(vec![shown.last_task_id.unwrap()], "no".to_owned(), Caller::UNKNOWN).await.unwrap().len(),
        1
    );
    assert_eq!(skip(150).await, Fired::Recorded(1));
}

/// Also when it is the task of an older tick, which somebody has started again; and how many were skipped for it.
pub async fn what_ticks_are_skipped_for_is_named(ledger: &dyn Ledger) {
    let put = anew("a", Definition { overlap: Overlap::Skip, ..definition() }, NextTick::At(tick(100)));
    let schedule = applied(ledger.change_schedule(put).await.unwrap());
    let holder = worker(ledger).await;
    let fire = async |at: i64| {
        let firing = Firing { tick: tick(at), ..firing(&schedule, &[at], at + 10) };
        ledger.fire(firing).await.unwrap()
    };
    let seen = async || {
        let seen = now(ledger, "a").await;
        (seen.last_task_id, seen.blocked_by, seen.skipped_in_a_row)
    };
    assert_eq!(fire(100).await, Fired::Recorded(1));
    let old = now(ledger, "a").await.last_task_id.unwrap();
    assert_eq!(seen().await, (Some(old), Some(old), 0));
    run(ledger, old, holder, super::discard()).await;
    assert_eq!(seen().await, (Some(old), None, 0));
    assert_eq!(fire(110).await, Fired::Recorded(1));
    let new = now(ledger, "a").await.last_task_id.unwrap();
    run(ledger, new, holder, complete()).await;
    ledger.replay(old, Caller::UNKNOWN).await.unwrap();
    for (at, skipped) in [(120, 1), (130, 2)] {
        assert_eq!(fire(at).await, Fired::Skipped(old));
        assert_eq!(seen().await, (Some(new), Some(old), skipped));
    }
    let passing = Firing { tick: tick(140), missed: 1, ..firing(&now(ledger, "a").await, &[], 150) };
    ledger.fire(passing).await.unwrap();
    assert_eq!(seen().await.2, 2, "what was missed was not skipped");
    run(ledger, old, holder, complete()).await;
    assert_eq!(fire(150).await, Fired::Recorded(1));
    let last = now(ledger, "a").await.last_task_id.unwrap();
    assert_eq!(seen().await, (Some(last), Some(last), 0));
    // One whose ticks may overlap is not blocked.
    let read = now(ledger, "a").await;
    let allow = ScheduleChange { replaces: Some(read.revision), ..anew("a", definition(), NextTick::Stays) };
    assert_eq!(applied(ledger.change_schedule(allow).await.unwrap()).blocked_by, None);
}

/// Ticks that are passed over move the schedule on and leave nothing but their count.
pub async fn missed_ticks_are_counted(ledger: &dyn Ledger) {
    let schedule = made(ledger, "a", 100).await;
    let passing = Firing { missed: 3, ..firing(&schedule, &[], 130) };
    assert_eq!(ledger.fire(passing).await.unwrap(), Fired::Recorded(0));
    let shown = now(ledger, "a").await;
    assert_eq!((shown.next_at, shown.last_tick, shown.ticks.missed), (Some(tick(130)), None, 3));
    assert_eq!(tasks(ledger, "a").await, []);
}
