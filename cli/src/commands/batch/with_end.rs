//! `batch --then`: a file of tasks in one request, and a task that follows when all have ended.

use std::io::BufRead;

use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::super::Context;
use super::{CHUNK_TIME, entries, nothing, open};
use crate::api::BatchAccepted;
use crate::chunks::{Chunk, Chunks, LINE_BYTES_MAX, ReadFault};
use crate::cli::Batch;
use crate::client::{Answer, Call};
use crate::failure::{Exit, Failure};
use crate::input;
use crate::text::count;

/// The most tasks of one request, as the API has it.
const TASKS_MAX: u32 = 10_000;
/// The most bytes of them, with room for the rest of the request.
const BYTES_MAX: usize = 60 * 1024 * 1024;

/// The body of the request.
#[derive(Serialize)]
struct Submission<'s> {
    tasks: Vec<Box<RawValue>>,
    then: Then<'s>,
}

#[derive(Serialize)]
struct Then<'s> {
    kind: &'s str,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Box<RawValue>>,
}

pub(super) async fn run(cx: &Context<'_>, batch: &Batch, kind: &str) -> Result<Exit, Failure> {
    let args = batch.then_args.as_deref().map(|given| input::args_of("--then-args", given)).transpose()?;
    let (input, _) = open(&batch.file)?;
    let (lines, tasks) = numbered(&whole(input, batch)?)?;
    let key = batch.key.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
    let call = Call::post(["v1", "tasks", "batch"]).json(&Submission { tasks, then: Then { kind, args } })?;
    let answer = cx.client.call(call.key(&key).waiting(CHUNK_TIME)).await.map_err(|failure| {
        let details = failure.details.iter().map(|detail| by_line(detail, &lines)).collect();
        let unknown = failure.outcome_unknown;
        let failure = Failure { details, ..failure };
        match unknown {
            true => failure
                .hint(format!("what is recorded is unknown: give the same command with --key {key} to have it once")),
            false => failure.hint(nothing(batch)),
        }
    })?;
    show(cx, batch, &answer)?;
    Ok(Exit::Done)
}

/// All lines of the input.
fn whole(input: Box<dyn BufRead + Send>, batch: &Batch) -> Result<Chunk, Failure> {
    let mut chunks = Chunks::new(input, TASKS_MAX).of_bytes(BYTES_MAX);
    let mut next = || {
        chunks.next().transpose().map_err(|fault| match fault {
            ReadFault::Io(error) => Failure::usage(format!("cannot read {}: {error}", batch.file.display())),
            ReadFault::LongLine(line) => Failure::usage(format!("line {line} is longer than {LINE_BYTES_MAX} bytes")),
        })
    };
    let first = next()?.ok_or_else(|| Failure::usage("there is no task, so nothing can follow"))?;
    match next()? {
        None => Ok(first),
        Some(more) => Err(Failure::usage(format!(
            "line {} is too much: a batch with --then is one request, of at most {TASKS_MAX} tasks and {BYTES_MAX} bytes",
            more.first_line
        ))),
    }
}

/// The tasks, each with the number of its line.
fn numbered(chunk: &Chunk) -> Result<(Vec<u64>, Vec<Box<RawValue>>), Failure> {
    let mut found = (Vec::new(), Vec::new());
    for (number, line) in (chunk.first_line..).zip(chunk.text.split(|byte| *byte == b'\n')) {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let task = serde_json::from_slice(line).map_err(|error| {
            Failure::usage(format!("line {number} is not JSON: {error}")).hint("nothing is recorded")
        })?;
        found.0.push(number);
        found.1.push(task);
    }
    Ok(found)
}

/// `tasks[3].kind: …` is `line 5: kind: …` of the file.
fn by_line(detail: &str, lines: &[u64]) -> String {
    let named = || {
        let (index, rest) = detail.strip_prefix("tasks[")?.split_once(']')?;
        let line = lines.get(index.parse::<usize>().ok()?)?;
        Some(format!("line {line}: {}", rest.trim_start_matches(['.', ':', ' '])))
    };
    named().unwrap_or_else(|| detail.to_owned())
}

fn show(cx: &Context<'_>, batch: &Batch, answer: &Answer) -> Result<(), Failure> {
    let accepted: BatchAccepted = answer.read()?;
    let group = accepted.group.as_ref().map_or("none", |group| group.id.as_str());
    if cx.output.json {
        return cx.output.json(&answer.text);
    }
    if batch.quiet {
        return cx.output.text(&entries(&accepted, true)?);
    }
    let tasks = count(accepted.tasks.len() as u64, "task");
    let before = if answer.is_replayed() { " before under this key" } else { "" };
    cx.output.line(&format!("{tasks} recorded{before}, group {group}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_the_lines_of_the_file() {
        let text = b"\n{\"kind\":\"a\"}\n\n{\"kind\":\"b\"}".to_vec();
        let (lines, tasks) = numbered(&Chunk { first_line: 7, lines: 4, tasks: 2, text }).unwrap();
        assert_eq!((&lines[..], tasks[1].get()), (&[8, 10][..], r#"{"kind":"b"}"#));
        for (given, told) in [
            ("tasks[1].kind: is required", "line 10: kind: is required"),
            ("tasks[0]: must be a JSON object", "line 8: must be a JSON object"),
            ("tasks[2].kind: x", "tasks[2].kind: x"),
            ("then.kind: x", "then.kind: x"),
            ("tasks: must be", "tasks: must be"),
        ] {
            assert_eq!(by_line(given, &lines), told);
        }
    }
}
