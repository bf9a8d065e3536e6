//! Notices a consumer that is stuck: messages are ready, there is room, and nothing is delivered.
//!
//! A connection and a channel that are up prove nothing. RabbitMQ hands a ready message to a free consumer at once, so
//! one that gets nothing for a while is broken, on whichever side: it is made anew, first alone, then with its whole
//! connection, and until something is delivered the worker is not ready.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lapin::Connection;
use tasklane_common::broker::{self, BrokerError, Depth};
use tasklane_common::task::{Lane, QueueName};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::life::Life;

/// How often the broker is asked what is ready: four looks, and with them the verdict, take less than 30 s.
const PERIOD: Duration = Duration::from_secs(5);
/// After so many looks in a row the consumer is made anew: it may have been begun while there was less room.
const REFRESH_AT: u32 = 2;
/// After so many it is stuck. Looks are counted, not seconds, so that a frozen process accuses nobody when it goes on.
const STUCK_AT: u32 = 4;

/// The signs of life of one lane's consumer.
#[derive(Debug, Default)]
pub struct Pulse {
    delivered: AtomicU64,
    /// Asks for a new consumer on the same channel.
    pub refresh: Notify,
}

impl Pulse {
    /// Notes that something was delivered.
    pub fn beat(&self) {
        self.delivered.fetch_add(1, Ordering::Relaxed);
    }
}

/// The lanes whose messages do not reach this worker.
#[derive(Debug, Default)]
pub struct Stalled(Mutex<BTreeSet<Lane>>);

impl Stalled {
    /// The queue of one of them, if there are any.
    pub fn any(&self) -> Option<QueueName> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).first().map(|lane| lane.queue.clone())
    }

    fn set(&self, lane: &Lane, stalled: bool) {
        let mut lanes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = if stalled { lanes.insert(lane.clone()) } else { lanes.remove(lane) };
        let queue = &lane.queue;
        let stalled = lanes.iter().any(|lane| lane.queue == *queue);
        metrics::gauge!("tasklane_worker_stalled", "queue" => queue.to_string()).set(if stalled { 1.0 } else { 0.0 });
    }
}

/// What one look at a queue has seen.
#[derive(Debug, Clone, Copy)]
struct Look {
    ready: u32,
    room: bool,
    delivered: u64,
}

/// What follows from the looks so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Nothing waits, or it could not be taken, or something came.
    Fine,
    /// Something waits; it may be on its way.
    Open,
    /// A new consumer may help.
    Refresh,
    /// Only a new connection may help.
    Stuck,
}

/// The looks in a row that found messages ready, room for them, and none delivered.
#[derive(Debug, Default)]
struct Suspicion {
    looks: u32,
    delivered: u64,
}

impl Suspicion {
    fn judge(&mut self, look: Look) -> Verdict {
        let came = look.delivered != self.delivered;
        self.delivered = look.delivered;
        if came || look.ready == 0 || !look.room {
            self.looks = 0;
            return Verdict::Fine;
        }
        self.looks += 1;
        match self.looks {
            REFRESH_AT => Verdict::Refresh,
            looks if looks >= STUCK_AT => Verdict::Stuck,
            _ => Verdict::Open,
        }
    }
}

/// Looks after the consumers of one generation until one of them is stuck.
pub async fn watch(life: &Life, connection: &Connection, lanes: &[Lane], pulses: &[Pulse]) -> BrokerError {
    let mut suspicions: Vec<_> = lanes.iter().map(|_| Suspicion::default()).collect();
    let mut period = interval_at(Instant::now() + PERIOD, PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let consumed: Vec<Lane> = lanes.iter().filter(|lane| life.stats.lanes.wait(lane).is_none()).cloned().collect();
        let depths = match broker::depths(connection, &consumed).await {
            Ok(depths) => depths,
            Err(error) => {
                // Whether the connection is good is for heartbeats and consumers to say.
                tracing::debug!(%error, "what is ready in the queues is not known");
                continue;
            }
        };
        for ((lane, pulse), suspicion) in lanes.iter().zip(pulses).zip(&mut suspicions) {
            // No answer for a lane is no evidence, for or against.
            let Some(Depth { ready, .. }) = depths.get(lane).copied() else { continue };
            // A paused queue has no consumer here: nothing is missed.
            let room = life.permits.available() > 0 && !life.pauses.has(&lane.queue);
            let delivered = pulse.delivered.load(Ordering::Relaxed);
            match suspicion.judge(Look { ready, room, delivered }) {
                Verdict::Fine => life.stats.stalled.set(lane, false),
                Verdict::Open => {}
                Verdict::Refresh => pulse.refresh.notify_one(),
                Verdict::Stuck => {
                    life.stats.stalled.set(lane, true);
                    tracing::warn!(queue = %lane, ready, "messages are ready and there is room, but none is delivered: connecting anew");
                    return BrokerError::Ended("the consumer is stuck");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITING: Look = Look { ready: 3, room: true, delivered: 0 };

    fn verdicts(looks: &[Look]) -> Vec<Verdict> {
        let mut suspicion = Suspicion::default();
        looks.iter().map(|look| suspicion.judge(*look)).collect()
    }

    #[test]
    fn what_waits_for_four_looks_is_stuck() {
        use Verdict::{Open, Refresh, Stuck};
        assert_eq!(verdicts(&[WAITING; 5]), [Open, Refresh, Open, Stuck, Stuck]);
    }

    #[test]
    fn a_delivery_an_empty_queue_or_no_room_clear_the_suspicion() {
        for clear in [Look { delivered: 1, ..WAITING }, Look { ready: 0, ..WAITING }, Look { room: false, ..WAITING }] {
            let after = Look { delivered: clear.delivered, ..WAITING };
            let seen = verdicts(&[WAITING, WAITING, WAITING, clear, after, after, after]);
            assert_eq!(seen[3], Verdict::Fine, "{clear:?}");
            assert!(!seen.contains(&Verdict::Stuck), "{clear:?}: {seen:?}");
        }
    }

    #[test]
    fn a_verdict_takes_less_than_30_s() {
        // The stall may begin just behind a look.
        assert!(PERIOD * (STUCK_AT + 1) < Duration::from_secs(30));
    }
}
