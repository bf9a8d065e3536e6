//! `group`: where the tasks of a batch with an end stand, and what follows.

use jiff::Timestamp;
use uuid::Uuid;

use super::Context;
use super::get::Lines;
use crate::api::Group;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::text::count;

pub(super) async fn run(cx: &Context<'_>, id: Uuid) -> Result<Exit, Failure> {
    let answer = cx.client.call(Call::get(["v1", "groups", &id.to_string()])).await?;
    match cx.output.json {
        true => cx.output.json(&answer.text)?,
        false => cx.output.text(&view(&answer.read()?, Lines::new(cx.output), Timestamp::now()))?,
    }
    Ok(Exit::Done)
}

fn view(group: &Group, mut lines: Lines<'_>, now: Timestamp) -> String {
    lines.add("id", &group.id);
    lines.add("tasks", &count(group.total, "task"));
    for (state, number) in &group.counts {
        lines.add(state, &number.to_string());
    }
    let kept: u64 = group.counts.values().sum();
    lines.optional("not kept", (kept < group.total).then(|| (group.total - kept).to_string()).as_deref());
    lines.add("then", &group.then.kind);
    lines.optional("follows as", group.then.id.as_deref());
    lines.time("created", Some(group.created_at), now);
    lines.time("ended", group.finished_at, now);
    if group.finished_at.is_none() {
        lines.add("ended", "not yet: some of its tasks have not");
    }
    lines.add("its tasks", &format!("tasklane list --group {}", group.id));
    lines.text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::get::tests::plain;

    #[test]
    fn a_group_for_people() {
        let text = r#"{"id":"01a20751-6b0e-7d11-8c3e-2f4be5b3f6aa","total":200,"counts":{"completed":180,"discarded":2,"running":8},
            "ended":null,"then":{"id":null,"kind":"report.join"},"created_at":"2026-11-23T07:31:26.000Z","finished_at":null,"new":1}"#;
        let group = serde_json::from_str(text).unwrap();
        let output = plain();
        insta::assert_snapshot!(view(&group, Lines::new(&output), "2026-11-23T07:33:00Z".parse().unwrap()));
    }
}
