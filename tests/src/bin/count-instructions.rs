//! Counts the instructions that one task takes, by program, with SQLite; needs valgrind.
//!
//! ```text
//! test-services -- count-instructions
//! ```
//!
//! The profiles are left beside the binaries, for `callgrind_annotate`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use tasklane_tests::bench::instructions::{self, Part};

#[tokio::main]
async fn main() -> ExitCode {
    match count().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the count did not work out: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn count() -> Result<()> {
    if cfg!(debug_assertions) {
        println!("these programs are not optimised: the figures say nothing");
    }
    let program = std::env::current_exe()?;
    let folder = program.parent().context("a program lies in a folder")?;
    let [few, many] = instructions::TASKS;
    println!("instructions of one task, outside of the kernel: the difference of {many} and {few} tasks, of 256 bytes");
    for (part, title) in [
        (Part::Worker, "worker, from a backlog"),
        (Part::Batch, "producer, in batches"),
        (Part::Single, "producer, one by one"),
    ] {
        let instructions = instructions::of_a_task(part, folder).await.context(title)?;
        println!("{title:<24} {instructions:>9}");
    }
    println!("profiles, for callgrind_annotate: {}", folder.join("callgrind.*").display());
    Ok(())
}
