//! The suite that every ledger passes: one function a promise, each on a ledger of its own.
//!
//! A ledger's tests give [`suite!`] an `async fn` that answers a fresh [`Store`]:
//!
//! ```ignore
//! async fn store() -> Store {
//!     let file = tempfile::tempdir().unwrap();
//!     let open = || async { crate::ledger::open(&address_in(&file)).await.unwrap() };
//!     Store::new([open().await, open().await], file)
//! }
//!
//! crate::ledger::conformance::suite!(store);
//! ```
//!
//! Time is waited for, never assumed to have passed: each wait names its condition and has a limit.

pub mod afterlife;
pub mod caller;
pub mod cancel;
pub mod claim;
pub mod edit;
pub mod group;
pub mod lease;
pub mod limit;
pub mod model;
pub mod moving;
pub mod pause;
pub mod publish;
pub mod rate;
pub mod read;
pub mod record;
pub mod retention;
pub mod schedule;
pub mod settle;
pub mod sharing;
pub mod transact;
pub mod unique;

use std::any::Any;
use std::fmt;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    Belief, Caller, Claim, ClaimRequest, Failure, Granted, Ledger, LedgerError, Mark, Pruned, Refusal, Settled,
    Settlement, SharedLedger, Submission, Transition, WorkerRecord,
};
use crate::state::State;
use crate::task::{
    ErrorKind, Fence, Guarantee, Json, Kind, Lane, NewTask, Priority, QueueName, Task, TaskId, WorkerId,
};

/// How long a condition may take to come true.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Longer than any test.
pub const HOUR: Duration = Duration::from_secs(3600);

/// An empty ledger, open twice as if by two processes.
pub struct Store {
    /// Two handles of the same data.
    pub handles: [SharedLedger; 2],
    /// What must outlive the handles, such as the guard of a database.
    _guard: Box<dyn Any + Send>,
}

impl Store {
    /// Two handles of one ledger, and what to drop after them.
    pub fn new(handles: [SharedLedger; 2], guard: impl Any + Send) -> Self {
        Self { handles, _guard: Box::new(guard) }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("handles", &self.handles).finish_non_exhaustive()
    }
}

/// Makes one test of each promise, over the stores of an `async fn() -> Store`.
macro_rules! suite {
    ($store:ident) => {
        $crate::ledger::conformance::suite! { @topics $store;
            record {
                what_was_recorded_can_be_read, a_time_to_come_makes_it_scheduled, json_survives_as_it_was_written,
                a_bad_submission_leaves_nothing_and_takes_nobody_along, many_submissions_at_once_are_all_there,
                the_same_key_gives_the_same_task,
                a_repetition_is_told_before_it_is_recorded, what_is_left_of_a_batch_proves_the_repetition, another_request_under_the_key_is_refused,
                fifty_equal_requests_give_one_task, fifty_equal_batches_give_one_batch,
                a_key_of_one_task_is_not_free_for_a_batch,
            }
            claim {
                a_grant_tells_what_the_worker_needs, one_of_fifty_claims_is_granted, the_fence_rises_with_every_claim,
                a_task_is_not_claimed_before_its_time, a_claim_needs_a_living_lease, a_refusal_says_why,
                a_delivery_may_overtake_the_mark, a_suspect_is_not_granted_unasked,
                an_age_counts_from_when_a_task_was_first_due,
                a_message_that_says_what_is_not_true_starts_nothing,
            }
            settle {
                completing_keeps_the_result, retrying_waits_and_keeps_the_error, snoozing_gives_the_attempt_back,
                interrupting_gives_the_attempt_back_at_once, cancelling_keeps_the_reason,
                discarding_keeps_reason_and_error, a_stale_fence_changes_nothing, one_of_two_settlements_is_applied,
                only_the_newest_errors_are_kept, any_text_can_be_settled, crashes_are_counted,
            }
            transact {
                work_and_completion_commit_together, a_failing_work_leaves_nothing_and_the_task_running,
                a_stale_fence_rolls_the_work_back, one_of_two_transactions_commits, many_at_once_add_up,
            }
            publish {
                a_published_task_is_marked_queued, a_late_mark_changes_nothing, a_late_mark_tells_when_it_was_published, a_new_task_is_due_after_its_reserve,
                a_scheduled_task_is_due_at_its_time, what_was_fetched_is_hidden_and_comes_back,
                what_was_fetched_in_vain_is_due_again,
                next_due_tells_how_long, putting_back_raises_the_fence, putting_back_leaves_others_alone,
                a_passed_watermark_strands, an_empty_queue_strands, a_task_keeps_its_priority,
                lanes_are_stranded_each_by_its_own_mark, an_empty_lane_strands_alone,
            }
            lease {
                tasks_are_abandoned_after_the_lease_and_not_before, a_renewed_lease_lives_on,
                an_ended_lease_cannot_be_renewed, retiring_abandons_at_once, an_abandoned_task_is_told_in_full,
                the_old_holder_of_a_rescued_task_is_fenced, live_workers_are_listed,
    what_runs_under_a_worker_is_told, what_workers_run_is_told, who_went_is_told_with_how,
            }
            cancel {
                a_waiting_task_is_cancelled_at_once, a_cancelled_task_is_never_granted, a_relay_forgets_what_is_cancelled,
                a_running_task_is_asked_first, only_its_own_worker_is_told, what_would_start_again_is_cancelled,
                what_is_final_stays_as_it_is, the_request_of_a_dead_worker_is_kept, the_first_to_ask_counts,
                what_has_ended_is_left_alone, a_replayed_task_is_wanted_again, many_are_cancelled_together,
            }
            caller {
                the_newest_change_is_kept_with_its_caller, what_changes_nothing_has_no_caller, a_pause_tells_who_made_it,
            }
            pause {
                a_paused_queue_grants_nothing, a_resumed_queue_goes_on, what_runs_in_a_paused_queue_goes_on,
                pausing_twice_is_pausing_once, paused_queues_are_shown, a_watermark_strands_nothing_of_a_paused_queue,
                a_dead_workers_task_waits_in_its_paused_queue,
            }
            limit {
                limits_are_kept_as_they_were_set, there_is_an_end_to_limits, a_task_without_a_place_is_held,
                every_limit_of_a_task_counts, only_who_could_run_takes_a_place, every_end_frees_the_place,
                a_held_task_can_be_cancelled_and_moved, a_dead_workers_place_is_free, a_limit_may_come_and_go,
                keys_have_their_turns, other_tasks_are_not_concerned,
                places_of_the_past_are_forgotten,
            }
            rate {
                a_rate_spreads_the_starts, tasks_are_let_go_in_the_pace_of_the_rate,
            }
            moving {
                a_waiting_task_goes_to_another_queue, a_late_mark_of_the_old_queue_changes_nothing,
                a_message_left_in_the_old_queue_starts_nothing, what_does_not_wait_there_is_left_alone,
                many_are_moved_together,
            }
            edit {
                a_waiting_task_can_be_changed, what_is_left_out_stays, an_edited_task_waits_for_its_new_time,
                a_message_of_before_an_edit_starts_nothing, a_message_of_before_is_refused_whatever_else_holds,
                a_late_mark_of_the_old_publication_changes_nothing, an_attempt_must_be_left,
                what_runs_or_has_ended_is_not_edited, any_args_can_be_edited_in, a_held_task_can_be_edited,
            }
            schedule {
                a_schedule_is_kept_as_it_was_given, a_change_replaces_what_was_read,
                a_pause_keeps_what_another_has_changed, a_deleted_schedule_leaves_its_tasks,
                schedules_are_listed_by_name, due_schedules_are_those_whose_tick_has_come, a_fired_tick_has_its_task,
                a_change_gives_up_what_was_due_and_counts_it, a_schedules_pause_tells_who_made_it,
                a_jittered_task_is_scheduled, a_stale_firing_writes_nothing, a_tick_that_comes_back_gets_no_second_task,
                an_unfinished_task_skips_the_next_tick, what_ticks_are_skipped_for_is_named, missed_ticks_are_counted,
            }
            unique {
                a_key_is_held_until_the_end, a_window_is_held_whatever_becomes_of_the_task, an_existing_task_is_answered,
                a_waiting_task_is_replaced, a_conflict_leaves_nothing_behind, a_repetition_is_no_conflict,
                a_replay_needs_its_key, a_pruned_task_holds_nothing,
            }
            group {
                a_group_is_recorded_with_its_members, a_group_closes_when_its_last_member_has_ended,
                every_way_to_end_is_counted, a_replay_counts_before_the_end_and_not_after,
                open_groups_are_looked_at_in_portions, members_are_kept_until_the_group_is_old,
                a_repeated_group_is_the_first, a_refused_group_leaves_nothing,
            }
            read {
                unknown_ids_are_left_out, pages_go_from_new_to_old, filters_are_combined, every_state_can_be_listed, failures_are_found_by_what_is_known_of_them,
                tags_match_exactly, big_tasks_come_in_more_pages, queues_are_counted, the_ledger_answers_a_ping,
                run_times_are_those_of_what_has_completed,
            }
            afterlife {
                a_discarded_task_can_be_replayed, a_cancelled_task_can_be_replayed, only_failures_are_replayed,
                many_are_replayed_each_after_its_delay, of_many_with_one_key_one_is_replayed,
                what_waits_for_its_time_is_started_before,
                a_task_tells_whose_work_it_does_again,
                old_finished_tasks_are_pruned, pruning_is_bounded, a_pruned_key_is_free,
                finished_tasks_are_purged_with_their_keys, what_has_not_finished_is_not_purged,
            }
            retention {
                a_queue_keeps_its_tasks_as_long_as_was_said, queues_take_turns, what_is_pruned_next_is_told,
                members_are_kept_as_long_as_their_queue_says, an_expired_result_is_cleared_and_its_task_stays,
                expiring_is_bounded, the_oldest_go_first,
            }
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn every_history_agrees_with_the_model() {
            let store = $store().await;
            $crate::ledger::conformance::model::every_history_agrees_with_the_model(&store.handles).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn no_key_ever_has_two_unfinished_tasks() {
            let store = $store().await;
            $crate::ledger::conformance::unique::no_key_ever_has_two_unfinished_tasks(&store.handles).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn no_limit_is_ever_exceeded() {
            let store = $store().await;
            $crate::ledger::conformance::limit::no_limit_is_ever_exceeded(&store.handles).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn one_of_all_unique_tasks_stands() {
            let store = $store().await;
            let [one, other] = &store.handles;
            $crate::ledger::conformance::unique::one_of_all_unique_tasks_stands(&**one, &**other).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn one_task_follows_a_group_that_ends_everywhere_at_once() {
            let store = $store().await;
            $crate::ledger::conformance::group::one_task_follows_a_group_that_ends_everywhere_at_once(&store.handles).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn one_of_all_closers_wins() {
            let store = $store().await;
            let [one, other] = &store.handles;
            $crate::ledger::conformance::group::one_of_all_closers_wins(&**one, &**other).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn a_closer_that_is_cut_off_leaves_it_to_the_next() {
            let store = $store().await;
            let [one, other] = &store.handles;
            $crate::ledger::conformance::group::a_closer_that_is_cut_off_leaves_it_to_the_next(&**one, &**other).await;
        }

        mod sharing {
            use super::*;
            $crate::ledger::conformance::suite! { @sharing $store;
                one_of_all_claims_is_granted, one_of_all_equal_requests_is_recorded, relays_share_what_is_due,
                a_lease_ended_by_one_is_lost_for_the_other, nothing_starts_after_a_pause_was_answered, cancel_claim_and_completion_leave_one_truth, every_task_runs_once_under_load,
                every_tick_is_fired_once_by_all, one_of_a_change_and_a_firing_comes_first, an_edit_and_a_claim_come_one_after_the_other,
            }
        }
    };
    (@topics $store:ident; $($topic:ident { $($promise:ident),* $(,)? })*) => {$(
        mod $topic {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $promise() {
                    let store = $store().await;
                    $crate::ledger::conformance::$topic::$promise(&*store.handles[0]).await;
                }
            )*
        }
    )*};
    (@sharing $store:ident; $($promise:ident),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $promise() {
            let store = $store().await;
            $crate::ledger::conformance::sharing::$promise(&*store.handles[0], &*store.handles[1]).await;
        }
    )*};
}
pub(crate) use suite;

/// Asks until there is an answer.
pub async fn until<T>(what: &str, ask: impl AsyncFn() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A task of kind `test.work` for the queue `default`, to start at once.
pub fn new_task() -> NewTask {
    let args = Json::parse(r#"{"n":1}"#.to_owned()).unwrap();
    NewTask { max_attempts: 3, ..NewTask::new(kind("test.work"), args) }
}

/// A kind.
pub fn kind(name: &str) -> Kind {
    Kind::parse(name).unwrap()
}

/// A queue's name.
pub fn queue(name: &str) -> QueueName {
    QueueName::parse(name).unwrap()
}

/// A lane.
pub fn lane(name: &str, priority: Priority) -> Lane {
    Lane { queue: queue(name), priority }
}

/// A submission whose tasks no relay touches within the test.
pub fn submission(tasks: Vec<NewTask>) -> Submission {
    Submission { tasks, idempotency: None, reserve: HOUR, group: None }
}

/// Marks publications that were confirmed right now.
pub async fn mark_queued(ledger: &dyn Ledger, published: Vec<(TaskId, Fence)>) -> Result<(), LedgerError> {
    let marks = published.into_iter().map(|(id, fence)| Mark { id, fence, ago: Duration::ZERO });
    ledger.mark_queued(marks.collect()).await
}

/// Records tasks made by `edit` from [`new_task`]; answers their ids.
pub async fn recorded(ledger: &dyn Ledger, count: usize, edit: impl Fn(&mut NewTask)) -> Vec<TaskId> {
    let tasks: Vec<NewTask> = std::iter::repeat_with(|| {
        let mut task = new_task();
        edit(&mut task);
        task
    })
    .take(count)
    .collect();
    let ids = tasks.iter().map(|task| task.id).collect();
    ledger.record(submission(tasks)).await.unwrap();
    ids
}

/// Records one plain task.
pub async fn one(ledger: &dyn Ledger) -> TaskId {
    recorded(ledger, 1, |_| {}).await[0]
}

/// Reads one task that is there.
pub async fn get(ledger: &dyn Ledger, id: TaskId) -> Task {
    ledger.get(vec![id]).await.unwrap().pop().unwrap()
}

/// A worker's record.
pub fn worker_record() -> WorkerRecord {
    WorkerRecord {
        id: WorkerId::new(),
        name: None,
        host: "machine".to_owned(),
        pid: 7,
        queues: vec![queue("default")],
        kinds: vec![kind("test.work")],
        concurrency: 8,
        version: "1.2.3".to_owned(),
    }
}

/// Enters a worker whose lease outlives the test.
pub async fn worker(ledger: &dyn Ledger) -> WorkerId {
    worker_for(ledger, HOUR).await
}

/// Enters a worker whose lease ends by itself.
pub async fn worker_for(ledger: &dyn Ledger, ttl: Duration) -> WorkerId {
    let record = worker_record();
    ledger.register(record.clone(), ttl).await.unwrap();
    record.id
}

/// What a message of this moment says of a task; of one that is not there, something.
pub async fn belief(ledger: &dyn Ledger, id: TaskId) -> Belief {
    let nothing = || Belief { kind: new_task().kind, published: Some(Fence(0)), args: new_task().args.digest() };
    ledger.get(vec![id]).await.unwrap().pop().map_or_else(nothing, |task| Belief::of(&task))
}

/// Asks for a task, by its newest message.
pub async fn request(ledger: &dyn Ledger, id: TaskId, worker: WorkerId) -> ClaimRequest {
    let (guarantee, belief) = (Guarantee::AtLeastOnce, belief(ledger, id).await);
    ClaimRequest { id, worker, guarantee, belief, crashes_below: i32::MAX }
}

/// Asks for a task, by its newest message.
pub async fn claim(ledger: &dyn Ledger, id: TaskId, worker: WorkerId) -> Claim {
    ledger.claim(request(ledger, id, worker).await).await.unwrap()
}

/// Asks for a task by a message that was published under this fence.
pub async fn claim_by(ledger: &dyn Ledger, id: TaskId, worker: WorkerId, published: Option<Fence>) -> Claim {
    let belief = Belief { published, ..belief(ledger, id).await };
    ledger.claim(ClaimRequest { belief, ..request(ledger, id, worker).await }).await.unwrap()
}

/// Puts a task back, by its newest message.
pub async fn put_back(ledger: &dyn Ledger, id: TaskId, delay: Duration) -> Result<(), LedgerError> {
    let refused = ledger.put_back(id, belief(ledger, id).await, delay).await?;
    assert!(matches!(refused, None | Some(Refusal::Unknown)), "{refused:?}");
    Ok(())
}

/// Takes a task that is to be had.
pub async fn granted(ledger: &dyn Ledger, id: TaskId, worker: WorkerId) -> Granted {
    match claim(ledger, id, worker).await {
        Claim::Granted(granted) => granted,
        Claim::Refused(reason) => panic!("the claim was refused: {reason:?}"),
    }
}

/// Asks for a task that is not to be had.
pub async fn refused(ledger: &dyn Ledger, id: TaskId, worker: WorkerId) -> Refusal {
    match claim(ledger, id, worker).await {
        Claim::Refused(reason) => reason,
        Claim::Granted(granted) => panic!("the claim was granted: {granted:?}"),
    }
}

/// Writes an outcome.
pub async fn settle(ledger: &dyn Ledger, id: TaskId, fence: Fence, transition: Transition) -> Settled {
    ledger.settle(Settlement { id, fence, transition }).await.unwrap()
}

/// Takes a task and writes an outcome that is applied.
pub async fn run(ledger: &dyn Ledger, id: TaskId, worker: WorkerId, transition: Transition) -> Granted {
    let granted = granted(ledger, id, worker).await;
    assert_eq!(settle(ledger, id, granted.fence, transition).await, Settled::Applied);
    granted
}

/// An outcome that completes.
pub fn complete() -> Transition {
    Transition::Complete { result: Json::null() }
}

/// An outcome that waits for `delay` and then tries again.
pub fn retry(delay: Duration, message: &str) -> Transition {
    Transition::Retry { delay, error: failure(message) }
}

/// An outcome that gives up.
pub fn discard() -> Transition {
    Transition::Discard { reason: "exhausted".to_owned(), error: failure("broken") }
}

/// An outcome that says stop.
pub fn cancel() -> Transition {
    Transition::Cancel { reason: "not wanted".to_owned() }
}

/// Makes one step of pruning; answers how many tasks it deleted.
pub async fn pruned(ledger: &dyn Ledger, retention: Duration, limit: u32) -> u64 {
    prune(ledger, retention, limit).await.tasks
}

/// Makes one step of pruning, by the clock as it is.
pub async fn prune(ledger: &dyn Ledger, retention: Duration, limit: u32) -> Pruned {
    let now = ledger.clock().await.unwrap().now;
    ledger.prune(now, retention, limit).await.unwrap()
}

/// Clears what is over by the clock as it is.
pub async fn expire_results(ledger: &dyn Ledger, limit: u32) -> u64 {
    let now = ledger.clock().await.unwrap().now;
    ledger.expire_results(now, limit).await.unwrap()
}

/// A handler's error.
pub fn failure(message: &str) -> Failure {
    Failure { message: message.to_owned(), kind: ErrorKind::Error }
}

/// Asks for a task's cancellation; answers its state before.
pub async fn cancelled(ledger: &dyn Ledger, id: TaskId, reason: &str) -> State {
    let before = ledger.cancel(vec![id], reason.to_owned(), Caller::UNKNOWN).await.unwrap();
    let [(of, state)] = before[..] else { panic!("one task: {before:?}") };
    assert_eq!(of, id);
    state
}
