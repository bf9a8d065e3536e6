//! What an operator does to tasks, queues, schedules and limits.

use super::*;

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
    let said = cli.run(&["pause", "report"]).await?;
    assert!(said.err.contains("nobody uses a queue report"), "a slip of the pen is told: {said:?}");
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

    cli.ok(&["schedules", "pause", "reports.nightly", "--by", "anna"]).await?;
    let said = cli.run(&put).await?;
    assert!(
        said.err.contains("it stays paused; to let it go on: tasklane schedules resume reports.nightly"),
        "{said:?}"
    );
    assert!(said.out.contains("\npaused        by anna, "), "{said:?}");
    let put_resumed = [&put[..], &["--paused=false"]].concat();
    let said = cli.run(&put_resumed).await?;
    assert!(said.err.is_empty() && !said.out.contains("\npaused"), "{said:?}");

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

/// By the name that is given, or that of the user who has called the command; and the producer's log says it, too.
#[tokio::test]
async fn who_makes_a_change_is_told() -> Result<()> {
    let (_stack, producer) = producer().await?;
    let mut cli = Cli::of(&producer);
    let id = cli.submit(&["later", "--delay", "1h"]).await?;
    let by = async |cli: &Cli, args: &[&str]| -> Result<Value> {
        cli.ok(&[&["edit", &id, "--delay", "2h"], args].concat()).await?;
        Ok(cli.json(&["get", &id]).await?[0]["last_change"]["by"].clone())
    };
    assert_eq!(by(&cli, &[]).await?, Value::Null, "nobody is known");
    cli.env = vec![("USER", "root")];
    assert_eq!(by(&cli, &[]).await?, "root");
    cli.env.push(("SUDO_USER", "jörg"));
    assert_eq!(by(&cli, &[]).await?, "jörg");
    cli.env.push(("TASKLANE_BY", "deploy"));
    assert_eq!(by(&cli, &[]).await?, "deploy");
    assert_eq!(by(&cli, &["--by", "anna"]).await?, "anna");
    assert_eq!(by(&cli, &["--by", ""]).await?, Value::Null);
    assert_eq!(cli.run(&["--by", &"x".repeat(129), "cancel", &id]).await?.code, Some(2));
    cli.ok(&["cancel", &id, "--by", "anna"]).await?;
    let shown = cli.ok(&["get", &id]).await?;
    assert!(shown.contains("\nlast change   cancel by anna, ") && shown.contains("\nrequest       "), "{shown}");
    let log = producer.process.log();
    let line = log.lines().find(|line| line.contains("a task was cancelled")).context("no line")?;
    let agent = concat!("agent=\"tasklane/", env!("CARGO_PKG_VERSION"), "\"");
    for part in [" INFO ", "call=\"cancel\"", &id, "by=\"anna\"", "peer=127.0.0.1:", agent, "request.id="] {
        assert!(line.contains(part), "{part}: {line}");
    }
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
    cli.run(&["retry", &one])
        .await?
        .failed(4, &[&one, "only one that has failed, or waits for its time, can be started"]);
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
    cli.run(&["retry", "--state", "running", "-y"]).await?.failed(4, &["a running task cannot be started"]);
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
