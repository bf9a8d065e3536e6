//! All metrics: what they say, and the series that are there before anything has happened, so that `increase` sees the
//! first event.

use metrics::{Label, counter, describe_counter, describe_gauge, describe_histogram, gauge};

use self::Shape::{Counter, Gauge, Histogram};

/// The program that has a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The producer.
    Producer,
    /// A worker.
    Worker,
}

/// What a metric is to Prometheus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Goes up.
    Counter,
    /// Goes up and down.
    Gauge,
    /// How often it was how much.
    Histogram,
}

/// A metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub shape: Shape,
    /// The one program that has it; `None`: both.
    pub of: Option<Program>,
    /// Its labels, with all their values where these are known.
    pub labels: &'static [(&'static str, &'static [&'static str])],
    help: &'static str,
}

const fn metric(
    shape: Shape,
    of: Option<Program>,
    name: &'static str,
    labels: &'static [(&'static str, &'static [&'static str])],
    help: &'static str,
) -> Metric {
    Metric { name, shape, of, labels, help }
}

const PRODUCER: Option<Program> = Some(Program::Producer);
const WORKER: Option<Program> = Some(Program::Worker);

/// How a run can end, as `tasklane_tasks_settled_total` says it.
pub const SETTLED: &[&str] = &["completed", "retried", "snoozed", "interrupted", "cancelled", "discarded"];

/// Every metric of both programs.
pub const METRICS: &[Metric] = &[
    metric(Gauge, None, "tasklane_build_info", &[("program", &[]), ("version", &[])], "1; the labels say what runs."),
    metric(Counter, PRODUCER, "tasklane_tasks_submitted_total", &[("queue", &["default"])], "Tasks recorded."),
    metric(
        Counter,
        PRODUCER,
        "tasklane_submissions_refused_total",
        &[("queue", &["default"])],
        "Submissions that a full queue refused.",
    ),
    metric(
        Counter,
        PRODUCER,
        "tasklane_cancellations_total",
        &[("answer", &["cancelled", "requested"])],
        "Tasks cancelled while they waited, and runs that were asked to end.",
    ),
    metric(Counter, PRODUCER, "tasklane_idempotent_replays_total", &[], "Submissions that repeated an earlier one."),
    metric(
        Counter,
        PRODUCER,
        "tasklane_unique_conflicts_total",
        &[],
        "Submitted tasks that were refused because another held their unique key.",
    ),
    metric(
        Counter,
        PRODUCER,
        "tasklane_http_requests_total",
        &[("method", &[]), ("route", &[]), ("status", &[])],
        "HTTP requests answered.",
    ),
    metric(
        Histogram,
        PRODUCER,
        "tasklane_http_request_seconds",
        &[("method", &[]), ("route", &[])],
        "How long HTTP requests took, waits for tasks included.",
    ),
    metric(
        Gauge,
        PRODUCER,
        "tasklane_queue_tasks",
        &[("queue", &[]), ("state", &[])],
        "Tasks of a queue by state, in the ledger.",
    ),
    metric(
        Gauge,
        PRODUCER,
        "tasklane_queue_oldest_seconds",
        &[("queue", &[])],
        "For how long the longest-waiting task of a queue has been able to start; 0 when none waits.",
    ),
    metric(Gauge, PRODUCER, "tasklane_queue_workers", &[("queue", &[])], "Live workers that consume a queue."),
    metric(Gauge, PRODUCER, "tasklane_workers", &[], "Live workers."),
    metric(Gauge, PRODUCER, "tasklane_worker_slots", &[], "How many tasks all live workers can run at once."),
    metric(Gauge, PRODUCER, "tasklane_ledger_seen_seconds", &[], "How old the figures from the ledger are."),
    metric(Gauge, WORKER, "tasklane_slots", &[], "How many tasks this worker runs at once."),
    metric(Gauge, WORKER, "tasklane_running", &[], "How many tasks this worker runs now."),
    metric(
        Counter,
        None,
        "tasklane_publications_total",
        &[("outcome", &["confirmed", "refused", "unknown"])],
        "Messages offered to the broker.",
    ),
    metric(
        Counter,
        None,
        "tasklane_schedule_ticks_total",
        &[("schedule", &[]), ("outcome", &[])],
        "Ticks of schedules.",
    ),
    metric(
        Counter,
        None,
        "tasklane_groups_closed_total",
        &[],
        "Batches whose tasks have all ended and that had a follower.",
    ),
    metric(
        Counter,
        None,
        "tasklane_relayed_total",
        &[],
        "Tasks that a relay published: delayed, retried, or missed at first.",
    ),
    metric(Counter, None, "tasklane_events_published_total", &[], "Events published."),
    metric(Counter, None, "tasklane_events_dropped_total", &[], "Events for which there was no room or no broker."),
    metric(Counter, None, "tasklane_released_total", &[], "Tasks that a limit held and has let go."),
    metric(Counter, None, "tasklane_stranded_total", &[], "Tasks whose message the broker had lost."),
    metric(
        Gauge,
        WORKER,
        "tasklane_worker_stalled",
        &[("queue", &[])],
        "1 while messages of a queue are ready, the worker has room, and none is delivered to it.",
    ),
    metric(
        Counter,
        None,
        "tasklane_broker_reconnects_total",
        &[("role", &["publisher", "completions", "consumer", "events"])],
        "Broker connections that had to be made again.",
    ),
    metric(Histogram, WORKER, "tasklane_task_wait_seconds", &[("kind", &[])], "From due to claimed."),
    metric(Histogram, WORKER, "tasklane_task_run_seconds", &[("kind", &[])], "Runs of handlers."),
    metric(Counter, WORKER, "tasklane_tasks_settled_total", &[("kind", &[]), ("outcome", &[])], "Runs that ended."),
    metric(
        Counter,
        WORKER,
        "tasklane_claims_refused_total",
        &[(
            "reason",
            &[
                "finished",
                "held",
                "not_due",
                "unknown",
                "lease_lost",
                "no_handler",
                "no_room",
                "paused",
                "outdated",
                "wrong_kind",
                "wrong_fence",
                "wrong_args",
                "suspect",
                "limited",
                "other_ledger",
            ],
        )],
        "Deliveries that led to no run.",
    ),
    metric(
        Counter,
        WORKER,
        "tasklane_not_started_total",
        &[],
        "Tasks given back without an attempt, since no process, descriptor or memory was left to start them with.",
    ),
    metric(
        Counter,
        WORKER,
        "tasklane_results_fenced_total",
        &[],
        "Results refused because somebody else held the task.",
    ),
    metric(
        Counter,
        None,
        "tasklane_rescued_total",
        &[("outcome", &["retried", "interrupted", "poison", "exhausted", "cancelled", "stood_still"])],
        "Tasks taken over from dead workers.",
    ),
    metric(
        Counter,
        WORKER,
        "tasklane_strays_total",
        &[],
        "Tasks that a worker gave back because the ledger had them running there and no answer had said so.",
    ),
    metric(Counter, WORKER, "tasklane_dead_letters_total", &[("reason", &[])], "Messages that were no tasks."),
    metric(Counter, None, "tasklane_pruned_total", &[], "Finished tasks forgotten."),
    metric(Counter, None, "tasklane_results_expired_total", &[], "Results cleared by their result_ttl_ms."),
    metric(Counter, None, "tasklane_spans_total", &[("outcome", &["sent", "lost"])], "Spans of traces."),
    metric(Histogram, None, "tasklane_ledger_batch_writes", &[("ledger", &[])], "Writes that shared a commit."),
];

/// Describes the metrics of a program, and begins what can be begun.
pub(super) fn begin(program: Program) {
    for metric in METRICS.iter().filter(|metric| metric.of.is_none_or(|of| of == program)) {
        match metric.shape {
            Shape::Counter => describe_counter!(metric.name, metric.help),
            Shape::Gauge => describe_gauge!(metric.name, metric.help),
            Shape::Histogram => describe_histogram!(metric.name, metric.help),
        }
        if metric.shape == Shape::Counter {
            for labels in metric.first_series() {
                counter!(metric.name, labels).increment(0);
            }
        }
    }
    let name = match program {
        Program::Producer => "producer",
        Program::Worker => "worker",
    };
    gauge!("tasklane_build_info", "program" => name, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

impl Metric {
    /// The labels of the series that are known beforehand.
    fn first_series(&self) -> Vec<Vec<Label>> {
        match self.labels {
            [] => vec![Vec::new()],
            [(label, values)] => values.iter().map(|value| vec![Label::from_static_parts(label, value)]).collect(),
            _ => Vec::new(),
        }
    }
}
