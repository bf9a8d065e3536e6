//! The way of one delivery through the worker: decode → claim → run → decide → settle → ack.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tasklane_common::backoff::Backoff;
use tasklane_common::envelope::{self, Envelope, Message};
use tasklane_common::events::Happening;
use tasklane_common::ledger::{Belief, Claim, ClaimRequest, Granted, LedgerError, Refusal, Transition, complain};
use tasklane_common::seldom::Seldom;
use tasklane_common::state::State;
use tasklane_common::task::{Fence, QueueName, TaskId};
use tasklane_common::traces::{self, TARGET};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::field::Empty;
use tracing::{Span, info_span};

use crate::arbiter::Permit;
use crate::consume::PATIENCE;
use crate::decide::{Attempted, Policy, decide};
use crate::delivery::Delivery;
use crate::foreign;
use crate::handler::{Options, TaskContext};
use crate::life::{Life, Stats};
use crate::meters::KindMeters;
use crate::run::{self, Run};
use crate::settle::{Ran, has_ended, log_outcome, settle};
use crate::transaction::Transaction;

/// How long a ledger that is away is left alone before it is asked again.
pub(crate) const LEDGER_PAUSE: Duration = Duration::from_millis(250);
/// How long a place stays empty in which nothing could be started, longer from round to round.
const STARVED_PAUSE: Backoff = Backoff { base_ms: 1_000, max_ms: 30_000 };
/// What holds for all starts is said once a minute.
static STARVED: Seldom = Seldom::once_in(Duration::from_secs(60));
/// How long a task waits whose kind has a handler in another live worker, so that it may get it.
const ELSEWHERE_DELAY: Duration = Duration::from_millis(500);
/// How long a task waits whose kind nobody handles at present.
const NOBODY_DELAY: Duration = Duration::from_secs(5);
/// How long a suspect waits, more or less, while another one runs here.
const SUSPECT_DELAY: Duration = Duration::from_secs(1);

/// Takes one delivery all the way. The permit bounds how many tasks run at once.
pub async fn process(life: Arc<Life>, mut delivery: Delivery, permit: Permit) {
    let body = std::mem::take(&mut delivery.body);
    // Before its layout is asked for: a foreign message is for others to read.
    if let Some(other) = envelope::ledger_of(&delivery.properties).filter(|ledger| *ledger != life.ledger.id()) {
        drop(permit);
        return Box::pin(foreign::hand_back(&life, delivery, body, other)).await;
    }
    match Message::decode(&delivery.properties, &body) {
        Ok(Message::Single(envelope)) => {
            drop(body);
            one(life, envelope, delivery, permit).await;
        }
        Ok(Message::Bundle(envelopes)) => Box::pin(bundle(life, envelopes, delivery, permit)).await,
        Err(error) => delivery.bury(body, error.reason()).await,
    }
}

/// Runs the tasks of a bundle, each in a place of its own. What finds none in the time that one place was to take for all
/// goes back by the ledger, to be published again by itself: with this message it would have to wait for the end of the others.
async fn bundle(life: Arc<Life>, envelopes: Vec<Envelope>, delivery: Delivery, permit: Permit) {
    let give_up = Instant::now() + PATIENCE.max(life.settings.common.bundle());
    let mut permit = Some(permit);
    let shares = delivery.shares(envelopes.len());
    for (envelope, share) in envelopes.into_iter().zip(shares) {
        let place = match permit.take() {
            Some(permit) => Some(permit),
            None => tokio::select! {
                place = life.permits.acquire(share.lane.priority) => Some(place),
                () = life.draining.cancelled() => None,
                () = sleep_until(give_up) => None,
            },
        };
        match place {
            Some(place) => drop(life.deliveries.spawn(one(Arc::clone(&life), envelope, share, place))),
            None => put_back(&life, &envelope, share, "no_room", Duration::ZERO).await,
        }
    }
}

/// Takes one task all the way.
async fn one(life: Arc<Life>, envelope: Envelope, delivery: Delivery, permit: Permit) {
    let known = life.registry.get(&envelope.kind).zip(life.meters.get(&envelope.kind));
    let Some((handler, meters)) = known else {
        let delay = Box::pin(delay_elsewhere(&life, &envelope, &delivery)).await;
        return Box::pin(put_back(&life, &envelope, delivery, "no_handler", delay)).await;
    };
    let options = handler.options();
    let (claimed, apart) = claim(&life, &envelope, &options).await;
    let granted = match claimed {
        Some(Claim::Granted(granted)) => granted,
        Some(Claim::Refused(reason)) => return Box::pin(refused(&life, reason, &envelope, delivery)).await,
        None => return delivery.give_back().await,
    };
    let mut holding = life.held.holding(envelope.id, granted.fence);
    observe_claim(&life, meters, &granted, envelope.fence, &delivery);
    let run = prepare(&life, &envelope, &delivery.lane.queue, &granted, &options);
    let unwanted = run.unwanted.clone();
    let transaction = run.cx.transaction.clone();
    let Envelope { id, kind, args, reply_to, .. } = envelope;
    let queue = delivery.lane.queue.clone();
    let (fence, attempt, completed, span) = (granted.fence, granted.attempt, &meters.completed, run.span.clone());
    let ran = Ran { id, kind, queue, fence, attempt, completed, span };
    let mut held = Some(delivery);
    let mut policy = policy(&life, &granted, options);
    let attempted = if policy.is_too_old() {
        Some(Attempted::TooOld)
    } else {
        holding.begun = true;
        Stats::add(&life.stats.started);
        life.events.tell(|| ran.event(&life, granted.started_at, (Happening::Started, State::Running)));
        let began = Instant::now();
        let attempted = run::run(run, Arc::clone(handler), args, &mut held).await;
        let took = began.elapsed();
        meters.run_seconds.record(took.as_secs_f64());
        policy.age = policy.age.saturating_add(took);
        attempted
    };
    // Where nothing can be started the place stays taken for a while, so that no more is claimed; else it is free now.
    let starved = attempted.as_ref().and_then(Attempted::not_started).map(|why| (why.to_owned(), permit));
    // Without an attempt the lease is lost, and with it the right to an outcome: whoever rescues the task decides.
    let Some(attempted) = attempted else { return traces::fail(&ran.span, &"the lease was lost") };
    let committed = matches!(attempted, Attempted::Committed(_));
    let transition = decide(attempted, &policy, rand::random());
    log_outcome(&ran, &transition);
    let again = matches!(transition, Transition::Retry { .. } | Transition::Snooze { .. } | Transition::Interrupt);
    // A task that may have been completed, or shall be cancelled, may have ended, and a notice too many only makes its
    // reader look.
    let ends = !again || transaction.is_in_doubt() || unwanted.is_cancelled();
    let settled = if committed {
        has_ended(&life, &ran, &transition);
        true
    } else {
        settle(&life, &ran, transition, transaction.is_in_doubt()).await
    };
    holding.settled = settled;
    drop(holding);
    if granted.limited {
        life.nudges.freed.notify_one();
    }
    drop(apart);
    if settled {
        // Settled first and acked afterwards: a crash in between only brings a delivery that the ledger refuses.
        if let Some(delivery) = held {
            delivery.ack();
        }
        if let Some(reply_to) = reply_to.filter(|_| ends) {
            life.publisher.notify(reply_to, id);
        }
    }
    starve(&life, starved).await;
}

/// Waits until another start is worth a try; the worker says that it can start nothing, and the tasks go to others meanwhile.
async fn starve(life: &Life, starved: Option<(String, Permit)>) {
    let Some((why, _permit)) = starved else { return life.starved.store(0, Ordering::Relaxed) };
    if let Some(left_out) = STARVED.admit() {
        tracing::error!(
            why,
            left_out,
            "this worker can start nothing: it gives tasks back, without an attempt, and claims few"
        );
    }
    metrics::counter!("tasklane_not_started_total").increment(1);
    let rounds = life.starved.fetch_add(1, Ordering::Relaxed) / u32::from(life.settings.concurrency).max(1);
    tokio::select! {
        () = sleep(STARVED_PAUSE.delay(i32::try_from(rounds).unwrap_or(i32::MAX).saturating_add(1))) => {}
        () = life.draining.cancelled() => {}
        () = life.lease.lost().cancelled() => {}
    }
}

/// Claims a task; the permit, if there is one, belongs to its run.
///
/// A task that the next crash would get discarded as poison is a suspect: it runs with no other suspect beside it. A
/// crash hits all that run in the worker, so without that the innocent would be discarded along with the culprit.
async fn claim(life: &Life, envelope: &Envelope, options: &Options) -> (Option<Claim>, Option<OwnedSemaphorePermit>) {
    let worker = life.lease.worker();
    let crashes_below = life.settings.common.max_crashes.saturating_sub(1).max(1);
    let (id, guarantee, belief) = (envelope.id, options.guarantee, envelope.belief());
    let request = ClaimRequest { id, worker, guarantee, belief, crashes_below };
    let claim = ask(life, request.clone()).await;
    if claim != Some(Claim::Refused(Refusal::Suspect)) {
        return (claim, None);
    }
    // Before the claim: what is claimed counts as running, and so as guilty, even if it only waits for its turn.
    match Arc::clone(&life.suspects).try_acquire_owned() {
        Ok(apart) => (ask(life, ClaimRequest { crashes_below: i32::MAX, ..request }).await, Some(apart)),
        Err(_) => (claim, None),
    }
}

/// Asks the ledger until it answers; `None` when the life ends before that. What is granted is noted as held.
async fn ask(life: &Life, request: ClaimRequest) -> Option<Claim> {
    let id = request.id;
    let _asked = life.held.ask(id);
    let mut in_doubt = false;
    loop {
        let claim = match life.ledger.claim(request.clone()).await {
            // An earlier try without an answer may have been granted all the same, and would be nobody's run.
            Ok(Claim::Refused(Refusal::Held)) if in_doubt => Box::pin(adopt(life, id, &request.belief)).await,
            claim => claim,
        };
        match claim {
            Ok(Claim::Granted(granted)) => {
                life.held.hold(id, granted.fence);
                return Some(Claim::Granted(granted));
            }
            Ok(refused) => return Some(refused),
            Err(error) => {
                complain(&error, "a task cannot be claimed, trying again");
            }
        }
        in_doubt = true;
        tokio::select! {
            () = sleep(LEDGER_PAUSE) => {}
            () = life.lease.lost().cancelled() => return None,
            () = life.draining.cancelled() => return None,
        }
    }
}

/// Takes over this life's own claim whose answer was lost, unless another delivery of the task has it: surely one with
/// other args, which the ledger would not have granted to this one.
async fn adopt(life: &Life, id: TaskId, belief: &Belief) -> Result<Claim, LedgerError> {
    let task = life.ledger.get(vec![id]).await?.pop();
    let own = task.filter(|task| {
        let (worker, kind, args) = (task.worker_id, &task.kind, task.args.digest());
        task.state == State::Running
            && worker == Some(life.lease.worker())
            && *kind == belief.kind
            && args == belief.args
    });
    let Some(task) = own.filter(|task| life.held.hold(id, task.fence)) else {
        return Ok(Claim::Refused(Refusal::Held));
    };
    Ok(Claim::Granted(Granted {
        fence: task.fence,
        attempt: task.attempt,
        max_attempts: task.max_attempts,
        timeout: task.timeout_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
        // The task does not tell when it was first due; this is later, so at worst one attempt more is made.
        first_due_at: task.run_at,
        run_at: task.run_at,
        queued_at: None,
        started_at: task.started_at.unwrap_or(task.run_at),
        // Not known: a place too many is only looked for.
        limited: true,
    }))
}

async fn refused(life: &Life, reason: Refusal, envelope: &Envelope, delivery: Delivery) {
    match reason {
        Refusal::Suspect => return put_back(life, envelope, delivery, reason.as_str(), SUSPECT_DELAY).await,
        // It does not say what held when it was published, so it may be the newest there is.
        Refusal::Outdated if envelope.fence.is_none() => {
            return put_back(life, envelope, delivery, reason.as_str(), Duration::ZERO).await;
        }
        Refusal::Paused => return paused(life, envelope, delivery).await,
        _ => {}
    }
    metrics::counter!("tasklane_claims_refused_total", "reason" => reason.as_str()).increment(1);
    match reason {
        // The ledger has custody: whatever this task needs next, a relay publishes it again.
        Refusal::Finished | Refusal::Held | Refusal::Outdated | Refusal::NotDue | Refusal::Limited => {
            delivery.ack();
        }
        Refusal::Unknown | Refusal::WrongKind | Refusal::WrongFence | Refusal::WrongArgs => {
            bury(envelope, delivery, reason).await;
        }
        Refusal::LeaseLost | Refusal::Suspect | Refusal::Paused => delivery.give_back().await,
    }
}

/// Whether the message says what the ledger knows to be wrong: its task is another one, or none.
fn is_untrue(reason: Refusal) -> bool {
    matches!(reason, Refusal::Unknown | Refusal::WrongKind | Refusal::WrongFence | Refusal::WrongArgs)
}

/// The task, if there is one, goes its own way: nothing of it was touched.
async fn bury(envelope: &Envelope, delivery: Delivery, reason: Refusal) {
    let reason = if reason == Refusal::Unknown { "unknown_task" } else { reason.as_str() };
    delivery.bury_task(envelope, reason).await;
}

/// A task of a paused queue stays in the broker: its message is given back once the consumer knows of the pause, since
/// before that it would come again at once.
async fn paused(life: &Life, envelope: &Envelope, delivery: Delivery) {
    match life.pauses.confirm(&*life.ledger, &delivery.lane.queue).await {
        Ok(true) => {
            metrics::counter!("tasklane_claims_refused_total", "reason" => Refusal::Paused.as_str()).increment(1);
            delivery.give_back().await;
        }
        // This queue goes on, so the task belongs to another, or the pause is over.
        Ok(false) => put_back(life, envelope, delivery, Refusal::Paused.as_str(), ELSEWHERE_DELAY).await,
        Err(error) => {
            complain(&error, "whether the queue is paused is not known, trying again");
            sleep(LEDGER_PAUSE).await;
            delivery.give_back().await;
        }
    }
}

/// How long a task waits whose kind has no handler here.
async fn delay_elsewhere(life: &Life, envelope: &Envelope, delivery: &Delivery) -> Duration {
    let elsewhere = match life.ledger.workers().await {
        Ok(workers) => workers
            .iter()
            .any(|worker| worker.kinds.contains(&envelope.kind) && worker.queues.contains(&delivery.lane.queue)),
        Err(_) => false,
    };
    if elsewhere { ELSEWHERE_DELAY } else { NOBODY_DELAY }
}

/// A task that cannot run here now: the ledger publishes it again later.
async fn put_back(life: &Life, envelope: &Envelope, delivery: Delivery, reason: &'static str, delay: Duration) {
    // Jitter: the broker deals out in turn, so tasks that came back in the same order every time would go to the same
    // wrong workers every time.
    let delay = delay.mul_f64(0.5 + rand::random::<f64>());
    tracing::debug!(task.id = %envelope.id, task.kind = %envelope.kind, reason, delay_ms = delay.as_millis(), "put back");
    let refused = life.ledger.put_back(envelope.id, envelope.belief(), delay).await;
    let reason = refused.as_ref().ok().copied().flatten().map_or(reason, Refusal::as_str);
    metrics::counter!("tasklane_claims_refused_total", "reason" => reason).increment(1);
    match refused {
        Ok(Some(refusal)) if is_untrue(refusal) => bury(envelope, delivery, refusal).await,
        Ok(_) => delivery.ack(),
        Err(error) => {
            complain(&error, "a task could not be put back, trying again");
            sleep(LEDGER_PAUSE).await;
            delivery.give_back().await;
        }
    }
}

/// What the handler is told, and how long it has.
fn prepare<'a>(
    life: &'a Life,
    envelope: &Envelope,
    queue: &QueueName,
    granted: &Granted,
    options: &Options,
) -> Run<'a> {
    let ceiling = options.timeout.unwrap_or(life.settings.task_timeout);
    let limit = granted.timeout.map_or(ceiling, |wished| wished.min(ceiling));
    let span = span_of(envelope, queue, granted);
    let cx = TaskContext {
        id: envelope.id,
        kind: envelope.kind.clone(),
        // The row's at the claim, too: a message of before a move or an edit is refused.
        queue: queue.clone(),
        attempt: granted.attempt,
        max_attempts: granted.max_attempts,
        fence: granted.fence,
        deadline: Instant::now() + limit,
        cancellation: life.interrupt.child_token(),
        traceparent: traces::traceparent(&span).or_else(|| envelope.traceparent.clone()),
        result_bytes_max: life.settings.result_bytes_max,
        transaction: Transaction::new(life.ledger.clone()),
    };
    Run {
        lease: &life.lease,
        interrupt: &life.interrupt,
        unwanted: life.held.unwanted(envelope.id),
        cancel_grace: life.settings.cancel_grace,
        custody_after: life.settings.custody_after,
        cx,
        limit,
        span,
    }
}

/// A run's part of its trace. The names are OpenTelemetry's conventions for messaging, where they have one.
fn span_of(envelope: &Envelope, queue: &QueueName, granted: &Granted) -> Span {
    let span = info_span!(
        target: TARGET, "process",
        otel.name = %format_args!("process {}", envelope.kind), otel.kind = "consumer",
        otel.status_code = Empty, otel.status_description = Empty,
        messaging.system = "rabbitmq", messaging.operation.type = "process", messaging.destination.name = queue.as_str(),
        messaging.message.id = %envelope.id, task.kind = envelope.kind.as_str(), task.attempt = granted.attempt,
        task.fence = granted.fence.0, task.outcome = Empty,
    );
    traces::continue_from(&span, envelope.traceparent.as_deref());
    span
}

/// What the end of a run is decided by; the age is that at the claim, by the ledger's clock.
fn policy(life: &Life, granted: &Granted, options: Options) -> Policy {
    let age = granted.started_at.duration_since(granted.first_due_at);
    Policy {
        attempt: granted.attempt,
        max_attempts: granted.max_attempts,
        delays: options.retry.delays.unwrap_or_else(|| life.settings.backoff.into()),
        age: Duration::try_from(age).unwrap_or_default(),
        max_age: options.retry.max_age,
        result_bytes_max: life.settings.result_bytes_max,
        discard_errors: options.discard_errors,
        guarantee: options.guarantee,
    }
}

/// Of a task that was published again an earlier message has come, if its fence is not the last before the claim's; the row
/// then tells when the later one was queued, which this one's place in the lane has nothing to do with.
fn observe_claim(life: &Life, meters: &KindMeters, granted: &Granted, carried: Option<Fence>, delivery: &Delivery) {
    let is_last_message = carried.is_some_and(|carried| carried.0 + 1 == granted.fence.0);
    if let Some(queued_at) = granted.queued_at.filter(|_| is_last_message && !delivery.redelivered) {
        life.note_head(&delivery.lane, queued_at);
    }
    let waited = granted.started_at.duration_since(granted.run_at);
    meters.wait_seconds.record(waited.as_secs_f64().max(0.0));
}
