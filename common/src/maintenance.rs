//! The loops that every process runs, so that any one of them that is up keeps the whole going.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Common;
use crate::events::Events;
use crate::ledger::SharedLedger;
use crate::publisher::Publisher;
use crate::release::{self, Nudges};
use crate::{gather, prune, reconcile, relay, rescue, ticker, vital};

/// What the loops work with.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'p> {
    /// Decides.
    pub ledger: &'p SharedLedger,
    /// Takes what is due to the broker.
    pub publisher: &'p Publisher,
    /// Tells whoever looks of what the loops do to tasks.
    pub events: &'p Events,
    /// Wakes them.
    pub nudges: &'p Arc<Nudges>,
}

/// Starts [`relay`], [`ticker`], [`gather`], [`rescue`], [`reconcile`], [`release`] and [`prune`]; the tracker waits for them after the shutdown.
#[must_use]
pub fn spawn(parts: Parts<'_>, settings: &Common, shutdown: &CancellationToken) -> TaskTracker {
    let Parts { ledger, publisher, events, nudges } = parts;
    let loops = TaskTracker::new();
    loops.spawn(vital::run(
        "relay",
        relay::run(ledger.clone(), publisher.clone(), Arc::clone(nudges), shutdown.clone()),
    ));
    loops.spawn(vital::run("ticker", ticker::run(ledger.clone(), events.clone(), shutdown.clone())));
    loops.spawn(vital::run("gather", gather::run(ledger.clone(), events.clone(), shutdown.clone())));
    loops.spawn(vital::run(
        "rescue",
        rescue::run(ledger.clone(), events.clone(), settings.max_crashes, shutdown.clone()),
    ));
    loops.spawn(vital::run("reconcile", reconcile::run(ledger.clone(), publisher.clone(), shutdown.clone())));
    loops.spawn(vital::run("release", release::run(ledger.clone(), Arc::clone(nudges), shutdown.clone())));
    loops.spawn(vital::run(
        "prune",
        prune::run(ledger.clone(), Duration::from_millis(settings.retention_ms), shutdown.clone()),
    ));
    loops.close();
    loops
}
