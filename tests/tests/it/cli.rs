//! The operator's command `tasklane`, as a shell runs it: its output, its exit codes, and what it does when things break.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::Api;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::oplog::CommandKind;
use tasklane_tests::process::binary;
use tasklane_tests::proxy::{Direction, Proxy};
use tasklane_tests::stack::{Producer, Stack, Worker};
use tasklane_tests::within;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// However slow the machine is.
const LIMIT: Duration = Duration::from_secs(60);

/// The id of no task.
const NOBODY: &str = "01a20751-1f82-705d-a198-4567bb46f288";

/// The command, for one producer.
#[derive(Clone)]
struct Cli {
    url: String,
    env: Vec<(&'static str, &'static str)>,
}

/// How a command ended, and what it said.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Cli {
    fn at(url: impl Into<String>) -> Self {
        Self { url: url.into(), env: Vec::new() }
    }

    fn of(producer: &Producer) -> Self {
        Self::at(producer.api.url(""))
    }

    fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary("tasklane")?);
        command.args(args).env_clear().env("TASKLANE_URL", &self.url).envs(self.env.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        Ok(command)
    }

    /// Runs it without input.
    async fn run(&self, args: &[&str]) -> Result<Said> {
        ended(self.command(args)?.spawn()?, args).await
    }

    /// Runs it with input.
    async fn fed(&self, args: &[&str], input: &str) -> Result<Said> {
        let mut child = self.command(args)?.stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("its standard input")?;
        let input = input.to_owned();
        // A command that refuses its input closes the pipe, which is not this test's matter.
        let feed = tokio::spawn(async move { stdin.write_all(input.as_bytes()).await });
        let said = ended(child, args).await;
        feed.abort();
        said
    }

    /// Runs it and expects success; answers what it printed.
    async fn ok(&self, args: &[&str]) -> Result<String> {
        let said = self.run(args).await?;
        ensure!(said.code == Some(0), "{args:?}: {said:#?}");
        Ok(said.out)
    }

    /// Runs it with `--json` and expects success; answers the documents that it printed.
    async fn json(&self, args: &[&str]) -> Result<Vec<Value>> {
        documents(&self.ok(&[args, &["--json"]].concat()).await?)
    }

    /// Submits a task; answers its id.
    async fn submit(&self, args: &[&str]) -> Result<String> {
        Ok(self.ok(&[&["submit", "--quiet"], args].concat()).await?.trim().to_owned())
    }
}

impl Said {
    /// It ended so, printed nothing, and said all this.
    fn failed(&self, code: i32, words: &[&str]) {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""), "{self:#?}");
        assert!(self.err.starts_with("error: ") && !self.err.contains("panicked"), "{self:#?}");
        for word in words {
            assert!(self.err.contains(word), "{word}: {self:#?}");
        }
    }
}

async fn ended(child: Child, args: &[&str]) -> Result<Said> {
    let output = within(LIMIT, &format!("tasklane {args:?}"), child.wait_with_output()).await??;
    let text = |bytes| String::from_utf8(bytes).context("not text");
    Ok(Said { code: output.status.code(), out: text(output.stdout)?, err: text(output.stderr)? })
}

fn documents(text: &str) -> Result<Vec<Value>> {
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
}

async fn producer() -> Result<(Stack, Producer)> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    Ok((stack, producer))
}

/// A worker that answers with the args, one that gives up, and one that takes its time.
async fn worker(stack: &Stack) -> Result<Worker> {
    let log = stack.operation_log()?;
    let kinds = [
        CommandKind::new("test.echo").then("cat"),
        CommandKind::new("test.fail").then("echo 'no such month' >&2; exit 65"),
        CommandKind::new("test.slow").then("sleep 30"),
    ];
    let mut start = stack.worker();
    for kind in kinds {
        start = start.config(&log.command(&kind)?);
    }
    start.start().await
}

#[tokio::test]
async fn a_task_is_submitted_as_written_and_waited_for() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let args = "submit test.echo month=2026-11 dry=true n=12345678901234567890 list=[1,2] name=\"Ada\" --wait 40s \
                --tag team=blue --tag x=a=b --max-attempts 3 --timeout 1m --priority high";
    let _worker = worker(&stack).await?;
    let task = &cli.json(&args.split(' ').collect::<Vec<_>>()).await?[0];
    assert_eq!(task["state"], "completed", "{task}");
    let args =
        json!({"month": "2026-11", "dry": true, "n": 12_345_678_901_234_567_890_u64, "list": [1, 2], "name": "Ada"});
    assert_eq!((&task["args"], &task["result"]), (&args, &args));
    assert_eq!(task["tags"], json!({"team": "blue", "x": "a=b"}));
    assert_eq!((&task["max_attempts"], &task["timeout_ms"]), (&json!(3), &json!(60_000)));
    assert_eq!(task["priority"], "high");

    let shown = cli.ok(&["submit", "test.echo", "--wait", "40s", "--args", "[1]"]).await?;
    for line in ["state         completed\n", "result        [1]\n", "attempt       1 of 20\n"] {
        assert!(shown.contains(line), "{shown}");
    }
    let file = stack.place().join("args.json");
    std::fs::write(&file, "{\n  \"from\": \"file\"\n}\n")?;
    let from_file = cli.submit(&["mail", "--args", &format!("@{}", file.display())]).await?;
    assert_eq!(producer.api.get(&from_file).await?.args, json!({"from": "file"}));
    let piped = cli.fed(&["submit", "mail", "-q", "--args", "-"], "{\"from\": \"pipe\"}\n").await?;
    assert_eq!(producer.api.get(piped.out.trim()).await?.args, json!({"from": "pipe"}));
    let later = cli.submit(&["mail", "--delay", "1h", "--queue", "mails"]).await?;
    let later = producer.api.get(&later).await?;
    assert_eq!((later.state.as_str(), later.queue.as_str()), ("scheduled", "mails"));
    let at = cli.submit(&["mail", "--at", "2130-01-31T08:00:00Z"]).await?;
    assert_eq!(producer.api.get(&at).await?.run_at.as_deref(), Some("2130-01-31T08:00:00Z"));

    let said = cli.run(&["submit", "test.fail", "--wait", "40s"]).await?;
    assert_eq!(said.code, Some(1), "{said:#?}");
    assert!(said.out.contains("discarded") && said.out.contains("no such month"), "{said:#?}");
    let said = cli.run(&["submit", "test.slow", "--wait", "300ms", "--json"]).await?;
    assert_eq!(said.code, Some(124), "{said:#?}");
    let id = documents(&said.out)?[0]["id"].clone();
    assert!(said.err.contains(id.as_str().context("an id")?), "{said:#?}");
    Ok(())
}

#[tokio::test]
async fn waiting_says_by_its_exit_code_how_tasks_ended() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let (good, bad) = (cli.submit(&["test.echo", "n=1"]).await?, cli.submit(&["test.fail"]).await?);
    let slow = cli.submit(&["test.slow"]).await?;
    // Begun before there is a worker: it hears of the end, and does not only look.
    let waiting = tokio::spawn({
        let (cli, good) = (cli.clone(), good.clone());
        async move { cli.run(&["wait", &good, "--timeout", "40s"]).await }
    });
    let _worker = worker(&stack).await?;
    let said = waiting.await??;
    assert_eq!(said.code, Some(0), "{said:#?}");
    assert!(said.out.contains("completed") && said.out.contains("{\"n\":1}"), "{said:#?}");

    let said = cli.run(&["wait", &good, &bad]).await?;
    assert_eq!((said.code, said.out.lines().count()), (Some(1), 2), "{said:#?}");
    let said = cli.run(&["wait", &slow, &bad, "--timeout", "200ms", "--json"]).await?;
    assert_eq!((said.code, documents(&said.out)?.len()), (Some(124), 2), "{said:#?}");
    let said = cli.run(&["wait", NOBODY, &good]).await?;
    assert_eq!(
        (said.code, said.out.lines().count()),
        (Some(3), 1),
        "the others are waited for all the same: {said:#?}"
    );
    assert!(said.err.contains(NOBODY), "{said:#?}");

    let said = cli.run(&["watch", &slow, "--every", "100ms", "--timeout", "300ms"]).await?;
    assert_eq!((said.code, said.out.lines().count()), (Some(124), 1), "a line for each change: {said:#?}");
    let watching = tokio::spawn({
        let (cli, slow) = (cli.clone(), slow.clone());
        async move { cli.run(&["watch", &slow, "--json"]).await }
    });
    cli.ok(&["cancel", &slow]).await?;
    let said = watching.await??;
    assert_eq!(said.code, Some(1), "{said:#?}");
    assert_eq!(documents(&said.out)?.last().context("a change")?["state"], "cancelled");
    Ok(())
}

#[tokio::test]
async fn everything_can_be_looked_at() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let lines: String =
        (0..250).map(|n| format!("{{\"kind\":\"later\",\"args\":{{\"n\":{n}}},\"delay_ms\":9000000}}\n")).collect();
    assert_eq!(cli.fed(&["batch"], &lines).await?.code, Some(0));
    cli.submit(&["other", "--queue", "reports", "--tag", "team=blue"]).await?;

    let newest_first: Vec<String> = producer.api.list_all(&[]).await?.into_iter().map(|task| task.id).collect();
    let ids = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(ids(&cli.ok(&["list", "--all", "-q"]).await?), newest_first);
    assert_eq!(ids(&cli.ok(&["list", "--limit", "120", "-q"]).await?), newest_first[..120]);
    assert_eq!(cli.ok(&["list"]).await?.lines().count(), 51, "a head, and fifty tasks");
    let found = cli.json(&["list", "--all", "--state", "scheduled", "--kind", "later"]).await?;
    assert_eq!(found.len(), 250);
    for filter in [["--tag", "team=blue"], ["--queue", "reports"], ["--kind", "other"]] {
        let found = cli.json(&[&["list"], &filter[..]].concat()).await?;
        assert_eq!((found.len(), &found[0]["kind"]), (1, &json!("other")), "{filter:?}");
    }
    let table = cli.ok(&["list", "--kind", "other"]).await?;
    assert!(table.starts_with("ID ") && table.contains("  reports  "), "{table}");

    let task = &cli.json(&["get", &newest_first[0]]).await?[0];
    assert_eq!(task["id"], json!(newest_first[0]));
    let shown = cli.ok(&["get", &newest_first[0], &newest_first[1]]).await?;
    assert!(shown.contains("tags          team=blue") && shown.contains("runs  "), "{shown}");

    let queues = &cli.json(&["queues"]).await?[0]["queues"];
    assert_eq!(queues.as_array().map(Vec::len), Some(2), "{queues}");
    let table = cli.ok(&["queues", "reports"]).await?;
    assert!(table.starts_with("QUEUE") && table.lines().count() == 2, "{table}");
    let pictures = cli.ok(&["watch", "--every", "100ms", "--timeout", "250ms"]).await?;
    assert!(pictures.matches("QUEUE").count() >= 2 && !pictures.contains('\u{1b}'), "{pictures}");

    let said = cli.run(&["workers"]).await?;
    assert_eq!((said.code, said.err.as_str()), (Some(0), "no worker is alive\n"));
    let _worker = worker(&stack).await?;
    let table = cli.ok(&["workers"]).await?;
    assert!(table.contains("test.echo") && table.contains("0/64"), "{table}");
    assert_eq!(cli.json(&["workers"]).await?[0]["workers"][0]["concurrency"], 64);
    Ok(())
}

#[tokio::test]
async fn waiting_tasks_are_moved_and_finished_ones_purged() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    for kind in ["a", "a", "b"] {
        cli.submit(&[kind, "--tag", "of=x"]).await?;
    }
    assert_eq!(
        cli.ok(&["move", "default", "slow", "--dry-run"]).await?,
        "3 waiting tasks would be moved from default to slow\n"
    );
    let moved = cli.ok(&["move", "default", "slow", "--kind", "a", "--tag", "of=x"]).await?;
    assert_eq!(moved, "2 waiting tasks moved from default to slow\n");
    assert_eq!(cli.json(&["move", "default", "slow"]).await?, [json!({"moved": 1, "dry_run": false})]);
    assert_eq!(cli.run(&["move", "slow", "slow"]).await?.code, Some(4));

    assert_eq!(cli.json(&["purge", "--queue", "slow", "--dry-run"]).await?, [json!({"purged": 0, "dry_run": true})]);
    cli.ok(&["cancel", "--kind", "a", "--yes"]).await?;
    let said = cli.run(&["purge", "--queue", "slow"]).await?;
    assert_eq!((said.code, said.err.contains("--yes")), (Some(2), true), "{said:?}");
    assert_eq!(cli.run(&["purge", "--yes"]).await?.code, Some(2), "no filter");
    assert_eq!(cli.ok(&["purge", "--queue", "slow", "--dry-run"]).await?, "2 finished tasks would be deleted\n");
    assert_eq!(cli.ok(&["purge", "--queue", "slow", "--yes"]).await?, "2 finished tasks deleted\n");
    assert_eq!(cli.ok(&["list", "--all", "-q"]).await?.lines().count(), 1);
    Ok(())
}

#[tokio::test]
async fn a_queue_is_paused_and_resumed() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let table = cli.ok(&["pause", "reports"]).await?;
    assert!(table.starts_with("QUEUE") && table.contains("reports (paused)"), "{table}");
    assert_eq!(cli.json(&["pause", "reports"]).await?[0]["paused"], true, "again");
    assert!(cli.ok(&["queues"]).await?.contains("reports (paused)"));
    let table = cli.ok(&["resume", "reports"]).await?;
    assert!(!table.contains("paused"), "{table}");
    let said = cli.run(&["pause", "Reports"]).await?;
    assert_eq!(said.code, Some(3), "{said:?}");
    Ok(())
}

#[tokio::test]
async fn schedules_are_made_shown_paused_and_deleted() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    assert_eq!(cli.json(&["schedules"]).await?, Vec::<Value>::new());
    let put = "schedules put reports.nightly report.build of=yesterday n=12345678901234567890 --cron @daily \
               --timezone Europe/Berlin --tag team=blue --priority low --concurrency-key customer:7 --timeout 90s \
               --catch-up all --catch-up-max 10 --overlap skip --jitter 1m";
    let put: Vec<_> = put.split_whitespace().collect();
    let shown = cli.ok(&put).await?;
    for line in ["cron          @daily (Europe/Berlin)", "catch up      all, 10 at most", "key           customer:7"] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    assert_eq!(shown.matches("\nnext  ").count(), 5, "{shown}");
    let made = &cli.json(&["schedules", "get", "reports.nightly"]).await?[0];
    assert_eq!((&made["jitter_ms"], &made["overlap"]), (&json!(60_000), &json!("skip")));
    let args = json!({"of": "yesterday", "n": 12_345_678_901_234_567_890_u64});
    assert_eq!((&made["task"]["args"], &made["task"]["timeout_ms"]), (&args, &json!(90_000)));

    let paused = &cli.json(&["schedules", "pause", "reports.nightly"]).await?[0];
    assert_eq!((&paused["paused"], &paused["next_runs"]), (&json!(true), &json!([])));
    assert!(cli.ok(&["schedules"]).await?.contains("paused"));
    let resumed = &cli.json(&["schedules", "resume", "reports.nightly"]).await?[0];
    let but_for_the_change = |schedule: &Value| {
        let mut schedule = schedule.clone();
        schedule["updated_at"].take();
        schedule
    };
    assert_eq!(but_for_the_change(resumed), but_for_the_change(made), "all but the pause stays");

    let names = ["a", "b"].map(|name| ["schedules", "put", name, "test.echo", "--cron", "@hourly"]);
    for put in &names {
        cli.ok(put).await?;
    }
    let listed = cli.json(&["schedules", "list"]).await?;
    let listed: Vec<_> = listed.iter().map(|schedule| schedule["name"].clone()).collect();
    assert_eq!(listed, ["a", "b", "reports.nightly"]);
    assert_eq!(cli.ok(&["schedules", "delete", "a"]).await?, "a deleted\n");
    cli.run(&["schedules", "delete", "a"]).await?.failed(3, &["a"]);
    cli.run(&["schedules", "pause", "a"]).await?.failed(3, &["a"]);
    let bad = ["schedules", "put", "c", "no good", "--cron", "often", "--timezone", "Europe/Bern"];
    cli.run(&bad).await?.failed(4, &["  cron: ", "  timezone: ", "  task.kind: "]);
    Ok(())
}

#[tokio::test]
async fn limits_are_set_shown_and_deleted_and_hold_tasks() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let table = cli
        .ok(&["limits", "set", "queue", "reports", "--rate", "100/1m", "--burst", "10", "--max-queued", "5000"])
        .await?;
    assert!(table.starts_with("OF ") && table.contains("100/1m0s     10       5 000  api"), "{table}");
    let set = &cli.json(&["limits", "set", "key", "customer:*", "--max-running", "1"]).await?[0];
    assert_eq!((&set["of"], &set["max_running"], &set["rate"]), (&json!("key"), &json!(1), &Value::Null));
    let limits = cli.json(&["limits"]).await?;
    assert_eq!(limits[0]["limits"].as_array().map(Vec::len), Some(2), "{limits:?}");

    let _worker = worker(&stack).await?;
    let mine = ["test.slow", "--concurrency-key", "customer:7"];
    let ids = [cli.submit(&mine).await?, cli.submit(&mine).await?];
    let held = within(LIMIT, "one of two to be held", async {
        loop {
            for id in &ids {
                let shown = cli.ok(&["get", id]).await?;
                if shown.contains("\nlimited by    key:customer:7\n") {
                    return anyhow::Ok(shown);
                }
            }
        }
    });
    assert!(held.await??.contains("\nkey           customer:7\n"));
    assert_eq!(cli.ok(&["limits", "delete", "key", "customer:*"]).await?, "limit of key customer:* deleted\n");
    for id in &ids {
        producer.api.in_state(id, "running", LIMIT).await?;
    }
    cli.run(&["limits", "delete", "key", "customer:*"]).await?.failed(3, &["customer:*"]);
    cli.run(&["limits", "set", "kind", "a", "--max-queued", "5"]).await?.failed(4, &["max_queued: is for queues only"]);
    Ok(())
}

#[tokio::test]
async fn events_are_shown_as_they_come() -> Result<()> {
    let (stack, mut producer) = producer().await?;
    let _worker = worker(&stack).await?;
    let cli = Cli::of(&producer);
    let tail = async |args: &[&str]| {
        let mut child = cli.command(&[&["tail"], args].concat())?.spawn()?;
        let out = BufReader::new(child.stdout.take().context("its output")?).lines();
        anyhow::Ok((child, out))
    };
    // Everybody has heard that events are wanted once the end of some task is told.
    let (mut heard, mut lines) = tail(&["--json", "--kind", "test.e*", "--state", "completed", "--count", "1"]).await?;
    let told = within(LIMIT, "a task to be told of", async {
        loop {
            cli.submit(&["test.echo"]).await?;
            if let Ok(line) = tokio::time::timeout(Duration::from_millis(500), lines.next_line()).await {
                return anyhow::Ok(line?.context("no event")?);
            }
        }
    });
    let told: Value = serde_json::from_str(&told.await??)?;
    let fields: Vec<_> = told.as_object().context("no object")?.keys().map(String::as_str).collect();
    assert_eq!(fields, ["at", "attempt", "event", "id", "kind", "queue", "state", "worker_id"]);
    assert_eq!(
        (&told["event"], &told["kind"], &told["attempt"]),
        (&json!("completed"), &json!("test.echo"), &json!(1))
    );
    assert_eq!(within(LIMIT, "its end", heard.wait()).await??.code(), Some(0), "one is enough");

    let (mut shown, mut lines) = tail(&["--kind", "test.fail"]).await?;
    let id = within(LIMIT, "a failure to be told of", async {
        let mut ids = Vec::new();
        loop {
            ids.push(cli.submit(&["test.fail"]).await?);
            while let Ok(line) = tokio::time::timeout(Duration::from_millis(500), lines.next_line()).await {
                let line = line?.context("no event")?;
                let id =
                    ids.iter().find(|id| line.contains(&format!("  discarded    {id}  default  test.fail  attempt 1")));
                if let Some(id) = id {
                    return anyhow::Ok(id.clone());
                }
            }
        }
    });
    assert_eq!(producer.api.get(&id.await??).await?.state, "discarded");
    producer.process.terminate()?;
    producer.process.exited(LIMIT).await?;
    assert_eq!(within(LIMIT, "its end", shown.wait()).await??.code(), Some(5), "the producer has gone");
    Ok(())
}

#[tokio::test]
async fn a_look_at_events_has_an_end_and_says_what_is_wrong() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    assert_eq!(cli.ok(&["tail", "--for", "200ms"]).await?, "");
    cli.run(&["tail", "--kind", "a*b", "--queue", "A"]).await?.failed(4, &["  kind: ", "  queue: "]);
    cli.run(&["tail", "--url", "http://127.0.0.1:1"]).await?.failed(5, &["cannot reach a producer"]);
    Ok(())
}

#[tokio::test]
async fn tasks_are_cancelled_and_run_again() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let one = cli.submit(&["later", "--delay", "1h"]).await?;
    let said = cli.run(&["cancel", &one, NOBODY, "--reason", "wrong month"]).await?;
    assert_eq!((said.code, said.out), (Some(3), format!("{one} cancelled\n")));
    assert_eq!(producer.api.get(&one).await?.reason.as_deref(), Some("wrong month"));
    assert_eq!(cli.ok(&["retry", &one]).await?, format!("{one} starts again\n"));
    cli.run(&["retry", &one]).await?.failed(4, &[&one, "only a cancelled or discarded task can be retried"]);
    cli.ok(&["cancel", &one]).await?;

    for _ in 0..30 {
        cli.submit(&["bulk", "--delay", "1h", "--tag", "team=blue"]).await?;
    }
    let open = async || producer.api.list_all(&[("state", "scheduled")]).await.map(|tasks| tasks.len());
    let dry = cli.ok(&["cancel", "--kind", "bulk", "--dry-run"]).await?;
    assert_eq!(dry, "30 waiting tasks would be cancelled, 0 running tasks would be stopped\n");
    cli.run(&["cancel", "--kind", "bulk"]).await?.failed(2, &["--yes", "--dry-run"]);
    assert_eq!(open().await?, 30);
    let counts = &cli.json(&["cancel", "--tag", "team=blue", "--state", "scheduled", "--yes"]).await?[0];
    assert_eq!(counts, &json!({"cancelled": 30, "requested": 0, "dry_run": false}));
    assert_eq!(open().await?, 0);
    let dry = cli.ok(&["retry", "--kind", "bulk", "--state", "cancelled", "--dry-run"]).await?;
    assert_eq!(dry, "30 tasks would start again\n");
    cli.run(&["retry", "--kind", "bulk"]).await?.failed(2, &["--yes", "--dry-run"]);
    let counts = &cli.json(&["retry", "--tag", "team=blue", "--state", "cancelled", "--yes"]).await?[0];
    assert_eq!(counts, &json!({"retried": 30, "conflicts": 0, "dry_run": false}));
    cli.run(&["retry", "--state", "running", "-y"]).await?.failed(4, &["a running task cannot be retried"]);
    cli.run(&["cancel", "--state", "completed", "-y"])
        .await?
        .failed(4, &["state: a completed task cannot be cancelled"]);
    Ok(())
}

#[tokio::test]
async fn tasks_are_edited_and_done_again_with_other_args() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let one = cli.submit(&["later", "to=ada", "--delay", "1h"]).await?;
    let said = cli.ok(&["edit", &one, "--args", r#"{"to": "bob"}"#, "--queue", "slow", "--delay", "2h"]).await?;
    assert!(said.starts_with(&format!("{one} edited, starts in ")), "{said}");
    let said = cli.ok(&["edit", &one, "--delay", "0s"]).await?;
    assert_eq!(said, format!("{one} edited, starts at once\n"));
    let task = producer.api.get(&one).await?;
    assert_eq!((task.queue.as_str(), &task.args), ("slow", &json!({"to": "bob"})));
    cli.run(&["edit", &one, "--max-attempts", "0"]).await?.failed(4, &["max_attempts: must be from 1 to 1000"]);
    cli.run(&["edit", NOBODY, "--delay", "1h"]).await?.failed(3, &["there is no task"]);
    cli.ok(&["cancel", &one]).await?;
    cli.run(&["edit", &one, "--delay", "1h"]).await?.failed(4, &["the task is cancelled"]);
    let again = &cli.json(&["retry", &one, "--args", "[7]"]).await?[0];
    assert_eq!((&again["retried_from"], &again["args"]), (&json!(one), &json!([7])));
    cli.run(&["retry", &one, NOBODY, "--args", "[7]"]).await?.failed(2, &["one task at a time"]);
    assert_eq!(producer.api.get(&one).await?.state, "cancelled");
    Ok(())
}

#[tokio::test]
async fn a_file_is_recorded_in_chunks_and_once() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let count = async || producer.api.list_all(&[]).await.map(|tasks| tasks.len());
    let task = |n: usize| format!("{{\"kind\":\"later\",\"args\":{{\"n\":{n}}},\"delay_ms\":9000000}}");
    // Line 2 and every thousandth are empty; line 2345 is bad.
    let mut lines: Vec<String> = (1..=2500).map(task).collect();
    lines[1].clear();
    lines[1000] = "  ".to_owned();
    lines[2344] = "{\"kind\":\"no good\",\"color\":1}".to_owned();
    let file = stack.place().join("tasks.ndjson");
    std::fs::write(&file, lines.join("\n"))?;
    let path = file.to_str().context("a path")?;

    let said = cli.run(&["batch", path, "--key", "november"]).await?;
    said.failed(
        4,
        &["lines 2003–2500 were refused", "line 2345: color:", "lines 1–2002 are recorded", "--key november"],
    );
    assert_eq!(count().await?, 2000);
    lines[2344] = task(2345);
    std::fs::write(&file, lines.join("\n"))?;
    let said = cli.ok(&["batch", path, "--key", "november"]).await?;
    assert!(
        said.starts_with("498 tasks recorded in 3 requests, ") && said.contains("; 2 000 tasks were recorded before"),
        "{said}"
    );
    assert_eq!(count().await?, 2498);
    let again = cli.json(&["batch", path, "--key", "november"]).await?;
    assert_eq!(again.len(), 2498);
    assert!(again.iter().all(|entry| entry["id"].is_string() && entry["state"] == "scheduled"), "{:?}", again[0]);
    cli.run(&["batch", path, "--key", "november", "--chunk", "500"]).await?.failed(4, &["--chunk", "lines 1–501 were"]);
    assert_eq!(count().await?, 2498, "nothing came twice");

    let said = cli.fed(&["batch", "-q"], &format!("{}\n{}\n", task(1), task(2))).await?;
    assert_eq!((said.code, said.out.lines().count()), (Some(0), 2), "{said:#?}");
    let said = cli.fed(&["batch"], "").await?;
    assert!(said.code == Some(0) && said.out.starts_with("0 tasks recorded"), "{said:#?}");
    cli.fed(&["batch"], "nonsense\n").await?.failed(4, &["line 1: is not JSON", "nothing is recorded"]);

    let then = ["batch", "-", "--then", "test.then", "--then-args", r#"{"work_ms":1}"#, "--key", "joined"];
    let three = format!("{}\n\n{}\n{}\n", task(1), task(2), task(3));
    let said = cli.fed(&then, &three).await?;
    let group = said.out.trim_end().strip_prefix("3 tasks recorded, group ").context("no group")?.to_owned();
    let shown: serde_json::Value = producer.api.raw_get(&format!("/v1/groups/{group}")).await?.expect(&[200])?;
    assert_eq!((&shown["total"], &shown["then"]["kind"]), (&json!(3), &json!("test.then")));
    let again = cli.fed(&then, &three).await?;
    assert_eq!(again.out.trim_end(), format!("3 tasks recorded before under this key, group {group}"));
    cli.fed(&then[..4], &format!("{}\n\n{{\"kind\":\"a b\"}}\n", task(1))).await?.failed(4, &["line 3: kind: must"]);
    cli.fed(&then[..4], "{}\nno\n").await?.failed(2, &["line 2 is not JSON", "nothing is recorded"]);
    cli.fed(&then[..4], &"{}\n".repeat(10_001)).await?.failed(2, &["line 10001 is too much", "10000 tasks"]);

    let long = format!("{}\n{{\"kind\":\"a\",\"args\":\"{}\"}}\n", task(1), "x".repeat(1_300_000));
    cli.fed(&["batch", "--chunk", "1"], &long).await?.failed(2, &["line 2 is longer than", "lines 1–1 are recorded"]);
    Ok(())
}

#[tokio::test]
async fn an_answer_that_was_lost_is_asked_for_again_and_nothing_comes_twice() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let addr: SocketAddr = producer.api.url("").trim_start_matches("http://").parse()?;
    let proxy = Proxy::to(addr).await?;
    let cli = Cli::at(format!("http://{}", proxy.addr()));
    let count = async || producer.api.list_all(&[]).await.map(|tasks| tasks.len());

    // Each answer is cut, until the second connection shows that the first one was.
    proxy.cut_after(Direction::ToClient, 20);
    let submitted = tokio::spawn({
        let cli = cli.clone();
        async move { cli.submit(&["later", "--delay", "1h"]).await }
    });
    proxy.connected(2, LIMIT).await?;
    proxy.resume().await?;
    submitted.await??;
    assert_eq!(count().await?, 1, "sent twice, recorded once");
    let lines: String =
        (0..3000).map(|n| format!("{{\"kind\":\"later\",\"args\":{n},\"delay_ms\":9000000}}\n")).collect();
    // In the middle of the second of three answers.
    let before = proxy.accepted();
    proxy.cut_after(Direction::ToClient, 100_000);
    let recorded = tokio::spawn({
        let cli = cli.clone();
        async move { cli.fed(&["batch", "-q"], &lines).await }
    });
    proxy.connected(before + 2, LIMIT).await?;
    proxy.resume().await?;
    let said = recorded.await??;
    assert_eq!((said.code, said.out.lines().count()), (Some(0), 3000), "{}", said.err);
    assert_eq!(count().await?, 3001);

    // What would not be the same twice is not repeated.
    let id = said.out.lines().next().context("an id")?.to_owned();
    producer.api.raw_post(&format!("/v1/tasks/{id}/cancel"), &json!({})).await?;
    let before = proxy.accepted();
    proxy.cut_after(Direction::ToClient, 20);
    cli.run(&["retry", &id]).await?.failed(5, &["did not answer", "it may start all the same", &id]);
    assert_eq!(proxy.accepted(), before + 1);
    Ok(())
}

#[tokio::test]
async fn a_producer_that_goes_away_for_a_moment_does_not_end_a_batch() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let addr: SocketAddr = producer.api.url("").trim_start_matches("http://").parse()?;
    let proxy = Proxy::to(addr).await?;
    let cli = Cli::at(format!("http://{}", proxy.addr()));
    let args = ["batch", "--quiet", "--chunk", "1"];
    let mut child = cli.command(&args)?.stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("its input")?;
    let mut ids = BufReader::new(child.stdout.take().context("its output")?).lines();
    stdin.write_all(b"{\"kind\":\"a\",\"delay_ms\":9000000}\n").await?;
    within(LIMIT, "the first id", ids.next_line()).await??.context("an id")?;
    proxy.refuse().await?;
    proxy.cut_all();
    stdin.write_all(b"{\"kind\":\"a\",\"delay_ms\":9000000}\n").await?;
    drop(stdin);
    // As long as the outage lasts; nothing tells of a connection that was refused.
    tokio::time::sleep(Duration::from_millis(600)).await;
    proxy.resume().await?;
    within(LIMIT, "the second id", ids.next_line()).await??.context("an id")?;
    let said = ended(child, &args).await?;
    assert_eq!(said.code, Some(0), "{said:#?}");
    assert_eq!(producer.api.list_all(&[]).await?.len(), 2);
    Ok(())
}

/// A server that answers each connection with the next of these, and tells what it was sent.
async fn scripted(answers: Vec<&'static str>) -> Result<(String, tokio::task::JoinHandle<Result<Vec<String>>>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let told = tokio::spawn(async move {
        let mut heads = Vec::new();
        for answer in answers {
            let (mut stream, _) = listener.accept().await?;
            heads.push(head(&mut stream).await?);
            stream.write_all(answer.as_bytes()).await?;
        }
        Ok(heads)
    });
    Ok((url, told))
}

/// A request as far as its headers.
async fn head(stream: &mut TcpStream) -> Result<String> {
    let mut lines = BufReader::new(stream).lines();
    let mut head = String::new();
    while let Some(line) = lines.next_line().await?.filter(|line| !line.is_empty()) {
        head.push_str(&line.to_lowercase());
        head.push('\n');
    }
    Ok(head)
}

#[tokio::test]
async fn a_busy_producer_is_asked_again_when_it_says_so() -> Result<()> {
    let busy = "HTTP/1.1 503 Busy\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let gone = "HTTP/1.1 404 Gone\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
    let (url, told) = scripted(vec![busy, busy, gone]).await?;
    let begin = tokio::time::Instant::now();
    Cli::at(&url).run(&["submit", "a"]).await?.failed(4, &["not from Tasklane's API"]);
    assert!(begin.elapsed() >= Duration::from_secs(2), "it did not wait as long as it was told");
    let heads = told.await??;
    let key = |head: &String| head.lines().find(|line| line.starts_with("idempotency-key: ")).map(str::to_owned);
    assert!(key(&heads[0]).is_some() && heads.iter().all(|head| key(head) == key(&heads[0])), "{heads:#?}");

    let (url, told) = scripted(vec![busy]).await?;
    Cli::at(&url).run(&["retry", NOBODY]).await?.failed(5, &["status 503"]);
    assert_eq!(told.await??.len(), 1);
    let moved = "HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let (url, _told) = scripted(vec![moved]).await?;
    Cli::at(&url).run(&["queues"]).await?.failed(4, &["redirects to http://elsewhere/", "--url"]);
    Ok(())
}

#[tokio::test]
async fn each_exit_code_has_its_reason() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    cli.run(&["get", NOBODY]).await?.failed(3, &["there is no task", NOBODY]);
    cli.run(&["queues", "nothing"]).await?.failed(3, &["there is no queue nothing"]);
    cli.run(&["submit", "no good", "--max-attempts", "0"])
        .await?
        .failed(4, &["kind: must match", "max_attempts: must be from 1"]);
    cli.run(&["submit", "a", "--args", "{"]).await?.failed(2, &["--args is not JSON", "@file"]);
    cli.run(&["submit", "a", "--args", "@/nowhere"]).await?.failed(2, &["/nowhere"]);
    cli.run(&["submit", "a", "x=1", "x=2"]).await?.failed(2, &["x is given twice"]);
    cli.run(&["batch", "/nowhere"]).await?.failed(2, &["/nowhere"]);
    for line in ["", "nonsense", "submit", "get x", "list --state done", "workers --url nowhere"] {
        let said = cli.run(&line.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>()).await?;
        assert_eq!((said.code, said.out.as_str()), (Some(2), ""), "{line}: {said:#?}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://user:s3cr3t@{}", listener.local_addr()?);
    drop(listener);
    let said = Cli::at(&url).run(&["queues"]).await?;
    said.failed(5, &["cannot reach a producer at http://127.0.0.1:", "refused", "--url", "TASKLANE_URL"]);
    assert!(!said.err.contains("s3cr3t"), "{said:#?}");
    let url = producer.api.url("");
    assert_eq!(Cli::at("http://127.0.0.1:1").run(&["queues", "--url", &url]).await?.code, Some(0), "a flag goes first");

    let full = cli.command(&["queues"])?.stdout(std::fs::File::create("/dev/full")?).spawn()?;
    ended(full, &["queues"]).await?.failed(6, &["cannot be written"]);
    let lines: String = (0..2000).map(|_| "{\"kind\":\"later\",\"delay_ms\":9000000}\n").collect();
    assert_eq!(cli.fed(&["batch"], &lines).await?.code, Some(0));
    let mut child = cli.command(&["list", "--all"])?.spawn()?;
    drop(child.stdout.take());
    let said = ended(child, &["list"]).await?;
    assert_eq!((said.code, said.err.as_str()), (Some(141), ""), "| head ends it quietly");

    let mut child = cli.command(&["batch", "-q"])?.stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("its input")?;
    let mut ids = BufReader::new(child.stdout.take().context("its output")?).lines();
    stdin.write_all(lines.as_bytes()).await?;
    for _ in 0..2000 {
        within(LIMIT, "an id", ids.next_line()).await??.context("an id")?;
    }
    let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())).context("a pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    let said = ended(child, &["batch"]).await?;
    said.failed(130, &["interrupted", "lines 1–2000 are recorded", "--key "]);
    drop(stack);
    Ok(())
}

#[tokio::test]
async fn what_the_server_holds_cannot_command_the_terminal() -> Result<()> {
    let (stack, producer) = producer().await?;
    let _worker = worker(&stack).await?;
    let mut cli = Cli::of(&producer);
    let evil = "\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}\r\n";
    let tag = "\u{202e}eulb";
    let task = json!({"kind": "test.echo", "args": {evil: evil}, "tags": {"evil": tag}});
    let (task, _) = producer.api.submit_and_wait(&task, 30_000).await?;
    let is_evil = |char: char| (char.is_control() && char != '\n') || char == '\u{202e}';
    for args in [
        vec!["get", &task.id],
        vec!["wait", &task.id],
        vec!["list"],
        vec!["get", &task.id, "--json"],
        vec!["list", "--json"],
    ] {
        let out = cli.ok(&args).await?;
        assert!(out.contains(&task.id) && !out.contains(is_evil), "{args:?}: {out:?}");
        let colored = cli.ok(&[&args[..], &["--color", "always"]].concat()).await?;
        let harmless = colored.split('\u{1b}').skip(1).all(|code| {
            code.strip_prefix('[').is_some_and(|code| {
                code.trim_start_matches(|char: char| char.is_ascii_digit() || char == ';').starts_with('m')
            })
        });
        assert!(harmless && colored.contains('\u{1b}') != args.contains(&"--json"), "{args:?}: {colored:?}");
    }
    let same = &cli.json(&["get", &task.id]).await?[0];
    assert_eq!((&same["args"], &same["tags"]), (&task.args, &json!({"evil": tag})), "the JSON means the same");
    cli.env = vec![("CLICOLOR_FORCE", "1")];
    assert!(cli.ok(&["list"]).await?.contains('\u{1b}'));
    cli.env.push(("NO_COLOR", "1"));
    assert!(!cli.ok(&["list"]).await?.contains('\u{1b}'));
    Ok(())
}

#[tokio::test]
async fn the_doctor_sees_what_is_missing() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let text = cli.ok(&["doctor"]).await?;
    assert!(text.contains("warn  workers.alive") && text.contains("tasklane-worker doctor"), "{text}");
    cli.submit(&["test.echo"]).await?;
    let said = cli.run(&["doctor", "--json"]).await?;
    assert_eq!(said.code, Some(1), "{said:#?}");
    let report = &documents(&said.out)?[0];
    let findings = report["findings"].as_array().context("findings")?;
    let found = findings.iter().find(|finding| finding["verdict"] == "fail").context("a failure")?;
    assert!(found["check"] == "queues.consumed" && report["verdict"] == "fail", "{found}");
    let _worker = worker(&stack).await?;
    producer.api.all_ended(1, LIMIT).await?;
    let report = &cli.json(&["doctor"]).await?[0];
    assert_eq!(report["verdict"], "ok", "{report:#}");
    let said = Cli::at("http://127.0.0.1:1").run(&["doctor"]).await?;
    assert!(said.code == Some(5) && said.out.contains("FAIL  producer.alive"), "{said:#?}");
    Ok(())
}

#[tokio::test]
async fn shells_can_complete_it() -> Result<()> {
    let cli = Cli::at("http://127.0.0.1:1");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = cli.ok(&["completions", shell]).await?;
        assert!(script.contains("tasklane") && script.contains("submit"), "{shell}");
    }
    let version = cli.ok(&["--version"]).await?;
    assert_eq!(version, format!("tasklane {}\n", env!("CARGO_PKG_VERSION")));
    Ok(())
}

/// An address is enough to talk to a producer; the harness's own client agrees with what the command shows.
#[tokio::test]
async fn the_address_may_have_a_slash() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let api: &Api = &producer.api;
    let id = Cli::at(api.url("/")).submit(&["later", "--delay", "1h"]).await?;
    assert_eq!(api.get(&id).await?.kind, "later");
    Ok(())
}
