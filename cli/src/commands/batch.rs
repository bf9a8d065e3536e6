//! `batch`: a file of tasks, chunk after chunk, in memory that does not grow with the file.

mod with_end;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use super::Context;
use crate::api::{BatchAccepted, Identified};
use crate::chunks::{Chunk, Chunks, LINE_BYTES_MAX, ReadFault};
use crate::cli::Batch;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::input;
use crate::output::note;
use crate::text::{brief, count, grouped, json_line, visible};

/// What the answer to a chunk may take beside the usual: the upload and one large transaction.
const CHUNK_TIME: Duration = Duration::from_secs(60);

/// How far the run has come.
struct Run<'r> {
    cx: &'r Context<'r>,
    batch: &'r Batch,
    key: String,
    bar: ProgressBar,
    begin: Instant,
    /// Up to this line everything is recorded.
    line: u64,
    recorded: u64,
    replayed: u64,
    requests: u64,
}

pub(super) async fn run(cx: &Context<'_>, batch: Batch) -> Result<Exit, Failure> {
    if let Some(kind) = &batch.then {
        return with_end::run(cx, &batch, kind).await;
    }
    let (input, bytes) = open(&batch.file)?;
    let (chunks, receiver) = mpsc::channel(1);
    let tasks_max = batch.chunk;
    let read = move || {
        for chunk in Chunks::new(input, tasks_max) {
            if chunks.blocking_send(chunk).is_err() {
                return;
            }
        }
    };
    std::thread::spawn(read);
    let key = batch.key.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
    let mut run = Run {
        cx,
        batch: &batch,
        key,
        bar: bar(bytes),
        begin: Instant::now(),
        line: 0,
        recorded: 0,
        replayed: 0,
        requests: 0,
    };
    let outcome = tokio::select! {
        outcome = run.all(receiver) => outcome,
        _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Interrupted, "interrupted")),
    };
    run.bar.finish_and_clear();
    match outcome {
        Ok(()) => run.summary().map(|()| Exit::Done),
        Err(failure) => Err(run.explained(failure)),
    }
}

fn open(file: &Path) -> Result<(Box<dyn BufRead + Send>, Option<u64>), Failure> {
    if file == Path::new("-") {
        return Ok((Box::new(BufReader::new(std::io::stdin())), None));
    }
    let file = input::open(file)?;
    let bytes = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|metadata| metadata.len());
    Ok((Box::new(BufReader::new(file)), bytes))
}

/// Seen on a terminal only.
fn bar(bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (ProgressBar::new(bytes), "{bar:30} {bytes}/{total_bytes}  {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes}  {msg}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

impl Run<'_> {
    async fn all(&mut self, mut chunks: mpsc::Receiver<Result<Chunk, ReadFault>>) -> Result<(), Failure> {
        while let Some(chunk) = chunks.recv().await {
            let chunk = chunk.map_err(|fault| match fault {
                ReadFault::Io(error) => Failure::usage(format!("cannot read {}: {error}", self.batch.file.display())),
                ReadFault::LongLine(line) => {
                    Failure::usage(format!("line {line} is longer than {LINE_BYTES_MAX} bytes"))
                }
            })?;
            self.one(chunk).await?;
        }
        Ok(())
    }

    async fn one(&mut self, chunk: Chunk) -> Result<(), Failure> {
        let Chunk { first_line, lines, tasks, text } = chunk;
        let bytes = text.len() as u64;
        // The key makes a chunk whose answer was lost repeatable: by the client now, by the user's next run later.
        let call = Call::post(["v1", "tasks", "batch"])
            .body("application/x-ndjson", text)
            .key(format!("{}-{first_line}", self.key))
            .waiting(CHUNK_TIME);
        let last_line = first_line + lines - 1;
        let answer = self.cx.client.call(call).await.map_err(|failure| in_file(failure, first_line, last_line))?;
        let accepted: BatchAccepted = answer.read()?;
        self.line = last_line;
        self.requests += 1;
        match answer.is_replayed() {
            true => self.replayed += u64::from(tasks),
            false => self.recorded += u64::from(tasks),
        }
        self.bar.inc(bytes);
        let per_second = (self.recorded + self.replayed) as f64 / self.begin.elapsed().as_secs_f64().max(0.001);
        self.bar.set_message(format!("{} tasks, {per_second:.0}/s", grouped(self.recorded + self.replayed)));
        self.show(&accepted)
    }

    fn show(&self, accepted: &BatchAccepted) -> Result<(), Failure> {
        if !self.batch.quiet && !self.cx.output.json {
            return Ok(());
        }
        let text = entries(accepted, self.batch.quiet)?;
        self.bar.suspend(|| self.cx.output.text(&text))
    }

    fn summary(&self) -> Result<(), Failure> {
        if self.batch.quiet || self.cx.output.json {
            return Ok(());
        }
        let time = brief(self.begin.elapsed());
        let mut line =
            format!("{} recorded in {}, {time}", count(self.recorded, "task"), count(self.requests, "request"));
        if self.replayed > 0 {
            line.push_str(&format!("; {} were recorded before under this key", count(self.replayed, "task")));
        }
        self.cx.output.line(&line)
    }

    /// Says what is recorded and how to go on.
    fn explained(&self, failure: Failure) -> Failure {
        let stands = match self.line {
            0 if failure.outcome_unknown || failure.exit == Exit::Interrupted => {
                "what is recorded is unknown".to_owned()
            }
            0 => return failure.hint(nothing(self.batch)),
            line => format!("lines 1–{line} are recorded"),
        };
        let chunk = if self.batch.chunk == 1000 { String::new() } else { format!(" --chunk {}", self.batch.chunk) };
        let again = format!("tasklane batch {} --key {}{chunk}", self.batch.file.display(), self.key);
        let failure = failure.hint(stands).hint(format!("the same input again records nothing twice with: {again}"));
        if failure.exit == Exit::BrokenPipe {
            failure.details.iter().for_each(|line| note(line));
        }
        failure
    }
}

/// What stands after a refusal of the first request. Of what earlier runs did under the same key nothing is known here.
fn nothing(batch: &Batch) -> &'static str {
    match batch.key {
        Some(_) => "this run has recorded nothing; what an earlier one recorded under this --key stands",
        None => "nothing is recorded",
    }
}

/// The tasks of an answer, one a line: their ids only, or as they are told.
fn entries(accepted: &BatchAccepted, ids_only: bool) -> Result<String, Failure> {
    let mut text = String::new();
    for entry in &accepted.tasks {
        if ids_only {
            let entry: Identified = serde_json::from_str(entry.get())
                .map_err(|error| Failure::new(Exit::Refused, format!("the answer is not as known here: {error}")))?;
            text.push_str(&visible(&entry.id));
        } else {
            text.push_str(&json_line(entry.get()));
        }
        text.push('\n');
    }
    Ok(text)
}

/// The failure of a chunk, by the lines of the file.
fn in_file(failure: Failure, first_line: u64, last_line: u64) -> Failure {
    let details = failure.details.iter().map(|detail| by_line_of_file(detail, first_line)).collect();
    let message = match failure.exit {
        Exit::Refused => format!("lines {first_line}–{last_line} were refused: {}", failure.message),
        _ => format!("lines {first_line}–{last_line}: {}", failure.message),
    };
    let failure = Failure { message, details, ..failure };
    match failure.message.contains("Idempotency-Key") {
        true => failure.hint("under this --key these lines were others, or --chunk was"),
        false => failure,
    }
}

/// `line 3: kind: …` of a chunk that begins with line 1001 is `line 1003: kind: …` of the file.
fn by_line_of_file(detail: &str, first_line: u64) -> String {
    let Some(rest) = detail.strip_prefix("line ") else { return detail.to_owned() };
    let end = rest.find(|char: char| !char.is_ascii_digit()).unwrap_or(rest.len());
    match rest[..end].parse::<u64>() {
        Ok(line) => format!("line {}{}", line.saturating_add(first_line).saturating_sub(1), &rest[end..]),
        Err(_) => detail.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_the_lines_of_the_file() {
        for (of_chunk, of_file) in [
            ("line 1: kind: is required", "line 1001: kind: is required"),
            ("line 12", "line 1012"),
            ("line : x", "line : x"),
            ("line 99999999999999999999: x", "line 99999999999999999999: x"),
            ("tasks: must be", "tasks: must be"),
        ] {
            assert_eq!(by_line_of_file(of_chunk, 1001), of_file);
        }
    }
}
