//! Bodies of submissions: one task, a batch, a batch of lines.

use jiff::Timestamp;
use tasklane_common::clock;
use tasklane_common::envelope::Envelope;
use tasklane_common::task::{KIND_BYTES_MAX, NewTask, QUEUE_BYTES_MAX};
use tasklane_producer::batch::{Batch, Collected, LINE_BYTES_MAX, Lines, TASKS_MAX};
use tasklane_producer::error::{ApiError, ERRORS_MAX, FieldError};
use tasklane_producer::extract;
use tasklane_producer::idempotency::Fingerprint;
use tasklane_producer::request::{
    Circumstances, DELAY_MS_MAX, MAX_ATTEMPTS_MAX, Rules, SubmitTask, TAG_KEY_BYTES_MAX, TAG_VALUE_BYTES_MAX, TAGS_MAX,
    TIMEOUT_MS_MAX,
};
use tasklane_producer::routing::Routes;

const ARGS_BYTES_MAX: usize = 1024 * 1024;
/// The longest path and message of one fault, as text.
const FAULT_BYTES_MAX: usize = 1024;
/// The milliseconds of a fixed now, so that every run is the same.
const NOW_MS: i64 = 1_900_000_000_000;

/// Reads a body in all three ways. What is accepted keeps the limits and survives the broker; what is refused is
/// refused in few words; and a task is accepted alone when, and only when, it is accepted in a batch.
pub fn http_body(body: &[u8]) {
    let alone = single(body);
    for outcome in [document(body), lines(&[body])] {
        check(&outcome);
    }
    check_cuts(body);
    let one = document(&[b"{\"tasks\":[", body, b"]}"].concat());
    if let Ok(task) = &alone {
        assert!(one.as_ref().is_ok_and(|one| one.tasks.len() == 1), "alone it is accepted, in a batch not: {one:?}");
        check_task(task);
    }
    if !body.contains(&b'\n') && !body.trim_ascii().is_empty() && body.len() <= LINE_BYTES_MAX {
        let line = lines(&[body]);
        assert_eq!(alone.is_ok(), line.is_ok(), "alone {alone:?}, as a line {line:?}");
        if let (Ok(one), Ok(line)) = (one, line) {
            assert_eq!(digest(one), digest(line), "the same batch has two fingerprints");
        }
    }
}

fn circumstances() -> (Rules, Circumstances<'static>) {
    let rules = Rules { max_attempts: 20, routes: Routes::default() };
    (rules, Circumstances { now: now(), traceparent: None })
}

fn now() -> Timestamp {
    clock::timestamp(NOW_MS)
}

/// As `POST /v1/tasks` does it.
fn single(body: &[u8]) -> Result<NewTask, ApiError> {
    let read = |body| {
        let task: SubmitTask = extract::object(body)?;
        let _ = Fingerprint::of_task(&task);
        let (rules, circumstances) = circumstances();
        task.validate(&rules, circumstances).map_err(ApiError::InvalidTask)
    };
    read(body).inspect_err(check_refusal)
}

/// As `POST /v1/tasks/batch` does it for `application/json`.
fn document(body: &[u8]) -> Result<Collected, ApiError> {
    let (rules, circumstances) = circumstances();
    let mut batch = Batch::new(&rules, circumstances, true);
    batch.add_document(body)?;
    batch.finish()
}

/// As `POST /v1/tasks/batch` does it for `application/x-ndjson`.
fn lines(parts: &[&[u8]]) -> Result<Collected, ApiError> {
    let (rules, circumstances) = circumstances();
    let (mut batch, mut lines) = (Batch::new(&rules, circumstances, true), Lines::default());
    for part in parts {
        if lines.feed(part, &mut batch).is_break() {
            return batch.finish();
        }
    }
    lines.finish(&mut batch);
    batch.finish()
}

/// Wherever the network cuts the stream, the answer is the same.
fn check_cuts(body: &[u8]) {
    let whole = lines(&[body]);
    for cut in [1, body.len() / 2, body.len().saturating_sub(1)] {
        let (first, second) = body.split_at(cut.min(body.len()));
        match (&whole, lines(&[first, second])) {
            (Ok(whole), Ok(parts)) => {
                let args = |batch: &Collected| batch.tasks.iter().map(|task| task.args.clone()).collect::<Vec<_>>();
                assert_eq!(args(whole), args(&parts), "cut at {cut}");
            }
            (Err(_), Err(_)) => {}
            (whole, parts) => assert_eq!(whole.is_ok(), parts.is_ok(), "cut at {cut}: {parts:?}"),
        }
    }
}

fn check(outcome: &Result<Collected, ApiError>) {
    match outcome {
        Ok(batch) => {
            assert!((1..=TASKS_MAX).contains(&batch.tasks.len()), "{} tasks", batch.tasks.len());
            batch.tasks.iter().for_each(check_task);
        }
        Err(error) => check_refusal(error),
    }
}

fn check_task(task: &NewTask) {
    assert!(task.kind.as_str().len() <= KIND_BYTES_MAX && task.queue.as_str().len() <= QUEUE_BYTES_MAX, "{task:?}");
    assert!(task.args.as_str().len() <= ARGS_BYTES_MAX, "{} bytes of args", task.args.as_str().len());
    let args = serde_json::from_str::<serde_json::Value>(task.args.as_str());
    assert!(args.is_ok(), "no handler can read these args: {args:?}");
    assert!((1..=MAX_ATTEMPTS_MAX).contains(&task.max_attempts), "{task:?}");
    let timeout_ms = task.timeout.map(clock::millis);
    assert!(timeout_ms.is_none_or(|ms| (1..=TIMEOUT_MS_MAX).contains(&ms)), "{task:?}");
    assert!(task.run_at.is_none_or(|at| at > now()), "{task:?}");
    assert!(task.tags.len() <= TAGS_MAX, "{} tags", task.tags.len());
    for (key, value) in &task.tags {
        assert!((1..=TAG_KEY_BYTES_MAX).contains(&key.len()) && !key.contains(':'), "{key:?}");
        assert!(value.len() <= TAG_VALUE_BYTES_MAX, "{value:?}");
        assert!(!format!("{key}{value}").contains(char::is_control), "{key:?}: {value:?}");
    }
    let sent = Envelope {
        id: task.id,
        kind: task.kind.clone(),
        args: task.args.clone(),
        fence: None,
        traceparent: None,
        reply_to: None,
        ledger: None,
    };
    assert_eq!(Envelope::decode(&sent.properties(), sent.args.as_str().as_bytes()), Ok(sent));
}

fn check_refusal(error: &ApiError) {
    let faults: &[FieldError] = match error {
        ApiError::InvalidTask(faults) => faults,
        _ => &[],
    };
    assert!(faults.len() <= ERRORS_MAX, "{} faults", faults.len());
    for FieldError { path, message } in faults {
        assert!(path.len() + message.len() <= FAULT_BYTES_MAX, "{} and {} bytes", path.len(), message.len());
    }
    assert!(error.to_string().len() <= FAULT_BYTES_MAX, "{} bytes", error.to_string().len());
    assert!(error.codes().0.is_client_error(), "the client is at fault, not we: {error:?}");
}

fn digest(batch: Collected) -> Option<[u8; 32]> {
    batch.fingerprint.map(|fingerprint| fingerprint.under(String::new()).fingerprint)
}

pub(super) fn large() -> Vec<Vec<u8>> {
    let task = |args: &str| format!(r#"{{"kind":"a","args":{args}}}"#);
    let text = |bytes: usize| task(&format!("\"{}\"", "x".repeat(bytes - 2)));
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let many = |count: usize| format!(r#"{{"tasks":[{}]}}"#, vec![r#"{"kind":"a"}"#; count].join(","));
    let tags = |count: usize| (0..count).map(|tag| format!(r#""{tag}":"""#)).collect::<Vec<_>>().join(",");
    [
        text(ARGS_BYTES_MAX),
        text(ARGS_BYTES_MAX + 1),
        task(&deep(127)),
        task(&deep(128)),
        task(&deep(100_000)),
        "[".repeat(100_000),
        "{\"tasks\":".repeat(50_000),
        task(&"9".repeat(100_000)),
        many(TASKS_MAX),
        many(TASKS_MAX + 1),
        "{\"kind\":\"a\"}\n".repeat(TASKS_MAX + 1),
        "x\n".repeat(5_000),
        " ".repeat(LINE_BYTES_MAX + 1) + "\n{\"kind\":\"a\"}",
        "\n".repeat(100_000),
        format!(r#"{{"{}":1}}"#, "k".repeat(ARGS_BYTES_MAX)),
        format!(r#"{{"kind":"a","max_attempts":"{}"}}"#, "9".repeat(ARGS_BYTES_MAX)),
        format!(r#"{{"kind":"a","tags":{{"{}":1}}}}"#, "k".repeat(ARGS_BYTES_MAX)),
        format!(r#"{{"kind":"a","tags":{{{}}}}}"#, tags(TAGS_MAX)),
        format!(r#"{{"kind":"a","tags":{{{}}}}}"#, tags(100_000)),
        format!(r#"{{"kind":"a","delay_ms":{DELAY_MS_MAX}}}"#),
    ]
    .map(String::into_bytes)
    .into()
}
