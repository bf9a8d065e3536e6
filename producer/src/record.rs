//! Record, then publish: after the first half a task is never lost, so the second half is only a matter of speed.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use tasklane_common::clock;
use tasklane_common::events::{Happening, TaskEvent};
use tasklane_common::group::NewGroup;
use tasklane_common::ledger::{Idempotency, Recorded, Submission};
use tasklane_common::publisher::Publication;
use tasklane_common::state::State;
use tasklane_common::task::{Fence, Lane, NewTask, QueueName, Task, TaskId};
use tokio::time::Instant;

use crate::app::App;
use crate::error::ApiError;

/// For how long relays leave a new task to this process; after a crash within it the task is that late.
const RESERVE: Duration = Duration::from_secs(5);
/// How long this process hands over the tasks of one submission.
const OFFER_TIME: Duration = Duration::from_secs(3);
/// How many tasks it hands over at once.
const PORTION: usize = 256;

/// What a client asks to be recorded.
#[derive(Debug)]
pub(crate) struct Recording {
    /// At least one.
    pub(crate) tasks: Vec<NewTask>,
    /// Makes the request repeatable.
    pub(crate) idempotency: Option<Idempotency>,
    /// The group that the tasks are the members of.
    pub(crate) group: Option<NewGroup>,
    /// Where the notice of the end goes, when a client waits for it here.
    pub(crate) reply_to: Option<String>,
}

/// What became of it.
#[derive(Debug)]
pub(crate) enum Receipt {
    /// Recorded now, at this time by the ledger's clock, but for those for which an earlier task stands, by index.
    New(Timestamp, Vec<(usize, TaskId)>),
    /// Recorded before, by a request with the same key and body.
    Replayed(Vec<TaskId>),
}

/// Records tasks and hands those that are due to the publisher.
///
/// # Errors
/// [`ApiError::KeyReused`], [`ApiError::QueueFull`], or what [`crate::gate::Gate::ask`] says.
pub(crate) async fn record(app: &Arc<App>, recording: Recording) -> Result<Receipt, ApiError> {
    // In a task of its own: a client that goes away between the halves must not leave its task to the relay.
    let recorded = app.recordings.spawn(record_and_offer(Arc::clone(app), recording));
    recorded.await.map_err(|error| ApiError::Internal(format!("recording ended early: {error}")))?
}

async fn record_and_offer(app: Arc<App>, recording: Recording) -> Result<Receipt, ApiError> {
    let Recording { tasks, idempotency, group, reply_to } = recording;
    let mut due: Vec<_> =
        tasks.iter().filter(|task| task.run_at.is_none()).map(|task| publication(task, &reply_to)).collect();
    let mut queues: Vec<_> = tasks.iter().map(|task| (task.id, task.queue.clone())).collect();
    let told = if app.events.wanted() { tasks.iter().map(submitted).collect() } else { Vec::new() };
    let taken = match app.intake.take(parts(&tasks)) {
        Ok(taken) => taken,
        Err(full) => return repeated_or(&app, idempotency, tasks.len(), full).await.map(Receipt::Replayed),
    };
    let submission = Submission { tasks, idempotency, reserve: RESERVE, group };
    let recorded = app.gate.ask(app.gate.ledger().record(submission)).await;
    drop(taken);
    match recorded? {
        Recorded::New { at, existing } => {
            if !existing.is_empty() {
                let left_out: HashSet<TaskId> = existing.iter().map(|(index, _)| queues[*index].0).collect();
                due.retain(|publication| !left_out.contains(&publication.id));
                queues.retain(|(id, _)| !left_out.contains(id));
            }
            // Before their messages, so that few are overtaken by their start.
            tell(&app, told, at, &existing);
            app.tally.tasks.fetch_add(queues.len() as u64, Ordering::Relaxed);
            for (queue, count) in count_by_queue(&app, &queues) {
                metrics::counter!("tasklane_submissions_refused_total", "queue" => queue.clone()).increment(0);
                metrics::counter!("tasklane_tasks_submitted_total", "queue" => queue).increment(count);
            }
            offer(&app, due).await;
            Ok(Receipt::New(at, existing))
        }
        Recorded::Replayed(ids) => Ok(Receipt::Replayed(replayed(ids))),
        Recorded::KeyReused => Err(ApiError::KeyReused),
        Recorded::NotUnique(conflicts) => {
            metrics::counter!("tasklane_unique_conflicts_total").increment(conflicts.len() as u64);
            Err(ApiError::UniqueKeysTaken(conflicts))
        }
    }
}

/// Answers what would be refused now, if it is the repetition of a request for so many tasks: that was taken in, and asks
/// nothing of what holds now, such as limits, or the state of another task.
///
/// # Errors
/// The refusal of what is new, [`ApiError::KeyReused`], or what [`crate::gate::Gate::ask`] says.
pub(crate) async fn repeated_or(
    app: &App,
    idempotency: Option<Idempotency>,
    tasks: usize,
    refusal: ApiError,
) -> Result<Vec<TaskId>, ApiError> {
    let Some(given) = idempotency else { return Err(refusal) };
    match app.gate.ask(app.gate.ledger().recorded_before(given, tasks)).await? {
        Some(Recorded::Replayed(ids)) => Ok(replayed(ids)),
        Some(Recorded::KeyReused) => Err(ApiError::KeyReused),
        Some(Recorded::New { .. } | Recorded::NotUnique(_)) | None => Err(refusal),
    }
}

fn replayed(ids: Vec<TaskId>) -> Vec<TaskId> {
    metrics::counter!("tasklane_idempotent_replays_total").increment(1);
    ids
}

/// Hands over in portions, since a large batch takes the publisher longer than one offer waits.
///
/// Ends before the reserve does: what is left then belongs to the relays.
async fn offer(app: &App, due: Vec<Publication>) {
    let until = Instant::now() + OFFER_TIME;
    let mut due = due.into_iter();
    while Instant::now() < until {
        let portion: Vec<_> = due.by_ref().take(PORTION).collect();
        if portion.is_empty() || !app.publisher.is_connected() {
            return;
        }
        app.publisher.offer(portion).await;
    }
}

/// What is told of a submission once it is recorded, but for the time and the state.
fn submitted(task: &NewTask) -> (TaskEvent, Option<Timestamp>) {
    let event = TaskEvent {
        at: Timestamp::UNIX_EPOCH,
        id: task.id,
        kind: task.kind.clone(),
        queue: task.queue.clone(),
        event: Happening::Submitted,
        state: State::Accepted,
        attempt: 0,
        worker_id: None,
    };
    (event, task.run_at)
}

fn tell(app: &App, told: Vec<(TaskEvent, Option<Timestamp>)>, at: Timestamp, existing: &[(usize, TaskId)]) {
    let left_out: HashSet<usize> = existing.iter().map(|(index, _)| *index).collect();
    for (_, (event, run_at)) in told.into_iter().enumerate().filter(|(index, _)| !left_out.contains(index)) {
        app.events.tell(|| TaskEvent { at, state: first_state(run_at, at), ..event });
    }
}

/// How many tasks go to which queue.
fn parts(tasks: &[NewTask]) -> Vec<(QueueName, u32)> {
    let mut parts: Vec<(QueueName, u32)> = Vec::new();
    for task in tasks {
        match parts.iter_mut().find(|(queue, _)| *queue == task.queue) {
            Some((_, count)) => *count += 1,
            None => parts.push((task.queue.clone(), 1)),
        }
    }
    parts
}

fn publication(task: &NewTask, reply_to: &Option<String>) -> Publication {
    Publication {
        id: task.id,
        kind: task.kind.clone(),
        lane: Lane { queue: task.queue.clone(), priority: task.priority },
        args: task.args.clone(),
        fence: Fence(0),
        traceparent: task.traceparent.clone(),
        reply_to: reply_to.clone(),
    }
}

fn count_by_queue(app: &App, queues: &[(TaskId, QueueName)]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for (_, queue) in queues {
        *counts.entry(app.queue_labels.of(queue)).or_default() += 1;
    }
    counts
}

/// The state in which a task was recorded.
pub(crate) fn first_state(run_at: Option<Timestamp>, recorded_at: Timestamp) -> State {
    if run_at.is_some_and(|run_at| run_at > recorded_at) { State::Scheduled } else { State::Accepted }
}

/// A task as it was recorded, without asking the ledger for it.
pub(crate) fn as_recorded(task: NewTask, recorded_at: Timestamp) -> Task {
    Task {
        id: task.id,
        kind: task.kind,
        queue: task.queue,
        state: first_state(task.run_at, recorded_at),
        args: task.args,
        tags: task.tags,
        priority: task.priority,
        attempt: 0,
        max_attempts: task.max_attempts,
        fence: Fence(0),
        result: None,
        result_expired: false,
        errors: Vec::new(),
        reason: None,
        created_at: recorded_at,
        run_at: task.run_at.unwrap_or(recorded_at),
        started_at: None,
        finished_at: None,
        cancel_requested_at: None,
        worker_id: None,
        timeout_ms: task.timeout.map(clock::millis),
        result_ttl_ms: task.result_ttl.map(clock::millis),
        unique_key: task.unique.map(|unique| unique.key),
        group_id: None,
        concurrency_key: task.concurrency_key,
        limited_by: None,
        retried_from: task.retried_from,
        retried_by: None,
        last_change: None,
    }
}
