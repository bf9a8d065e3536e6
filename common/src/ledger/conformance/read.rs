//! Reading: single tasks, pages, counts.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{
    HOUR, LIMIT, cancel, complete, discard, get, granted, kind, lane, mark_queued, one, queue, recorded, retry, run,
    until, worker,
};
use crate::clock::{timestamp, wall_ms};
use crate::ledger::{Ledger, ListQuery, QueueCounts};
use crate::state::State;
use crate::task::{Fence, Json, Priority, TaskId};

/// The mean of what has completed lately, of each kind by itself and of one queue.
pub async fn run_times_are_those_of_what_has_completed(ledger: &dyn Ledger) {
    let worker = worker(ledger).await;
    assert_eq!(ledger.run_times(queue("default")).await.unwrap(), []);
    for (name, times) in [("a", 2), ("b", 1)] {
        for id in recorded(ledger, times, |task| task.kind = kind(name)).await {
            run(ledger, id, worker, complete()).await;
        }
    }
    run(ledger, recorded(ledger, 1, |task| task.kind = kind("fails")).await[0], worker, discard()).await;
    run(ledger, recorded(ledger, 1, |task| task.queue = queue("other")).await[0], worker, complete()).await;
    let mut times = ledger.run_times(queue("default")).await.unwrap();
    times.sort();
    let [(a, quick), (b, _)] = &times[..] else { panic!("{times:?}") };
    assert_eq!((a, b), (&kind("a"), &kind("b")));
    assert!(*quick < LIMIT);
}

fn query() -> ListQuery {
    ListQuery { limit: 10, ..ListQuery::default() }
}

/// All pages of a query, one after the other.
async fn walk(ledger: &dyn Ledger, mut query: ListQuery) -> Vec<Vec<TaskId>> {
    let mut pages = Vec::new();
    loop {
        let page = ledger.list(query.clone()).await.unwrap();
        pages.push(page.tasks.iter().map(|task| task.id).collect());
        assert!(pages.len() < 1000, "the cursor does not move");
        match page.next {
            Some(next) => query.before = Some(next),
            None => return pages,
        }
    }
}

async fn listed(ledger: &dyn Ledger, query: ListQuery) -> Vec<TaskId> {
    walk(ledger, query).await.concat()
}

fn newest_first(mut ids: Vec<TaskId>) -> Vec<TaskId> {
    ids.sort_unstable_by(|a, b| b.cmp(a));
    ids
}

/// Whoever asks for what is not there gets the rest.
pub async fn unknown_ids_are_left_out(ledger: &dyn Ledger) {
    let id = one(ledger).await;
    let found = ledger.get(vec![TaskId::new(), id, TaskId::new()]).await.unwrap();
    assert_eq!(found.iter().map(|task| task.id).collect::<Vec<_>>(), [id]);
    assert_eq!(ledger.get(Vec::new()).await.unwrap(), []);
    let states = ledger.states(vec![TaskId::new(), id]).await.unwrap();
    assert_eq!(states, [(id, State::Accepted)]);
}

/// Each task is on one page, newest first, and the last page knows that it is the last.
pub async fn pages_go_from_new_to_old(ledger: &dyn Ledger) {
    assert_eq!(walk(ledger, query()).await, [[]; 1]);
    let ids = newest_first(recorded(ledger, 25, |_| {}).await);
    let mut pages = walk(ledger, query()).await;
    // Whether a full page is the last one may need one more look.
    pages.retain(|page| !page.is_empty());
    assert_eq!(pages, [&ids[..10], &ids[10..20], &ids[20..]]);
    // Tasks that come in between do not shift the pages.
    let first = ledger.list(query()).await.unwrap();
    recorded(ledger, 3, |_| {}).await;
    let rest = listed(ledger, ListQuery { before: first.next, ..query() }).await;
    assert_eq!(rest, ids[10..]);
}

/// A task is listed when every filter lets it through.
pub async fn filters_are_combined(ledger: &dyn Ledger) {
    let mut expected = Vec::new();
    for (kind_name, queue_name, tag) in [("a", "one", "x"), ("a", "two", "x"), ("b", "one", "x"), ("a", "one", "y")] {
        let ids = recorded(ledger, 12, |task| {
            (task.kind, task.queue) = (kind(kind_name), queue(queue_name));
            task.tags = [("tag".to_owned(), tag.to_owned()), ("other".to_owned(), "z".to_owned())].into();
        });
        expected.push(ids.await);
    }
    let all = ListQuery {
        state: Some(State::Accepted),
        kind: Some(kind("a")),
        queue: Some(queue("one")),
        tags: vec![("tag".to_owned(), "x".to_owned())],
        ..query()
    };
    assert_eq!(listed(ledger, all.clone()).await, newest_first(expected[0].clone()));
    let without_tag = ListQuery { tags: Vec::new(), ..all.clone() };
    assert_eq!(listed(ledger, without_tag).await, newest_first([&expected[0][..], &expected[3]].concat()));
    let without_queue = ListQuery { queue: None, ..all.clone() };
    assert_eq!(listed(ledger, without_queue).await, newest_first([&expected[0][..], &expected[1]].concat()));
    let without_kind = ListQuery { kind: None, ..all.clone() };
    assert_eq!(listed(ledger, without_kind).await, newest_first([&expected[0][..], &expected[2]].concat()));
    assert_eq!(listed(ledger, ListQuery { state: Some(State::Queued), ..all.clone() }).await, []);
    assert_eq!(listed(ledger, ListQuery { kind: Some(kind("none")), ..all }).await, []);
}

/// One task in each state, and each is found by its own.
async fn one_in_each_state(ledger: &dyn Ledger) -> BTreeMap<State, TaskId> {
    let worker = worker(ledger).await;
    let ids = recorded(ledger, 7, |_| {}).await;
    let scheduled = recorded(ledger, 1, |task| task.run_at = Some(timestamp(wall_ms() + 3_600_000))).await[0];
    mark_queued(ledger, vec![(ids[1], Fence(0))]).await.unwrap();
    granted(ledger, ids[2], worker).await;
    run(ledger, ids[3], worker, retry(HOUR, "later")).await;
    run(ledger, ids[4], worker, complete()).await;
    run(ledger, ids[5], worker, cancel()).await;
    run(ledger, ids[6], worker, discard()).await;
    let states =
        [State::Queued, State::Running, State::Retryable, State::Completed, State::Cancelled, State::Discarded];
    let mut found: BTreeMap<State, TaskId> = states.into_iter().zip(ids[1..].iter().copied()).collect();
    found.extend([(State::Accepted, ids[0]), (State::Scheduled, scheduled)]);
    found
}

/// The state is a filter like the others, whichever index serves it.
pub async fn every_state_can_be_listed(ledger: &dyn Ledger) {
    let expected = one_in_each_state(ledger).await;
    for state in State::ALL {
        assert_eq!(listed(ledger, ListQuery { state: Some(state), ..query() }).await, [expected[&state]], "{state}");
        let before = Some(expected[&state]);
        assert_eq!(listed(ledger, ListQuery { state: Some(state), before, ..query() }).await, [], "{state}");
    }
    assert_eq!(listed(ledger, query()).await.len(), State::ALL.len());
}

/// A tag is a key and a value, not a piece of text somewhere.
pub async fn tags_match_exactly(ledger: &dyn Ledger) {
    let pairs =
        [("k", "v"), ("k", "vv"), ("kk", "v"), ("k", "a\",\"k\":\"v"), ("nul", "\0"), ("ü%_", "\\"), ("v", "k")];
    let mut ids = Vec::new();
    for (key, value) in pairs {
        ids.push(recorded(ledger, 1, |task| task.tags = [(key.to_owned(), value.to_owned())].into()).await[0]);
    }
    for ((key, value), id) in pairs.into_iter().zip(ids) {
        let tags = vec![(key.to_owned(), value.to_owned())];
        assert_eq!(listed(ledger, ListQuery { tags, ..query() }).await, [id], "{key}={value}");
        assert_eq!(get(ledger, id).await.tags.get(key).map(String::as_str), Some(value));
    }
}

/// What an operator knows of a failure leads to it: its words, its reason, its time, its worker.
pub async fn failures_are_found_by_what_is_known_of_them(ledger: &dyn Ledger) {
    let (one, other) = (worker(ledger).await, worker(ledger).await);
    let ids = recorded(ledger, 4, |task| task.tags = [("a".to_owned(), "1".to_owned())].into()).await;
    let two = recorded(ledger, 1, |task| {
        task.tags = [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())].into();
    });
    let two = two.await[0];
    run(ledger, ids[0], one, retry(HOUR, "a \"quoted\" – word\n")).await;
    run(ledger, ids[1], other, retry(HOUR, "message")).await;
    run(ledger, ids[2], other, discard()).await;
    granted(ledger, ids[3], one).await;
    let all = newest_first([&ids[..], &[two]].concat());
    let said = |text: &str| ListQuery { error: Some(text.to_owned()), ..query() };
    for text in ["\"quoted\"", " – w", "word\n"] {
        assert_eq!(listed(ledger, said(text)).await, [ids[0]], "{text}");
    }
    // What only the error's frame has is not found.
    assert_eq!(listed(ledger, said("attempt\":")).await, []);
    let tags = |pairs: &[(&str, &str)]| ListQuery {
        tags: pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..query()
    };
    assert_eq!(listed(ledger, tags(&[("a", "1")])).await, all);
    assert_eq!(listed(ledger, tags(&[("a", "1"), ("b", "2")])).await, [two]);
    assert_eq!(listed(ledger, tags(&[("b", "2"), ("a", "2")])).await, []);
    let by = |worker| ListQuery { worker: Some(worker), ..query() };
    assert!(listed(ledger, by(one)).await.contains(&ids[3]));
    assert!(!listed(ledger, by(other)).await.contains(&ids[3]));
    let running = ListQuery { state: Some(State::Running), ..by(one) };
    assert_eq!(listed(ledger, running).await, [ids[3]]);
    let reason = get(ledger, ids[2]).await.reason;
    assert_eq!(listed(ledger, ListQuery { reason, ..query() }).await, [ids[2]]);
    assert_eq!(listed(ledger, ListQuery { reason: Some("none".to_owned()), ..query() }).await, []);
    let (first, last) = (get(ledger, ids[0]).await.created_at, get(ledger, two).await.created_at);
    let second = Duration::from_secs(1);
    let since = |at| ListQuery { since: Some(at), ..query() };
    assert_eq!(listed(ledger, since(first)).await, all);
    assert_eq!(listed(ledger, since(last + second)).await, []);
    let until = |at| ListQuery { until: Some(at), ..query() };
    assert_eq!(listed(ledger, until(first)).await, []);
    assert_eq!(listed(ledger, until(last + second)).await, all);
    let retried = ListQuery { state: Some(State::Retryable), ..until(last + second) };
    assert_eq!(listed(ledger, retried).await, newest_first(vec![ids[0], ids[1]]));
}

/// However large the tasks of a page are, all of them can be read.
pub async fn big_tasks_come_in_more_pages(ledger: &dyn Ledger) {
    let big = Json::parse(format!("\"{}\"", "x".repeat(1024 * 1024))).unwrap();
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.extend(recorded(ledger, 6, |task| task.args = big.clone()).await);
    }
    assert_eq!(listed(ledger, ListQuery { limit: 1000, ..query() }).await, newest_first(ids));
    let page = ledger.list(ListQuery { limit: 1000, ..query() }).await.unwrap();
    assert!(page.tasks.len() <= 17 && page.next.is_some(), "{} MiB at once", page.tasks.len());
}

async fn counts(ledger: &dyn Ledger, name: &str) -> Option<QueueCounts> {
    ledger.queues().await.unwrap().into_iter().find(|counts| counts.queue == queue(name))
}

/// Everything but completed tasks is counted, by queue and state.
pub async fn queues_are_counted(ledger: &dyn Ledger) {
    assert_eq!(ledger.queues().await.unwrap(), []);
    one_in_each_state(ledger).await;
    recorded(ledger, 5, |task| task.queue = queue("mail")).await;
    let expected: BTreeMap<State, u64> =
        State::ALL.into_iter().filter(|state| *state != State::Completed).map(|state| (state, 1)).collect();
    assert_eq!(counts(ledger, "default").await.unwrap().counts, expected);
    assert_eq!(counts(ledger, "mail").await.unwrap().counts, [(State::Accepted, 5)].into());
    assert_eq!(
        ledger.queued_lanes().await.unwrap(),
        [lane("default", Priority::Normal)],
        "only there is a task queued"
    );
    until("the waiting time to grow", async || {
        let waiting = counts(ledger, "mail").await.unwrap().oldest_waiting;
        waiting.filter(|waiting| *waiting >= Duration::from_millis(50))
    })
    .await;
    recorded(ledger, 1, |task| {
        (task.queue, task.run_at) = (queue("later"), Some(timestamp(wall_ms() + 3_600_000)));
    })
    .await;
    assert_eq!(counts(ledger, "later").await.unwrap().oldest_waiting, None);
}

/// The ledger is there.
pub async fn the_ledger_answers_a_ping(ledger: &dyn Ledger) {
    ledger.ping().await.unwrap();
}
