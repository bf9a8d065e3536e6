//! Gauges of what waits and who works, from the ledger: looked at when somebody asks for the metrics, and not more often
//! than every few seconds, whoever asks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use metrics::gauge;
use tasklane_common::ledger::{LedgerError, QueueCounts, Worker};
use tasklane_common::state::State;
use tokio::time::{Instant, timeout};

use crate::app::App;

/// How old the figures may be.
const AGE_MAX: Duration = Duration::from_secs(10);

/// How long a scrape waits for the ledger; then it gets the figures of before.
const LOOK_TIME_MAX: Duration = Duration::from_secs(3);

/// What the gauges were set to last.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    /// One look at a time: scrapes that come meanwhile do without.
    looking: tokio::sync::Mutex<Option<Instant>>,
    /// The labels of queues that have series.
    labels: Mutex<BTreeSet<String>>,
}

/// One queue's gauges, or those of all that share a label.
#[derive(Debug, Default)]
struct Figures {
    counts: BTreeMap<State, u64>,
    oldest: Duration,
    workers: u32,
}

/// Brings the gauges up to date, if they are too old and the ledger answers.
pub(crate) async fn refresh(app: &App) {
    let backlog = &app.backlog;
    let Ok(mut looked_at) = backlog.looking.try_lock() else { return };
    if looked_at.is_none_or(|at| at.elapsed() >= AGE_MAX)
        && let Ok(Ok((queues, workers))) = timeout(LOOK_TIME_MAX, look(app)).await
    {
        backlog.set(app, queues, &workers);
        *looked_at = Some(Instant::now());
    }
    if let Some(at) = *looked_at {
        gauge!("tasklane_ledger_seen_seconds").set(at.elapsed().as_secs_f64());
    }
}

async fn look(app: &App) -> Result<(Vec<QueueCounts>, Vec<Worker>), LedgerError> {
    // Not through the gate: a late look says nothing of whether submissions can be recorded.
    Ok((app.gate.ledger().queues().await?, app.gate.ledger().workers().await?))
}

impl Backlog {
    fn set(&self, app: &App, queues: Vec<QueueCounts>, workers: &[Worker]) {
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        // A queue that has emptied is told once more.
        let mut figures: BTreeMap<_, Figures> =
            labels.iter().map(|label| (label.clone(), Figures::default())).collect();
        for queue in queues {
            let of_label = figures.entry(app.queue_labels.of(&queue.queue)).or_default();
            for (state, count) in queue.counts {
                *of_label.counts.entry(state).or_default() += count;
            }
            of_label.oldest = of_label.oldest.max(queue.oldest_waiting.unwrap_or_default());
        }
        for queue in workers.iter().flat_map(|worker| worker.queues.iter().collect::<BTreeSet<_>>()) {
            figures.entry(app.queue_labels.of(queue)).or_default().workers += 1;
        }
        for (label, Figures { counts, oldest, workers }) in figures {
            for state in State::ALL.into_iter().filter(|state| *state != State::Completed) {
                let count = counts.get(&state).copied().unwrap_or_default();
                gauge!("tasklane_queue_tasks", "queue" => label.clone(), "state" => state.as_str()).set(count as f64);
            }
            gauge!("tasklane_queue_oldest_seconds", "queue" => label.clone()).set(oldest.as_secs_f64());
            gauge!("tasklane_queue_workers", "queue" => label.clone()).set(f64::from(workers));
            labels.insert(label);
        }
        gauge!("tasklane_workers").set(workers.len() as f64);
        gauge!("tasklane_worker_slots").set(workers.iter().map(|worker| f64::from(worker.concurrency)).sum::<f64>());
    }
}
