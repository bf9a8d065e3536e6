//! `schedules`: periodic tasks.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::Context;
use super::get::{Lines, made};
use super::spec::{Spec, millis, spec};
use crate::api::{Schedule, SchedulePage, Unreadable};
use crate::cli::{PutSchedule, SchedulesDo};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::note;
use crate::table::{Cell, Column, Table};
use crate::text::{brief_ms, json_line, relative};

/// How many schedules one request asks for.
const PAGE: u32 = 200;

/// The body of the request.
#[derive(Debug, Serialize)]
struct Definition<'p> {
    cron: &'p str,
    #[serde(skip_serializing_if = "Option::is_none")]
    timezone: Option<&'p str>,
    task: Spec<'p>,
    #[serde(skip_serializing_if = "Option::is_none")]
    catch_up: Option<&'p str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    catch_up_max: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    overlap: Option<&'p str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jitter_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    paused: Option<bool>,
}

pub(super) async fn run(cx: &Context<'_>, action: Option<SchedulesDo>) -> Result<Exit, Failure> {
    match action {
        None | Some(SchedulesDo::List) => list(cx).await,
        Some(SchedulesDo::Get(named)) => show(cx, Call::get(path(&named.name))).await,
        Some(SchedulesDo::Put(put)) => self::put(cx, &put).await,
        Some(SchedulesDo::Delete(named)) => delete(cx, &named.name).await,
        Some(SchedulesDo::Pause(named)) => show(cx, Call::post(["v1", "schedules", &named.name, "pause"])).await,
        Some(SchedulesDo::Resume(named)) => show(cx, Call::post(["v1", "schedules", &named.name, "resume"])).await,
    }
}

fn path(name: &str) -> [&str; 3] {
    ["v1", "schedules", name]
}

fn definition(put: &PutSchedule) -> Result<Definition<'_>, Failure> {
    Ok(Definition {
        cron: &put.cron,
        timezone: put.timezone.as_deref(),
        task: spec(&put.task)?,
        catch_up: put.catch_up.as_deref(),
        catch_up_max: put.catch_up_max,
        overlap: put.overlap.as_deref(),
        jitter_ms: put.jitter.map(millis),
        paused: put.paused,
    })
}

async fn put(cx: &Context<'_>, put: &PutSchedule) -> Result<Exit, Failure> {
    let answer = cx.client.call(Call::put(path(&put.named.name)).json(&definition(put)?)?).await?;
    let schedule: Schedule = answer.read()?;
    shown(cx, &answer.text, &schedule)?;
    if schedule.paused && put.paused.is_none() {
        note(&format!("it stays paused; to let it go on: tasklane schedules resume {}", schedule.name));
    }
    Ok(Exit::Done)
}

async fn show(cx: &Context<'_>, call: Call) -> Result<Exit, Failure> {
    let answer = cx.client.call(call).await?;
    shown(cx, &answer.text, &answer.read()?)?;
    Ok(Exit::Done)
}

fn shown(cx: &Context<'_>, json: &str, schedule: &Schedule) -> Result<(), Failure> {
    match cx.output.json {
        true => cx.output.json(json),
        false => cx.output.text(&view(schedule, Lines::new(cx.output), Timestamp::now())),
    }
}

async fn delete(cx: &Context<'_>, name: &str) -> Result<Exit, Failure> {
    cx.client.call(Call::delete(path(name))).await?;
    match cx.output.json {
        true => cx.output.json(&json!({"deleted": name}).to_string())?,
        false => cx.output.line(&format!("{name} deleted"))?,
    }
    Ok(Exit::Done)
}

/// Shows `each` page of all schedules.
///
/// # Errors
/// What the API refused, or what failed for a page.
pub(super) async fn pages(
    cx: &Context<'_>,
    mut each: impl FnMut(&SchedulePage) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut cursor = None::<String>;
    loop {
        let call = Call::get(["v1", "schedules"]).query("limit", PAGE).optional("cursor", cursor);
        let page: SchedulePage = cx.client.call(call).await?.read()?;
        each(&page)?;
        cursor = page.next_cursor;
        if cursor.is_none() {
            return Ok(());
        }
    }
}

/// A schedule out of a page.
pub(super) fn read(json: &RawValue) -> Result<Schedule, Failure> {
    serde_json::from_str(json.get())
        .map_err(|error| Failure::new(Exit::Refused, format!("a schedule is not as this program knows it: {error}")))
}

/// All, page after page; as JSON one a line.
async fn list(cx: &Context<'_>) -> Result<Exit, Failure> {
    let mut table = Table::new(columns());
    let mut found = false;
    pages(cx, |page| {
        found |= !page.schedules.is_empty();
        for Unreadable { name, problem } in &page.unreadable {
            note(&format!("{name} cannot be read by this producer: {problem}"));
        }
        if cx.output.json {
            let lines = page.schedules.iter().map(|json| format!("{}\n", json_line(json.get())));
            return cx.output.text(&lines.collect::<String>());
        }
        for json in &page.schedules {
            table.row(row(&read(json)?, Timestamp::now()));
        }
        cx.output.table(&mut table)
    })
    .await?;
    if !found && cx.output.terminal && !cx.output.json {
        note("no schedules");
    }
    Ok(Exit::Done)
}

fn columns() -> [Column; 9] {
    [
        Column::new("NAME").cut(16),
        Column::new("CRON").cut(12).optional(2),
        Column::new("ZONE").cut(8).optional(5),
        Column::new("KIND").cut(10).optional(3),
        Column::new("NEXT"),
        Column::new("LAST").optional(1),
        Column::number("FIRED").optional(8),
        Column::number("SKIPPED").optional(6),
        Column::number("MISSED").optional(7),
    ]
}

fn row(schedule: &Schedule, now: Timestamp) -> [Cell; 9] {
    let next = match schedule.next_runs.first() {
        _ if schedule.paused => "paused".to_owned(),
        Some(_) if schedule.blocked_by.is_some() && schedule.skipped_in_a_row > 0 => "blocked".to_owned(),
        Some(next) => relative(*next, now),
        None => "-".to_owned(),
    };
    let last = schedule.last_tick.map_or_else(|| "-".to_owned(), |last| relative(last, now));
    [
        Cell::new(&schedule.name),
        Cell::new(&schedule.cron),
        Cell::new(&schedule.timezone),
        Cell::new(&schedule.task.kind),
        Cell::new(next),
        Cell::new(last),
        Cell::number(schedule.ticks.fired),
        Cell::number(schedule.ticks.skipped),
        Cell::number(schedule.ticks.missed),
    ]
}

/// A schedule as people read it.
fn view(schedule: &Schedule, mut lines: Lines<'_>, now: Timestamp) -> String {
    let Schedule { task, ticks, .. } = schedule;
    lines.add("name", &schedule.name);
    lines.add("cron", &format!("{} ({})", schedule.cron, schedule.timezone));
    let paused = schedule.paused_at.map(|at| made(at, schedule.paused_by.as_deref(), now));
    lines.optional("paused", schedule.paused.then(|| paused.unwrap_or_else(|| "yes".to_owned())).as_deref());
    let catch_up = match schedule.catch_up.as_str() {
        "all" => format!("all, {} at most", schedule.catch_up_max),
        other => other.to_owned(),
    };
    lines.add("catch up", &catch_up);
    lines.add("overlap", &schedule.overlap);
    lines.optional("jitter", (schedule.jitter_ms > 0).then(|| brief_ms(schedule.jitter_ms)).as_deref());
    lines.add("kind", &task.kind);
    lines.add("queue", &task.queue);
    lines.optional("priority", task.priority.as_deref().filter(|priority| *priority != "normal"));
    lines.optional("key", task.concurrency_key.as_deref());
    lines.add("attempts", &task.max_attempts.to_string());
    lines.optional("timeout", task.timeout_ms.map(brief_ms).as_deref());
    lines.tags(&task.tags);
    lines.json("args", task.args.as_deref());
    lines.add("ticks", &format!("{} fired, {} skipped, {} missed", ticks.fired, ticks.skipped, ticks.missed));
    lines.time("last", schedule.last_tick, now);
    lines.optional("last task", schedule.last_task_id.as_deref());
    lines.time("last skipped", schedule.last_skipped, now);
    lines.optional(
        "in a row",
        (schedule.skipped_in_a_row > 0).then(|| schedule.skipped_in_a_row.to_string()).as_deref(),
    );
    lines.optional("blocked by", schedule.blocked_by.as_deref());
    for next in &schedule.next_runs {
        lines.time("next", Some(*next), now);
    }
    lines.text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::get::tests::plain;

    #[test]
    fn a_schedule_for_people() {
        let text = r#"{"name":"reports.nightly","cron":"30 2 * * MON-FRI","timezone":"Europe/Berlin","task":{"kind":"report.build",
            "queue":"reports","args":{"of":"yester\u001bday"},"priority":"low","max_attempts":20,"timeout_ms":90000,
            "concurrency_key":"customer:7","tags":{"team":"blue"}},"catch_up":"all","catch_up_max":10,"overlap":"skip",
            "jitter_ms":60000,"paused":false,"next_runs":["2026-11-24T01:30:00Z","2026-11-25T01:30:00Z"],
            "last_tick":"2026-11-23T01:30:00Z","last_task_id":"01a20751-1f82-705d-a198-4567bb46f288","last_skipped":null,
            "ticks":{"fired":5,"skipped":1,"missed":0},"created_at":"2026-11-20T07:31:27Z","updated_at":"2026-11-20T07:31:27Z"}"#;
        let schedule: Schedule = serde_json::from_str(text).unwrap();
        let now = "2026-11-23T07:33:00Z".parse().unwrap();
        let output = plain();
        let mut table = Table::new(columns());
        table.row(row(&schedule, now));
        insta::assert_snapshot!(format!("{}\n{}", view(&schedule, Lines::new(&output), now), table.take(false, None)));
    }
}
