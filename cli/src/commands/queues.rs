//! `queues`: what waits where.

use anstyle::AnsiColor;

use super::Context;
use crate::api::{Queue, QueueList};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::table::{Cell, Table};
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
    let numbers = ["ACCEPTED", "QUEUED", "SCHEDULED", "RETRYABLE", "RUNNING", "CANCELLED", "DISCARDED"];
    let head = numbers.iter().map(Cell::number);
    let more = ["OLDEST", "IN BROKER", "CONSUMERS"].map(Cell::number);
    let mut table = Table::new([Cell::from("QUEUE")].into_iter().chain(head).chain(more));
    for queue in queues {
        let name = if queue.paused { format!("{} (paused)", queue.name) } else { queue.name.clone() };
        let mut row = vec![Cell::new(name)];
        row.extend(numbers.iter().map(|state| Cell::number(queue.count(&state.to_lowercase()))));
        row.push(Cell::number(queue.oldest_waiting_ms.map_or_else(|| "-".to_owned(), brief_ms)));
        row.push(Cell::number(or_unknown(queue.broker_depth)));
        let consumers = Cell::number(or_unknown(queue.consumers));
        let alone = queue.consumers == Some(0) && queue.oldest_waiting_ms.is_some();
        row.push(if alone { consumers.styled(AnsiColor::Red.on_default()) } else { consumers });
        table.row(row);
    }
    table
}

fn or_unknown(number: Option<u64>) -> String {
    number.map_or_else(|| "?".to_owned(), |number| number.to_string())
}
