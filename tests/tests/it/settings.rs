//! What keeps a program from starting: said in one clear line, with the right exit code, and never with a password.

use std::net::TcpListener;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection};
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::services;
use tasklane_tests::stack::{Program, Stack, Start};
use url::Url;

const LIMIT: Duration = Duration::from_secs(30);

/// Stands in the addresses of these tests and must not be seen again.
const PASSWORD: &str = "s3cr3t-Pa55";

/// The exit code for settings that make no sense.
const BAD_SETTINGS: i32 = 2;

/// The exit code when something that is needed is not there.
const UNAVAILABLE: i32 = 69;

/// The exit code of a worker whose metrics cannot be served.
const METRICS_ADDR_TAKEN: i32 = 70;

/// What an idle worker may have in memory.
const IDLE_WORKER_MIB_MAX: u64 = if cfg!(debug_assertions) { 60 } else { 30 };

/// A handler, so that a worker has a reason to start.
const HANDLER: &str = "[[command]]\nkind = \"test.true\"\nargv = [\"true\"]\n";

/// The program ends with this code and says all of these.
async fn refuses<P: Program>(start: Start<P>, code: i32, words: &[&str]) -> Result<()> {
    let (status, log) = start.fail().await?;
    check(status, &log, code, words);
    Ok(())
}

fn check(status: ExitStatus, log: &str, code: i32, words: &[&str]) {
    assert_eq!(status.code(), Some(code), "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is not said: {log}");
    }
    assert!(!log.contains(PASSWORD), "the password is told: {log}");
    assert!(!log.contains("panicked"), "{log}");
}

/// Both programs, started with the same additions.
macro_rules! both {
    ($stack:ident, $code:expr, $words:expr, |$start:ident| $with:expr) => {{
        let $start = $stack.producer();
        refuses($with, $code, $words).await?;
        let $start = $stack.worker();
        refuses($with, $code, $words).await?;
    }};
}

#[tokio::test]
async fn a_bad_settings_file_is_refused_with_file_line_and_key() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let url = format!("ledger_url = \"postgres://user:{PASSWORD}@127.0.0.1/db\"\n");
    both!(stack, BAD_SETTINGS, &["tasklane-", ".toml:2:7: ", "key `log`"], |start| start
        .config(&format!("{url}log = 3")));
    both!(stack, BAD_SETTINGS, &[".toml:2:1: unknown field `lease_ttl`", "lease_ttl_ms"], |start| start
        .config(&format!("{url}lease_ttl = 3")));
    both!(stack, BAD_SETTINGS, &[".toml:3:8: ", "key `kind`"], |start| start
        .config(&format!("{url}[[command]]\nkind = \"no kind\"\nargv = [\"true\"]")));
    both!(stack, BAD_SETTINGS, &[".toml:2:"], |start| start
        .config(&format!("log = \"info\"\n{}", url.replace("\"\n", ""))));
    both!(stack, BAD_SETTINGS, &[".toml:1:"], |start| start
        .config(&format!("postgres://user:{PASSWORD}@127.0.0.1/db?sslmode=disable")));
    both!(stack, BAD_SETTINGS, &["/nowhere/tasklane.toml"], |start| start
        .env("TASKLANE_CONFIG", "/nowhere/tasklane.toml"));
    both!(stack, BAD_SETTINGS, &["--no-such-flag"], |start| start.arg("--no-such-flag"));
    both!(stack, BAD_SETTINGS, &["max_crashes", "at least 1"], |start| start.env("TASKLANE_MAX_CRASHES", 0));
    both!(stack, BAD_SETTINGS, &["bundle_ms", "at most 60000"], |start| start.env("TASKLANE_BUNDLE_MS", u64::MAX));
    both!(stack, BAD_SETTINGS, &["trace_ratio", "from 0 to 1, but is 1.5"], |start| start
        .env("TASKLANE_TRACE_RATIO", 1.5));
    Ok(())
}

#[tokio::test]
async fn a_bad_address_is_refused_without_its_password() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    both!(stack, BAD_SETTINGS, &["amqp_url", "must be"], |start| start
        .config(HANDLER)
        .env("TASKLANE_AMQP_URL", format!("http://user:{PASSWORD}@127.0.0.1")));
    for url in ["127.0.0.1:4318".to_owned(), format!("http://user:{PASSWORD}@127.0.0.1:4318")] {
        both!(stack, BAD_SETTINGS, &["otlp_url", "must be", "OTEL_EXPORTER_OTLP_HEADERS"], |start| start
            .env("TASKLANE_OTLP_URL", &url));
    }
    for url in [
        format!("mysql://user:{PASSWORD}@127.0.0.1/db"),
        format!("postgres://user:{PASSWORD}@127.0.0.1:port/db"),
        format!("user:{PASSWORD}@127.0.0.1/db"),
    ] {
        both!(stack, BAD_SETTINGS, &["ledger_url", "postgres://"], |start| start
            .config(HANDLER)
            .env("TASKLANE_LEDGER_URL", &url));
    }
    Ok(())
}

#[tokio::test]
async fn settings_that_make_no_sense_together_are_refused_both_named() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let pair = &["lease_renew_ms", "lease_ttl_ms", "3000"];
    for renew_ms in [3000, 4000] {
        let worker = stack.worker().env("TASKLANE_LEASE_TTL_MS", 3000).env("TASKLANE_LEASE_RENEW_MS", renew_ms);
        refuses(worker, BAD_SETTINGS, pair).await?;
    }
    refuses(stack.worker().config("lease_ttl_ms = 3000\nlease_renew_ms = 3000"), BAD_SETTINGS, pair).await
}

#[tokio::test]
async fn handlers_that_cannot_work_are_refused() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let twice = stack.worker().config(HANDLER).config(HANDLER);
    refuses(twice, BAD_SETTINGS, &["test.true", "two handlers"]).await?;
    let in_rust = stack.worker().binary("test-worker").config("[[command]]\nkind = \"test.work\"\nargv = [\"true\"]");
    refuses(in_rust, BAD_SETTINGS, &["test.work", "two handlers"]).await?;
    let missing = stack.worker().config("[[command]]\nkind = \"test.gone\"\nargv = [\"/nowhere/program\"]");
    refuses(missing, BAD_SETTINGS, &["test.gone", "/nowhere/program"]).await?;
    let none = stack.worker();
    refuses(none, BAD_SETTINGS, &["no handlers", "[[command]]"]).await
}

#[tokio::test]
async fn a_ledger_that_cannot_be_reached_is_refused_at_the_start() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let mut wrong: Url = services::shared().await?.postgres_url.parse()?;
    wrong.set_password(Some(PASSWORD)).ok().context("the URL takes a password")?;
    for url in [
        format!("postgres://user:{PASSWORD}@127.0.0.1:{port}/db"),
        format!("postgres://user:{PASSWORD}@{}/db", silent.local_addr()?),
        wrong.to_string(),
        "sqlite:///nowhere/ledger.db".to_owned(),
    ] {
        both!(stack, UNAVAILABLE, &["the ledger"], |start| start.config(HANDLER).env("TASKLANE_LEDGER_URL", &url));
    }
    Ok(())
}

#[tokio::test]
async fn a_newer_ledger_on_sqlite_is_refused() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    std::fs::write(stack.ledger.sqlite_file().context("a file")?, empty_sqlite_file(999))?;
    refuses_newer_schema(&stack).await
}

#[tokio::test]
async fn a_newer_ledger_on_postgres_is_refused() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    drop(stack.producer().start().await?);
    let mut connection = PgConnection::connect(&stack.ledger.url()).await?;
    sqlx::query("UPDATE tasklane.schema_version SET version = 999").execute(&mut connection).await?;
    connection.close().await?;
    refuses_newer_schema(&stack).await
}

/// A database without tables whose `user_version` is this one; byte by byte as SQLite's file format has it.
pub(crate) fn empty_sqlite_file(user_version: u32) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"SQLite format 3\0");
    // Page size, format versions, and the fractions that must be so.
    put(16, &[0x10, 0, 1, 1, 0, 64, 32, 32]);
    // Change counter, and size in pages.
    put(24, &[0, 0, 0, 1, 0, 0, 0, 1]);
    // Schema format 4, UTF-8.
    put(47, &[4]);
    put(59, &[1]);
    put(60, &user_version.to_be_bytes());
    // The change counter for which the size is valid.
    put(95, &[1]);
    // An empty leaf of the table of tables, whose cells would begin at the page's end.
    put(100, &[13, 0, 0, 0, 0, 0x10, 0, 0]);
    page
}

async fn refuses_newer_schema(stack: &Stack) -> Result<()> {
    let words = &["schema version 999", "at least as new"];
    both!(stack, UNAVAILABLE, words, |start| start.config(HANDLER));
    Ok(())
}

#[tokio::test]
async fn what_is_in_the_ledgers_place_is_named_and_refused() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    stack.ledger.execute("CREATE SCHEMA tasklane; CREATE TABLE tasklane.tasks (title text)").await?;
    let words = &["the schema tasklane of the database", "holds tasks, which is not the ledger's"];
    both!(stack, UNAVAILABLE, words, |start| start.config(HANDLER));
    Ok(())
}

#[tokio::test]
async fn an_address_in_use_is_refused() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let addr = taken.local_addr()?.to_string();
    refuses(stack.producer().env("TASKLANE_HTTP_ADDR", &addr), UNAVAILABLE, &[&addr]).await?;
    let worker = stack.worker().config(HANDLER).env("TASKLANE_METRICS_ADDR", &addr);
    refuses(worker, METRICS_ADDR_TAKEN, &["metrics_addr", &addr]).await
}

#[tokio::test]
async fn a_broker_that_is_away_is_waited_for_and_its_password_not_told() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let url = format!("amqp://user:{PASSWORD}@127.0.0.1:{port}/%2f");
    let wrong = stack.vhost.url().replace(&format!(":{}@", stack.vhost.node().password), &format!(":{PASSWORD}@"));
    for url in [url, wrong] {
        let producer = stack.producer().env("TASKLANE_AMQP_URL", &url).env("TASKLANE_LOG", "debug").start().await?;
        let mut worker =
            stack.worker().config(HANDLER).env("TASKLANE_AMQP_URL", &url).env("TASKLANE_LOG", "debug").spawn()?;
        for process in [&producer.process, &worker.process] {
            process.logged("the broker connection failed, trying again", LIMIT).await?;
            assert!(!process.log().contains(PASSWORD), "the password is told: {}", process.log());
        }
        assert_eq!(worker.process.has_exited()?, None);
        assert!(!worker.is_ready().await?);
    }
    Ok(())
}

#[tokio::test]
async fn an_idle_worker_is_small() -> Result<()> {
    for ledger in [LedgerKind::Sqlite, LedgerKind::Postgres] {
        let stack = Stack::new(ledger).await?;
        let worker = stack.worker().config(HANDLER).start().await?;
        let kib = worker.process.rss_bytes()? / 1024;
        println!("{ledger}: an idle worker has {:.1} MiB in memory", kib as f64 / 1024.0);
        assert!(kib < IDLE_WORKER_MIB_MAX * 1024, "{kib} KiB");
    }
    Ok(())
}

/// jemalloc passes over settings that it does not find, without a word.
#[tokio::test]
async fn the_producers_allocator_finds_its_settings() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let telling = stack.producer().env("_RJEM_MALLOC_CONF", "stats_print:true");
    let settings =
        ["opt.tcache: false", "opt.background_thread: true", "opt.dirty_decay_ms: 1000", "opt.muzzy_decay_ms: 0"];
    refuses(telling.env("TASKLANE_TRACE_RATIO", 1.5), BAD_SETTINGS, &settings).await
}
