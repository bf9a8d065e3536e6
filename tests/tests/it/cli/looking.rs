//! Submitting, waiting, looking, and what is printed.

use super::*;

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
    assert_eq!(producer.api.get(&at).await?.run_at, Some("2130-01-31T08:00:00Z".parse()?));

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
    let pictures = cli.ok(&["watch", "--every", "100ms", "--timeout", "3s"]).await?;
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
    for name in ["a", "b"] {
        cli.ok(&["schedules", "put", name, "test.echo", "--cron", "@yearly"]).await?;
    }
    cli.ok(&["schedules", "pause", "b", "--by", "anna"]).await?;
    let text = cli.ok(&["doctor"]).await?;
    assert!(text.contains("warn  schedules.paused") && text.contains("b, paused by anna, "), "{text}");
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
