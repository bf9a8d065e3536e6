//! The worker as a whole: life after life, until it is told to stop.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tasklane_common::clock::{hostname, since_boot};
use tasklane_common::events::Events;
use tasklane_common::ledger::{SharedLedger, WorkerRecord, complain};
use tasklane_common::maintenance;
use tasklane_common::publisher::Publisher;
use tasklane_common::release::Nudges;
use tasklane_common::task::WorkerId;
use tasklane_common::vital;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::arbiter::Arbiter;
use crate::config::Settings;
use crate::held::Held;
use crate::lease::{self, Lease};
use crate::life::{Life, Stats};
use crate::meters::Meters;
use crate::pause::Pauses;
use crate::process_group::ProcessGroups;
use crate::registry::Registry;
use crate::{audit, cancel, consume, pause, readiness};

const LEDGER_PAUSE: Duration = Duration::from_millis(500);
/// How long interrupted handlers and their outcomes get after the grace: longer than a command's SIGTERM and SIGKILL.
const INTERRUPT_LIMIT: Duration = Duration::from_secs(10);

/// How a worker is told to stop.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Take nothing new, finish what runs within the grace, interrupt the rest.
    pub gracefully: CancellationToken,
    /// Interrupt what runs at once.
    pub at_once: CancellationToken,
}

/// A worker that is ready to run.
#[derive(Debug)]
pub struct Worker {
    settings: Arc<Settings>,
    registry: Registry,
    ledger: SharedLedger,
    groups: ProcessGroups,
    stats: Arc<Stats>,
    nudges: Arc<Nudges>,
}

/// What a worker did, from start to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StopSummary {
    /// Handlers started.
    pub started: u64,
    /// Tasks completed.
    pub completed: u64,
    /// Failed attempts to be followed by another, and snoozes.
    pub retried: u64,
    /// Tasks discarded.
    pub discarded: u64,
    /// Tasks cancelled.
    pub cancelled: u64,
    /// Runs cut short by the shutdown.
    pub interrupted: u64,
    /// Results refused because somebody else held the task.
    pub fenced: u64,
    /// Handlers that had not ended when the worker did.
    pub left_running: usize,
}

impl fmt::Display for StopSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { started, completed, retried, discarded, cancelled, interrupted, fenced, left_running } = self;
        write!(
            f,
            "{started} started: {completed} completed, {retried} to be tried again, {discarded} discarded, \
             {cancelled} cancelled, {interrupted} interrupted, {fenced} fenced, {left_running} left running"
        )
    }
}

impl Worker {
    /// Puts a worker together. `settings.queues` is completed by the queues that handlers ask for.
    ///
    /// `groups` holds the child processes of its handlers; they are killed when the lease is lost.
    #[must_use]
    pub fn new(mut settings: Settings, registry: Registry, ledger: SharedLedger, groups: ProcessGroups) -> Self {
        for queue in registry.queues() {
            if !settings.queues.contains(&queue) {
                settings.queues.push(queue);
            }
        }
        Self { settings: Arc::new(settings), registry, ledger, groups, stats: Arc::default(), nudges: Arc::default() }
    }

    /// Knows whether the worker can do its work; for `/readyz`.
    #[must_use]
    pub fn readiness(&self) -> readiness::Readiness {
        readiness::Readiness { stats: Arc::clone(&self.stats), ledger: self.ledger.clone() }
    }

    /// Works until the shutdown. A lost lease ends a life, not the worker: it enters again under a new id.
    pub async fn run(self, shutdown: Shutdown) -> StopSummary {
        let background = CancellationToken::new();
        let publisher = Publisher::spawn(
            &self.settings.common.amqp_url,
            self.ledger.clone(),
            self.settings.common.bundle(),
            background.clone(),
        );
        let events = Events::spawn(publisher.clone());
        let parts =
            maintenance::Parts { ledger: &self.ledger, publisher: &publisher, events: &events, nudges: &self.nudges };
        let loops = maintenance::spawn(parts, &self.settings.common, &background);
        let mut left_running = 0;
        while !shutdown.gracefully.is_cancelled() {
            if let Some(life) = self.enter(&publisher, &events, &shutdown).await {
                left_running = self.live(Arc::new(life), &shutdown).await;
            }
        }
        publisher.drain(Duration::from_secs(5)).await;
        background.cancel();
        // The loops hold nothing that matters: what they leave, others do.
        let _ = timeout(Duration::from_secs(2), loops.wait()).await;
        self.summary(left_running)
    }

    /// Enters the ledger under a new id; tries until the ledger answers. `None` at shutdown.
    async fn enter(&self, publisher: &Publisher, events: &Events, shutdown: &Shutdown) -> Option<Life> {
        loop {
            // Every try has an id of its own: one that seemed to fail may have entered the ledger all the same.
            let record = WorkerRecord {
                id: WorkerId::new(),
                name: self.settings.name.clone(),
                host: hostname(),
                pid: std::process::id(),
                queues: self.settings.queues.clone(),
                kinds: self.registry.kinds(),
                concurrency: self.settings.concurrency.into(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            };
            let (worker, sent_at) = (record.id, since_boot());
            match self.ledger.register(record, self.settings.lease_ttl).await {
                Ok(()) => {
                    let lease = Lease::new(worker, self.settings.lease_ttl, sent_at);
                    return Some(self.begin(lease, publisher, events));
                }
                Err(error) => drop(complain(&error, "the worker cannot enter the ledger, trying again")),
            }
            tokio::select! {
                () = sleep(LEDGER_PAUSE) => {}
                () = shutdown.gracefully.cancelled() => return None,
            }
        }
    }

    fn begin(&self, lease: Lease, publisher: &Publisher, events: &Events) -> Life {
        Life {
            lease,
            registry: self.registry.clone(),
            ledger: self.ledger.clone(),
            publisher: publisher.clone(),
            events: events.clone(),
            settings: Arc::clone(&self.settings),
            meters: Meters::of(self.registry.kinds()),
            permits: Arbiter::new(self.settings.concurrency.into()),
            suspects: Arc::new(Semaphore::new(1)),
            deliveries: TaskTracker::new(),
            draining: CancellationToken::new(),
            interrupt: CancellationToken::new(),
            ended: CancellationToken::new(),
            stats: Arc::clone(&self.stats),
            held: Held::default(),
            asked: Notify::new(),
            messages_lost: Notify::new(),
            nudges: Arc::clone(&self.nudges),
            pauses: Pauses::default(),
            starved: AtomicU32::new(0),
            heads: Mutex::new(HashMap::new()),
        }
    }

    /// Lives until the lease is lost or the shutdown is done; answers how many handlers would not end.
    async fn live(&self, life: Arc<Life>, shutdown: &Shutdown) -> usize {
        let worker = life.lease.worker();
        let (proven, killed, ttl) = (self.groups.clone(), self.groups.clone(), self.settings.lease_ttl);
        let prove = move |remaining| proven.prove_lease(ttl, remaining);
        if let Err(error) = lease::watch(life.lease.clone(), life.ended.clone(), prove, move || killed.aim()) {
            tracing::error!(%error, "the lease cannot be watched");
            sleep(LEDGER_PAUSE).await;
            return 0;
        }
        tracing::info!(worker.id = %worker, concurrency = self.settings.concurrency, "the worker has entered the ledger");
        self.stats.leased.store(true, Ordering::Relaxed);
        let renewing = vital::spawn("lease", {
            let (life, period) = (Arc::clone(&life), self.settings.lease_renew);
            async move { lease::renew(&life, period, &life.ended).await }
        });
        let cancelling = vital::spawn("cancel", {
            let (life, period) = (Arc::clone(&life), self.settings.lease_renew);
            async move { cancel::watch(&life, period).await }
        });
        let auditing = vital::spawn("audit", {
            let (life, period) = (Arc::clone(&life), self.settings.lease_ttl);
            async move { audit::watch(&life, period).await }
        });
        // Known before the first consumer: it would be handed what it must give back.
        if let Err(error) = life.pauses.look(&*life.ledger).await {
            complain(&error, "the ledger does not say which queues are paused, asking again");
        }
        let pausing = vital::spawn("pause", {
            let (life, period) = (Arc::clone(&life), self.settings.lease_renew);
            async move { pause::watch(&life, period).await }
        });
        let consuming = vital::spawn("consumer", consume::run(Arc::clone(&life)));
        tokio::select! {
            () = self.groups.keep_guarded() => {}
            () = life.lease.lost().cancelled() => {}
            () = shutdown.gracefully.cancelled() => self.finish(&life, shutdown).await,
        }
        self.stats.leased.store(false, Ordering::Relaxed);
        life.draining.cancel();
        if life.lease.lost().is_cancelled() {
            // The watchdog ends the process if some handler does not stop; outcomes on their way are still offered.
            while life.lease.running() > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        } else {
            audit::finish(&life).await;
            self.retire(worker).await;
        }
        let left_running = life.lease.running();
        life.ended.cancel();
        // All end with the life.
        let _ = tokio::join!(renewing, cancelling, auditing, pausing, consuming);
        left_running
    }

    /// Takes nothing new, waits for what runs, and interrupts what does not end in time.
    async fn finish(&self, life: &Life, shutdown: &Shutdown) {
        life.draining.cancel();
        life.deliveries.close();
        let grace = Duration::from_millis(self.settings.common.shutdown_grace_ms);
        tracing::info!(running = life.lease.running(), grace_ms = grace.as_millis(), "finishing what runs");
        tokio::select! {
            () = life.deliveries.wait() => return,
            () = sleep(grace) => {}
            () = shutdown.at_once.cancelled() => {}
            () = life.lease.lost().cancelled() => return,
        }
        tracing::warn!(running = life.lease.running(), "interrupting what still runs");
        life.interrupt.cancel();
        if timeout(INTERRUPT_LIMIT, life.deliveries.wait()).await.is_err() {
            tracing::error!(running = life.lease.running(), "some handlers do not end");
        }
    }

    async fn retire(&self, worker: WorkerId) {
        if let Err(error) = self.ledger.retire(worker).await {
            complain(&error, "the lease could not be ended early, it runs out by itself");
        }
    }

    fn summary(&self, left_running: usize) -> StopSummary {
        let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let Stats { started, completed, retried, discarded, cancelled, interrupted, fenced, .. } = &*self.stats;
        StopSummary {
            started: of(started),
            completed: of(completed),
            retried: of(retried),
            discarded: of(discarded),
            cancelled: of(cancelled),
            interrupted: of(interrupted),
            fenced: of(fenced),
            left_running,
        }
    }
}
