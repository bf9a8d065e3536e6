//! `queues`: what waits where.

use anstyle::AnsiColor;

use super::Context;
use crate::api::{Queue, QueueList};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::table::{Cell, Column, Table};
use crate::text::brief_ms;

pub(super) async fn run(cx: &Context<'_>, name: Option<&str>) -> Result<Exit, Failure> {
    let answer = match name {
        Some(name) => cx.client.call(Call::get(["v1", "queues", name])).await?,
        None => cx.client.call(Call::get(["v1", "queues"])).await?,
    };
    if cx.output.json {
        cx.output.json(&answer.text)?;
    } else {
        let queues = if name.is_some() { vec![answer.read()?] } else { answer.read::<QueueList>()?.queues };
        cx.output.table(&mut table(&queues))?;
    }
    Ok(Exit::Done)
}

/// The queues as a table.
pub(super) fn table(queues: &[Queue]) -> Table {
    let states = ["ACCEPTED", "QUEUED", "SCHEDULED", "RETRYABLE", "RUNNING", "CANCELLED", "DISCARDED"];
    // What has the highest rank goes first where there is no room.
    let ranks = [Some(3), None, Some(5), Some(4), None, Some(7), Some(1)];
    let counts = states.iter().zip(ranks).map(|(state, rank)| {
        let column = Column::number(state);
        rank.map_or_else(|| column.clone(), |rank| column.clone().optional(rank))
    });
    let more = [Column::number("OLDEST"), Column::number("IN BROKER").optional(6), Column::number("WORKERS")];
    let mut table = Table::new([Column::new("QUEUE").cut(16)].into_iter().chain(counts).chain(more));
    for queue in queues {
        let name = if queue.paused { format!("{} (paused)", queue.name) } else { queue.name.clone() };
        let mut row = vec![Cell::new(name)];
        row.extend(states.iter().map(|state| Cell::number(queue.count(&state.to_lowercase()))));
        row.push(Cell::number(queue.oldest_waiting_ms.map_or_else(|| "-".to_owned(), brief_ms)));
        row.push(Cell::number(or_unknown(queue.broker_depth)));
        let workers = Cell::number(queue.workers.map_or_else(|| "?".to_owned(), |workers| workers.to_string()));
        let alone = queue.workers == Some(0) && queue.oldest_waiting_ms.is_some();
        row.push(if alone { workers.styled(AnsiColor::Red.on_default()) } else { workers });
        table.row(row);
    }
    table
}

fn or_unknown(number: Option<u64>) -> String {
    number.map_or_else(|| "?".to_owned(), |number| number.to_string())
}
