//! The examples: each is run as its header says, but on the test's own broker, ledger and ports.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::Api;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::on_both_ledgers;
use tasklane_tests::process::{Launch, Process, binary};
use tasklane_tests::stack::{Producer, Stack};

/// How long an example may take.
const LIMIT: Duration = Duration::from_secs(120);

/// An example with the settings of a stack, not yet started.
fn example(name: &str, stack: &Stack, args: &[OsString]) -> Result<Launch> {
    Ok(in_repository(name, binary(&format!("examples/{name}"))?, stack).args(args.to_vec()))
}

/// A program that starts in the repository's folder, as the headers have it, and sees nothing else of the environment.
fn in_repository(name: &str, program: impl Into<PathBuf>, stack: &Stack) -> Launch {
    Launch::new(name, program)
        .bare_env()
        .dir(repository())
        .env("TASKLANE_AMQP_URL", stack.vhost.url())
        .env("TASKLANE_LEDGER_URL", stack.ledger.url())
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs a client that talks to a producer; answers what it printed.
async fn run(name: &str, stack: &Stack, producer: &Producer, args: &[OsString]) -> Result<String> {
    let mut process = example(name, stack, args)?.env("TASKLANE_URL", producer.api.url("")).spawn()?;
    let status = process.exited(LIMIT).await?;
    ensure!(status.success(), "{name}: {status}\n{}", process.log());
    Ok(process.log())
}

/// The task once it has ended, as `curl '…?wait_ms=…' --json …` shows it.
async fn ended(api: &Api, task: Value) -> Result<Value> {
    let answer = api.raw_post("/v1/tasks?wait_ms=30000", &task).await?;
    let task = answer.json()?;
    ensure!(answer.status == 200, "it has not ended: {} {task}", answer.status);
    Ok(task)
}

#[tokio::test]
async fn hello_is_a_whole_worker() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    let _worker = example("hello", &stack, &[])?.spawn()?;
    let task = ended(&producer.api, json!({"kind": "hello", "args": {"name": "Ada"}})).await?;
    assert_eq!(task["result"], "Hello, Ada! This is attempt 1.");
    Ok(())
}

#[tokio::test]
async fn hello_has_the_exit_codes_of_a_worker() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let mut bad = example("hello", &stack, &["--concurrency".into(), "0".into()])?.spawn()?;
    assert_eq!(bad.exited(LIMIT).await?.code(), Some(2));
    let mut lost = example("hello", &stack, &[])?.env("TASKLANE_LEDGER_URL", "sqlite:///nowhere/t.db").spawn()?;
    assert_eq!(lost.exited(LIMIT).await?.code(), Some(69), "{}", lost.log());
    Ok(())
}

#[tokio::test]
async fn thumbnails_of_a_folder() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    let to = stack.place().join("thumbnails");
    let printed = run("thumbnails", &stack, &producer, &["examples/pictures".into(), to.clone().into()]).await?;
    assert!(printed.contains("dusk.jpg -> 128 x 85") && printed.contains("3 thumbnails"), "{printed}");
    let mut made: Vec<_> = std::fs::read_dir(&to)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    made.sort();
    assert_eq!(made, ["dusk.jpg", "rings.png", "tiles.png"]);
    Ok(())
}

#[tokio::test]
async fn fan_in_counts_the_primes() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let producer = stack.producer().start().await?;
    let printed = run("fan_in", &stack, &producer, &["100000".into()]).await?;
    assert!(printed.contains("9592 primes below 100000"), "{printed}");
    Ok(())
}

#[tokio::test]
async fn idempotent_books_once() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    let printed = run("idempotent", &stack, &producer, &[]).await?;
    assert!(printed.contains("the balance is 1000 cents"), "{printed}");
    Ok(())
}

on_both_ledgers! {
    async fn transactional_books_once(ledger) {
        let stack = Stack::new(ledger).await?;
        let producer = stack.producer().start().await?;
        let printed = run("transactional", &stack, &producer, &[]).await?;
        assert!(printed.contains("2 attempts, and the balance is 2000 cents"), "{printed}");
        Ok(())
    }
}

#[tokio::test]
async fn an_example_says_when_its_ledger_is_not_the_producers() -> Result<()> {
    let (stack, other) = (Stack::new(LedgerKind::Sqlite).await?, Stack::new(LedgerKind::Sqlite).await?);
    let producer = stack.producer().start().await?;
    let _its_own = other.producer().start().await?;
    let error = run("idempotent", &other, &producer, &[]).await.expect_err("another ledger").to_string();
    assert!(error.contains("set TASKLANE_LEDGER_URL to the producer's ledger"), "{error}");
    Ok(())
}

#[tokio::test]
async fn python_counts_words() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    let _worker = worker(&stack, &repository().join("examples/python/tasklane.toml"))?;
    let task = ended(&producer.api, json!({"kind": "text.count", "args": {"text": "to be or not to be"}})).await?;
    assert_eq!(task["result"]["words"], 6);
    assert_eq!(task["result"]["most_common"][0], json!(["to", 2]));
    assert_eq!((&task["result"]["task"], &task["result"]["fence"]), (&task["id"], &task["fence"]));

    let task = ended(&producer.api, json!({"kind": "text.count", "args": {"text": 7}})).await?;
    assert_eq!((task["state"].as_str(), task["attempt"].as_i64()), (Some("discarded"), Some(1)), "{task}");
    assert_eq!(
        task["errors"][0]["message"].as_str().map(|text| text.contains("must be a string")),
        Some(true),
        "{task}"
    );
    Ok(())
}

#[tokio::test]
async fn an_http_service_is_called_until_it_has_time() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    let python = in_repository("service", "python3", &stack);
    let service = python.args(["examples/http/service.py", "0"]).spawn()?;
    service.logged("listening on http://", LIMIT).await?;
    let log = service.log();
    let url = log.split_whitespace().find(|word| word.starts_with("http://")).context("it says where it listens")?;
    let settings = std::fs::read_to_string(repository().join("examples/http/tasklane.toml"))?;
    assert!(settings.contains("http://127.0.0.1:9000/"), "{settings}");
    let file = stack.place().join("tasklane.toml");
    std::fs::write(&file, settings.replace("http://127.0.0.1:9000", url))?;
    let _worker = worker(&stack, &file)?;

    let task = ended(&producer.api, json!({"kind": "crm.sync", "args": {"customer": 7}})).await?;
    assert_eq!(task["result"], json!({"customer": 7, "synced_in_attempt": 2}), "{task}");
    let task = ended(&producer.api, json!({"kind": "crm.sync", "args": {}})).await?;
    assert_eq!((task["state"].as_str(), task["attempt"].as_i64()), (Some("discarded"), Some(1)), "{task}");
    Ok(())
}

/// `tasklane-worker` with a settings file, in the repository's folder.
fn worker(stack: &Stack, settings: &Path) -> Result<Process> {
    in_repository("tasklane-worker", binary("tasklane-worker")?, stack).env("TASKLANE_CONFIG", settings).spawn()
}

#[tokio::test]
async fn the_demo_adds_up_and_leaves_nothing_behind() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let home = std::env::var_os("HOME").context("HOME is set")?;
    // Its temporary folder is in the test's.
    let demo = example("demo", &stack, &[])?.env("ONCE", "1").env("TMPDIR", stack.place()).env("HOME", home);
    let mut demo = demo.spawn()?;
    let status = demo.exited(LIMIT).await?;
    let printed = demo.log();
    ensure!(status.success(), "{status}\n{printed}");
    assert!(printed.contains("runs per task    min 1, max 1"), "{printed}");
    assert!(printed.contains("sampled agree with sha256sum"), "{printed}");
    assert_eq!(std::fs::read_dir(stack.place())?.count(), 0, "its folder is gone");
    assert_eq!(stack.vhost.depth("tasklane.q.demo").await?, Some(0));
    Ok(())
}
