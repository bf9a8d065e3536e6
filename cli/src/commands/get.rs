//! `get`: tasks, with all that is known of them.

use std::collections::BTreeMap;
use std::time::Duration;

use anstyle::Style;
use jiff::Timestamp;
use serde_json::value::RawValue;

use super::Context;
use crate::api::Task;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::input::IdArg;
use crate::output::{Output, state_style};
use crate::text::{brief, brief_ms, cut, json_line, relative};

/// How much of args and result people see.
const SHOWN_CHARS_MAX: usize = 2000;

pub(super) async fn run(cx: &Context<'_>, ids: &[IdArg]) -> Result<Exit, Failure> {
    let mut first = true;
    cx.each(ids, async |id| {
        let answer = cx.client.call(Call::get(["v1", "tasks", id])).await?;
        if cx.output.json {
            cx.output.json(&answer.text)?;
        } else {
            let gap = if std::mem::take(&mut first) { "" } else { "\n" };
            cx.output.text(&format!("{gap}{}", view(&answer.read()?, cx.output, Timestamp::now())))?;
        }
        Ok(Exit::Done)
    })
    .await
}

/// A task as people read it.
pub(super) fn view(task: &Task, output: &Output, now: Timestamp) -> String {
    let mut lines = Lines::new(output);
    lines.add("id", &task.id);
    lines.add("kind", &task.kind);
    lines.add("queue", &task.queue);
    lines.styled("state", &task.state, state_style(&task.state));
    lines.optional("reason", task.reason.as_deref());
    lines.add("attempt", &format!("{} of {}", task.attempt, task.max_attempts));
    lines.optional("timeout", task.timeout_ms.map(brief_ms).as_deref());
    lines.optional("key", task.concurrency_key.as_deref());
    lines.optional("limited by", task.limited_by.as_deref());
    lines.tags(&task.tags);
    lines.time("created", Some(task.created_at), now);
    lines.time("runs", (task.run_at > now && !task.has_ended()).then_some(task.run_at), now);
    lines.time("started", task.started_at, now);
    lines.time("finished", task.finished_at, now);
    let ran = task.started_at.zip(task.finished_at).map(|(from, to)| between(from, to));
    lines.optional("ran", ran.map(brief).as_deref());
    lines.time("cancel asked", task.cancel_requested_at, now);
    lines.optional("retried from", task.retried_from.as_deref());
    lines.optional("retried by", task.retried_by.as_deref());
    lines.optional("worker", task.worker_id.as_deref());
    if let Some(change) = &task.last_change {
        lines.add("last change", &format!("{} {}", change.call, made(change.at, change.by.as_deref(), now)));
        lines.optional("request", change.request_id.as_deref());
    }
    lines.json("args", task.args.as_deref());
    match task.result_expired {
        true => lines.add("result", "expired"),
        false => lines.json("result", task.result.as_deref()),
    }
    for error in &task.errors {
        let text =
            format!("attempt {}, {}: {} ({})", error.attempt, relative(error.at, now), error.message, error.kind);
        lines.add("error", &text);
    }
    lines.text
}

/// Who has done something, and how long ago.
pub(super) fn made(at: Timestamp, by: Option<&str>, now: Timestamp) -> String {
    let by = by.map(|by| format!("by {by}, ")).unwrap_or_default();
    format!("{by}{}", relative(at, now))
}

/// The time from one to the other, if it passed forwards.
pub(super) fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

/// Names and values, one a line.
pub(super) struct Lines<'o> {
    output: &'o Output,
    /// The lines so far.
    pub(super) text: String,
}

impl<'o> Lines<'o> {
    /// No lines yet.
    pub(super) fn new(output: &'o Output) -> Self {
        Self { output, text: String::new() }
    }

    /// Text of any origin.
    pub(super) fn add(&mut self, name: &str, value: &str) {
        self.styled(name, value, Style::new());
    }

    fn styled(&mut self, name: &str, value: &str, style: Style) {
        let name = self.output.paint(&format!("{name:<12}"), Style::new().dimmed());
        self.text.push_str(&format!("{name}  {}\n", self.output.paint(value, style)));
    }

    /// Text, if there is any.
    pub(super) fn optional(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }

    /// Tags, if there are any.
    pub(super) fn tags(&mut self, tags: &BTreeMap<String, String>) {
        let tags: Vec<_> = tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
        self.optional("tags", (!tags.is_empty()).then(|| tags.join(" ")).as_deref());
    }

    /// A time, and how far off it is.
    pub(super) fn time(&mut self, name: &str, time: Option<Timestamp>, now: Timestamp) {
        if let Some(time) = time {
            self.add(name, &format!("{time:.3}  {}", relative(time, now)));
        }
    }

    /// JSON, cut where it is long.
    pub(super) fn json(&mut self, name: &str, json: Option<&RawValue>) {
        let Some(json) = json else { return };
        let line = json_line(json.get());
        let shown = cut(&line, SHOWN_CHARS_MAX);
        match shown.len() < line.len() {
            true => self.add(name, &format!("{shown} ({} bytes, --json prints them all)", line.len())),
            false => self.add(name, &shown),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::{Cli, When};
    use clap::Parser;

    /// An output for people, without colours.
    pub(crate) fn plain() -> Output {
        let mut cli = Cli::parse_from(["tasklane", "workers"]);
        cli.global.color = When::Never;
        Output::new(&cli.global)
    }

    #[test]
    fn a_task_for_people() {
        let text = r#"{"id":"01a20751-1f82-705d-a198-4567bb46f288","kind":"text.count","queue":"default","state":"discarded",
            "args":{
              "text": "a\u001b[2Jb"},"tags":{"team":"blue"},"priority":"normal","attempt":2,"max_attempts":20,"fence":2,"result":null,
            "errors":[{"attempt":1,"at":"2026-11-23T07:32:39.241Z","message":"no \u001b[31mspace\nleft","kind":"error"}],
            "reason":"final_error","created_at":"2026-11-23T07:31:26.722Z","run_at":"2026-11-23T07:31:26.722Z",
            "started_at":"2026-11-23T07:31:27Z","finished_at":"2026-11-23T07:31:27.011Z","cancel_requested_at":null,
            "worker_id":null,"timeout_ms":90000,"concurrency_key":"customer:7",
            "limited_by":"key:customer:7","unique_key":null,"of_a_newer_producer":1}"#;
        let task: Task = serde_json::from_str(text).unwrap();
        let now = "2026-11-23T07:33:00Z".parse().unwrap();
        insta::assert_snapshot!(view(&task, &plain(), now));
        let expired = Task { result_expired: true, ..task };
        assert!(view(&expired, &plain(), now).contains("result        expired\n"));
    }
}
