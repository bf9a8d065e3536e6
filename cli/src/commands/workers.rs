//! `workers`: who is alive, what they run, and who went lately.

use anstyle::AnsiColor;
use jiff::Timestamp;

use super::Context;
use crate::api::{GoneWorker, Worker, WorkerList};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::{Output, note};
use crate::table::{Cell, Column, Table};
use crate::text::{brief_ms, count, relative};

/// How many runs are shown, the longest; `--json` has more.
const RUNS_MAX: usize = 20;
/// How many workers that are gone are shown, the newest.
const GONE_MAX: usize = 10;

pub(super) async fn run(cx: &Context<'_>) -> Result<Exit, Failure> {
    let answer = cx.client.call(Call::get(["v1", "workers"])).await?;
    if cx.output.json {
        cx.output.json(&answer.text)?;
        return Ok(Exit::Done);
    }
    let list: WorkerList = answer.read()?;
    cx.output.text(&view(&list, cx.output, Timestamp::now()))?;
    if list.workers.is_empty() {
        note("no worker is alive");
    }
    Ok(Exit::Done)
}

fn view(list: &WorkerList, output: &Output, now: Timestamp) -> String {
    let WorkerList { workers, gone } = list;
    let named = workers.iter().any(|worker| worker.name.is_some());
    let (running, places) = workers
        .iter()
        .fold((0, 0), |(running, places), worker| (running + worker.running, places + worker.concurrency));
    let mut text = alive(workers, named, now).take(output.color, output.width);
    if !workers.is_empty() {
        text.push_str(&format!("{}, running {running} of {places} tasks\n", count(workers.len() as u64, "worker")));
    }
    if let Some((mut runs, more)) = runs(workers, now) {
        text.push_str(&format!("\n{}", runs.take(output.color, output.width)));
        if more > 0 {
            text.push_str(&format!("and {} more; --json has them\n", count(more as u64, "run")));
        }
    }
    if !gone.is_empty() {
        text.push_str(&format!("\n{}", went(gone, now).take(output.color, output.width)));
    }
    text
}

fn alive(workers: &[Worker], named: bool, now: Timestamp) -> Table {
    let mut columns = vec![
        Column::new("ID"),
        Column::new("HOST").cut(8).optional(2),
        Column::number("PID").optional(3),
        Column::new("QUEUES").cut(8).optional(4),
        Column::new("KINDS").cut(8).optional(6),
        Column::new("RUNNING"),
        Column::new("UP").optional(5),
        Column::new("LEASE AGE").optional(7),
        Column::new("VERSION").optional(8),
    ];
    if named {
        columns.insert(1, Column::new("NAME").cut(8).optional(1));
    }
    let mut table = Table::new(columns);
    for worker in workers {
        let up = now.as_millisecond().saturating_sub(worker.started_at.as_millisecond());
        let mut row = vec![
            Cell::new(&worker.id),
            Cell::new(&worker.host),
            Cell::number(number(worker.pid)),
            Cell::new(worker.queues.join(",")),
            Cell::new(worker.kinds.join(",")),
            Cell::new(format!("{}/{}", worker.running, worker.concurrency)),
            Cell::new(brief_ms(up)),
            Cell::new(brief_ms(worker.lease_age_ms)),
            Cell::new(&worker.version),
        ];
        if named {
            row.insert(1, Cell::new(worker.name.as_deref().unwrap_or("-")));
        }
        table.row(row);
    }
    table
}

/// What they run, the longest first, and how much more there is; `None` when nothing runs.
fn runs(workers: &[Worker], now: Timestamp) -> Option<(Table, usize)> {
    let mut runs: Vec<_> = workers.iter().flat_map(|worker| worker.runs.iter().map(move |run| (worker, run))).collect();
    runs.sort_by_key(|(_, run)| run.since);
    let more = runs.len().saturating_sub(RUNS_MAX);
    runs.truncate(RUNS_MAX);
    let mut table = Table::new([
        Column::new("RUNNING TASK"),
        Column::new("KIND").cut(10),
        Column::number("ATTEMPT").optional(2),
        Column::new("SINCE"),
        Column::new("WORKER").cut(8).optional(1),
    ]);
    for (worker, run) in &runs {
        table.row([
            Cell::new(&run.task_id),
            Cell::new(&run.kind),
            Cell::number(run.attempt),
            Cell::new(relative(run.since, now)),
            Cell::new(called(worker.name.as_deref(), &worker.host, worker.pid)),
        ]);
    }
    (!runs.is_empty()).then_some((table, more))
}

fn went(gone: &[GoneWorker], now: Timestamp) -> Table {
    let mut table = Table::new([
        Column::new("GONE"),
        Column::new("WORKER").cut(8).optional(1),
        Column::new("HOW"),
        Column::new("WHEN").optional(2),
        Column::new("LIVED").optional(3),
        Column::new("VERSION").optional(4),
    ]);
    for worker in gone.iter().take(GONE_MAX) {
        let how = match worker.ended.as_deref() {
            Some("stopped") => Cell::new("stopped"),
            Some("lease_ended") => Cell::new("lease ended").styled(AnsiColor::Yellow.on_default()),
            other => Cell::new(other.unwrap_or("-")),
        };
        let lived = worker.ended_at.map(|end| end.as_millisecond().saturating_sub(worker.started_at.as_millisecond()));
        table.row([
            Cell::new(&worker.id),
            Cell::new(called(worker.name.as_deref(), &worker.host, worker.pid)),
            how,
            Cell::new(worker.ended_at.map_or_else(|| "just now".to_owned(), |end| relative(end, now))),
            Cell::new(lived.map_or_else(|| "-".to_owned(), brief_ms)),
            Cell::new(&worker.version),
        ]);
    }
    table
}

/// By its name, or else by where it is.
fn called(name: Option<&str>, host: &str, pid: Option<u32>) -> String {
    match (name, pid) {
        (Some(name), _) => name.to_owned(),
        (None, Some(pid)) => format!("{host}:{pid}"),
        (None, None) => host.to_owned(),
    }
}

fn number(number: Option<u32>) -> String {
    number.map_or_else(|| "-".to_owned(), |number| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::get::tests::plain;

    #[test]
    fn workers_for_people() {
        let text = r#"{"workers":[
            {"id":"01a20a88-ef48-71e6-bf03-7b41ca582df4","name":"blue\u001b-1","host":"vm-7.example.org","pid":4711,
             "queues":["default","mail"],"kinds":["mail.send.now","report.build.monthly","text.count.words"],"concurrency":64,
             "running":2,"version":"0.1.0","started_at":"2026-11-23T07:00:00Z","lease_age_ms":900,"runs":[
                {"task_id":"01a20751-1f82-705d-a198-4567bb46f288","kind":"mail.send.now","attempt":2,"since":"2026-11-23T07:32:00Z"}]},
            {"id":"01a20a88-ef48-71e6-bf03-7b41ca582df5","host":"vm-8","queues":["default"],"kinds":[],"concurrency":64,
             "running":0,"version":"0.1.0","started_at":"2026-11-23T07:30:00Z","lease_age_ms":900}],
            "gone":[
            {"id":"01a20a88-ef48-71e6-bf03-7b41ca582df6","name":null,"host":"vm-8","pid":12,"version":"0.1.0",
             "started_at":"2026-11-23T07:00:00Z","ended_at":"2026-11-23T07:20:00Z","ended":"lease_ended"}]}"#;
        let list = serde_json::from_str(text).unwrap();
        let now = "2026-11-23T07:33:00Z".parse().unwrap();
        let at = |width| {
            let mut output = plain();
            output.width = width;
            view(&list, &output, now)
        };
        let shown = [None, Some(120), Some(80), Some(60)].map(|width| format!("==== {width:?}\n{}", at(width)));
        insta::assert_snapshot!(shown.join("\n"));
    }
}
