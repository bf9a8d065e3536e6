//! A ledger that is killed, stands still, or has no room: what it has taken is kept, and work goes on when it is back.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tasklane_tests::api::Api;
use tasklane_tests::eventually;
use tasklane_tests::ledger::{Ledger, LedgerKind};
use tasklane_tests::postgres::{Database, Postgres};
use tasklane_tests::stack::Stack;

use crate::faults_load::PatientLoad;
use crate::load::{check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// How big the disk of the test of a full one is.
const DISK_BYTES: u64 = 8 << 20;

/// A world whose ledger is in a server of the test's own. Drop the server last.
async fn own_server() -> Result<(Postgres, Stack)> {
    let server = Postgres::private().await?;
    let mut stack = Stack::new(LedgerKind::Sqlite).await?;
    stack.ledger = Ledger::Postgres(server.database().await?);
    Ok((server, stack))
}

#[tokio::test]
async fn a_postgres_killed_twice_under_load_loses_and_doubles_nothing() -> Result<()> {
    let (mut server, stack) = own_server().await?;
    let log = stack.operation_log()?;
    let mut producer = stack.producer().start().await?;
    let mut workers =
        [stack.test_worker(&log).short_lease().start().await?, stack.test_worker(&log).short_lease().start().await?];
    let load = PatientLoad::of(&producer.api, json!({"kind": "test.work", "args": {"work_ms": 100}}));
    for round in 1..=2 {
        log.started(round * 50, LIMIT).await?;
        let refused = load.so_far().await.refused;
        server.kill().await?;
        more_refused(&load, refused + 5).await?;
        server.start().await?;
        taken_again(&load).await?;
    }
    let submitted = load.stop().await?.accepted;
    let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
    check_completed(&ended, &submitted)?;
    assert_eq!(ended.len(), submitted.len(), "repetitions under the same key have made other tasks");
    log.check_fences_rise()?;
    log.check_no_overlap()?;
    assert_eq!(producer.process.has_exited()?, None);
    for worker in &mut workers {
        assert_eq!(worker.process.has_exited()?, None);
    }
    nothing_left(&stack.vhost).await
}

/// As after a failover, when the server that was the primary takes reads only: both programs say so, and whatever takes
/// writes again is found among the servers of the address.
#[tokio::test]
async fn a_postgres_that_takes_no_writes_is_told_and_the_one_that_does_is_found() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let log = stack.operation_log()?;
    let Ledger::Postgres(database) = &stack.ledger else { anyhow::bail!("the ledger is in PostgreSQL") };
    let several = database.url().replacen('@', "@127.0.0.1:1,", 1) + "?target_session_attrs=read-write";
    let producer = stack.producer().env("TASKLANE_LEDGER_URL", &several).start().await?;
    let worker = stack.test_worker(&log).short_lease().env("TASKLANE_LEDGER_URL", &several).start().await?;
    let task = json!({"kind": "test.once"});
    assert_eq!(producer.api.submit_and_wait(&task, 30_000).await?.0.state, "completed");
    set_read_only(database, "on").await?;
    eventually(LIMIT, "both to say that the server takes no writes", async || {
        let answers = [producer.api.raw_get("/readyz").await?, worker.get("/readyz").await?];
        Ok(answers.iter().all(|it| it.status == 503 && it.text().contains("takes no writes")).then_some(()))
    })
    .await?;
    set_read_only(database, "off").await?;
    eventually(LIMIT, "both to be ready again", async || {
        let answers = [producer.api.raw_get("/readyz").await?, worker.get("/readyz").await?];
        Ok(answers.iter().all(|it| it.status == 200).then_some(()))
    })
    .await?;
    assert_eq!(producer.api.submit_and_wait(&task, 60_000).await?.0.state, "completed");
    nothing_left(&stack.vhost).await
}

/// For the sessions that come, which all are then.
async fn set_read_only(database: &Database, value: &str) -> Result<()> {
    let mut operator = PgConnection::connect(database.url()).await?;
    sqlx::query("SET default_transaction_read_only = off").execute(&mut operator).await?;
    let name: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&mut operator).await?;
    let sql = format!("ALTER DATABASE {name} SET default_transaction_read_only = {value}");
    sqlx::query(AssertSqlSafe(sql)).execute(&mut operator).await?;
    operator.close().await?;
    database.disconnect_all().await
}

/// What was sent to the server before is executed when it goes on, and by then comes from workers whose lease has ended.
#[tokio::test]
async fn a_postgres_that_stands_still_for_longer_than_a_lease_loses_and_doubles_nothing() -> Result<()> {
    let (server, stack) = own_server().await?;
    let log = stack.operation_log()?;
    let mut producer = stack.producer().start().await?;
    let mut workers =
        [stack.test_worker(&log).short_lease().start().await?, stack.test_worker(&log).short_lease().start().await?];
    let load = PatientLoad::of(&producer.api, json!({"kind": "test.work", "args": {"work_ms": 200}}));
    log.started(50, LIMIT).await?;
    server.freeze()?;
    for worker in &workers {
        worker.process.logged("the lease cannot be proven any more", LIMIT).await?;
    }
    let refused = load.so_far().await.refused;
    more_refused(&load, refused + 5).await?;
    server.thaw()?;
    taken_again(&load).await?;
    let submitted = load.stop().await?.accepted;
    let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
    check_completed(&ended, &submitted)?;
    assert_eq!(ended.len(), submitted.len(), "repetitions under the same key have made other tasks");
    log.check_fences_rise()?;
    log.check_no_overlap()?;
    assert_eq!(producer.process.has_exited()?, None);
    for worker in &mut workers {
        assert_eq!(worker.process.has_exited()?, None);
    }
    nothing_left(&stack.vhost).await
}

#[tokio::test]
async fn a_full_disk_refuses_submissions_and_loses_and_doubles_nothing() -> Result<()> {
    let mut stack = Stack::new(LedgerKind::Sqlite).await?;
    let Ledger::Sqlite(folder) = &stack.ledger else { anyhow::bail!("the ledger is a file") };
    let disk = match SmallDisk::mount(folder.path()) {
        Ok(disk) => disk,
        Err(reason) => {
            println!("not tested, since no small disk can be mounted here (that needs root): {reason:#}");
            return Ok(());
        }
    };
    let log = stack.operation_log()?;
    let mut producer = stack.producer().start().await?;
    let mut worker = stack.test_worker(&log).short_lease().start().await?;
    let args = json!({"work_ms": 100, "answer": "x".repeat(2000)});
    let load = PatientLoad::of(&producer.api, json!({"kind": "test.work", "args": args}));
    log.started(50, LIMIT).await?;

    disk.fill()?;
    more_refused(&load, 20).await?;
    refuses_a_batch(&producer.api).await?;
    disk.make_room()?;
    taken_again(&load).await?;

    let mut submitted = load.stop().await?.accepted;
    submitted.extend(ids(&producer.api.submit_batch(&tasks(10, "test.work", &json!({}))).await?));
    let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
    check_completed(&ended, &submitted)?;
    assert_eq!(ended.len(), submitted.len(), "what was refused was recorded all the same");
    log.check_fences_rise()?;
    log.check_no_overlap()?;
    assert_eq!((producer.process.has_exited()?, worker.process.has_exited()?), (None, None));
    nothing_left(&stack.vhost).await?;
    drop((producer, worker));
    drop(disk);
    stack.ledger = Ledger::fresh(LedgerKind::Sqlite).await?;
    Ok(())
}

/// A batch of which a part would fit is refused as a whole: the count of all tasks at the end tells.
async fn refuses_a_batch(api: &Api) -> Result<()> {
    let args = json!({"answer": "x".repeat(1000)});
    let batch = json!({"tasks": tasks(5000, "test.work", &args)});
    let answer = api.raw_post("/v1/tasks/batch", &batch).await?;
    let problem = answer.problem()?;
    ensure!(answer.status == 503 && problem["code"] == "ledger_unavailable", "{problem}");
    Ok(())
}

async fn more_refused(load: &PatientLoad, count: usize) -> Result<()> {
    eventually(LIMIT, &format!("{count} submissions to be refused"), async || {
        Ok((load.so_far().await.refused >= count).then_some(()))
    })
    .await
}

async fn taken_again(load: &PatientLoad) -> Result<()> {
    let accepted = load.so_far().await.accepted.len();
    eventually(LIMIT, "submissions to be taken again", async || {
        Ok((load.so_far().await.accepted.len() >= accepted + 20).then_some(()))
    })
    .await
}

/// A file system in memory with little room, unmounted with this guard. Whoever uses it must have ended before.
struct SmallDisk {
    place: PathBuf,
}

impl SmallDisk {
    fn mount(place: &Path) -> Result<Self> {
        let size = format!("size={DISK_BYTES},mode=700");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tasklane-test"]).arg(place))?;
        Ok(Self { place: place.to_owned() })
    }

    fn filler(&self) -> PathBuf {
        self.place.join("filler")
    }

    /// Takes all the room that is left.
    fn fill(&self) -> Result<()> {
        let filled = std::fs::write(self.filler(), vec![1; DISK_BYTES as usize]);
        let error = filled.err().context("the disk has taken more than its size")?;
        ensure!(error.kind() == std::io::ErrorKind::StorageFull, "{error}");
        Ok(())
    }

    fn make_room(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(&self.place)) {
            eprintln!("clean-up failed: {error:#}");
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// What is answered with 202 is in the file that the next start opens, or nothing is.
#[tokio::test]
async fn a_file_that_is_deleted_under_running_programs_takes_nothing_more() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).start().await?;
    let file = stack.ledger.sqlite_file().context("it is a file")?;
    let aside = file.with_extension("aside");
    std::fs::rename(&file, &aside)?;
    let answer = producer.api.raw_post("/v1/tasks", &json!({"kind": "test.work"})).await?;
    ensure!(answer.status == 503 && answer.text().contains("ledger_broken"), "{}", answer.text());
    let ready = producer.api.raw_get("/readyz").await?;
    ensure!(ready.status == 503 && ready.text().contains("was deleted or replaced"), "{}", ready.text());
    let problem = worker.problem().await?.unwrap_or_default();
    ensure!(problem.contains("was deleted or replaced"), "{problem}");
    // Without anybody's asking.
    for process in [&producer.process, &worker.process] {
        process.logged("ERROR", LIMIT).await?;
        process.logged("the ledger takes nothing more", LIMIT).await?;
    }
    std::fs::rename(&aside, &file)?;
    let done = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
    producer.api.in_state(&done, "completed", LIMIT).await?;
    Ok(())
}
