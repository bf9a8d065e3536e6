//! Recording: durable, all or nothing, once for each key.

use std::time::Duration;

use futures::future::join_all;

use super::{HOUR, get, kind, new_task, one, queue, submission};
use crate::clock::{timestamp, wall_ms};
use crate::ledger::{Caller, Idempotency, Ledger, Recorded, Submission};
use crate::state::State;
use crate::task::{Fence, Json, NewTask, Priority, TaskId};

/// Every field of a submission is in the task, and the rest is as fresh.
pub async fn what_was_recorded_can_be_read(ledger: &dyn Ledger) {
    let task = NewTask {
        kind: kind("mail.send"),
        queue: queue("mail"),
        timeout: Some(Duration::from_millis(1234)),
        result_ttl: Some(Duration::from_millis(60_000)),
        tags: [("customer".to_owned(), "Ä \"1\"".to_owned())].into(),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
        concurrency_key: Some("customer Ä".to_owned()),
        ..new_task()
    };
    let Recorded::New { at, .. } = ledger.record(submission(vec![task.clone()])).await.unwrap() else {
        panic!("a task without a key is new")
    };
    let found = get(ledger, task.id).await;
    assert_eq!((found.kind, found.queue, found.args), (task.kind, task.queue, task.args));
    assert_eq!((found.state, found.tags, found.timeout_ms), (State::Accepted, task.tags, Some(1234)));
    assert_eq!((found.attempt, found.max_attempts, found.fence), (0, 3, Fence(0)));
    assert_eq!((found.created_at, found.run_at), (at, at));
    assert_eq!((found.started_at, found.finished_at, found.worker_id), (None, None, None));
    assert_eq!((found.result, found.errors, found.reason), (None, Vec::new(), None));
    assert_eq!((found.result_ttl_ms, found.result_expired), (Some(60_000), false));
    assert_eq!((found.priority, found.unique_key), (Priority::Normal, None));
    assert_eq!((found.concurrency_key, found.limited_by), (task.concurrency_key, None));
}

/// Only a time that is still to come makes a task wait.
pub async fn a_time_to_come_makes_it_scheduled(ledger: &dyn Ledger) {
    let later = timestamp(wall_ms() + 3_600_000);
    let (mut future, mut past) = (new_task(), new_task());
    (future.run_at, past.run_at) = (Some(later), Some(timestamp(1)));
    let ids = (future.id, past.id);
    ledger.record(submission(vec![future, past])).await.unwrap();
    let (future, past) = (get(ledger, ids.0).await, get(ledger, ids.1).await);
    assert_eq!((future.state, future.run_at), (State::Scheduled, later));
    assert_eq!((past.state, past.run_at), (State::Accepted, past.created_at));
}

/// The ledger keeps JSON as text: neither its order nor its spelling changes.
pub async fn json_survives_as_it_was_written(ledger: &dyn Ledger) {
    let texts = [
        r#"{"b":1,"a":2,"b":3}"#.to_owned(),
        r#"{"nul":"\u0000","lone":"\ud800","pretty" : [ 1.0, 1e400, 123456789012345678901234567890 ]}"#.to_owned(),
        "null".to_owned(),
        format!("\"{}\"", "ü".repeat(500_000)),
    ];
    for text in texts {
        let mut task = new_task();
        task.args = Json::parse(text.clone()).unwrap();
        let id = task.id;
        ledger.record(submission(vec![task])).await.unwrap();
        assert_eq!(get(ledger, id).await.args.as_str(), text);
    }
}

/// A submission that cannot be recorded leaves no part of itself, and those beside it do not notice.
pub async fn a_bad_submission_leaves_nothing_and_takes_nobody_along(ledger: &dyn Ledger) {
    let taken = one(ledger).await;
    let mut twin = new_task();
    twin.id = taken;
    let (before, after) = (new_task(), new_task());
    let lost = vec![before.id, after.id];
    let bad = submission(vec![before, twin, after]);
    let good: Vec<NewTask> = std::iter::repeat_with(new_task).take(40).collect();
    let ids: Vec<TaskId> = good.iter().map(|task| task.id).collect();
    let neighbours = join_all(good.into_iter().map(|task| ledger.record(submission(vec![task]))));
    let (refused, neighbours) = futures::join!(ledger.record(bad), neighbours);
    assert!(refused.is_err(), "an id that is taken cannot be recorded: {refused:?}");
    assert!(neighbours.iter().all(|recorded| matches!(recorded, Ok(Recorded::New { .. }))), "{neighbours:?}");
    assert_eq!(ledger.get(lost).await.unwrap(), []);
    assert_eq!(ledger.get(ids.clone()).await.unwrap().len(), ids.len());
}

/// Submissions of all sizes, written together, are all there.
pub async fn many_submissions_at_once_are_all_there(ledger: &dyn Ledger) {
    let sizes = [1, 2, 700, 1, 1, 50, 1200, 3];
    let submissions: Vec<Submission> =
        sizes.iter().map(|&size| submission(std::iter::repeat_with(new_task).take(size).collect())).collect();
    let ids: Vec<TaskId> = submissions.iter().flat_map(|each| each.tasks.iter().map(|task| task.id)).collect();
    for recorded in join_all(submissions.into_iter().map(|each| ledger.record(each))).await {
        assert!(matches!(recorded, Ok(Recorded::New { .. })), "{recorded:?}");
    }
    assert_eq!(ledger.get(ids.clone()).await.unwrap().len(), ids.len());
}

/// Under a key, `request` tells one request from another.
fn keyed(tasks: usize, key: &str, request: u8) -> Submission {
    let idempotency = Some(Idempotency { key: key.to_owned(), fingerprint: [request; 32] });
    Submission {
        tasks: std::iter::repeat_with(new_task).take(tasks).collect(),
        idempotency,
        reserve: HOUR,
        group: None,
    }
}

fn ids_of(submission: &Submission) -> Vec<TaskId> {
    submission.tasks.iter().map(|task| task.id).collect()
}

/// A repeated request gets the tasks of the first, in order, and records nothing.
pub async fn the_same_key_gives_the_same_task(ledger: &dyn Ledger) {
    for (size, key) in [(1, "one"), (12, "twelve")] {
        let (first, second) = (keyed(size, key, 7), keyed(size, key, 7));
        let (first_ids, second_ids) = (ids_of(&first), ids_of(&second));
        assert!(matches!(ledger.record(first).await, Ok(Recorded::New { .. })));
        assert_eq!(ledger.record(second).await.unwrap(), Recorded::Replayed(first_ids));
        assert_eq!(ledger.get(second_ids).await.unwrap(), []);
    }
}

/// Whether a request is a repetition can be asked without recording anything.
pub async fn a_repetition_is_told_before_it_is_recorded(ledger: &dyn Ledger) {
    for (size, key) in [(1, "one"), (12, "twelve")] {
        let (first, other) = (keyed(size, key, 7), keyed(size, key, 8));
        let ids = ids_of(&first);
        let [same, other] = [&first, &other].map(|submission| submission.idempotency.clone().unwrap());
        let longer = Idempotency { key: format!("{key}!"), ..same.clone() };
        assert_eq!(ledger.recorded_before(same.clone(), size).await.unwrap(), None);
        ledger.record(first).await.unwrap();
        assert_eq!(ledger.recorded_before(same, size).await.unwrap(), Some(Recorded::Replayed(ids)));
        assert_eq!(ledger.recorded_before(other, size).await.unwrap(), Some(Recorded::KeyReused));
        assert_eq!(ledger.recorded_before(longer, size).await.unwrap(), None);
    }
}

/// A batch of which tasks are not kept any more is still that batch, whichever they were.
pub async fn what_is_left_of_a_batch_proves_the_repetition(ledger: &dyn Ledger) {
    let batch = keyed(12, "twelve", 7);
    let ids = ids_of(&batch);
    ledger.record(batch).await.unwrap();
    for gone in [0, 7, 11] {
        ledger.cancel(vec![ids[gone]], "stop".to_owned(), Caller::default()).await.unwrap();
        assert_eq!(ledger.purge(vec![ids[gone]]).await.unwrap(), 1);
        let left = ledger.get(ids.clone()).await.unwrap();
        let mut left: Vec<TaskId> = left.iter().map(|task| task.id).collect();
        left.sort_unstable();
        assert_eq!(ledger.record(keyed(12, "twelve", 7)).await.unwrap(), Recorded::Replayed(left));
        assert_eq!(ledger.record(keyed(12, "twelve", 8)).await.unwrap(), Recorded::KeyReused);
    }
}

/// A key belongs to one request.
pub async fn another_request_under_the_key_is_refused(ledger: &dyn Ledger) {
    for (size, key) in [(1, "one"), (3, "three")] {
        ledger.record(keyed(size, key, 1)).await.unwrap();
        for other_size in [1, 3, 5] {
            let other = keyed(other_size, key, 2);
            let ids = ids_of(&other);
            assert_eq!(ledger.record(other).await.unwrap(), Recorded::KeyReused, "{size} then {other_size}");
            assert_eq!(ledger.get(ids).await.unwrap(), []);
        }
    }
}

/// Parallel repetitions of one request: one is new, the others get its task.
pub async fn fifty_equal_requests_give_one_task(ledger: &dyn Ledger) {
    equal_requests(ledger, 1).await;
}

/// The same for batches, none of which is ever half there.
pub async fn fifty_equal_batches_give_one_batch(ledger: &dyn Ledger) {
    equal_requests(ledger, 7).await;
}

async fn equal_requests(ledger: &dyn Ledger, size: usize) {
    let requests: Vec<Submission> = std::iter::repeat_with(|| keyed(size, "same", 9)).take(50).collect();
    let asked: Vec<Vec<TaskId>> = requests.iter().map(ids_of).collect();
    let answers = join_all(requests.into_iter().map(|request| ledger.record(request))).await;
    let new: Vec<usize> =
        (0..answers.len()).filter(|&index| matches!(answers[index], Ok(Recorded::New { .. }))).collect();
    let [winner] = new[..] else { panic!("one request is new: {answers:?}") };
    for (index, answer) in answers.into_iter().enumerate().filter(|(index, _)| *index != winner) {
        assert_eq!(answer.unwrap(), Recorded::Replayed(asked[winner].clone()), "request {index}");
    }
    assert_eq!(ledger.get(asked.concat()).await.unwrap().len(), size);
}

/// A key is a key, whatever was submitted under it.
pub async fn a_key_of_one_task_is_not_free_for_a_batch(ledger: &dyn Ledger) {
    ledger.record(keyed(1, "single", 1)).await.unwrap();
    assert_eq!(ledger.record(keyed(2, "single", 2)).await.unwrap(), Recorded::KeyReused);
    ledger.record(keyed(2, "batch", 1)).await.unwrap();
    assert_eq!(ledger.record(keyed(1, "batch", 2)).await.unwrap(), Recorded::KeyReused);
}
