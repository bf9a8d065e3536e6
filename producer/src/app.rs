//! What every request handler shares.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use tasklane_common::completion::Completions;
use tasklane_common::control::Control;
use tasklane_common::events::feed::Feed;
use tasklane_common::events::{Events, Happening, TaskEvent};
use tasklane_common::ledger::SharedLedger;
use tasklane_common::publisher::Publisher;
use tasklane_common::state::State;
use tasklane_common::task::{Task, TaskId};
use tasklane_common::telemetry::Metrics;
use tasklane_common::web::hosts::Hosts;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::Admission;
use crate::backlog::Backlog;
use crate::body;
use crate::gate::Gate;
use crate::intake::Intake;
use crate::queue_labels::QueueLabels;
use crate::request::Rules;
use crate::wait::Waits;

/// The running producer, but for its listener.
#[derive(Debug)]
pub struct App {
    /// Decides, behind a gate that fails fast.
    pub gate: Gate,
    /// Takes what was recorded to the broker.
    pub publisher: Publisher,
    /// Hears of tasks that have ended.
    pub completions: Completions,
    /// Tells workers what shall be cancelled, and which queues were paused or resumed.
    pub control: Control,
    /// Tells whoever looks what happens to tasks.
    pub events: Events,
    /// What happens to tasks, for those who look here.
    pub feed: Feed,
    /// Everything that was measured.
    pub metrics: Metrics,
    /// What the settings add to submissions.
    pub rules: Rules,
    /// From where requests may come.
    pub hosts: Hosts,
    /// How many requests may be under way.
    pub admission: Admission,
    /// How full the queues with a bound are.
    pub intake: Intake,
    /// The room for bodies.
    pub bodies: body::Room,
    /// How many clients may wait for the end of tasks.
    pub waits: Waits,
    /// Recordings under way; they finish even when their client has gone.
    pub recordings: TaskTracker,
    /// Cancelled when the producer begins to stop: waiting clients are answered at once.
    pub stopping: CancellationToken,
    /// What was done since the start.
    pub tally: Tally,
    pub(crate) queue_labels: QueueLabels,
    /// Gauges of what waits.
    pub(crate) backlog: Backlog,
}

/// What was done since the start.
#[derive(Debug, Default)]
pub struct Tally {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Tasks recorded.
    pub tasks: AtomicU64,
}

/// What an [`App`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// Decides.
    pub ledger: SharedLedger,
    /// Takes what was recorded to the broker.
    pub publisher: Publisher,
    /// Hears of tasks that have ended.
    pub completions: Completions,
    /// Tells whoever looks what happens to tasks.
    pub events: Events,
    /// What happens to tasks, for those who look here.
    pub feed: Feed,
    /// Everything that was measured.
    pub metrics: Metrics,
    /// What the settings add to submissions.
    pub rules: Rules,
    /// From where requests may come.
    pub hosts: Hosts,
}

impl App {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts { ledger, publisher, completions, events, feed, metrics, rules, hosts } = parts;
        Arc::new(Self {
            gate: Gate::new(ledger),
            control: Control::spawn(publisher.clone()),
            publisher,
            completions,
            events,
            feed,
            metrics,
            rules,
            hosts,
            admission: Admission::default(),
            intake: Intake::default(),
            bodies: body::Room::default(),
            waits: Waits::default(),
            recordings: TaskTracker::new(),
            stopping: CancellationToken::new(),
            tally: Tally::default(),
            queue_labels: QueueLabels::default(),
            backlog: Backlog::default(),
        })
    }

    /// Tells those who wait what was cancelled, and the workers what they shall stop: each with its state before.
    pub(crate) fn tell_cancelled(&self, before: &[(TaskId, State)]) {
        let (running, waiting): (Vec<_>, Vec<_>) =
            before.iter().filter(|(_, state)| !state.is_final()).partition(|(_, state)| *state == State::Running);
        for (id, _) in &waiting {
            self.completions.tell(*id);
        }
        metrics::counter!("tasklane_cancellations_total", "answer" => "cancelled").increment(waiting.len() as u64);
        metrics::counter!("tasklane_cancellations_total", "answer" => "requested").increment(running.len() as u64);
        self.control.cancel(running.into_iter().map(|(id, _)| id).collect());
    }

    /// Tells whoever looks what somebody has done to a task that does not run, and the state to which that leads.
    pub(crate) fn tell_of(&self, task: &Task, (event, state): (Happening, State)) {
        self.events.tell(|| TaskEvent {
            at: Timestamp::now(),
            id: task.id,
            kind: task.kind.clone(),
            queue: task.queue.clone(),
            event,
            state,
            attempt: task.attempt,
            worker_id: None,
        });
    }
}
