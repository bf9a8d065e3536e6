//! `limits`: how much runs at once, how often tasks start, and how much may wait.

use serde::Serialize;
use serde_json::json;

use super::Context;
use crate::api::{Limit, LimitList, Rate};
use crate::cli::{LimitsDo, SetLimit};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::note;
use crate::table::{Cell, Column, Table};
use crate::text::{brief_ms, grouped};

/// The body of the request.
#[derive(Debug, Serialize)]
struct Bounds {
    #[serde(skip_serializing_if = "Option::is_none")]
    max_running: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<Rate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_queued: Option<u32>,
}

pub(super) async fn run(cx: &Context<'_>, action: Option<LimitsDo>) -> Result<Exit, Failure> {
    match action {
        None | Some(LimitsDo::List) => list(cx).await?,
        Some(LimitsDo::Set(set)) => put(cx, &set).await?,
        Some(LimitsDo::Delete(limited)) => {
            cx.client.call(Call::delete(["v1", "limits", &limited.of, &limited.name])).await?;
            match cx.output.json {
                true => cx.output.json(&json!({"deleted": {"of": limited.of, "name": limited.name}}).to_string())?,
                false => cx.output.line(&format!("limit of {} {} deleted", limited.of, limited.name))?,
            }
        }
    }
    Ok(Exit::Done)
}

async fn list(cx: &Context<'_>) -> Result<(), Failure> {
    let answer = cx.client.call(Call::get(["v1", "limits"])).await?;
    if cx.output.json {
        return cx.output.json(&answer.text);
    }
    let limits = answer.read::<LimitList>()?.limits;
    cx.output.table(&mut table(&limits))?;
    if limits.is_empty() && cx.output.terminal {
        note("no limits");
    }
    Ok(())
}

async fn put(cx: &Context<'_>, set: &SetLimit) -> Result<(), Failure> {
    let rate = set.rate.map(|rate| Rate { burst: set.burst.unwrap_or(rate.burst), ..rate });
    let bounds = Bounds { max_running: set.max_running, rate, max_queued: set.max_queued };
    let call = Call::put(["v1", "limits", &set.limited.of, &set.limited.name]).json(&bounds)?;
    let answer = cx.client.call(call).await?;
    if cx.output.json {
        return cx.output.json(&answer.text);
    }
    cx.output.table(&mut table(&[answer.read()?]))
}

fn table(limits: &[Limit]) -> Table {
    let mut table = Table::new([
        Column::new("OF"),
        Column::new("NAME").cut(12),
        Column::number("MAX RUNNING"),
        Column::number("RATE"),
        Column::number("BURST").optional(3),
        Column::number("MAX QUEUED").optional(1),
        Column::new("SET BY").optional(2),
    ]);
    let number = |number: Option<u32>| Cell::number(number.map_or_else(|| "-".to_owned(), |n| grouped(n.into())));
    for limit in limits {
        let rate = limit.rate.as_ref();
        let text = rate.map_or_else(|| "-".to_owned(), |rate| format!("{}/{}", grouped(rate.tasks.into()), per(rate)));
        table.row([
            Cell::new(&limit.of),
            Cell::new(&limit.name),
            number(limit.max_running),
            Cell::number(text),
            number(rate.map(|rate| rate.burst)),
            number(limit.max_queued),
            Cell::new(&limit.origin),
        ]);
    }
    table
}

/// The period of a rate: most are whole seconds, of which `1.0s` would say too much.
fn per(rate: &Rate) -> String {
    brief_ms(i64::try_from(rate.per_ms).unwrap_or(i64::MAX)).replace(".0s", "s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_for_people() {
        let text = r#"{"limits":[{"of":"queue","name":"default","max_running":5,"rate":{"tasks":100,"per_ms":1000,"burst":10},
            "max_queued":50000,"origin":"file"},{"of":"key","name":"customer:\u001b*","max_running":2,"rate":null,
            "max_queued":null,"origin":"api","of_a_newer_producer":1}]}"#;
        let limits = serde_json::from_str::<LimitList>(text).unwrap().limits;
        insta::assert_snapshot!(table(&limits).take(false, None));
    }
}
