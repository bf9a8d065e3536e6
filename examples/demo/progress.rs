//! Submits the work, and shows how it goes until nothing is left to do.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Deserialize;
use serde_json::json;
use tasklane_common::state::State;
use tasklane_common::task::TaskId;
use tasklane_examples::client::Client;
use tasklane_worker::Handler;
use tokio::time::{Instant, sleep};

use crate::worker::{DigestFile, QUEUE};

/// How many tasks one request submits.
const BATCH: usize = 500;
/// How long nothing may change before the demo gives up.
const STALL_LIMIT: Duration = Duration::from_secs(60);

/// Submits one task a file, and waits until all have ended.
pub(crate) async fn work(client: &Client, paths: &[PathBuf]) -> Result<Vec<TaskId>> {
    println!();
    let submitted = Cell::new(0);
    let (ids, ()) = tokio::try_join!(submit(client, paths, &submitted), watch(client, paths.len(), &submitted))?;
    Ok(ids)
}

async fn submit(client: &Client, paths: &[PathBuf], submitted: &Cell<usize>) -> Result<Vec<TaskId>> {
    let mut ids = Vec::with_capacity(paths.len());
    for batch in paths.chunks(BATCH) {
        let task = |path| json!({"kind": DigestFile::KIND, "queue": QUEUE, "args": {"path": path}});
        ids.extend(client.submit_all(&batch.iter().map(task).collect::<Vec<_>>()).await?);
        submitted.set(ids.len());
    }
    Ok(ids)
}

#[derive(Default, PartialEq, Eq, Clone, Copy)]
struct Look {
    submitted: usize,
    waiting: usize,
    running: usize,
    failed: usize,
}

async fn watch(client: &Client, total: usize, submitted: &Cell<usize>) -> Result<()> {
    let live = std::io::stdout().is_terminal();
    let pause = if live { Duration::from_millis(100) } else { Duration::from_millis(250) };
    let began = Instant::now();
    let (mut last, mut changed, mut told) = (Look::default(), began, began);
    loop {
        // Read first: what is submitted after the count would seem to be done.
        let look = Look { submitted: submitted.get(), ..look(client).await? };
        let ended = look.submitted == total && look.waiting + look.running == 0;
        if look != last {
            (last, changed) = (look, Instant::now());
        }
        if live || ended || told.elapsed() >= Duration::from_secs(1) {
            told = Instant::now();
            tell(look, total, began.elapsed(), live);
        }
        if ended {
            if live {
                println!();
            }
            return Ok(());
        }
        ensure!(changed.elapsed() < STALL_LIMIT, "nothing has changed for {STALL_LIMIT:?}");
        sleep(pause).await;
    }
}

async fn look(client: &Client) -> Result<Look> {
    #[derive(Deserialize)]
    struct Queue {
        counts: BTreeMap<State, usize>,
    }
    let queue: Queue = client.get(&format!("/v1/queues/{QUEUE}")).await?;
    let count = |states: &[State]| states.iter().filter_map(|state| queue.counts.get(state)).sum();
    Ok(Look {
        submitted: 0,
        waiting: count(&[State::Accepted, State::Scheduled, State::Queued, State::Retryable]),
        running: count(&[State::Running]),
        failed: count(&[State::Cancelled, State::Discarded]),
    })
}

/// One line: rewritten on a terminal, a new one elsewhere.
fn tell(look: Look, total: usize, elapsed: Duration, live: bool) {
    let Look { submitted, waiting, running, failed } = look;
    let completed = submitted.saturating_sub(waiting + running + failed);
    let (begin, end) = if live { ("\r\x1b[K", "") } else { ("", "\n") };
    print!(
        "{begin}{:5.1} s   submitted {submitted}/{total}   waiting {waiting}   running {running}   completed {completed}   failed {failed}{end}",
        elapsed.as_secs_f64()
    );
    // A terminal that is gone is no reason to stop.
    let _ = std::io::stdout().flush();
}
