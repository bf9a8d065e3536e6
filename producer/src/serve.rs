//! The producer's life: from its settings to the word why it stopped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use secrecy::ExposeSecret;
use tasklane_common::completion::Completions;
use tasklane_common::events::Events;
use tasklane_common::events::feed::Feed;
use tasklane_common::ledger::{self, LedgerError};
use tasklane_common::maintenance;
use tasklane_common::publisher::Publisher;
use tasklane_common::telemetry::Metrics;
use tasklane_common::vital;
use tasklane_common::web::{files, listener};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::app::{App, Parts};
use crate::config::Settings;
use crate::{intake, router};

/// How many connections there may be, where the limit of open files allows it.
const CONNECTIONS_MAX: usize = 16_384;
/// How long the loops in the background may take to end.
const LOOPS_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the producer did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Nothing can be accepted without a ledger.
    #[error("cannot open the ledger: {0}")]
    Ledger(#[from] LedgerError),
    /// The address is taken, or not this machine's.
    #[error("cannot listen on http_addr {addr}: {source}; if it is taken, give another with --http-addr")]
    Listen {
        /// The setting.
        addr: String,
        /// Why.
        source: std::io::Error,
    },
}

/// What one run of the producer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSummary {
    /// Requests answered.
    pub requests: u64,
    /// Tasks recorded.
    pub tasks: u64,
    /// Whether everything under way was finished within the grace.
    pub all_finished: bool,
}

/// Serves the API until `shutdown` resolves, then finishes what is under way within the settings' grace.
///
/// A broker that is away keeps nothing from starting: it is looked for in the background.
///
/// # Errors
/// [`StartError`] when the ledger or the address cannot be had.
pub async fn run(
    settings: Settings,
    metrics: Metrics,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<StopSummary, StartError> {
    let listen_error = |source| StartError::Listen { addr: settings.http_addr.clone(), source };
    let listener = TcpListener::bind(&settings.http_addr).await.map_err(listen_error)?;
    let addr = listener.local_addr().map_err(listen_error)?;
    let ledger = ledger::open(settings.common.ledger_url.expose_secret()).await?;
    tracing::info!(ledger = ledger.place(), id = %ledger.id(), "the ledger is open");
    if let Some(limits) = &settings.limits {
        ledger.adopt_limits(limits.clone()).await?;
    }
    // Every process prunes, and reads it there.
    if let Some(queues) = &settings.queue_retention
        && ledger.set_retention(queues.clone()).await?
    {
        tracing::info!(?queues, "the retention of queues was changed");
    }

    let background = CancellationToken::new();
    // Whichever way this function is left, nothing stays behind in the background.
    let _background = background.clone().drop_guard();
    let publisher =
        Publisher::spawn(&settings.common.amqp_url, ledger.clone(), settings.common.bundle(), background.clone());
    let completions = Completions::spawn(&settings.common.amqp_url, background.clone());
    let events = Events::spawn(publisher.clone());
    let feed = Feed::spawn(&settings.common.amqp_url, publisher.clone(), events.clone(), background.clone());
    let nudges = Arc::default();
    let parts = maintenance::Parts { ledger: &ledger, publisher: &publisher, events: &events, nudges: &nudges };
    let loops = maintenance::spawn(parts, &settings.common, &background);
    vital::spawn("events listener", {
        let (events, publisher, background) = (events.clone(), publisher.clone(), background.clone());
        async move { events.listen(publisher, background).await }
    });
    let upkeep = vital::spawn("metrics", metrics.clone().upkeep());
    let rules = settings.rules.clone();
    let hosts = settings.common.http_hosts.clone().at(&settings.http_addr);
    let app = App::new(Parts { ledger, publisher, completions, events, feed, metrics, rules, hosts });
    let looks = vital::spawn("intake", intake::run(Arc::clone(&app), background.clone()));
    let router = router::router(Arc::clone(&app));
    let connections = files::clients_here(files::RESERVE, CONNECTIONS_MAX);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), connections, "listening on http://{addr}");

    let grace = Duration::from_millis(settings.common.shutdown_grace_ms);
    let stop = async {
        shutdown.await;
        app.stopping.cancel();
        Instant::now() + grace
    };
    let (served, deadline) = tokio::join!(listener::serve(listener, router, connections, &app.stopping, grace), stop);
    let all_finished = finish(&app, served, deadline).await;
    background.cancel();
    let _ = timeout(LOOPS_TIMEOUT, loops.wait()).await;
    upkeep.abort();
    looks.abort();
    let (requests, tasks) = (app.tally.requests.load(Ordering::Relaxed), app.tally.tasks.load(Ordering::Relaxed));
    Ok(StopSummary { requests, tasks, all_finished })
}

/// Waits for recordings whose client has gone, and for the publications under way.
async fn finish(app: &App, served: bool, deadline: Instant) -> bool {
    app.recordings.close();
    let recorded = timeout(left(deadline), app.recordings.wait()).await.is_ok();
    app.publisher.drain(left(deadline)).await;
    served && recorded
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
