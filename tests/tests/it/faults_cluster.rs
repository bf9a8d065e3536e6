//! Three brokers: one is killed, one stands still, two are down. The programs know one address, as behind a balancer.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tasklane_tests::api::Api;
use tasklane_tests::cluster::Cluster;
use tasklane_tests::eventually;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::proxy::Proxy;
use tasklane_tests::stack::{Producer, Stack, Worker};
use tokio::time::{Instant, sleep_until};

use crate::load::{Load, Loaded, check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// For how long a node stands still.
const STILL: Duration = Duration::from_secs(20);

/// The longest that a submission may take whatever the brokers do.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Three brokers and the programs on them. What is declared first ends last.
struct World {
    wire: Proxy,
    producer: Producer,
    workers: [Worker; 2],
    log: OperationLog,
    /// Which node has the leader of the task queue.
    leader: usize,
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
        let leader = settled_leader(&stack, &cluster, &producer.api).await?;
        Ok(Self { wire, producer, workers, log, leader, stack, cluster })
    }

    fn load(&self) -> Load {
        Load::of(&self.producer.api, json!({"kind": "test.work", "args": {"work_ms": 50}}))
    }

    /// Some more tasks begin than have until now.
    async fn goes_on(&self, limit: Duration) -> Result<()> {
        let started = self.log.starts()?.len();
        self.log.started(started + 30, limit).await.map(drop)
    }

    /// The nodes that do not have the leader.
    fn followers(&self) -> Vec<usize> {
        (0..3).filter(|node| *node != self.leader).collect()
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

/// Where the leader of the task queue is, once the queue has all its members and has moved tasks: a node of 3.10 that is
/// killed in the first second of a queue may leave it dead.
async fn settled_leader(stack: &Stack, cluster: &Cluster, api: &Api) -> Result<usize> {
    let first = ids(&api.submit_batch(&tasks(20, "test.work", &json!({}))).await?);
    check_completed(&api.all_ended(first.len(), LIMIT).await?, &first)?;
    let management = &cluster.nodes[0].node().management;
    eventually(LIMIT, "the queue to have its three members", async || {
        for queue in ["tasklane.dead", "tasklane.q.default"] {
            let queue = management.get(&["queues", stack.vhost.name(), queue]).await?;
            let online = queue["online"].as_array().map_or(0, Vec::len);
            ensure!(online == 3, "{online} of its members are there");
            let leader = queue["leader"].as_str().context("a leader")?;
            let found = cluster.nodes.iter().position(|node| node.name() == leader).context("of this cluster")?;
            if queue["name"] == "tasklane.q.default" {
                return Ok(Some(found));
            }
        }
        Ok(None)
    })
    .await
}

#[tokio::test]
async fn a_killed_queue_leaders_node_costs_time_and_nothing_else() -> Result<()> {
    let mut world = World::new().await?;
    let load = world.load();
    world.goes_on(LIMIT).await?;
    world.cluster.nodes[world.leader].kill().await?;
    let next = world.followers()[1];
    world.wire.lead_to(world.cluster.nodes[next].node().amqp);
    // With two of three.
    world.goes_on(LIMIT).await?;
    world.cluster.nodes[world.leader].start().await?;
    world.goes_on(LIMIT).await?;
    let loaded = load.stop().await?;
    world.check(loaded).await
}

#[tokio::test]
async fn a_node_of_three_that_stands_still_for_20_s_costs_time_and_nothing_else() -> Result<()> {
    let world = World::new().await?;
    let load = world.load();
    world.goes_on(LIMIT).await?;
    let frozen_until = Instant::now() + STILL;
    world.cluster.nodes[world.leader].process()?.freeze()?;
    let next = world.followers()[1];
    world.wire.lead_to(world.cluster.nodes[next].node().amqp);
    // The programs see by their heartbeats that nobody answers, and go to another node. Until the cluster counts the
    // frozen one as down (`net_ticktime`, 60 s by default), that node cannot write bindings either, so they wait.
    let workers = &world.workers;
    for worker in workers {
        worker.process.logged("no heartbeat received from server for too long", STILL).await?;
    }
    sleep_until(frozen_until).await;
    world.cluster.nodes[world.leader].process()?.thaw()?;
    world.goes_on(LIMIT).await?;
    let loaded = load.stop().await?;
    world.check(loaded).await
}

#[tokio::test]
async fn two_nodes_of_three_down_and_back_cost_time_and_nothing_else() -> Result<()> {
    let mut world = World::new().await?;
    let load = world.load();
    world.goes_on(LIMIT).await?;
    let [stays, other] = world.followers()[..] else { anyhow::bail!("two of three") };
    world.wire.lead_to(world.cluster.nodes[stays].node().amqp);
    for node in [world.leader, other] {
        world.cluster.nodes[node].kill().await?;
    }
    let producer = &world.producer.api;
    eventually(LIMIT, "submissions to pile up", async || {
        Ok((producer.under_way().await?.values().sum::<u64>() > 200).then_some(()))
    })
    .await?;
    // The one that stays has paused itself, being a minority, and is slow to come back.
    for node in [other, world.leader] {
        world.cluster.nodes[node].start().await?;
    }
    world.wire.lead_to(world.cluster.nodes[other].node().amqp);
    world.goes_on(LIMIT).await?;
    let loaded = load.stop().await?;
    world.check(loaded).await
}
