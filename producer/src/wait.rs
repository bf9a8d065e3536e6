//! Waits for the end of a task on a client's behalf: told by a notice where there is one, else by looking.

use std::sync::Arc;
use std::time::Duration;

use tasklane_common::completion::Watch;
use tasklane_common::task::{Task, TaskId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

use crate::app::App;
use crate::error::ApiError;
use crate::extract::Params;

/// The longest `wait_ms`.
pub const WAIT_MS_MAX: u32 = 60_000;
/// How many clients may wait at once.
const WAITING_MAX: usize = 10_000;

/// How often to look when a notice is expected; it may get lost.
const WITH_NOTICE: Pace = Pace { next: Duration::from_millis(100), slowest: Duration::from_millis(500) };
/// How often to look when no notice will come.
const WITHOUT_NOTICE: Pace = Pace { next: Duration::from_millis(20), slowest: Duration::from_millis(250) };

/// The places for waiting clients.
#[derive(Debug)]
pub struct Waits(Arc<Semaphore>);

/// A client that waits, until then. Made before the task is published, so that no notice is missed.
#[derive(Debug)]
pub(crate) struct Wait {
    until: Instant,
    watch: Option<Watch>,
    _place: OwnedSemaphorePermit,
}

/// Looks again after a growing time.
#[derive(Debug, Clone, Copy)]
struct Pace {
    next: Duration,
    slowest: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(WAITING_MAX)))
    }
}

/// Reads `?wait_ms=`; `None` when the client does not wait.
///
/// # Errors
/// [`ApiError::InvalidQuery`].
pub(crate) fn asked(query: Option<&str>) -> Result<Option<Duration>, ApiError> {
    let mut params = Params::parse(query, &["wait_ms"], &[]);
    let wait_ms = params.integer("wait_ms", 0, WAIT_MS_MAX);
    params.finish()?;
    Ok(wait_ms.filter(|ms| *ms > 0).map(|ms| Duration::from_millis(ms.into())))
}

impl Waits {
    /// Takes a place for a client.
    ///
    /// # Errors
    /// [`ApiError::TooManyWaiting`].
    pub(crate) fn begin(&self, time: Duration) -> Result<Wait, ApiError> {
        let place = Arc::clone(&self.0).try_acquire_owned().map_err(|_| ApiError::TooManyWaiting)?;
        Ok(Wait { until: Instant::now() + time, watch: None, _place: place })
    }
}

impl Wait {
    /// Expects a notice about a task that is about to be published; returns where it shall go.
    pub(crate) fn expect_notice(&mut self, app: &App, id: TaskId) -> Option<String> {
        let reply_to = app.completions.reply_to()?;
        self.watch = Some(app.completions.watch(id));
        Some(reply_to)
    }

    /// Expects no notice: the task was published before.
    pub(crate) fn expect_nothing(&mut self) {
        self.watch = None;
    }

    /// The task when it has ended, or when the time is over, or when the producer stops.
    ///
    /// # Errors
    /// [`ApiError::UnknownTask`] when it is gone, or what [`crate::gate::Gate::ask`] says.
    pub(crate) async fn end_of(mut self, app: &App, id: TaskId) -> Result<Task, ApiError> {
        let mut pace = if self.watch.is_some() { WITH_NOTICE } else { WITHOUT_NOTICE };
        loop {
            let look_at = Instant::now() + pace.step();
            let last = tokio::select! {
                () = noticed(&mut self.watch) => {
                    // Looked at once for it; from here on only the clock decides, or a stray notice would spin.
                    self.watch = None;
                    false
                }
                () = sleep_until(look_at.min(self.until)) => Instant::now() >= self.until,
                () = app.stopping.cancelled() => true,
            };
            if last || has_ended(app, id).await? {
                return find(app, id).await;
            }
        }
    }
}

/// Whether a task has ended: asked again and again, so that it must not read what may be large.
async fn has_ended(app: &App, id: TaskId) -> Result<bool, ApiError> {
    let found = app.gate.look(app.gate.ledger().states(vec![id])).await?;
    // Of one that is gone, the last look says so.
    Ok(found.first().is_none_or(|(_, state)| state.is_final()))
}

/// One task from the ledger.
///
/// # Errors
/// [`ApiError::UnknownTask`], or what [`crate::gate::Gate::ask`] says.
pub(crate) async fn find(app: &App, id: TaskId) -> Result<Task, ApiError> {
    let found = app.gate.look(app.gate.ledger().get(vec![id])).await?;
    found.into_iter().next().ok_or_else(|| ApiError::UnknownTask(id.to_string()))
}

async fn noticed(watch: &mut Option<Watch>) {
    match watch {
        Some(watch) => watch.ended().await,
        None => std::future::pending().await,
    }
}

impl Pace {
    fn step(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.slowest);
        step
    }
}
