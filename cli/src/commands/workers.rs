//! `workers`: who is alive.

use jiff::Timestamp;

use super::Context;
use crate::api::{Worker, WorkerList};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::table::{Cell, Table};
use crate::text::{brief_ms, cut};

/// How much of a list of queues or kinds is seen.
const LIST_CHARS_MAX: usize = 40;

pub(super) async fn run(cx: &Context<'_>) -> Result<Exit, Failure> {
    let answer = cx.client.call(Call::get(["v1", "workers"])).await?;
    if cx.output.json {
        cx.output.json(&answer.text)?;
        return Ok(Exit::Done);
    }
    let workers = answer.read::<WorkerList>()?.workers;
    cx.output.table(&mut table(&workers, Timestamp::now()))?;
    if workers.is_empty() {
        cx.output.note("no worker is alive");
    }
    Ok(Exit::Done)
}

fn table(workers: &[Worker], now: Timestamp) -> Table {
    let head = ["ID", "HOST", "QUEUES", "KINDS", "RUNNING", "UP", "LEASE AGE", "VERSION"];
    let mut table = Table::new(head.map(Cell::from));
    for worker in workers {
        let up = now.as_millisecond().saturating_sub(worker.started_at.as_millisecond());
        table.row([
            Cell::new(&worker.id),
            Cell::new(&worker.host),
            Cell::new(cut(&worker.queues.join(","), LIST_CHARS_MAX)),
            Cell::new(cut(&worker.kinds.join(","), LIST_CHARS_MAX)),
            Cell::new(format!("{}/{}", worker.running, worker.concurrency)),
            Cell::new(brief_ms(up)),
            Cell::new(brief_ms(worker.lease_age_ms)),
            Cell::new(&worker.version),
        ]);
    }
    table
}
