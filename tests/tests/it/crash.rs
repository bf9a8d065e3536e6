//! Programs that die or stand still in the middle of their work: others take over, and nothing runs when it must not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use jiff::Timestamp;
use serde_json::json;
use tasklane_common::clock::since_boot;
use tasklane_common::ledger::{self, Settled, Settlement, Transition};
use tasklane_common::task::{Fence, Json};
use tasklane_tests::api::{Accepted, Api, Task};
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::{CommandKind, Entry, OperationLog, Step};
use tasklane_tests::process::Process;
use tasklane_tests::proxy::{Direction, Proxy};
use tasklane_tests::stack::{LEASE_TTL, Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers, within};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use url::Url;

use crate::load::{check_completed, ids, nothing_left, running_at, started_at, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// From the death of a worker to the next start of its tasks: the rest of its lease, and this.
const TAKEOVER: Duration = Duration::from_secs(2);

/// What `tasklane-worker --help` tells as the exit code of a worker that cannot stop a handler.
const EXIT_UNSTOPPABLE: i32 = 75;

/// How often a worker is frozen until it is not in the middle of a write.
const FREEZES: usize = 20;

on_both_ledgers! {
    async fn a_killed_workers_tasks_start_again_elsewhere_within_its_lease_and_two_seconds(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut victim = stack.test_worker(&log).short_lease().start().await?;
        // With room for all when the lease has ended.
        let _survivor = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 256).start().await?;

        let batch = tasks(200, "test.work", &json!({"work_ms": 1000}));
        let submitted = ids(&producer.api.submit_batch(&batch).await?);
        let cut = kill_in_mid_run(&mut victim, &log).await?;
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;

        check_completed(&ended, &submitted)?;
        log.check_fences_rise()?;
        log.check_no_overlap()?;
        for run in &cut.running {
            let next = next_start(&log, run)?;
            assert!(next.at > cut.at, "started again before the worker was dead: {next:?}");
            assert!(next.at < cut.at + LEASE_TTL + TAKEOVER, "killed at {:?}, taken over as {next:?}", cut.at);
        }
        check_started_once_but(&log, &cut.held_by_victim(&ended, &log)?)?;
        nothing_left(&stack.vhost).await
    }

    async fn a_killed_workers_at_most_once_tasks_never_start_again(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut victim = stack.test_worker(&log).short_lease().start().await?;
        let _survivor = stack.test_worker(&log).start().await?;

        let batch = tasks(200, "test.once", &json!({"work_ms": 1000}));
        let submitted = ids(&producer.api.submit_batch(&batch).await?);
        let cut = kill_in_mid_run(&mut victim, &log).await?;
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;

        assert_eq!(ended.len(), submitted.len());
        check_started_once_but(&log, &BTreeSet::new())?;
        let (discarded, rest): (Vec<Task>, Vec<Task>) = ended.into_iter().partition(|task| task.state == "discarded");
        let discarded_ids: BTreeSet<_> = discarded.iter().map(|task| task.id.clone()).collect();
        for run in &cut.running {
            assert!(discarded_ids.contains(&run.task), "it ran when its worker was killed: {run:?}");
        }
        for task in &discarded {
            assert_eq!((task.reason.as_deref(), &task.worker_id), (Some("interrupted"), &cut.worker), "{task:#?}");
            assert_eq!(task.errors.last().map(|error| error.kind.as_str()), Some("crash"), "{task:#?}");
        }
        assert!(rest.iter().all(|task| task.state == "completed"), "{rest:#?}");
        let started: BTreeSet<_> = log.starts()?.into_iter().map(|start| start.task).collect();
        assert!(rest.iter().all(|task| started.contains(&task.id)));
        nothing_left(&stack.vhost).await
    }
}

/// Offers a result of the first run of each task.
async fn offer_late_results(stack: &Stack, tasks: &BTreeSet<String>) -> Result<()> {
    let ledger = ledger::open(&stack.ledger.url()).await?;
    for id in tasks {
        let transition = Transition::Complete { result: Json::of(&"late")? };
        let late = Settlement { id: id.parse()?, fence: Fence(1), transition };
        assert_eq!(ledger.settle(late).await?, Settled::Fenced, "{id}");
    }
    Ok(())
}

/// What was so when a worker was killed.
struct Cut {
    /// A moment when it was surely dead.
    at: Duration,
    pid: i32,
    /// Its name in the ledger.
    worker: Option<String>,
    /// The runs that it had begun and not ended.
    running: Vec<Entry>,
}

impl Cut {
    /// The tasks that the victim may have held: begun there, or claimed a moment before the kill.
    fn held_by_victim(&self, ended: &[Task], log: &OperationLog) -> Result<BTreeSet<String>> {
        let begun = log.starts()?.into_iter().filter(|start| start.pid == self.pid).map(|start| start.task);
        let crashed = ended.iter().filter(|task| task.errors.iter().any(|error| error.kind == "crash"));
        Ok(begun.chain(crashed.map(|task| task.id.clone())).collect())
    }
}

/// SIGKILL, once the worker is in the middle of many runs.
async fn kill_in_mid_run(victim: &mut Worker, log: &OperationLog) -> Result<Cut> {
    let pid = victim.process.pid();
    started_at(log, pid, 30, LIMIT).await?;
    victim.process.kill().await?;
    let at = since_boot();
    let running = running_at(&log.entries()?, pid);
    ensure!(running.len() >= 20, "only {} runs were cut: the test proves too little", running.len());
    Ok(Cut { at, pid, worker: worker_id(&victim.process.log()), running })
}

/// The newest name of a worker, from its own log.
fn worker_id(log: &str) -> Option<String> {
    let entered = log.lines().rfind(|line| line.contains("entered the ledger"))?;
    let id = entered.split_once("worker.id=")?.1;
    Some(id.split_whitespace().next()?.to_owned())
}

fn next_start(log: &OperationLog, run: &Entry) -> Result<Entry> {
    let starts = log.of(&run.task)?.into_iter().filter(|entry| entry.step == Step::Start);
    starts
        .filter(|start| start.at > run.at)
        .min_by_key(|start| start.at)
        .with_context(|| format!("no start after {run:?}"))
}

/// No task but these was started twice.
fn check_started_once_but(log: &OperationLog, excused: &BTreeSet<String>) -> Result<()> {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for start in log.starts()? {
        *counts.entry(start.task).or_default() += 1;
    }
    let twice: Vec<_> = counts.iter().filter(|(task, count)| **count > 1 && !excused.contains(*task)).collect();
    ensure!(twice.is_empty(), "started more than once: {twice:?}");
    Ok(())
}

on_both_ledgers! {
    async fn a_task_that_takes_its_worker_down_is_discarded_as_poison_and_its_neighbours_complete(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut batch = tasks(20, "test.work", &json!({"work_ms": 300}));
        batch.insert(5, json!({"kind": "test.exit"}));
        let accepted = producer.api.submit_batch(&batch).await?;
        let poison = &accepted[5].id;

        let ended = tokio::select! {
            ended = producer.api.all_ended(batch.len(), LIMIT) => ended?,
            crashed = supervise(&stack, &log) => anyhow::bail!("the worker is not started again: {crashed:?}"),
        };
        let (poisoned, neighbours): (Vec<Task>, Vec<Task>) = ended.into_iter().partition(|task| task.id == *poison);
        assert_eq!(poisoned[0].state, "discarded", "{poisoned:#?}");
        assert_eq!(poisoned[0].reason.as_deref(), Some("poison"), "{poisoned:#?}");
        assert_eq!(log.of(poison)?.len(), 3, "it has taken down three workers");
        let innocent: BTreeSet<_> = ids(&accepted).into_iter().filter(|id| id != poison).collect();
        check_completed(&neighbours, &innocent)?;
        log.check_fences_rise()?;
        log.check_no_overlap()?;
        // It would take the workers down again: a filter that does not name it leaves it out.
        for (filter, retried) in [(json!({"kind": "test.exit"}), 0), (json!({"reason": "poison"}), 1)] {
            let answer = producer.api.raw_post("/v1/tasks/retry", &filter).await?;
            assert_eq!(answer.json()?["retried"], retried, "{filter}: {}", answer.text());
        }
        Ok(())
    }
}

/// Starts a worker again and again, as a service manager does. It only ends with an error.
async fn supervise(stack: &Stack, log: &OperationLog) -> Result<()> {
    loop {
        let mut worker = stack.test_worker(log).short_lease().spawn()?;
        worker.process.exited(LIMIT).await?;
    }
}

on_both_ledgers! {
    async fn a_worker_frozen_past_its_lease_changes_nothing_and_goes_on_under_a_new_name(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut frozen = stack.test_worker(&log).short_lease().start().await?;
        let batch = tasks(60, "test.work", &json!({"work_ms": 3000, "work_again_ms": 4000}));
        let submitted = ids(&producer.api.submit_batch(&batch).await?);
        log.started(submitted.len(), LIMIT).await?;
        freeze_between_writes(&stack, &frozen)?;
        let old_name = worker_id(&frozen.process.log());

        let mut healthy = stack.test_worker(&log).start().await?;
        started_at(&log, healthy.process.pid(), submitted.len(), LIMIT).await?;
        // In the middle of the second runs. The first ones end at once now, and their results may be offered: in case
        // that the worker hears of its lost lease before, they are offered in its stead.
        frozen.process.thaw()?;
        offer_late_results(&stack, &submitted).await?;
        let both = eventually(LIMIT, "the thawed worker to enter again", async || {
            let names: BTreeSet<_> = producer.api.workers().await?.iter().map(|worker| worker["id"].to_string()).collect();
            Ok((names.len() == 2).then_some(names))
        })
        .await?;
        let old_name = old_name.context("the frozen worker had a name")?;
        assert!(!both.iter().any(|name| name.contains(&old_name)), "{old_name} lives again: {both:?}");
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        let second_run = |fence| json!({"pid": healthy.process.pid(), "fence": fence});
        let changed: Vec<_> = ended.iter().filter(|task| task.result != second_run(task.fence)).collect();
        assert!(changed.is_empty(), "a late result has changed something: {changed:#?}");

        // It works again: the other one is stopped, so that whatever is done is done by it.
        healthy.process.terminate()?;
        healthy.process.exited(LIMIT).await?;
        let later = ids(&producer.api.submit_batch(&tasks(5, "test.work", &json!({}))).await?);
        check_completed(&producer.api.all_ended(submitted.len() + later.len(), LIMIT).await?, &later)?;
        let done_by: BTreeSet<_> = log.starts()?.iter().filter(|run| later.contains(&run.task)).map(|run| run.pid).collect();
        assert_eq!(done_by, BTreeSet::from([frozen.process.pid()]));
        assert_eq!(frozen.process.has_exited()?, None);
        log.check_fences_rise()
    }
}

/// Freezes a worker at a moment when it does not hold the ledger's file, which would then hold up everybody.
fn freeze_between_writes(stack: &Stack, worker: &Worker) -> Result<()> {
    for _ in 0..FREEZES {
        worker.process.freeze()?;
        if stack.ledger.takes_writes()? {
            return Ok(());
        }
        worker.process.thaw()?;
        // Waits for the end of that write.
        stack.ledger.takes_writes()?;
    }
    anyhow::bail!("the worker was in the middle of a write {FREEZES} times")
}

on_both_ledgers! {
    async fn a_frozen_worker_whose_handler_blocks_ends_itself(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut frozen = stack.test_worker(&log).short_lease().start().await?;
        let blocking = json!({"kind": "test.work", "args": {"blocks": true, "work_ms": 90_000, "work_again_ms": 50}});
        let task = producer.api.submit(&blocking).await?;
        log.started(1, LIMIT).await?;
        freeze_between_writes(&stack, &frozen)?;
        let _healthy = stack.test_worker(&log).start().await?;
        let done = producer.api.in_state(&task.id, "completed", LIMIT).await?;
        // Its fence is 2 or 3: the second start comes with the first message, which the broker delivers again, or by a relay.
        assert_eq!((done.attempt, done.errors.len()), (2, 1), "{done:#?}");
        frozen.process.thaw()?;
        let status = frozen.process.exited(LIMIT).await?;
        assert_eq!(status.code(), Some(EXIT_UNSTOPPABLE), "{status}");
        Ok(())
    }

    /// Not even the renewal can run: the watchdog is a thread of its own.
    async fn a_worker_that_is_blocked_whole_is_gone_before_its_task_starts_elsewhere(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut blocked = stack.test_worker(&log).short_lease().env("TOKIO_WORKER_THREADS", 1).start().await?;
        let blocking = json!({"kind": "test.work", "args": {"blocks": true, "work_ms": 90_000, "work_again_ms": 50}});
        let task = producer.api.submit(&blocking).await?;
        log.started(1, LIMIT).await?;
        let _healthy = stack.test_worker(&log).start().await?;
        let status = blocked.process.exited(LEASE_TTL * 3).await?;
        let gone_at = logged_at(&blocked.process, "handlers could not be stopped")?;
        assert_eq!(status.code(), Some(EXIT_UNSTOPPABLE), "{status}");
        producer.api.in_state(&task.id, "completed", LIMIT).await?;
        let again = log.starts()?.into_iter().find(|start| start.fence > 1).context("a second start")?;
        assert!(again.at > gone_at, "gone at {gone_at:?}, started again as {again:?}");
        Ok(())
    }
}

/// When a process logged this, by the clock of the operation log.
fn logged_at(process: &Process, text: &str) -> Result<Duration> {
    let log = process.log();
    let line = log.lines().find(|line| line.contains(text)).with_context(|| format!("it never logged {text:?}"))?;
    let at: Timestamp = line.split_whitespace().next().context("a date")?.parse().with_context(|| line.to_owned())?;
    Ok(since_boot().saturating_sub(Timestamp::now().duration_since(at).unsigned_abs()))
}

/// The wire to the ledger breaks just behind a claim, and is mended when it is too late to start.
#[tokio::test]
async fn a_grant_that_arrives_after_the_lease_is_lost_starts_nothing() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let mut url: Url = stack.ledger.url().parse()?;
    let server = url.socket_addrs(|| Some(5432))?;
    let wire = Proxy::to(*server.first().context("the database has an address")?).await?;
    url.set_port(Some(wire.addr().port())).map_err(|()| anyhow!("{url} takes no port"))?;
    let cut_off = stack.test_worker(&log).short_lease().env("TASKLANE_LEDGER_URL", &url).start().await?;
    let mut rounds = 0;
    let task = loop {
        rounds += 1;
        ensure!(rounds <= 20, "no claim has gone out");
        // Afterwards the claim is prepared on the connections in use: the next one is done when its bytes have gone out.
        for _ in 0..5 {
            let warm = producer.api.submit(&json!({"kind": "test.work"})).await?;
            producer.api.in_state(&warm.id, "completed", LIMIT).await?;
        }
        wire.stall(Direction::ToClient);
        let task = producer.api.submit(&json!({"kind": "test.work"})).await?;
        let granted = producer.api.in_state(&task.id, "running", 2 * LEASE_TTL).await.is_ok();
        let lost = async || {
            let told = cut_off.process.log().matches("the lease cannot be proven any more").count();
            Ok((told >= rounds).then_some(()))
        };
        eventually(LIMIT, "the end of the lease", lost).await?;
        wire.resume().await?;
        if granted {
            break task;
        }
        // It was another connection's turn, and the claim has waited for an answer before it could go out.
        producer.api.in_state(&task.id, "completed", LIMIT).await?;
    };
    // Its next life may have the task as well as anybody.
    let done = producer.api.in_state(&task.id, "completed", LIMIT).await?;
    let fences: Vec<u64> = log.starts()?.iter().filter(|run| run.task == task.id).map(|run| run.fence).collect();
    assert!(
        done.fence > 1 && fences == [done.fence],
        "only the second grant has started anything: {fences:?}, {done:#?}"
    );
    Ok(())
}

on_both_ledgers! {
    async fn what_a_killed_producer_has_accepted_completes(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let wire = Proxy::to(stack.vhost.node().amqp).await?;
        let mut producer = stack.producer().env("TASKLANE_AMQP_URL", stack.vhost.url_through(&wire)).start().await?;
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let mut clients = JoinSet::new();
        for _ in 0..8 {
            clients.spawn(submit_until_it_fails(producer.api.clone(), Arc::clone(&accepted)));
        }
        let reached = async |count| {
            let enough = async || Ok((accepted.lock().await.len() >= count).then_some(()));
            eventually(LIMIT, &format!("{count} tasks to be accepted"), enough).await
        };
        reached(300).await?;
        // From here on the broker hears of nothing that is accepted.
        wire.stall(Direction::ToServer);
        let heard = accepted.lock().await.len();
        reached(heard + 100).await?;
        producer.process.kill().await?;
        within(LIMIT, "the clients to see it", clients.join_all()).await?;

        // A worker alone: it relays what the producer recorded and did not come to publish.
        let worker = stack.test_worker(&log).start().await?;
        let accepted = ids(&accepted.lock().await);
        log.started(accepted.len(), LIMIT).await?;
        let relayed = worker.metrics().await?.sum("tasklane_relayed_total", &[]);
        assert!(relayed >= (accepted.len() - heard) as f64, "{relayed} of {} were relayed", accepted.len() - heard);
        let producer = stack.producer().start().await?;
        check_completed(&producer.api.all_ended(accepted.len(), LIMIT).await?, &accepted)?;
        check_started_once_but(&log, &BTreeSet::new())?;
        nothing_left(&stack.vhost).await
    }
}

/// Submits single tasks and small batches, and notes what was answered with 202.
async fn submit_until_it_fails(api: Api, accepted: Arc<Mutex<Vec<Accepted>>>) {
    loop {
        let Ok(some) = api.submit_batch(&tasks(3, "test.work", &json!({}))).await else { return };
        accepted.lock().await.extend(some);
        let Ok(one) = api.submit(&json!({"kind": "test.work"})).await else { return };
        accepted.lock().await.push(Accepted { id: one.id, state: one.state });
    }
}

/// Producer and worker stand still together, as on a laptop that is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_sleeps_again_and_again_poisons_nothing() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let counted = stack.place().join("runs").display().to_string();
    // Two runs are slept through, which were two crashes; the third one comes to its end.
    let command = CommandKind::new("test.long")
        .then(&format!("echo run >> '{counted}'\n[ \"$(wc -l < '{counted}')\" -gt 2 ] || sleep 300"));
    let producer = stack.producer().env("TASKLANE_MAX_CRASHES", 2).start().await?;
    let worker =
        stack.worker().env("TASKLANE_MAX_CRASHES", 2).short_lease().config(&log.command(&command)?).start().await?;
    let task = producer.api.submit(&json!({"kind": "test.long"})).await?;
    for run in 1..=2 {
        log.started(run, LIMIT).await?;
        producer.process.freeze()?;
        worker.process.freeze()?;
        tokio::time::sleep(LEASE_TTL + Duration::from_secs(1)).await;
        producer.process.thaw()?;
        worker.process.thaw()?;
    }
    let done = producer.api.in_state(&task.id, "completed", LIMIT).await?;
    assert_eq!((done.attempt, done.errors.len()), (1, 0), "{done:#?}");
    log.check_no_overlap()
}
