//! A worker with handlers for tests: they do nothing, take their time, fail, panic, or block, and log that they did.
//!
//! With `TASKLANE_TEST_OPLOG` each start and end is a line in that file, in the form of the harness's `oplog`.

#![expect(clippy::panic, reason = "one of the handlers panics on purpose")]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use serde_json::json;
use tasklane_common::task::Guarantee;
use tasklane_worker::{Handler, HandlerError, Options, Outcome, TaskContext};

static OPLOG: LazyLock<Option<File>> = LazyLock::new(|| {
    let path = std::env::var_os("TASKLANE_TEST_OPLOG")?;
    OpenOptions::new().append(true).create(true).open(path).ok()
});

fn log(step: &str, cx: &TaskContext) {
    let Some(mut file) = OPLOG.as_ref() else { return };
    let now = clock_gettime(ClockId::Boottime);
    let line = format!(
        "{step} {} {} {} {} {}.{:09}\n",
        cx.id,
        cx.attempt,
        cx.fence,
        std::process::id(),
        now.tv_sec,
        now.tv_nsec
    );
    // One write under 4 KiB with O_APPEND: lines of several processes do not mix.
    if let Err(error) = file.write_all(line.as_bytes()) {
        eprintln!("the operation log cannot be written: {error}");
        std::process::abort();
    }
}

/// What the handlers of this program are asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Wish {
    /// How long the run takes.
    work_ms: u64,
    /// How long a run takes that is not the first; as long as the first by default.
    work_again_ms: Option<u64>,
    /// How many first attempts fail.
    failures: i32,
    /// Panics instead of failing.
    panics: bool,
    /// Blocks its thread, and does not listen to anybody.
    blocks: bool,
    /// How long the first claim's snooze is; 0 is none.
    snooze_ms: u64,
    /// What it answers; by default, which run answers.
    answer: Option<serde_json::Value>,
}

async fn fulfil(wish: Wish, cx: &TaskContext) -> Result<Outcome, HandlerError> {
    log("start", cx);
    let again = wish.work_again_ms.filter(|_| cx.fence.0 > 1);
    let work = Duration::from_millis(again.unwrap_or(wish.work_ms));
    if wish.blocks {
        std::thread::sleep(work);
    } else {
        tokio::time::sleep(work).await;
    }
    let answer = match cx.attempt {
        attempt if attempt <= wish.failures && wish.panics => panic!("attempt {attempt} panics"),
        attempt if attempt <= wish.failures => Err(HandlerError::retry(format!("attempt {attempt} fails"))),
        _ if wish.snooze_ms > 0 && cx.fence.0 == 1 => Ok(Outcome::Snooze(Duration::from_millis(wish.snooze_ms))),
        _ => Outcome::complete(wish.answer.unwrap_or_else(|| json!({"pid": std::process::id(), "fence": cx.fence}))),
    };
    log("end", cx);
    answer
}

struct AtLeastOnce;

impl Handler for AtLeastOnce {
    const KIND: &'static str = "test.work";
    type Args = Wish;

    async fn handle(&self, wish: Wish, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        fulfil(wish, cx).await
    }
}

struct AtMostOnce;

impl Handler for AtMostOnce {
    const KIND: &'static str = "test.once";
    type Args = Wish;

    fn options(&self) -> Options {
        Options { guarantee: Guarantee::AtMostOnce, ..Options::default() }
    }

    async fn handle(&self, wish: Wish, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        fulfil(wish, cx).await
    }
}

struct Exit;

impl Handler for Exit {
    const KIND: &'static str = "test.exit";
    type Args = serde_json::Value;

    /// Takes its whole worker down, as a task that runs out of memory does.
    async fn handle(&self, _args: serde_json::Value, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        log("start", cx);
        std::process::abort();
    }
}

fn main() -> ExitCode {
    tasklane_worker::program::main(|handlers| handlers.handler(AtLeastOnce).handler(AtMostOnce).handler(Exit))
}
