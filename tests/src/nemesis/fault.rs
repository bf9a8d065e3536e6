//! The faults: each is injected, lasts for a while, and is healed.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use tokio::sync::MutexGuard;
use tokio::time::sleep;

use crate::cluster::Cluster;
use crate::history::{self, Op};
use crate::ledger::LedgerKind;
use crate::nemesis::member::Member;
use crate::nemesis::schedule::Injection;
use crate::nemesis::world::{LANES, Lane, QUEUES, World, broker_queue, broker_queues};
use crate::nemesis::{duplicator, operator};
use crate::proxy::{Direction, Method, Proxy, Side};
use crate::stack::LEASE_TTL;
use crate::wait::{eventually, within};

/// How much later delayed bytes arrive.
const DELAY: Duration = Duration::from_millis(150);

/// What it takes from the end of a lease to the next start, about.
const TAKEOVER: Duration = Duration::from_secs(1);

/// How long a fault waits for the broker.
const BROKER_LIMIT: Duration = Duration::from_secs(10);

/// How long is waited for a worker in mid-run.
const BUSY_LIMIT: Duration = Duration::from_secs(4);

/// How many runs make a worker worth a fault.
const BUSY_RUNS: usize = 3;

/// How much of the history tells what runs now: some seconds.
const TAIL_BYTES: u64 = 64 << 10;

/// How long a worker may take to be ready again before the next one is stopped.
const READY_LIMIT: Duration = Duration::from_secs(30);

macro_rules! faults {
    ($($name:ident => $words:literal,)+) => {
        /// What can be done to a world.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Fault {
            $(#[doc = $words] $name,)+
        }

        impl Fault {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];
        }

        impl fmt::Display for Fault {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => $words,)+
                })
            }
        }
    };
}

faults! {
    WorkerKilled => "worker killed",
    ProducerKilled => "producer killed",
    WorkerFrozen => "worker frozen",
    ProducerFrozen => "producer frozen",
    MachineFrozen => "worker and its commands frozen",
    WorkerStopped => "worker restarted",
    RollingRestart => "rolling restart",
    AllWorkersKilled => "all workers killed",
    BrokerWireCut => "broker wire cut",
    BrokerWireStalled => "broker wire stalled",
    BrokerWireSilent => "broker wire stalled one way",
    BrokerWireHalfClosed => "broker wire half-closed",
    BrokerWireSlow => "broker wire slow",
    PublishCut => "wire cut behind a publish",
    ConfirmCut => "wire cut before a confirm",
    DeliveryCut => "wire cut in a delivery",
    AckCut => "wire cut before an ack",
    LedgerWireCut => "ledger wire cut",
    LedgerWireStalled => "ledger wire stalled",
    LedgerWireHalfClosed => "ledger wire half-closed",
    LedgerWireSlow => "ledger wire slow",
    LedgerAnswerCut => "ledger answer cut",
    LedgerLocked => "ledger locked by operator",
    TasksLocked => "table of tasks locked by operator",
    ClientWireCut => "client wire cut",
    ClientAnswerCut => "answer to client cut",
    ConnectionsClosed => "connections closed by operator",
    QueuePurged => "queue purged",
    QueueDeleted => "queue deleted",
    QueuePaused => "queue paused",
    TasksMoved => "tasks moved back and forth",
    Duplicated => "every message twice",
    Garbage => "garbage messages",
    BrokerKilled => "broker node killed",
    BrokerStopped => "broker node restarted",
    BrokerFrozen => "broker node frozen",
    MemoryAlarm => "memory alarm",
    DatabaseCrashed => "database crashed",
    DatabaseStopped => "database restarted",
    DatabaseStalled => "database stalled",
}

impl Fault {
    /// Can it befall a lane with this ledger?
    pub fn befalls(self, ledger: LedgerKind) -> bool {
        match self {
            Self::LedgerWireCut
            | Self::LedgerWireStalled
            | Self::LedgerWireHalfClosed
            | Self::LedgerWireSlow
            | Self::LedgerAnswerCut
            | Self::TasksLocked
            | Self::DatabaseCrashed
            | Self::DatabaseStopped
            | Self::DatabaseStalled => ledger == LedgerKind::Postgres,
            Self::LedgerLocked => ledger == LedgerKind::Sqlite,
            _ => true,
        }
    }

    /// Does an operator, or another program, do it by way of the broker?
    fn is_operators(self) -> bool {
        matches!(
            self,
            Self::ConnectionsClosed | Self::QueuePurged | Self::QueueDeleted | Self::Duplicated | Self::Garbage
        )
    }

    /// Does it hit both lanes?
    pub fn is_shared(self) -> bool {
        matches!(self, Self::BrokerKilled | Self::BrokerStopped | Self::BrokerFrozen | Self::MemoryAlarm)
    }
}

impl Injection {
    /// Injects the fault, waits, and heals it.
    pub async fn play(&self, world: &World) -> Result<()> {
        let lane = &world.lanes[self.lane];
        // An operator does it while the broker is up.
        let up = match self.fault.is_operators() {
            true => Some(broker(world).await?),
            false => None,
        };
        if self.fault == Fault::Duplicated {
            // This takes its time, and the broker may go down meanwhile.
            drop(up);
        }
        match self.fault {
            Fault::WorkerKilled => {
                busy(lane, self.worker(lane)?).await;
                kill(self.worker(lane)?).await
            }
            Fault::ProducerKilled => kill(self.producer(lane)?).await,
            Fault::WorkerFrozen => {
                busy(lane, self.worker(lane)?).await;
                self.freeze(self.worker(lane)?).await
            }
            Fault::ProducerFrozen => self.freeze(self.producer(lane)?).await,
            Fault::MachineFrozen => {
                let worker = self.worker(lane)?;
                busy(lane, worker).await;
                worker.signal_all(Signal::STOP).await?;
                sleep(LEASE_TTL + TAKEOVER + self.hold / 2).await;
                worker.signal_all(Signal::CONT).await
            }
            Fault::WorkerStopped => restart(self.worker(lane)?).await,
            Fault::RollingRestart => rolling_restart(lane, self.victim).await,
            Fault::AllWorkersKilled => {
                busy(lane, self.worker(lane)?).await;
                for worker in lane.workers() {
                    worker.signal(Signal::KILL).await?;
                }
                Ok(())
            }
            Fault::ConnectionsClosed => lane.stack.vhost.close_connections().await,
            Fault::QueuePurged => lane.stack.vhost.purge(&self.broker_queue()).await.map(drop),
            Fault::QueueDeleted => operator::delete_queue(world, lane, &self.broker_queue()).await,
            Fault::QueuePaused => operator::pause(lane, self.queue(), self.hold).await,
            Fault::TasksMoved => operator::shuffle(lane, self.victim, self.hold).await,
            Fault::Duplicated => duplicator::run(&lane.stack.vhost, self.hold).await,
            Fault::Garbage => operator::litter(lane, self.queue()).await,
            Fault::LedgerLocked => operator::lock(lane, self.hold).await,
            Fault::TasksLocked => operator::lock_tasks(lane, self.hold).await,
            fault if fault.is_shared() => self.harm_broker(world).await,
            Fault::DatabaseCrashed | Fault::DatabaseStopped => self.harm_database(world).await,
            Fault::DatabaseStalled => {
                let wires: Vec<&Proxy> = lane.members.iter().filter_map(|member| member.ledger.as_ref()).collect();
                self.stall(&wires).await
            }
            _ => self.harm_wire(lane).await,
        }
    }

    fn worker<'l>(&self, lane: &'l Lane) -> Result<&'l Member> {
        lane.workers().get(self.victim % lane.workers().len()).context("a lane has workers")
    }

    fn producer<'l>(&self, lane: &'l Lane) -> Result<&'l Member> {
        lane.producers().get(self.victim % lane.producers().len()).context("a lane has producers")
    }

    fn queue(&self) -> &'static str {
        QUEUES[self.victim % QUEUES.len()]
    }

    /// The broker's queue of one of its priorities.
    fn broker_queue(&self) -> String {
        broker_queues(self.queue())[self.victim / QUEUES.len() % LANES.len()].clone()
    }

    /// Long enough that a worker has lost its lease, and its tasks run elsewhere, when it goes on.
    async fn freeze(&self, member: &Member) -> Result<()> {
        member.signal(Signal::STOP).await?;
        sleep(LEASE_TTL + TAKEOVER + self.hold / 2).await;
        member.signal(Signal::CONT).await
    }

    async fn stall(&self, wires: &[&Proxy]) -> Result<()> {
        wires.iter().for_each(|wire| wire.stall_all());
        sleep(self.hold).await;
        for wire in wires {
            wire.resume().await?;
        }
        Ok(())
    }

    /// What a single wire suffers.
    async fn harm_wire(&self, lane: &Lane) -> Result<()> {
        let any = &lane.members[self.victim % lane.members.len()];
        let (worker, producer) = (self.worker(lane)?, self.producer(lane)?);
        let ledger = any.ledger.as_ref().unwrap_or(&any.amqp);
        let http = producer.http.as_ref().context("a producer has clients")?;
        let way = if self.victim.is_multiple_of(2) { Direction::ToServer } else { Direction::ToClient };
        let wire = match self.fault {
            Fault::BrokerWireCut => cut(&any.amqp),
            Fault::LedgerWireCut => cut(ledger),
            Fault::ClientWireCut => cut(http),
            Fault::BrokerWireStalled => return self.stall(&[&any.amqp]).await,
            Fault::LedgerWireStalled => return self.stall(&[ledger]).await,
            Fault::BrokerWireSilent => with(&any.amqp, |wire| wire.stall(way)),
            Fault::BrokerWireHalfClosed => with(&any.amqp, |wire| wire.half_close(way)),
            Fault::LedgerWireHalfClosed => with(ledger, |wire| wire.half_close(way)),
            Fault::BrokerWireSlow => with(&any.amqp, slow),
            Fault::LedgerWireSlow => with(ledger, slow),
            Fault::PublishCut => {
                with(&producer.amqp, |wire| wire.cut_at(Direction::ToServer, Side::Behind, Method::PUBLISH))
            }
            Fault::ConfirmCut => {
                with(&producer.amqp, |wire| wire.cut_at(Direction::ToClient, Side::Before, Method::ACK))
            }
            Fault::DeliveryCut => {
                with(&worker.amqp, |wire| wire.cut_at(Direction::ToClient, Side::Behind, Method::DELIVER))
            }
            Fault::AckCut => with(&worker.amqp, |wire| wire.cut_at(Direction::ToServer, Side::Before, Method::ACK)),
            Fault::LedgerAnswerCut => with(ledger, |wire| wire.cut_after(Direction::ToClient, self.bytes())),
            _ => with(http, |wire| wire.cut_after(Direction::ToClient, self.bytes())),
        };
        sleep(self.hold).await;
        wire.resume().await
    }

    fn bytes(&self) -> u64 {
        self.victim as u64 * 7
    }

    async fn harm_broker(&self, world: &World) -> Result<()> {
        let mut cluster = broker(world).await?;
        // Behind the lock: whoever held it may have had a queue declared anew.
        world.settled().await;
        let at = self.node(&cluster, &world.lanes[self.lane]).await;
        let node = &mut cluster.nodes[at];
        match self.fault {
            Fault::BrokerKilled => {
                node.kill().await?;
                sleep(self.hold / 2).await;
                node.start().await
            }
            Fault::BrokerStopped => {
                node.stop().await?;
                sleep(self.hold / 2).await;
                node.start().await
            }
            Fault::BrokerFrozen => {
                node.process()?.freeze()?;
                sleep(self.hold).await;
                node.process()?.thaw()
            }
            _ => {
                node.raise_memory_alarm().await?;
                sleep(self.hold).await;
                node.clear_memory_alarm().await
            }
        }
    }

    /// Which node it hits: every other time the one that leads the lane's queue.
    async fn node(&self, cluster: &Cluster, lane: &Lane) -> usize {
        let any = self.victim % cluster.nodes.len();
        if cluster.nodes.len() == 1 || self.victim.is_multiple_of(2) {
            return any;
        }
        let name = broker_queue(self.queue());
        let queue = ["queues", lane.stack.vhost.name(), &name];
        let Ok(queue) = cluster.nodes[any].node().management.get(&queue).await else { return any };
        let leads = |name: &str| queue["leader"].as_str().or(queue["node"].as_str()) == Some(name);
        cluster.nodes.iter().position(|broker| leads(broker.name())).unwrap_or(any)
    }

    async fn harm_database(&self, world: &World) -> Result<()> {
        let mut database = world.postgres.lock().await;
        match self.fault {
            Fault::DatabaseCrashed => database.crash().await?,
            _ => database.stop().await?,
        }
        sleep(self.hold / 2).await;
        database.start().await
    }
}

/// Waits a while until a worker is in the middle of some runs; if none come, something else is broken, and that is
/// as good a moment.
async fn busy(lane: &Lane, worker: &Member) {
    let _ = eventually(BUSY_LIMIT, "a worker to be busy", async || {
        let mut running = BTreeSet::new();
        for line in history::tail(&lane.history_file, TAIL_BYTES)? {
            match line.op {
                Op::Start { run, .. } if Some(line.pid) == worker.process() => drop(running.insert(run)),
                Op::End { run, .. } => drop(running.remove(&run)),
                _ => {}
            }
        }
        Ok((running.len() >= BUSY_RUNS).then_some(()))
    })
    .await;
}

async fn kill(member: &Member) -> Result<()> {
    let before = member.process();
    member.signal(Signal::KILL).await?;
    member.started_again(before).await
}

async fn restart(member: &Member) -> Result<()> {
    let before = member.process();
    member.signal(Signal::TERM).await?;
    member.started_again(before).await
}

/// One process after the other, all of a role, each when the one before is ready again.
async fn rolling_restart(lane: &Lane, dice: usize) -> Result<()> {
    for member in if dice.is_multiple_of(3) { lane.producers() } else { lane.workers() } {
        restart(member).await?;
        eventually(READY_LIMIT, &format!("{} to be ready again", member.name), async || {
            Ok((member.probe.raw_get("/readyz").await?.status == 200).then_some(()))
        })
        .await?;
    }
    Ok(())
}

fn with(wire: &Proxy, harm: impl FnOnce(&Proxy)) -> &Proxy {
    harm(wire);
    wire
}

fn cut(wire: &Proxy) -> &Proxy {
    with(wire, Proxy::cut_all)
}

fn slow(wire: &Proxy) {
    wire.delay(Direction::ToServer, DELAY);
    wire.delay(Direction::ToClient, DELAY);
}

/// The broker, as soon as no other fault holds it; one at a time is enough.
async fn broker(world: &World) -> Result<MutexGuard<'_, Cluster>> {
    within(BROKER_LIMIT, "the broker, which another fault holds", world.broker.lock()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::check::takeovers::ABSENCES;

    #[test]
    fn the_checker_knows_by_their_names_when_nothing_can_start() {
        let is_absence = |fault: &Fault| ABSENCES.iter().any(|name| fault.to_string().starts_with(name));
        for name in ABSENCES {
            assert!(Fault::ALL.iter().any(|fault| fault.to_string().starts_with(name)), "no fault begins with {name}");
        }
        assert!(Fault::ALL.iter().filter(|fault| fault.is_shared()).all(is_absence));
        assert!(![Fault::WorkerKilled, Fault::WorkerFrozen, Fault::BrokerWireCut].iter().any(is_absence));
    }
}
