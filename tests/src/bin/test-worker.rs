//! A worker with handlers for tests: they do nothing, take their time, fail, panic, or block, and log that they did.
//!
//! With `TASKLANE_TEST_OPLOG` each start, effect and end is a line of that history; with `TASKLANE_TEST_OPLOG_SYNC` each
//! line is synced to disk.

#![expect(clippy::panic, reason = "one of the handlers panics on purpose")]

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;
use tasklane_common::task::{Guarantee, Kind};
use tasklane_tests::history::{Ending, Op, Run, Writer};
use tasklane_worker::{Handler, HandlerError, Options, Outcome, TaskContext, sqlx};

static OPLOG: LazyLock<Option<Writer>> = LazyLock::new(|| {
    let path = std::env::var_os("TASKLANE_TEST_OPLOG")?;
    Writer::open(Path::new(&path), std::env::var_os("TASKLANE_TEST_OPLOG_SYNC").is_some()).ok()
});

/// One run in the log: begun when this is made, and dropped if nobody says how it ended.
struct Logged {
    run: Run,
    ended: bool,
}

impl Logged {
    fn start(cx: &TaskContext, edition: u64) -> Self {
        let run = Run { task: cx.id.to_string(), attempt: cx.attempt.unsigned_abs(), fence: cx.fence.0.unsigned_abs() };
        log(Op::Start { run: run.clone(), edition, queue: Some(cx.queue.to_string()) });
        Self { run, ended: false }
    }

    fn effect(&self) {
        log(Op::Effect(self.run.clone()));
    }

    fn end(mut self, how: Ending) {
        self.ended = true;
        log(Op::End { run: self.run.clone(), how });
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        if !self.ended {
            log(Op::End { run: self.run.clone(), how: Ending::Dropped });
        }
    }
}

fn log(op: Op) {
    let Some(writer) = OPLOG.as_ref() else { return };
    if let Err(error) = writer.append(op) {
        eprintln!("the operation log cannot be written: {error:#}");
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
    /// Ends with an error as soon as it is asked to stop.
    heeds: bool,
    /// How long the transaction of a counting task's first run takes before its write; it logs its effect before that.
    inside_ms: u64,
    /// How long the first claim's snooze is; 0 is none.
    snooze_ms: u64,
    /// The number of the change that these are of; 0 is the submission.
    edition: u64,
    /// Only makes the args larger.
    ballast: IgnoredAny,
    /// What it answers; by default, which run answers.
    answer: Option<serde_json::Value>,
}

async fn fulfil(wish: Wish, cx: &TaskContext) -> Result<Outcome, HandlerError> {
    let logged = Logged::start(cx, wish.edition);
    let again = wish.work_again_ms.filter(|_| cx.fence.0 > 1);
    let work = Duration::from_millis(again.unwrap_or(wish.work_ms));
    if wish.blocks {
        std::thread::sleep(work);
    } else if wish.heeds {
        tokio::select! {
            () = tokio::time::sleep(work) => {}
            () = cx.cancellation.cancelled() => return Err(HandlerError::retry("asked to stop")),
        }
    } else if !work.is_zero() {
        // Even no time at all would wait for the timer's next millisecond.
        tokio::time::sleep(work).await;
    }
    let answer = match cx.attempt {
        attempt if attempt <= wish.failures && wish.panics => panic!("attempt {attempt} panics"),
        attempt if attempt <= wish.failures => Err(HandlerError::retry(format!("attempt {attempt} fails"))),
        _ if wish.snooze_ms > 0 && cx.fence.0 == 1 => Ok(Outcome::Snooze(Duration::from_millis(wish.snooze_ms))),
        _ => Outcome::complete(wish.answer.unwrap_or_else(|| json!({"pid": std::process::id(), "fence": cx.fence}))),
    };
    let done = matches!(answer, Ok(Outcome::Complete(_)));
    if done {
        logged.effect();
    }
    logged.end(if done { Ending::Done } else { Ending::Again });
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

/// Of a kind that limits are made for: so many run at once.
struct Few;

impl Handler for Few {
    const KIND: &'static str = "test.few";
    type Args = Wish;

    async fn handle(&self, wish: Wish, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        fulfil(wish, cx).await
    }
}

/// Of a kind that limits are made for: so many start in a second.
struct Paced;

impl Handler for Paced {
    const KIND: &'static str = "test.paced";
    type Args = Wish;

    async fn handle(&self, wish: Wish, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        fulfil(wish, cx).await
    }
}

/// What a task that follows a group is given.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AfterGroup {
    group: serde_json::Value,
    args: Wish,
}

/// Follows a group, and answers with what it was told of it.
struct Then;

impl Handler for Then {
    const KIND: &'static str = "test.then";
    type Args = AfterGroup;

    async fn handle(&self, AfterGroup { group, args }: AfterGroup, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        fulfil(Wish { answer: Some(group), ..args }, cx).await
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

/// Counts in a table of the ledger's database, in the transaction of its own completion.
struct Count;

impl Handler for Count {
    const KIND: &'static str = "test.count";
    type Args = Wish;

    fn options(&self) -> Options {
        Options { guarantee: Guarantee::Transactional, ..Options::default() }
    }

    async fn handle(&self, wish: Wish, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let logged = Logged::start(cx, wish.edition);
        tokio::time::sleep(Duration::from_millis(wish.work_ms)).await;
        let inside = Inside::of(&wish, &logged.run);
        let counted = match std::env::var("TASKLANE_LEDGER_URL") {
            Ok(url) if url.starts_with("sqlite:") => count_in_sqlite(cx, inside).await,
            _ => count_in_postgres(cx, inside).await,
        };
        // Its effect is in the database, where it can be counted.
        logged.end(if counted.is_ok() { Ending::Done } else { Ending::Again });
        counted
    }
}

/// A run that is to be caught inside of its transaction.
struct Inside {
    run: Run,
    pause: Duration,
}

impl Inside {
    fn of(wish: &Wish, run: &Run) -> Option<Self> {
        let pause = Duration::from_millis(wish.inside_ms);
        (!pause.is_zero() && run.fence == 1).then(|| Self { run: run.clone(), pause })
    }

    /// Tells that it is inside; how long it stays there.
    fn begin(&self) -> Duration {
        log(Op::Effect(self.run.clone()));
        self.pause
    }
}

async fn count_in_sqlite(cx: &TaskContext, inside: Option<Inside>) -> Result<Outcome, HandlerError> {
    cx.complete_in_sqlite(move |db| {
        if let Some(inside) = &inside {
            std::thread::sleep(inside.begin());
        }
        let sql = "UPDATE counter SET n = n + 1 RETURNING n";
        Ok(db.prepare_cached(sql)?.query_row([], |row| row.get::<_, i64>(0))?)
    })
    .await
}

async fn count_in_postgres(cx: &TaskContext, inside: Option<Inside>) -> Result<Outcome, HandlerError> {
    cx.complete_in_postgres(async |connection| {
        if let Some(inside) = &inside {
            tokio::time::sleep(inside.begin()).await;
        }
        let sql = "UPDATE counter SET n = n + 1 RETURNING n";
        Ok(sqlx::query_scalar::<_, i64>(sql).fetch_one(connection).await?)
    })
    .await
}

struct Exit;

impl Handler for Exit {
    const KIND: &'static str = "test.exit";
    type Args = serde_json::Value;

    /// Takes its whole worker down, as a task that runs out of memory does.
    async fn handle(&self, _args: serde_json::Value, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let _logged = Logged::start(cx, 0);
        std::process::abort();
    }
}

/// How many kinds `test.work.0` and so on there are, for measurements of many.
fn more_kinds() -> usize {
    std::env::var("TASKLANE_TEST_KINDS").ok().and_then(|count| count.parse().ok()).unwrap_or_default()
}

fn main() -> ExitCode {
    tasklane_worker::program::main(|handlers| {
        let limited = handlers.handler(Few).handler(Paced);
        let limited = (0..more_kinds()).fold(limited, |handlers, n| match Kind::parse(&format!("test.work.{n}")) {
            Ok(kind) => handlers.named(kind, Arc::new(AtLeastOnce)),
            Err(error) => panic!("{error}"),
        });
        limited.handler(AtLeastOnce).handler(Then).handler(AtMostOnce).handler(Count).handler(Exit)
    })
}
