//! Fan-out and fan-in: one computation in many tasks, submitted as one batch, waited for, and put together.
//!
//! Counts the primes below a number, a range a task. With a producer running (`make demo`, or
//! `make programs`, then `target/release/tasklane-producer`), and the same `TASKLANE_LEDGER_URL`:
//!
//! ```sh
//! cargo run --release --example fan_in -- 1000000
//! ```

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::json;
use tasklane_examples::client::{Client, result_of};
use tasklane_examples::worker::LocalWorker;
use tasklane_worker::{Handler, HandlerError, Outcome, Registry, TaskContext};
use tokio_util::sync::CancellationToken;

/// Into how many tasks the work is cut.
const PARTS: u64 = 64;
const LIMIT: Duration = Duration::from_secs(600);

struct CountPrimes;

#[derive(Deserialize)]
struct Part {
    from: u64,
    below: u64,
}

impl Handler for CountPrimes {
    const KIND: &'static str = "primes.count";
    type Args = Part;

    async fn handle(&self, part: Part, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let stop = cx.cancellation.clone();
        // Stops the thread when this future is dropped.
        let _stops_the_thread = stop.clone().drop_guard();
        let count = tokio::task::spawn_blocking(move || count(part.from..part.below, &stop)).await?;
        Outcome::complete(count.ok_or_else(|| HandlerError::retry("told to stop"))?)
    }
}

/// `None` when told to stop.
fn count(numbers: Range<u64>, stop: &CancellationToken) -> Option<u64> {
    let mut primes = 0;
    for number in numbers {
        if number.is_multiple_of(1024) && stop.is_cancelled() {
            return None;
        }
        primes += u64::from(is_prime(number));
    }
    Some(primes)
}

fn is_prime(number: u64) -> bool {
    number >= 2 && (2..).take_while(|factor| factor * factor <= number).all(|factor| !number.is_multiple_of(factor))
}

#[tokio::main]
async fn main() -> Result<()> {
    let below: u64 = match std::env::args().nth(1) {
        Some(number) => number.parse().context("usage: fan_in [NUMBER]")?,
        None => 1_000_000,
    };
    let client = Client::from_env()?;
    let worker = LocalWorker::start(Registry::builder().handler(CountPrimes), &client).await?;

    // Out: all parts are accepted, or none.
    let edge = |part: u64| u64::try_from(u128::from(below) * u128::from(part) / u128::from(PARTS)).unwrap_or(below);
    let task = |part| json!({"kind": CountPrimes::KIND, "args": {"from": edge(part), "below": edge(part + 1)}});
    let ids = client.submit_all(&(0..PARTS).map(task).collect::<Vec<_>>()).await?;

    // In: each wait answers as soon as its task has ended, and at once for those that ended meanwhile.
    let mut primes = 0;
    for id in ids {
        primes += result_of::<u64>(&client.ended(id, LIMIT).await?)?;
    }
    println!("{primes} primes below {below}, counted in {PARTS} tasks");
    println!("the worker: {}", worker.stop().await?);
    Ok(())
}
