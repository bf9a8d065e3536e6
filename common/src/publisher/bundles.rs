//! Which tasks share a message: those of one lane and kind that wait at the same time, if they are known to be short.
//!
//! A message costs the broker the same for one task as for many, and goes to one worker whole. So a bundle is never larger
//! than what one place works off within [`bundle_ms`](crate::config::Common::bundle_ms), by the mean of the kind's last
//! runs, and nothing waits for others to come.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Job;
use crate::ledger::SharedLedger;
use crate::task::{Kind, Lane, QueueName};

/// How many tasks a message may have.
const TASKS_MAX: usize = 64;
/// How many bytes of args a message of several tasks may have.
const BYTES_MAX: usize = 64 * 1024;
/// How often the run times are looked at.
const PERIOD: Duration = Duration::from_secs(2);
/// How long they are looked at after the last publication to a queue.
const MEMORY: Duration = Duration::from_secs(60);
/// Of how many queues the run times are known at most; the names are client input.
const QUEUES_MAX: usize = 64;

/// The sizes of bundles; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Bundles {
    /// How long one place may take for a bundle; zero: none are made.
    limit: Duration,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// When each queue was published to last.
    wanted: HashMap<QueueName, Instant>,
    sizes: HashMap<(QueueName, Kind), usize>,
}

impl Bundles {
    /// With a loop that keeps the sizes current, unless none are made.
    pub(super) fn spawn(limit: Duration, ledger: SharedLedger, shutdown: CancellationToken) -> Self {
        let bundles = Self { limit, known: Arc::default() };
        if !limit.is_zero() {
            crate::vital::spawn("bundles", bundles.clone().run(ledger, shutdown));
        }
        bundles
    }

    async fn run(self, ledger: SharedLedger, shutdown: CancellationToken) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = period.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let mut sizes = HashMap::new();
            for queue in self.wanted() {
                match ledger.run_times(queue.clone()).await {
                    Ok(times) => {
                        let size = |(kind, time)| ((queue.clone(), kind), size_for(self.limit, time));
                        sizes.extend(times.into_iter().map(size).filter(|(_, size)| *size > 1));
                    }
                    Err(error) => tracing::debug!(%error, %queue, "run times are not known"),
                }
            }
            self.lock().sizes = sizes;
        }
    }

    /// Puts together what may go together, in the order of the first of each.
    pub(super) fn of(&self, jobs: Vec<Job>) -> Vec<Vec<Job>> {
        if self.limit.is_zero() {
            return jobs.into_iter().map(|job| vec![job]).collect();
        }
        let (mut known, now) = (self.lock(), Instant::now());
        let mut open: BTreeMap<(Lane, Kind), Open> = BTreeMap::new();
        let mut bundles: Vec<Vec<Job>> = Vec::new();
        for job in jobs {
            let publication = &job.publication;
            let (queue, bytes) = (&publication.lane.queue, publication.args.as_str().len());
            known.want(queue, now);
            let size = known.sizes.get(&(queue.clone(), publication.kind.clone())).copied().unwrap_or(1);
            let place = (publication.lane.clone(), publication.kind.clone());
            match open.get_mut(&place).filter(|open| open.left > 0 && open.bytes + bytes <= BYTES_MAX) {
                Some(found) => {
                    found.left -= 1;
                    found.bytes += bytes;
                    bundles[found.at].push(job);
                }
                None => {
                    open.insert(place, Open { at: bundles.len(), left: size - 1, bytes });
                    bundles.push(vec![job]);
                }
            }
        }
        bundles
    }

    fn wanted(&self) -> Vec<QueueName> {
        let mut known = self.lock();
        known.wanted.retain(|_, last| last.elapsed() < MEMORY);
        known.wanted.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn want(&mut self, queue: &QueueName, now: Instant) {
        if let Some(last) = self.wanted.get_mut(queue) {
            *last = now;
        } else if self.wanted.len() < QUEUES_MAX {
            self.wanted.insert(queue.clone(), now);
        }
    }
}

/// A bundle that takes more.
struct Open {
    at: usize,
    left: usize,
    bytes: usize,
}

/// How many tasks of a kind go into a message.
fn size_for(limit: Duration, run: Duration) -> usize {
    let fit = limit.as_micros() / run.as_micros().max(1);
    usize::try_from(fit).unwrap_or(TASKS_MAX).clamp(1, TASKS_MAX)
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;
    use crate::publisher::Publication;
    use crate::task::{Fence, Json, Priority, TaskId};

    async fn job(queue: &str, kind: &str, bytes: usize) -> Job {
        let publication = Publication {
            id: TaskId::new(),
            kind: Kind::parse(kind).unwrap(),
            lane: Lane { queue: QueueName::parse(queue).unwrap(), priority: Priority::Normal },
            args: Json::of(&"x".repeat(bytes)).unwrap(),
            fence: Fence(0),
            traceparent: None,
            reply_to: None,
        };
        let room = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        Job { publication, reply: None, _room: room }
    }

    #[tokio::test]
    async fn what_goes_together_is_of_one_lane_and_kind_and_within_its_bounds() {
        let bundles = Bundles { limit: Duration::from_secs(1), known: Arc::default() };
        let queue = |name| QueueName::parse(name).unwrap();
        let kind = |name| Kind::parse(name).unwrap();
        bundles.lock().sizes = [((queue("a"), kind("short")), 3), ((queue("b"), kind("short")), 3)].into();
        let mut jobs = Vec::new();
        for (name, sort, bytes) in [
            ("a", "short", 1),
            ("a", "long", 1),
            ("b", "short", 1),
            ("a", "short", 1),
            ("a", "long", 1),
            ("a", "short", 1),
            ("a", "short", 1),
            ("b", "short", BYTES_MAX),
            ("b", "short", 1),
        ] {
            jobs.push(job(name, sort, bytes).await);
        }
        let ids: Vec<TaskId> = jobs.iter().map(|job| job.publication.id).collect();
        let of = |bundle: &Vec<Job>| -> Vec<usize> {
            bundle.iter().map(|job| ids.iter().position(|id| *id == job.publication.id).unwrap()).collect()
        };
        let put_together: Vec<_> = bundles.of(jobs).iter().map(of).collect();
        assert_eq!(put_together, [vec![0, 3, 5], vec![1], vec![2], vec![4], vec![6], vec![7], vec![8]]);
        assert_eq!(bundles.wanted().len(), 2);
    }

    #[test]
    fn a_bundle_is_what_one_place_does_in_time() {
        let limit = Duration::from_millis(250);
        let size = |ms| size_for(limit, Duration::from_millis(ms));
        assert_eq!([size(0), size(1), size(10), size(125), size(126), size(9_000)], [64, 64, 25, 2, 1, 1]);
    }
}
