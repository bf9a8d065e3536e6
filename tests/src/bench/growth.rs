//! The rows about what changes: the tasks' size, how many queues, kinds and workers there are, the ledger's size, who watches,
//! who dies, and memory.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, interval, sleep};

use super::world::{BATCH, LIMIT, WARM, WORKERS, World, megabytes, task};
use super::{Plan, Row};
use crate::collector::Collector;
use crate::ledger::{Ledger, LedgerKind};
use crate::stack::{Start, Worker};
use crate::wait::eventually;

/// How long a task of the row `scale` waits.
const WAIT_MS: u64 = 10;
/// How many tasks a worker of that row runs at once: eight of them shall leave two cores room.
const WAITING: usize = 1;
/// How many tasks each of its workers has.
const SCALED: usize = 500;
/// How many tasks run at once in the memory row.
const AT_ONCE: usize = 1_000;

/// After how many submissions that row looks at its producer.
const SUBMITTED: [usize; 2] = [100_000, 1_000_000];

/// Which part of the traces is sent where not all are.
const SAMPLED: f64 = 0.01;

/// How long it rests before a look.
const REST: Duration = Duration::from_secs(12);

/// How many rows go into a SQLite ledger at once.
const PIECE: usize = 50_000;

/// How many bytes of args one batch may have.
const BATCH_BYTES: usize = 16 << 20;

/// What the tasks of a measurement are like, and who runs them.
#[derive(Debug, Clone, Copy)]
struct Shape {
    name: &'static str,
    bytes: usize,
    queues: usize,
    kinds: usize,
    workers: usize,
}

/// What the others are compared with.
const PLAIN: Shape = Shape { name: "plain", bytes: 256, queues: 1, kinds: 1, workers: WORKERS };

const SHAPES: [Shape; 9] = [
    Shape { name: "args 1 KiB", bytes: 1 << 10, ..PLAIN },
    Shape { name: "args 16 KiB", bytes: 16 << 10, ..PLAIN },
    Shape { name: "args 256 KiB", bytes: 256 << 10, ..PLAIN },
    Shape { name: "8 queues", queues: 8, ..PLAIN },
    Shape { name: "32 queues", queues: 32, ..PLAIN },
    Shape { name: "16 kinds", kinds: 16, ..PLAIN },
    Shape { name: "128 kinds", kinds: 128, ..PLAIN },
    Shape { name: "4 workers", workers: 4, ..PLAIN },
    Shape { name: "8 workers", workers: 8, ..PLAIN },
];

impl Shape {
    /// Queues and kinds take turns.
    fn batch(self) -> Vec<Value> {
        let around = json!({"ballast": ""}).to_string().len();
        let args = json!({"ballast": "x".repeat(self.bytes - around)});
        let task = |n: usize| {
            let (kind, queue) = (format!("test.work.{}", n % self.kinds), format!("bench{}", n % self.queues));
            json!({"kind": kind, "queue": queue, "args": args})
        };
        (0..BATCH.min(BATCH_BYTES / self.bytes)).map(task).collect()
    }

    async fn world(self, ledger: LedgerKind) -> Result<World> {
        let mut world = World::new(ledger, 0).await?;
        let queues: Vec<_> = (0..self.queues).map(|n| format!("bench{n}")).collect();
        let worker = |worker: Start<Worker>| {
            worker.env("TASKLANE_QUEUES", queues.join(",")).env("TASKLANE_TEST_KINDS", self.kinds)
        };
        world.hire_as(self.workers, worker).await?;
        Ok(world)
    }
}

/// End to end by batch, of tasks that are larger, of more queues and kinds, and with more workers; each of them right behind
/// a plain one.
pub async fn shapes(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let plain = PLAIN.world(ledger).await?;
    plain.end_to_end_of(&PLAIN.batch(), WARM).await?;
    let mut rows = Vec::new();
    for shape in SHAPES {
        let world = shape.world(ledger).await?;
        let (batch, plain_batch) = (shape.batch(), PLAIN.batch());
        // Of large ones fewer are as much work.
        let tasks = (plan.tasks * PLAIN.bytes.max(1 << 10) / shape.bytes.max(1 << 10)).max(2 * batch.len());
        world.end_to_end_of(&batch, batch.len()).await?;
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..plan.repeats {
            without.push(plain.end_to_end_of(&plain_batch, plan.tasks).await?);
            with.push(world.end_to_end_of(&batch, tasks).await?);
        }
        let without = Row::of(PLAIN.name, Some(name), "/s", without);
        let with = Row::of(shape.name, Some(name), "/s", with).against(&without);
        rows.extend([without, with]);
    }
    Ok(rows)
}

/// Rows that lie in the ledger: tasks of a paused queue, and finished ones.
#[derive(Debug, Clone, Copy)]
pub struct Backlog {
    /// How many wait.
    pub queued: i64,
    /// How many have finished.
    pub finished: i64,
}

/// End to end by batch, in an empty ledger and in one that is full: in turn, so that both had the same machine.
pub async fn backlog(plan: Plan, backlog: Backlog, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let empty = World::new(ledger, WORKERS).await?;
    let full = World::new(ledger, WORKERS).await?;
    fill(&full.stack.ledger, backlog).await?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for world in [&empty, &full] {
        world.end_to_end(WARM, false).await?;
    }
    for _ in 0..plan.repeats {
        without.push(empty.end_to_end(plan.tasks, false).await?);
        with.push(full.end_to_end(plan.tasks, false).await?);
    }
    let without = Row::of("empty ledger", Some(name), "/s", without);
    let with = Row::of("full ledger", Some(name), "/s", with).against(&without);
    Ok(vec![without, with])
}

/// Puts rows into the ledger past everybody: through the API it would take an hour.
async fn fill(ledger: &Ledger, Backlog { queued, finished }: Backlog) -> Result<()> {
    match ledger {
        Ledger::Sqlite(_) => {
            let file = ledger.sqlite_file().context("a SQLite ledger has a file")?;
            tokio::task::spawn_blocking(move || {
                let db = tasklane_common::rusqlite::Connection::open(file)?;
                db.busy_timeout(LIMIT)?;
                db.execute("INSERT INTO paused_queues VALUES ('parked', 0)", [])?;
                for (state, rows) in [(2, queued), (5, finished)] {
                    // In pieces: the other processes have leases to renew.
                    for from in (0..rows).step_by(PIECE) {
                        let numbers = (state, from, rows.min(from + PIECE as i64));
                        db.execute(SQLITE_ROWS, numbers)?;
                        db.execute(SQLITE_ARGS, numbers)?;
                    }
                }
                anyhow::Ok(())
            })
            .await??;
        }
        Ledger::Postgres(_) => {
            ledger.execute("INSERT INTO paused_queues VALUES ('parked', 0)").await?;
            for (state, rows) in [(2, queued), (5, finished)] {
                ledger.fill(POSTGRES_ROWS, [state, rows]).await?;
            }
            ledger.execute("ANALYZE tasks").await?;
        }
    }
    Ok(())
}

/// `?1` is the state, and the rows have the numbers from `?2` up to `?3`. What waits was queued in an hour: without messages it
/// would soon count as lost.
const SQLITE_ROWS: &str = "
INSERT INTO tasks (id, kind, queue, state, max_attempts, created_at, run_at, queued_at, started_at, finished_at)
WITH RECURSIVE n (n) AS (SELECT ?2 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < ?3)
SELECT unhex(format('018d%012x%016x', ?1, n)), 'test.work', 'parked', ?1, 5, 1000, 1000,
       iif(?1 = 5, 1000, (unixepoch() + 3600) * 1000), iif(?1 = 5, 1000, NULL), iif(?1 = 5, unixepoch() * 1000, NULL)
FROM n";

/// The args of these rows.
const SQLITE_ARGS: &str = "
INSERT INTO task_args (id, args)
WITH RECURSIVE n (n) AS (SELECT ?2 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < ?3)
SELECT unhex(format('018d%012x%016x', ?1, n)), '{}' FROM n";

/// `$1` is the state, `$2` the number of rows.
const POSTGRES_ROWS: &str = "
INSERT INTO tasks (id, kind, queue, state, args, max_attempts, created_at, run_at, queued_at, started_at, finished_at)
SELECT ('018d' || lpad(to_hex($1), 12, '0') || lpad(to_hex(n), 16, '0'))::uuid, 'test.work', 'parked', $1::smallint, '{}',
       5, 1000, 1000, CASE WHEN $1 = 5 THEN 1000 ELSE tasklane.now_ms() + 3600000 END, CASE WHEN $1 = 5 THEN 1000 END,
       CASE WHEN $1 = 5 THEN tasklane.now_ms() END
FROM generate_series(1, $2) n";

/// Tasks that wait 10 ms, by one worker and by eight: one that is bound by its own places, and the same eight times.
pub async fn scale(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let waits = json!({"kind": "test.work", "args": {"work_ms": WAIT_MS}});
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..plan.repeats {
        for (rates, workers) in rates.iter_mut().zip([1, 8]) {
            let mut world = World::new(ledger, 0).await?;
            world.hire_as(workers, |worker| worker.env("TASKLANE_CONCURRENCY", WAITING)).await?;
            let tasks = workers * SCALED;
            let begun = Instant::now();
            tokio::try_join!(world.batches_of(&waits, tasks), world.until_completed(tasks as f64))?;
            rates.push(tasks as f64 / begun.elapsed().as_secs_f64());
        }
    }
    let [one, eight] = rates;
    let one = Row::of("1 worker", Some(name), "/s", one);
    let eight = Row::of("8 workers", Some(name), "/s", eight).against(&one);
    Ok(vec![one, eight])
}

/// From the death of a worker, with the lease of the settings' defaults, to the start of its task in another.
pub async fn takeover(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let mut took = Vec::new();
    for _ in 0..plan.repeats {
        let mut world = World::new(ledger, 1).await?;
        let task = json!({"kind": "test.work", "args": {"work_ms": 60_000}});
        let task = world.producer.api.submit(&task).await?;
        world.producer.api.in_state(&task.id, "running", LIMIT).await?;
        world.hire(1).await?;
        let mut first = world.workers.remove(0);
        let died = Instant::now();
        first.process.kill().await?;
        eventually(LIMIT, "the task to start again", async || {
            Ok((world.producer.api.get(&task.id).await?.attempt == 2).then_some(()))
        })
        .await?;
        took.push(died.elapsed().as_secs_f64());
    }
    Ok(vec![Row::of("takeover", Some(name), "s", took)])
}

/// End to end by batch: with nobody looking; with some and with all requests and runs traced, to a collector on this machine;
/// and with events heard and metrics fetched besides.
pub async fn overhead(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let (collector, other) = (Collector::start().await?, Collector::start().await?);
    let world = World::new(ledger, WORKERS).await?;
    let sampled = World::traced(ledger, WORKERS, &other, SAMPLED).await?;
    let traced = World::traced(ledger, WORKERS, &collector, 1.0).await?;
    for world in [&world, &sampled, &traced] {
        world.end_to_end(WARM, false).await?;
    }
    let (mut unwatched, mut some, mut all, mut watched) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.repeats {
        unwatched.push(world.end_to_end(plan.tasks, false).await?);
        some.push(sampled.end_to_end(plan.tasks, false).await?);
        all.push(traced.end_to_end(plan.tasks, false).await?);
        let rate = tokio::select! {
            rate = traced.end_to_end(plan.tasks, false) => rate?,
            ended = watch(&traced) => ended.and_then(|()| anyhow::bail!("the events have ended"))?,
        };
        watched.push(rate);
    }
    let runs = WARM + 2 * plan.repeats * plan.tasks;
    let sent = collector.count() as f64 / runs as f64;
    let unwatched = Row::of("unwatched", Some(name), "/s", unwatched);
    let against = |title: &str, rates| Row::of(title, Some(name), "/s", rates).against(&unwatched);
    let rows = [against("traced 1 %", some), against("traced", all), against("watched", watched)];
    let sent = Row::of("- spans a task", Some(name), "sent", vec![sent]);
    Ok([unwatched].into_iter().chain(rows).chain([sent]).collect())
}

/// Hears every event, and fetches every process's metrics each second.
async fn watch(world: &World) -> Result<()> {
    let mut events = world.producer.api.client().get(world.producer.api.url("/v1/events")).send().await?.bytes_stream();
    let mut second = interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            piece = events.next() => match piece {
                Some(piece) => drop(piece?),
                None => return Ok(()),
            },
            _ = second.tick() => {
                world.producer.api.metrics().await?;
                world.completed().await?;
            }
        }
    }
}

/// The memory of an idle worker and of one with 1,000 tasks at once, and of a producer that takes ever more submissions.
pub async fn memory(ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let row = |title: &str, measured| Row::of(title, Some(name), "MB", vec![measured]);
    let mut world = World::new(ledger, 0).await?;
    world.hire_as(1, |worker| worker.env("TASKLANE_CONCURRENCY", AT_ONCE)).await?;
    let idle = megabytes(&world.workers[0].process)?;
    let mut rows = vec![row("idle worker", idle), row("idle producer", megabytes(&world.producer.process)?)];
    world.batches_of(&json!({"kind": "test.work", "args": {"work_ms": 5_000}}), AT_ONCE).await?;
    eventually(LIMIT, "all tasks to run at once", async || {
        let running = world.producer.api.under_way().await?;
        Ok((running.get("running").copied() == Some(AT_ONCE as u64)).then_some(()))
    })
    .await?;
    rows.push(row("+ 1000 running", megabytes(&world.workers[0].process)? - idle));
    world.until_completed(AT_ONCE as f64).await?;
    let body = serde_json::to_vec(&json!({"tasks": vec![task(); BATCH]}))?;
    let mut submitted = 0;
    for until in SUBMITTED {
        let batches = (until - submitted).div_ceil(BATCH);
        world.submit(1, "/v1/tasks/batch", &body, &AtomicUsize::new(batches)).await?;
        submitted = until;
        // What is under way has its own memory, and what is over is given back within seconds.
        world.until_completed((AT_ONCE + until) as f64).await?;
        sleep(REST).await;
        rows.push(row(&format!("after {until}"), megabytes(&world.producer.process)?));
    }
    Ok(rows)
}
