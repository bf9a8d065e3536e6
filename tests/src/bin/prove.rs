//! Proves the guarantees on this machine: a world under load, faults at random, and a checker of all that happened.
//!
//! ```text
//! MINUTES=3 SEED=42 NODES=1 prove
//! ```
//!
//! The report goes to standard output and into a folder beside the binary, `prove/SEED/`; the histories and the logs of
//! all processes stay there when a promise was broken, or with `KEEP=1`. The exit code is 0 when all were kept, 1 when one was
//! broken, and 2 when the run itself did not work out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tasklane_tests::nemesis::report::Report;
use tasklane_tests::nemesis::run::{Plan, run};

const BROKEN: u8 = 1;
const FAILED: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match prove().await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(BROKEN),
        Err(error) => {
            eprintln!("the run did not work out, and proves nothing: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

async fn prove() -> Result<bool> {
    let plan = plan()?;
    let place = plan.place.clone();
    let minutes = plan.faulty.as_secs_f64() / 60.0;
    println!("SEED={} MINUTES={minutes} NODES={}, in {}", plan.seed, plan.nodes, place.display());
    let report = tokio::select! {
        report = run(plan) => report.with_context(|| format!("histories and logs are in {}", place.display()))?,
        stopped = tokio::signal::ctrl_c() => {
            stopped?;
            anyhow::bail!("stopped from outside");
        }
    };
    println!("\n{report}");
    keep(&report, &place)?;
    Ok(report.holds())
}

/// Writes the report down; the rest stays only where it is needed to find the fault.
fn keep(report: &Report, place: &Path) -> Result<()> {
    fs::write(place.join("report.txt"), report.to_string())?;
    if !report.holds() {
        return Ok(fs::write(place.join("broken.txt"), report.broken().join("\n"))?);
    }
    if std::env::var_os("KEEP").is_none_or(|keep| keep.is_empty()) {
        for lane in &report.lanes {
            fs::remove_dir_all(place.join(lane.name.to_lowercase()))?;
        }
    }
    Ok(())
}

fn plan() -> Result<Plan> {
    let minutes: f64 = number("MINUTES")?.unwrap_or(3.0);
    ensure!(minutes > 0.0 && minutes <= 1440.0, "MINUTES must be over 0 and at most 1440, but is {minutes}");
    let seed = number("SEED")?.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let nodes = number("NODES")?.unwrap_or(1);
    ensure!((1..=5).contains(&nodes), "NODES must be from 1 to 5, but is {nodes}");
    let place = place(seed)?;
    Ok(Plan { seed, faulty: Duration::from_secs_f64(minutes * 60.0), nodes, place })
}

/// A number from the environment, where it is set and not empty.
fn number<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(key: &str) -> Result<Option<T>> {
    match std::env::var(key) {
        Ok(text) if !text.is_empty() => Ok(Some(text.parse().with_context(|| format!("{key}={text:?}"))?)),
        _ => Ok(None),
    }
}

/// `prove/SEED` in the target folder, empty.
fn place(seed: u64) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let target = me.ancestors().nth(2).context("the binary lies in a folder of the target folder")?;
    let place = target.join("prove").join(seed.to_string());
    if place.exists() {
        fs::remove_dir_all(&place)?;
    }
    fs::create_dir_all(&place)?;
    Ok(place)
}
