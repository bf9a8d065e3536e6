//! Measures this machine: the broker alone, and Tasklane on both ledgers, in one run.
//!
//! ```text
//! TASKS=30000 REPEATS=3 BYTES=256 PLACES=256 ROWS=raw,e2e test-services -- bench
//! ```
//!
//! The table goes to standard output, and all figures as JSON into `bench.json` beside the binaries. The rows: `raw`, `e2e`
//! (with latency), `cost` (µs of processor time a task in each program), `drain` (with accept), `delays`, `due` (100,000 at
//! once), `shapes` (larger tasks, more queues, kinds and workers), `scale`, `takeover`, `overhead`, `memory` (1,000,000
//! submissions), and only when it is asked for `backlog` (1 M rows that wait and 10 M that have finished).

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use tasklane_tests::bench::growth::{self, Backlog};
use tasklane_tests::bench::{self, Plan, Row, cost, rows};
use tasklane_tests::ledger::LedgerKind;

const ROWS: [&str; 12] =
    ["raw", "e2e", "cost", "drain", "delays", "due", "shapes", "scale", "takeover", "overhead", "memory", "backlog"];

/// How many tasks are due at the same second.
const DUE_AT_ONCE: usize = 100_000;

#[tokio::main]
async fn main() -> ExitCode {
    match bench().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the measurement did not work out: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench() -> Result<()> {
    let plan = Plan { repeats: number("REPEATS", 3)?, tasks: number("TASKS", 30_000)? };
    ensure!(
        plan.repeats > 0 && plan.tasks >= 1_000 && plan.tasks.is_multiple_of(1_000),
        "TASKS must be a multiple of 1000"
    );
    let asked = std::env::var("ROWS").unwrap_or_default();
    let asked: Vec<&str> = asked.split(',').filter(|row| !row.is_empty()).collect();
    if let Some(odd) = asked.iter().find(|row| !ROWS.contains(row)) {
        anyhow::bail!("ROWS={odd}: must be some of {}", ROWS.join(","));
    }
    if cfg!(debug_assertions) {
        println!("these programs are not optimised: the figures say nothing");
    }
    let bytes = number("BYTES", 256)?;
    bench::with_args_of(bytes);
    let places = number("PLACES", 256)?;
    bench::with_places(places);
    println!(
        "workers of {places} places; {} tasks of {bytes} bytes, {} times each; median, half the width, ratio",
        plan.tasks, plan.repeats
    );
    let all = measure(plan, &asked).await?;
    let file = std::env::current_exe()?.with_file_name("bench.json");
    std::fs::write(&file, serde_json::to_vec_pretty(&all)?).with_context(|| file.display().to_string())?;
    println!("all figures: {}", file.display());
    Ok(())
}

/// All rows that are asked for; all but the full ledger, where nobody asks for any.
async fn measure(plan: Plan, asked: &[&str]) -> Result<Vec<Row>> {
    let wanted = |row: &str| asked.is_empty() || asked.contains(&row);
    let mut all: Vec<Row> = Vec::new();
    // Each pair side by side, so that both had the same machine.
    let [raw, raw_drain, raw_latency] = rows::raw(plan).await?;
    show(&mut all, [raw.clone(), raw_drain.clone(), raw_latency.clone()]);
    if wanted("cost") {
        show(&mut all, cost::raw_cost(plan).await?);
    }
    for (ledger, name) in [(LedgerKind::Sqlite, "SQLite"), (LedgerKind::Postgres, "PostgreSQL")] {
        if wanted("e2e") {
            let measured = rows::end_to_end(plan, ledger, name).await?;
            show(
                &mut all,
                measured.into_iter().map(|row| {
                    let other = if row.unit == "/s" { &raw } else { &raw_latency };
                    row.against(other)
                }),
            );
        }
        if wanted("cost") {
            show(&mut all, cost::cost(plan, ledger, name).await?);
        }
        if wanted("drain") {
            let measured = rows::drain(plan, ledger, name).await?;
            show(
                &mut all,
                measured.into_iter().map(|row| {
                    let other = if row.name == "drain" { &raw_drain } else { &raw };
                    row.against(other)
                }),
            );
        }
        if wanted("delays") {
            show(&mut all, bench::repeated(plan, || rows::delays(ledger, name)).await?);
        }
        if wanted("due") {
            let due = || rows::due_at_once(DUE_AT_ONCE, ledger, name);
            show(&mut all, bench::repeated(plan, due).await?);
        }
        if wanted("shapes") {
            show(&mut all, growth::shapes(plan, ledger, name).await?);
        }
        if wanted("scale") {
            show(&mut all, growth::scale(plan, ledger, name).await?);
        }
        if wanted("takeover") {
            show(&mut all, growth::takeover(plan, ledger, name).await?);
        }
        if wanted("overhead") {
            show(&mut all, growth::overhead(plan, ledger, name).await?);
        }
        if wanted("memory") {
            show(&mut all, bench::repeated(plan, || growth::memory(ledger, name)).await?);
        }
        if asked.contains(&"backlog") {
            let backlog = Backlog {
                queued: i64::try_from(number("QUEUED", 1_000_000)?)?,
                finished: i64::try_from(number("FINISHED", 10_000_000)?)?,
            };
            show(&mut all, growth::backlog(plan, backlog, ledger, name).await?);
        }
    }
    Ok(all)
}

fn show(all: &mut Vec<Row>, rows: impl IntoIterator<Item = Row>) {
    for row in rows {
        println!("{row}");
        all.push(row);
    }
}

/// A number from the environment, where it is set and not empty.
fn number(key: &str, default: usize) -> Result<usize> {
    match std::env::var(key) {
        Ok(text) if !text.is_empty() => text.parse().with_context(|| format!("{key}={text:?}")),
        _ => Ok(default),
    }
}
