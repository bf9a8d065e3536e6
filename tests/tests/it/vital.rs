//! A part of a process that it cannot do without ends it by a panic, and does not leave it half alive.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use tasklane_common::vital::EXIT_PANICKED;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::stack::Stack;

const LIMIT: Duration = Duration::from_secs(60);

/// What both programs have, what only one has, and what they have with SQLite.
const BOTH: [&str; 13] = [
    "relay",
    "ticker",
    "gather",
    "rescue",
    "reconcile",
    "release",
    "prune",
    "publisher",
    "marker",
    "control",
    "events",
    "events wish",
    "metrics",
];
const PRODUCER: [&str; 4] = ["completions", "events feed", "events listener", "intake"];
const WORKER: [&str; 8] = ["lease", "lease watchdog", "cancel", "audit", "pause", "consumer", "signals", "health"];
const LEDGER: [&str; 2] = ["ledger writer", "ledger answers"];

/// How many programs start at once.
const AT_ONCE: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_that_panics_ends_its_process() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    // The ledger is made before many processes want to make it at once.
    drop(stack.producer().start().await?);
    let both = BOTH.into_iter().chain(LEDGER);
    let producers = both.clone().chain(PRODUCER).map(|role| (true, role));
    let workers = both.chain(WORKER).map(|role| (false, role));
    let ended = futures::stream::iter(producers.chain(workers)).map(|(is_producer, role)| {
        let stack = &stack;
        async move {
            let mut process = match is_producer {
                true => stack.producer().env("TASKLANE_TEST_PANIC", role).env("RUST_BACKTRACE", 0).spawn()?.process,
                false => {
                    stack
                        .worker()
                        .binary("test-worker")
                        .env("TASKLANE_TEST_PANIC", role)
                        .env("RUST_BACKTRACE", 0)
                        .spawn()?
                        .process
                }
            };
            let status = process.exited(LIMIT).await.with_context(|| format!("{role} (producer: {is_producer})"))?;
            let log = process.log();
            ensure!(status.code() == Some(EXIT_PANICKED), "{role}: {status}\n{log}");
            ensure!(log.contains("that it cannot do without") && log.contains(role), "{role} is not named:\n{log}");
            Ok(())
        }
    });
    ended.buffer_unordered(AT_ONCE).collect::<Vec<Result<()>>>().await.into_iter().collect()
}
