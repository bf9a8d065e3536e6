//! Wall clocks that are wrong or jump: leases do not look at them.
//!
//! The programs run under `libfaketime`, which gives each of them a wall clock of the test's choice and leaves the
//! clocks that nobody can set as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use serde_json::json;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::process::Process;
use tasklane_tests::stack::{LEASE_TTL, Program, Stack, Start};
use tasklane_tests::{eventually, on_both_ledgers};

use crate::load::{check_completed, ids, nothing_left, started_at, tasks};

const LIMIT: Duration = Duration::from_secs(60);
const HOUR: i64 = 3600;

/// Where Debian's package `faketime` puts its library for programs with threads.
fn library() -> Result<PathBuf> {
    let folders = fs::read_dir("/usr/lib").context("reading /usr/lib")?.flatten();
    let libraries = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    let beside = PathBuf::from("/usr/lib/faketime/libfaketimeMT.so.1");
    libraries
        .chain([beside])
        .find(|file| file.is_file())
        .context("no libfaketime found: run scripts/setup-services faketime")
}

/// A wall clock that the test sets, for any number of programs.
struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    fn new(place: &Path) -> Result<Self> {
        let clock = Self { library: library()?, file: place.join("clock") };
        clock.set(0)?;
        Ok(clock)
    }

    /// Sets it so many seconds before or behind the true one.
    fn set(&self, offset: i64) -> Result<()> {
        // Renamed into place: nobody reads half of it.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{offset:+}\n"))?;
        Ok(fs::rename(new, &self.file)?)
    }

    fn of<P: Program>(&self, start: Start<P>) -> Start<P> {
        start
            .env("LD_PRELOAD", self.library.display())
            .env("FAKETIME_TIMESTAMP_FILE", self.file.display())
            .env("FAKETIME_NO_CACHE", 1)
            .env("FAKETIME_DONT_FAKE_MONOTONIC", 1)
    }
}

/// The clock by which a program has dated the newest line of its log is so many seconds off.
fn check_clock(process: &Process, offset: i64) -> Result<()> {
    let log = process.log();
    let line = log.lines().last().context("it has logged something")?;
    let at: Timestamp = line.split_whitespace().next().context("a date")?.parse().with_context(|| line.to_owned())?;
    let off = at.as_second() - Timestamp::now().as_second() - offset;
    ensure!((-60..=5).contains(&off), "its clock should be {offset} s off, but says {line:?}");
    Ok(())
}

/// On one machine all programs have one clock; with PostgreSQL they may be on several.
#[tokio::test]
async fn workers_whose_clocks_are_an_hour_off_share_the_work_and_keep_their_leases() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let (fast_place, slow_place) = (stack.place().join("fast"), stack.place().join("slow"));
    fs::create_dir(&fast_place)?;
    fs::create_dir(&slow_place)?;
    let (fast_clock, slow_clock) = (Clock::new(&fast_place)?, Clock::new(&slow_place)?);
    fast_clock.set(HOUR)?;
    slow_clock.set(-HOUR)?;
    let fast = fast_clock.of(stack.test_worker(&log).short_lease()).env("TASKLANE_CONCURRENCY", 4).start().await?;
    let slow = slow_clock.of(stack.test_worker(&log).short_lease()).env("TASKLANE_CONCURRENCY", 4).start().await?;
    check_clock(&fast.process, HOUR)?;
    check_clock(&slow.process, -HOUR)?;

    // Some fail first: their next attempt's time is set by one of the workers, and looked at by all programs.
    let mut batch = tasks(30, "test.work", &json!({"work_ms": 300, "failures": 1}));
    // Some are longer than a lease: whoever judged it by the wrong clock would take them over.
    batch.extend(tasks(4, "test.work", &json!({"work_ms": (LEASE_TTL * 2).as_millis()})));
    let submitted = ids(&producer.api.submit_batch(&batch).await?);
    for worker in [&fast, &slow] {
        started_at(&log, worker.process.pid(), 8, LIMIT).await?;
    }
    let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
    check_completed(&ended, &submitted)?;
    assert!(ended.iter().all(|task| task.errors.iter().all(|error| error.kind == "error")), "{ended:#?}");
    assert_eq!(log.starts()?.len(), 30 * 2 + 4, "nothing was started in vain");
    log.check_fences_rise()?;
    log.check_no_overlap()?;
    for worker in [&fast, &slow] {
        let entered = worker.process.log().matches("the worker has entered the ledger").count();
        assert_eq!(entered, 1, "a lease was lost:\n{}", worker.process.log());
    }
    nothing_left(&stack.vhost).await
}

on_both_ledgers! {
    async fn a_wall_clock_that_jumps_by_hours_costs_no_lease_and_starts_nothing_twice(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let clock = Clock::new(stack.place())?;
        let producer = clock.of(stack.producer()).start().await?;
        let worker = |at_once| clock.of(stack.test_worker(&log).short_lease()).env("TASKLANE_CONCURRENCY", at_once).start();
        let workers = [worker(4).await?, worker(4).await?];
        let mut submitted = ids(&[]);
        // Set back and forth. Longer than a lease, and more than run at once: some wait in the broker when it jumps.
        let work = json!({"work_ms": (LEASE_TTL * 3 / 2).as_millis()});
        for offset in [-HOUR, 0, HOUR] {
            let (started, before) = (log.starts()?.len(), submitted.len());
            submitted.extend(ids(&producer.api.submit_batch(&tasks(16, "test.work", &work)).await?));
            log.started(started + 8, LIMIT).await?;
            clock.set(offset)?;
            submitted.extend(ids(&producer.api.submit_batch(&tasks(4, "test.work", &json!({}))).await?));
            // What waits when the ledger's own clock is set back goes on waiting until that has caught up.
            let goes_on = if offset < 0 { before + 8 + 4 } else { submitted.len() };
            eventually(LIMIT, &format!("{goes_on} tasks to be completed at {offset} s"), async || {
                let completed = producer.api.list_all(&[("state", "completed")]).await?.len();
                ensure!(completed >= goes_on, "{completed} of them are");
                Ok(Some(()))
            })
            .await?;
        }
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        assert!(ended.iter().all(|task| task.attempt == 1), "{ended:#?}");
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        for worker in &workers {
            let entered = worker.process.log().matches("the worker has entered the ledger").count();
            assert_eq!(entered, 1, "a lease was lost:\n{}", worker.process.log());
        }
        nothing_left(&stack.vhost).await
    }
}

/// A clock that is eight days ahead for a while: schedules go on when it is back, and nothing is deleted that is not old.
#[tokio::test]
async fn a_clock_that_leaps_by_days_and_comes_back_deletes_nothing_and_stops_no_schedule() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let clock = Clock::new(stack.place())?;
    let producer = clock.of(stack.producer()).start().await?;
    let worker = clock.of(stack.test_worker(&log)).start().await?;
    let schedule = json!({"cron": "* * * * * *", "timezone": "UTC", "task": {"kind": "test.work"}});
    let answer = producer.api.raw_put("/v1/schedules/seconds", &schedule).await?;
    ensure!(answer.status < 300, "{}", answer.text());
    let done = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
    producer.api.in_state(&done, "completed", LIMIT).await?;
    let fired_more = async || {
        let fired = async || -> Result<u64> {
            let shown: serde_json::Value = producer.api.raw_get("/v1/schedules/seconds").await?.expect(&[200])?;
            Ok(shown["ticks"]["fired"].as_u64().unwrap_or_default())
        };
        let before = fired().await?;
        eventually(LIMIT, "two ticks more", async || Ok((fired().await? >= before + 2).then_some(()))).await
    };
    fired_more().await?;

    clock.set(8 * 24 * HOUR)?;
    // Each process looks every half minute.
    producer.process.logged("clock has leapt", LIMIT).await?;
    worker.process.logged("clock has leapt", LIMIT).await?;
    fired_more().await?;
    producer.api.get(&done).await.context("a finished task is kept in the leap")?;

    clock.set(0)?;
    fired_more().await?;
    let told = [&producer.process, &worker.process].map(|process| process.log().matches("clock has gone back").count());
    assert_eq!(told.iter().sum::<usize>(), 1, "{told:?}");
    producer.api.get(&done).await.context("a finished task is kept after the leap")?;
    Ok(())
}
