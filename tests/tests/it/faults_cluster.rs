//! Three brokers: one is killed, one stands still, two are down. The programs know one address, as behind a balancer.
//!
//! One after the other in one cluster, under one load: it takes longer to found three clusters than to harm them.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tasklane_tests::cluster::Cluster;
use tasklane_tests::eventually;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::proxy::Proxy;
use tasklane_tests::stack::{Producer, Stack, Worker};
use tokio::time::{Instant, sleep_until};

use crate::load::{Load, Loaded, check_completed, nothing_left};

const LIMIT: Duration = Duration::from_secs(60);

/// For how long a node stands still.
const STILL: Duration = Duration::from_secs(20);

/// What a program says when a node no longer answers.
const NO_HEARTBEAT: &str = "no heartbeat received from server for too long";

/// The longest that a submission may take whatever the brokers do.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Three brokers and the programs on them. What is declared first ends last.
struct World {
    wire: Proxy,
    producer: Producer,
    workers: [Worker; 2],
    log: OperationLog,
    stack: Stack,
    cluster: Cluster,
}

impl World {
    /// The test's own view of the brokers is that of node 0; the programs begin at node 1.
    async fn new() -> Result<Self> {
        let cluster = Cluster::private(3).await?;
        let stack = Stack::on(cluster.nodes[0].node(), LedgerKind::Postgres).await?;
        let log = stack.operation_log()?;
        let wire = Proxy::to(cluster.nodes[1].node().amqp).await?;
        let url = stack.vhost.url_through(&wire);
        let producer = stack.producer().env("TASKLANE_AMQP_URL", &url).start().await?;
        let worker = || stack.test_worker(&log).env("TASKLANE_AMQP_URL", &url).start();
        let workers = [worker().await?, worker().await?];
        Ok(Self { wire, producer, workers, log, stack, cluster })
    }

    fn load(&self) -> Load {
        Load::of(&self.producer.api, json!({"kind": "test.work", "args": {"work_ms": 50}}))
    }

    /// Some more tasks begin than have until now.
    async fn goes_on(&self, limit: Duration) -> Result<()> {
        let started = self.log.starts()?.len();
        self.log.started(started + 30, limit).await.map(drop)
    }

    /// Which node has the leader of the task queue, and which have not, once each queue has all its members.
    async fn settled(&self) -> Result<(usize, [usize; 2])> {
        let management = &self.cluster.nodes[0].node().management;
        let leader = eventually(LIMIT, "the queues to have their three members", async || {
            let mut leader = None;
            for name in ["tasklane.dead", "tasklane.q.default"] {
                let queue = management.get(&["queues", self.stack.vhost.name(), name]).await?;
                let online = queue["online"].as_array().map_or(0, Vec::len);
                ensure!(online == 3, "{online} members of {name} are there");
                leader = self.cluster.nodes.iter().position(|node| queue["leader"] == node.name());
            }
            Ok(leader)
        })
        .await?;
        Ok((leader, [(leader + 1) % 3, (leader + 2) % 3]))
    }

    /// From now on the programs reach this node.
    fn lead_to(&self, node: usize) {
        self.wire.lead_to(self.cluster.nodes[node].node().amqp);
    }

    /// Nothing is lost, nothing was started twice, and no program had to be started again.
    async fn check(mut self, loaded: Loaded) -> Result<()> {
        ensure!(loaded.slowest < ANSWER_LIMIT, "a submission took {:?}", loaded.slowest);
        let ended = self.producer.api.all_ended(loaded.accepted.len(), LIMIT).await?;
        check_completed(&ended, &loaded.accepted)?;
        let started: BTreeSet<_> = self.log.starts()?.into_iter().map(|start| start.task).collect();
        ensure!(started.is_superset(&loaded.accepted), "some were completed without a start");
        ensure!(self.log.starts()?.len() == started.len(), "something was started twice");
        for process in [&mut self.producer.process].into_iter().chain(self.workers.iter_mut().map(|w| &mut w.process)) {
            ensure!(process.has_exited()?.is_none(), "a program has ended");
        }
        nothing_left(&self.stack.vhost).await
    }
}

#[tokio::test]
async fn nodes_of_a_cluster_that_fail_cost_time_and_nothing_else() -> Result<()> {
    let mut world = World::new().await?;
    // Before the first harm the queues have moved tasks: a node of 3.10 that is killed in the first second of a queue may
    // leave it dead.
    let load = world.load();
    world.goes_on(LIMIT).await?;
    a_killed_queue_leaders_node(&mut world).await.context("a killed queue leader's node")?;
    a_node_that_stands_still_for_20_s(&world).await.context("a node that stands still for 20 s")?;
    two_nodes_down_and_back(&mut world).await.context("two nodes down and back")?;
    let loaded = load.stop().await?;
    world.check(loaded).await
}

async fn a_killed_queue_leaders_node(world: &mut World) -> Result<()> {
    let (leader, [_, next]) = world.settled().await?;
    world.cluster.nodes[leader].kill().await?;
    world.lead_to(next);
    // With two of three.
    world.goes_on(LIMIT).await?;
    world.cluster.nodes[leader].start().await?;
    world.goes_on(LIMIT).await
}

async fn a_node_that_stands_still_for_20_s(world: &World) -> Result<()> {
    let (leader, [_, next]) = world.settled().await?;
    // The programs are connected to the one that will stand still.
    world.lead_to(leader);
    world.wire.cut_all();
    world.goes_on(LIMIT).await?;
    let before = world.workers.each_ref().map(|worker| worker.process.log().matches(NO_HEARTBEAT).count());
    let frozen_until = Instant::now() + STILL;
    world.cluster.nodes[leader].process()?.freeze()?;
    world.lead_to(next);
    // The programs see by their heartbeats that nobody answers, and go to another node. Until the cluster counts the
    // frozen one as down (`net_ticktime`, 60 s by default), that node cannot write bindings either, so they wait.
    for (worker, before) in world.workers.iter().zip(before) {
        eventually(STILL, "the worker to miss the heartbeats", async || {
            Ok((worker.process.log().matches(NO_HEARTBEAT).count() > before).then_some(()))
        })
        .await?;
    }
    sleep_until(frozen_until).await;
    world.cluster.nodes[leader].process()?.thaw()?;
    world.goes_on(LIMIT).await
}

async fn two_nodes_down_and_back(world: &mut World) -> Result<()> {
    let (leader, [stays, other]) = world.settled().await?;
    world.lead_to(stays);
    for node in [leader, other] {
        world.cluster.nodes[node].kill().await?;
    }
    let producer = &world.producer.api;
    eventually(LIMIT, "submissions to pile up", async || {
        Ok((producer.under_way().await?.values().sum::<u64>() > 200).then_some(()))
    })
    .await?;
    // The one that stays has paused itself, being a minority, and is slow to come back.
    for node in [other, leader] {
        world.cluster.nodes[node].start().await?;
    }
    world.lead_to(other);
    world.goes_on(LIMIT).await
}
