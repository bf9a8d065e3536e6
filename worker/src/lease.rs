//! The worker's lease: renewed in time, and given up in time.
//!
//! On this side a lease ends by a clock that counts suspend, measured from *before* its renewal was sent, so it ends
//! here no later than in the ledger. A plain thread watches it, since a handler may have blocked the runtime: well
//! before another worker could take over it stops everything, and if something cannot be stopped, it ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tasklane_common::clock::since_boot;
use tasklane_common::ledger::{Renewal, Renewed, complain};
use tasklane_common::task::WorkerId;
use tasklane_common::vital;
use tokio_util::sync::CancellationToken;

use crate::life::Life;

/// The exit code when a lease was lost and a handler could not be stopped.
pub const EXIT_UNSTOPPABLE: i32 = 75;

/// How often the watchdog looks.
const WATCH_PERIOD: Duration = Duration::from_millis(20);
/// What handlers get to end at least, even if the lease was lost unexpectedly, as after SIGSTOP.
const STOP_MIN: Duration = Duration::from_millis(500);

/// One worker's lease; clones share it.
#[derive(Debug, Clone)]
pub struct Lease(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    worker: WorkerId,
    ttl: Duration,
    /// Milliseconds since boot at which the ledger may have let the lease end.
    ends_at: AtomicU64,
    lost: CancellationToken,
    running: AtomicUsize,
}

/// Counts a handler as running until it is dropped.
#[derive(Debug)]
pub struct RunGuard(Lease);

impl Lease {
    /// A lease that was asked for at `sent_at`.
    #[must_use]
    pub fn new(worker: WorkerId, ttl: Duration, sent_at: Duration) -> Self {
        let inner = Inner {
            worker,
            ttl,
            ends_at: AtomicU64::new(0),
            lost: CancellationToken::new(),
            running: AtomicUsize::new(0),
        };
        let lease = Self(Arc::new(inner));
        lease.extend(sent_at);
        lease
    }

    /// Whose it is.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        self.0.worker
    }

    /// Is cancelled when the lease cannot be proven any more.
    #[must_use]
    pub fn lost(&self) -> &CancellationToken {
        &self.0.lost
    }

    /// How many handlers are running.
    #[must_use]
    pub fn running(&self) -> usize {
        self.0.running.load(Ordering::Acquire)
    }

    /// Counts a handler in, or refuses because the lease is not safe any more.
    #[must_use]
    pub fn start_run(&self) -> Option<RunGuard> {
        // Counted and checked once more: the watchdog cannot miss a run that begins while the lease is lost.
        if !self.is_held() {
            return None;
        }
        self.0.running.fetch_add(1, Ordering::AcqRel);
        let guard = RunGuard(self.clone());
        self.is_held().then_some(guard)
    }

    /// Whether it can still be proven, by the clock and not by what somebody has noticed yet: a process that was stopped
    /// may see its commands' ends before its watchdog has looked again.
    #[must_use]
    pub fn is_held(&self) -> bool {
        !self.0.lost.is_cancelled() && since_boot() < self.stop_at()
    }

    /// Takes a renewal's answer. One that comes too late renews nothing: commands may have been killed meanwhile.
    fn renewed(&self, sent_at: Duration) {
        if self.is_held() {
            self.extend(sent_at);
        } else {
            self.0.lost.cancel();
        }
    }

    fn extend(&self, sent_at: Duration) {
        let ends_at = u64::try_from((sent_at + self.0.ttl).as_millis()).unwrap_or(u64::MAX);
        self.0.ends_at.fetch_max(ends_at, Ordering::AcqRel);
    }

    fn ends_at(&self) -> Duration {
        Duration::from_millis(self.0.ends_at.load(Ordering::Acquire))
    }

    /// When handlers are stopped: a fifth of the ttl before the end.
    fn stop_at(&self) -> Duration {
        self.ends_at().saturating_sub(self.0.ttl / 5)
    }

    /// When the process ends itself if some handler still runs: a twentieth of the ttl before the end.
    fn exit_at(&self) -> Duration {
        self.ends_at().saturating_sub(self.0.ttl / 20)
    }
}

impl Drop for RunGuard {
    fn drop(&mut self) {
        self.0.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Renews the lease until it is lost or `ended`; one failed renewal is not the end, its time being over is.
pub async fn renew(life: &Life, period: Duration, ended: &CancellationToken) {
    let lease = &life.lease;
    let mut pause = period;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = lease.lost().cancelled() => return,
            () = ended.cancelled() => return,
        }
        metrics::gauge!("tasklane_slots").set(f64::from(life.settings.concurrency));
        metrics::gauge!("tasklane_running").set(lease.running() as f64);
        let renewal = Renewal {
            worker: lease.worker(),
            ttl: lease.0.ttl,
            running: i32::try_from(lease.running()).unwrap_or(i32::MAX),
            heads: life.take_heads(),
        };
        let sent_at = since_boot();
        pause = match life.ledger.renew(renewal).await {
            Ok(Renewed::Held) => {
                lease.renewed(sent_at);
                period
            }
            Ok(Renewed::Lost) => {
                tracing::error!(worker.id = %lease.worker(), "the ledger says that the lease has ended: stopping all tasks");
                lease.lost().cancel();
                return;
            }
            Err(error) => {
                complain(&error, "the lease could not be renewed, trying again");
                period / 4
            }
        };
    }
}

/// Starts the thread that gives the lease up in time. `aim` answers what kills, when called, what now runs beside the
/// runtime: child processes. Those of the next lease may begin before the thread sees that this one's runs have ended.
/// `prove` hears how long the lease is good for, at once and after every renewal: when this process is stopped as a
/// whole, by SIGSTOP, something else must stop them.
///
/// # Errors
/// When the thread cannot be started.
pub fn watch<K: FnOnce()>(
    lease: Lease,
    ended: CancellationToken,
    prove: impl Fn(Duration) + Send + 'static,
    aim: impl Fn() -> K + Send + 'static,
) -> std::io::Result<()> {
    let mut proven = lease.ends_at();
    // Before the first task can start.
    prove(proven.saturating_sub(since_boot()));
    std::thread::Builder::new().name("lease-watchdog".to_owned()).spawn(move || {
        vital::run_thread("lease watchdog", || {
            while !ended.is_cancelled() {
                if lease.lost().is_cancelled() || since_boot() >= lease.stop_at() {
                    return give_up(&lease, &aim);
                }
                if lease.ends_at() > proven {
                    proven = lease.ends_at();
                    prove(proven.saturating_sub(since_boot()));
                }
                std::thread::sleep(WATCH_PERIOD);
            }
        });
    })?;
    Ok(())
}

fn give_up<K: FnOnce()>(lease: &Lease, aim: &impl Fn() -> K) {
    let worker = lease.worker();
    tracing::error!(worker.id = %worker, running = lease.running(), "the lease cannot be proven any more: stopping all tasks");
    lease.lost().cancel();
    let exit_at = lease.exit_at().max(since_boot() + STOP_MIN);
    loop {
        // Before the look: as long as one of this lease's runs goes on, none of the next has begun.
        let kill = aim();
        match lease.running() {
            // What runs from now on belongs to the next lease.
            0 => return,
            running if since_boot() >= exit_at => {
                tracing::error!(worker.id = %worker, running, "handlers could not be stopped: this process ends itself before others run their tasks");
                kill();
                std::process::exit(EXIT_UNSTOPPABLE);
            }
            _ => {
                // Again and again: a handler may start another child before its future is dropped.
                kill();
                std::thread::sleep(WATCH_PERIOD);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_run_starts_when_the_lease_is_not_safe() {
        let ttl = Duration::from_secs(10);
        let fresh = Lease::new(WorkerId::new(), ttl, since_boot());
        let guard = fresh.start_run().expect("a fresh lease is safe");
        assert_eq!(fresh.running(), 1);
        drop(guard);
        assert_eq!(fresh.running(), 0);

        let stale = Lease::new(WorkerId::new(), ttl, since_boot() - Duration::from_secs(9));
        assert!(stale.start_run().is_none(), "9 s of 10 are over: too late to start");
        assert_eq!(stale.running(), 0);

        fresh.lost().cancel();
        assert!(fresh.start_run().is_none());
    }

    #[test]
    fn what_is_over_by_the_clock_is_lost_before_anybody_has_noticed() {
        let ttl = Duration::from_secs(10);
        let held = Lease::new(WorkerId::new(), ttl, since_boot() - Duration::from_secs(5));
        assert!(held.is_held());
        held.renewed(since_boot());
        assert!(held.ends_at() > since_boot() + Duration::from_secs(9), "it was renewed in time");

        let stopped = Lease::new(WorkerId::new(), ttl, since_boot() - Duration::from_secs(9));
        assert!(!stopped.is_held() && !stopped.lost().is_cancelled());
        stopped.renewed(since_boot());
        assert!(!stopped.is_held() && stopped.lost().is_cancelled(), "the answer came too late");
    }

    #[test]
    fn the_watchdog_gives_the_lease_up_before_it_ends() {
        let sent_at = since_boot();
        let lease = Lease::new(WorkerId::new(), Duration::from_secs(1), sent_at);
        let run = lease.start_run().expect("the lease is held");
        let (killed, kills) = std::sync::mpsc::channel();
        let (proved, proofs) = std::sync::mpsc::channel();
        let prove = move |remaining| proved.send(remaining).unwrap();
        watch(lease.clone(), CancellationToken::new(), prove, move || {
            let killed = killed.clone();
            move || {
                let _ = killed.send(since_boot());
            }
        })
        .unwrap();
        let remaining = proofs.try_recv().expect("it is proven from the beginning");
        assert!(remaining <= Duration::from_secs(1) && remaining > Duration::from_millis(800), "{remaining:?}");
        let killed_at = kills.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(lease.lost().is_cancelled());
        let after = killed_at - sent_at;
        assert!(after >= Duration::from_millis(780), "given up too early: {after:?}");
        assert!(after < Duration::from_secs(1), "given up too late: {after:?}");

        // The next lease's runs are not this one's to kill.
        drop(run);
        while kills.recv_timeout(Duration::from_secs(60)).is_ok() {}
    }
}
