//! A whole run: build, measure, harm under load, heal, measure again, judge.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use futures::future::{join_all, try_join_all};
use futures::stream::FuturesUnordered;
use jiff::Timestamp;
use rustix::process::Signal;
use tasklane_common::task::Guarantee;
use tasklane_common::topology::DEAD_QUEUE;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::api::{Api, Task};
use crate::history::check::{Evidence, FinalTask, check};
use crate::history::{self, Op};
use crate::nemesis::client::{Client, FOLLOW_UP, NAME_TAG, QUEUE_TAG, Seen};
use crate::nemesis::fault::Fault;
use crate::nemesis::measure::{self, Counters, Sprint};
use crate::nemesis::member::Role;
use crate::nemesis::operator::GARBAGE;
use crate::nemesis::report::{LaneReport, Report};
use crate::nemesis::schedule::{Injection, PAUSE, Schedule};
use crate::nemesis::world::{COMMAND, Lane, QUEUES, World, broker_queues};
use crate::nemesis::{cron, limits, operator};
use crate::wait::{eventually, within};

/// How many faults a lane may have at once, once each is known alone.
const AT_ONCE: usize = 3;

/// How long all tasks may take to end once everything is healed: behind a limit, outages pile up more the longer they last.
const END_LIMIT: Duration = Duration::from_secs(900);

/// How long it may take until fewer are under way than ever before.
const STALL_LIMIT: Duration = Duration::from_secs(60);

/// How long the clients may take to end.
const CLIENTS_LIMIT: Duration = Duration::from_secs(120);

/// How long the broker may take to see the last acks.
const ACK_LIMIT: Duration = Duration::from_secs(30);

/// How many groups wait for their last task.
const OPEN_GROUPS: &str = "SELECT count(*) FROM task_groups WHERE finished_at IS NULL";

/// How long one look at what is left may take.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// How often the counters are looked at.
const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// How often the progress is told.
const TELL_PERIOD: Duration = Duration::from_secs(5);

/// The longest that one fault may take with its healing: a broker node starts in it. What it leaves is healed at the end.
const FAULT_LIMIT: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// All chance comes from it.
    pub seed: u64,
    /// How long faults are injected.
    pub faulty: Duration,
    /// How many nodes the broker has.
    pub nodes: usize,
    /// Where histories and logs go.
    pub place: PathBuf,
}

/// How often each fault was injected, and how often it could not be.
type Tally = BTreeMap<Fault, (usize, usize)>;

/// Runs the plan to its end. An error means that the run itself did not work out, and proves nothing.
pub async fn run(plan: Plan) -> Result<Report> {
    let began = Instant::now();
    let world = Arc::new(World::build(plan.nodes, &plan.place).await?);
    sprint_all(&world, "cold").await?;
    let before = sprint_all(&world, "before").await?;
    let rss_before = memory(&world);
    let broker_before = measure::broker_rss(&world).await;

    for lane in &world.lanes {
        cron::begin(lane).await?;
    }
    let stop = CancellationToken::new();
    let seen: Vec<Arc<Seen>> = world.lanes.iter().map(|_| Arc::default()).collect();
    let counters: Arc<Vec<Counters>> = Arc::new(world.lanes.iter().map(|_| Counters::default()).collect());
    let mut clients = clients(&world, &seen, plan.seed, &stop)?;
    let mut amending = JoinSet::new();
    for lane in 0..world.lanes.len() {
        amending.spawn(cron::amend(Arc::clone(&world), lane, plan.seed ^ lane as u64, stop.clone()));
    }
    let mut watchers = JoinSet::new();
    watchers.spawn(look(Arc::clone(&world), Arc::clone(&counters)));
    watchers.spawn(tell(Arc::clone(&world), seen.clone()));
    let faults = harm(&world, &plan, &mut clients).await?;
    heal(&world).await?;
    let healed = Instant::now();
    stop.cancel();
    within(CLIENTS_LIMIT, "the clients to end", async {
        while let Some(client) = clients.join_next().await {
            client??;
        }
        while let Some(amended) = amending.join_next().await {
            amended?;
        }
        anyhow::Ok(())
    })
    .await??;
    let mut missed = Vec::new();
    for lane in &world.lanes {
        missed.push(cron::end(lane).await?);
    }
    let settled = settle(&world, healed).await?;
    let after = match settled.iter().all(Option::is_some) {
        true => sprint_all(&world, "after").await?,
        // What has not ended is told by the checker.
        false => before.iter().map(|_| Vec::new()).collect(),
    };
    let (rss_after, broker_after) = (memory(&world), measure::broker_rss(&world).await);
    watchers.shutdown().await;

    let mut world = Arc::into_inner(world).context("everybody has let go of the world")?;
    let mut lanes = Vec::new();
    for (at, lane) in world.lanes.iter_mut().enumerate() {
        counters[at].look(lane).await;
        let evidence = gather(lane, missed[at]).await?;
        let speed = |sprints: &[Sprint]| measure::speeds(sprints, &evidence.history);
        lanes.push(LaneReport {
            name: lane.kind.to_string(),
            verdict: check(&evidence),
            counted: counters[at].total(),
            speed: (speed(&before[at]), speed(&after[at])),
            producer_rss: (rss_before[at].0, rss_after[at].0),
            worker_rss: (rss_before[at].1, rss_after[at].1),
            settled_in: settled[at].unwrap_or(END_LIMIT),
        });
    }
    let Plan { seed, faulty, nodes, place } = plan;
    let broker_rss = (broker_before, broker_after);
    Ok(Report { seed, faulty, took: began.elapsed(), nodes, faults, broker_rss, lanes, place })
}

async fn sprint_all(world: &World, when: &str) -> Result<Vec<Vec<Sprint>>> {
    let [one, other] = &world.lanes[..] else { bail!("a world has two lanes") };
    let (one, other) = tokio::try_join!(measure::sprints(one, when), measure::sprints(other, when))?;
    Ok(vec![one, other])
}

/// The largest producer and the largest worker of each lane.
fn memory(world: &World) -> Vec<(u64, u64)> {
    let of = |lane| (measure::rss(lane, Role::Producer), measure::rss(lane, Role::Worker));
    world.lanes.iter().map(of).collect()
}

fn clients(world: &World, seen: &[Arc<Seen>], seed: u64, stop: &CancellationToken) -> Result<JoinSet<Result<()>>> {
    let mut clients = JoinSet::new();
    for (lane, seen) in world.lanes.iter().zip(seen) {
        let wires = lane.producers().iter().filter_map(|producer| producer.http.as_ref());
        let apis = wires.map(|wire| Api::new(wire.addr())).collect::<Result<_>>()?;
        let client = Client { apis, history: Arc::clone(&lane.history), seen: Arc::clone(seen) };
        clients.spawn(client.run(seed ^ lane.kind as u64, stop.clone()));
    }
    Ok(clients)
}

/// Injects faults into all lanes until the time is over.
async fn harm(world: &World, plan: &Plan, clients: &mut JoinSet<Result<()>>) -> Result<Tally> {
    let lanes = (0..world.lanes.len()).map(|lane| harm_lane(world, plan, lane));
    let harmed = tokio::select! {
        harmed = join_all(lanes) => harmed,
        // A client that ends now has failed.
        Some(ended) = clients.join_next() => {
            ended?.context("a client could not go on")?;
            bail!("a client has ended by itself");
        }
    };
    let mut tally = Tally::new();
    for (fault, done) in harmed.into_iter().flatten() {
        let (ok, failed) = tally.entry(fault).or_default();
        *if done { ok } else { failed } += 1;
    }
    Ok(tally)
}

/// Injects faults into one lane, at first each alone, and then several at once; tells which, and whether they did
/// work out.
async fn harm_lane(world: &World, plan: &Plan, lane: usize) -> Vec<(Fault, bool)> {
    let mut schedule = Schedule::new(plan.seed, lane, world.lanes[lane].kind);
    let began = Instant::now();
    let mut played = Vec::new();
    let mut playing = FuturesUnordered::new();
    while began.elapsed() < plan.faulty || !playing.is_empty() {
        let over = began.elapsed() >= plan.faulty;
        let alone = began.elapsed() < plan.faulty / 2 && schedule.has_new();
        let at_once = if alone { 1 } else { AT_ONCE };
        tokio::select! {
            () = sleep(PAUSE), if !over && playing.len() < at_once => playing.push(play(world, schedule.another())),
            Some(one) = playing.next() => played.push(one),
        }
    }
    played
}

/// Plays one fault, and writes it down. A fault that cannot be injected, since another one is in its way, is no error.
async fn play(world: &World, injection: Injection) -> (Fault, bool) {
    let fault = injection.fault;
    let note = |op: Op| {
        for (at, lane) in world.lanes.iter().enumerate() {
            if at == injection.lane || fault.is_shared() {
                // The history's file is watched by everybody else who writes to it.
                let _ = lane.history.append(op.clone());
            }
        }
    };
    let what = format!("{fault} (victim {}, {} ms)", injection.victim, injection.hold.as_millis());
    note(Op::Fault { what: what.clone() });
    let done = match timeout(FAULT_LIMIT, injection.play(world)).await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            note(Op::Fault { what: format!("{what} did not work out: {error:#}") });
            false
        }
        Err(_) => {
            note(Op::Fault { what: format!("{what} was not over after {} s", FAULT_LIMIT.as_secs()) });
            false
        }
    };
    note(Op::Healed { what });
    (fault, done)
}

/// Makes everything whole, whatever the faults have left.
async fn heal(world: &World) -> Result<()> {
    let mut cluster = world.broker.lock().await;
    for node in &mut cluster.nodes {
        match node.process() {
            Ok(process) => process.thaw()?,
            Err(_) => node.start().await?,
        }
        node.clear_memory_alarm().await?;
    }
    drop(cluster);
    let mut postgres = world.postgres.lock().await;
    if !postgres.is_running() {
        postgres.start().await?;
    }
    drop(postgres);
    for member in world.lanes.iter().flat_map(|lane| &lane.members) {
        member.mend().await?;
        member.signal(Signal::CONT).await?;
    }
    world.up().await?;
    for lane in &world.lanes {
        operator::resume_all(lane).await?;
    }
    Ok(())
}

/// Waits until no group is open and no task under way; how long that took in each lane, or `None` where it came to a stand.
async fn settle(world: &World, healed: Instant) -> Result<Vec<Option<Duration>>> {
    let lanes = world.lanes.iter().map(|lane| settle_lane(lane, healed));
    try_join_all(lanes).await
}

async fn settle_lane(lane: &Lane, healed: Instant) -> Result<Option<Duration>> {
    let api = lane.api()?;
    let (mut fewest, mut since) = (u64::MAX, Instant::now());
    let mut look = interval(LOOK_PERIOD);
    while since.elapsed() < STALL_LIMIT && healed.elapsed() < END_LIMIT {
        look.tick().await;
        // Groups first: what follows the last of them is recorded then, and is under way.
        let left = async {
            let groups = lane.stack.ledger.number(OPEN_GROUPS).await?.unsigned_abs();
            anyhow::Ok(groups + api.under_way().await?.values().sum::<u64>())
        };
        // A process that is just back may not answer yet.
        match timeout(LOOK_LIMIT, left).await {
            Ok(Ok(0)) => return Ok(Some(healed.elapsed())),
            Ok(Ok(left)) if left < fewest => (fewest, since) = (left, Instant::now()),
            _ => {}
        }
    }
    Ok(None)
}

/// Stops a lane, and collects all that is to be judged.
async fn gather(lane: &mut Lane, missed: usize) -> Result<Evidence> {
    let tasks = lane.api()?.list_all(&[]).await?;
    lane.history.append(cron::promised(&tasks, missed)?)?;
    let tasks: Vec<FinalTask> = tasks.into_iter().map(final_task).collect::<Result<_>>()?;
    let vhost = &lane.stack.vhost;
    for queue in QUEUES.iter().flat_map(|queue| broker_queues(queue)) {
        // What is not empty by then is told by the checker.
        let _ = eventually(ACK_LIMIT, "the queue to be empty", async || {
            Ok((vhost.depth(&queue).await? == Some(0)).then_some(()))
        })
        .await;
    }
    for member in &mut lane.members {
        member.stop().await?;
    }
    // Now all that nobody has acked is back in the queue.
    let mut queues = Vec::new();
    for queue in QUEUES.iter().flat_map(|queue| broker_queues(queue)) {
        let depth = vhost.depth(&queue).await?;
        queues.push((queue, depth));
    }
    let dead = vhost.take(DEAD_QUEUE).await?;
    let ours = dead.iter().filter(|letter| !String::from_utf8_lossy(&letter.data).contains(GARBAGE));
    queues.push((format!("{DEAD_QUEUE}, other than garbage"), Some(u32::try_from(ours.count())?)));
    let counter = lane.stack.ledger.number("SELECT n FROM counter").await?;
    Ok(Evidence { history: history::read(&lane.history_file)?, tasks, queues, limits: limits::all(), counter })
}

fn final_task(task: Task) -> Result<FinalTask> {
    let guarantee = match task.kind.as_str() {
        "test.once" | COMMAND => Guarantee::AtMostOnce,
        "test.count" => Guarantee::Transactional,
        _ => Guarantee::AtLeastOnce,
    };
    let follows = (task.kind == FOLLOW_UP).then(|| serde_json::from_value(task.args["group"].clone())).transpose()?;
    Ok(FinalTask {
        edition: task.args["edition"].as_u64().unwrap_or_default(),
        kind: task.kind,
        concurrency_key: task.concurrency_key,
        name: task.tags.get(NAME_TAG).cloned().unwrap_or_default(),
        guarantee,
        result_fence: task.result["fence"].as_u64(),
        counted: task.result.as_i64(),
        unique_key: task.unique_key,
        submitted_to: task.tags.get(QUEUE_TAG).cloned(),
        queue: task.queue,
        started_at: task.started_at.map(|at| at.duration_since(Timestamp::UNIX_EPOCH).try_into()).transpose()?,
        group: task.group_id,
        follows,
        id: task.id,
        state: task.state,
        reason: task.reason,
        fence: task.fence,
    })
}

async fn look(world: Arc<World>, counters: Arc<Vec<Counters>>) {
    let mut period = interval(LOOK_PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        for (lane, counters) in world.lanes.iter().zip(counters.iter()) {
            counters.look(lane).await;
        }
    }
}

/// Tells how it goes, line by line.
async fn tell(world: Arc<World>, seen: Vec<Arc<Seen>>) {
    let began = Instant::now();
    let mut period = interval(TELL_PERIOD);
    loop {
        period.tick().await;
        let mut line = format!("  {:>4} s", began.elapsed().as_secs());
        for (lane, seen) in world.lanes.iter().zip(&seen) {
            let accepted = seen.accepted.load(Ordering::Relaxed);
            let unanswered = seen.unanswered.load(Ordering::Relaxed);
            let up = lane.members.iter().filter(|member| member.process().is_some()).count();
            line.push_str(&format!(
                "  |  {}: {accepted} accepted, {unanswered} unanswered, {up} of {} up",
                lane.kind,
                lane.members.len()
            ));
        }
        println!("{line}");
    }
}
