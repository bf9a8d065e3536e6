//! `tail`: what happens to tasks, as it happens.

use serde::Deserialize;
use tokio::time::Instant;

use super::Context;
use crate::api::TaskEvent;
use crate::cli::Tail;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::{Output, note, state_style};
use crate::sse::Event;
use crate::text::{count, json_line, visible};

/// What a slow reader is told.
#[derive(Debug, Deserialize)]
struct Lost {
    events: u64,
}

pub(super) async fn run(cx: &Context<'_>, tail: &Tail) -> Result<Exit, Failure> {
    let until = tail.time.map(|time| Instant::now() + time);
    let call = Call::get(["v1", "events"])
        .optional("kind", tail.kind.as_ref())
        .optional("queue", tail.queue.as_ref())
        .optional("state", tail.state.as_ref());
    let mut stream = cx.client.stream(call, until).await?;
    let (mut seen, mut greeted) = (0, false);
    while let Some(event) = stream.next().await? {
        match event.name.as_str() {
            "listening" => {
                if std::mem::replace(&mut greeted, true) {
                    note("the producer's connection to the broker was broken: events are missing here");
                }
            }
            "lost" => {
                let lost: Lost = read(&event)?;
                note(&format!("{} missing here: this reader was too slow", count(lost.events, "event")));
            }
            _ => {
                show(cx.output, &event)?;
                seen += 1;
                if tail.count.is_some_and(|count| seen >= count) {
                    return Ok(Exit::Done);
                }
            }
        }
    }
    Ok(Exit::Done)
}

fn read<'e, T: Deserialize<'e>>(event: &'e Event) -> Result<T, Failure> {
    serde_json::from_str(&event.data)
        .map_err(|error| Failure::new(Exit::Refused, format!("an event is not as this program knows it: {error}")))
}

fn show(output: &Output, event: &Event) -> Result<(), Failure> {
    if output.json {
        return output.text(&format!("{}\n", json_line(&event.data)));
    }
    output.text(&format!("{}\n", line(output, &read(event)?)))
}

fn line(output: &Output, event: &TaskEvent) -> String {
    let TaskEvent { at, id, kind, queue, event, state, attempt, worker_id } = event;
    let word = output.paint(&format!("{event:<11}"), state_style(state));
    let worker = worker_id.as_ref().map(|worker| format!("  worker {worker}")).unwrap_or_default();
    let attempt = if *attempt > 0 { format!("  attempt {attempt}") } else { String::new() };
    format!("{at:.3}  {word}  {}", visible(&format!("{id}  {queue}  {kind}{attempt}{worker}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::get::tests::plain;

    #[test]
    fn an_event_for_people() {
        let text = r#"{"at":"2026-11-23T07:32:39.241567Z","id":"01a20751-1f82-705d-a198-4567bb46f288","kind":"text.\u001bcount",
            "queue":"default","event":"retried","state":"retryable","attempt":2,"worker_id":"01a20a88-ef48-71e6-bf03-7b41ca582df4","new":1}"#;
        let event = serde_json::from_str(text).unwrap();
        let expected = "2026-11-23T07:32:39.241Z  retried      01a20751-1f82-705d-a198-4567bb46f288  default  text.\\u{1b}count  \
                        attempt 2  worker 01a20a88-ef48-71e6-bf03-7b41ca582df4";
        assert_eq!(line(&plain(), &event), expected);
    }
}
