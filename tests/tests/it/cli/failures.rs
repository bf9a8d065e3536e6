//! Answers that get lost, producers that go away, and exit codes.

use super::*;

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

/// A repetition gets its tasks however full the queue is by now; and what is said of a refusal holds for all runs.
#[tokio::test]
async fn a_run_into_a_full_queue_says_what_stands() -> Result<()> {
    let (stack, producer) = producer().await?;
    let cli = Cli::of(&producer);
    let task = "{\"kind\":\"later\",\"queue\":\"small\",\"args\":1}\n";
    let file = stack.place().join("tasks.ndjson");
    std::fs::write(&file, task.repeat(3))?;
    let path = file.to_str().context("a path")?;
    let plain = ["batch", path, "--key", "plain"];
    let joined = ["batch", path, "--key", "joined", "--then", "test.then"];
    cli.ok(&plain).await?;
    cli.ok(&joined).await?;
    cli.ok(&["limits", "set", "queue", "small", "--max-queued", "2"]).await?;
    assert!(cli.ok(&plain).await?.contains("3 tasks were recorded before under this key"));
    assert!(cli.ok(&joined).await?.starts_with("3 tasks recorded before under this key"));

    std::fs::write(&file, task.replace('1', "2").repeat(3))?;
    let stands = "what an earlier one recorded under this --key stands";
    cli.run(&plain).await?.failed(4, &["was used before", "this run has recorded nothing", stands]);
    cli.run(&joined).await?.failed(4, &["was used before", "this run has recorded nothing", stands]);
    let said = cli.run(&["batch", path]).await?;
    said.failed(5, &["queue small takes no more than 2", "nothing is recorded"]);

    // The first answer was lost, and the request may have been heard.
    let refused =
        "HTTP/1.1 422 No\r\nconnection: close\r\ncontent-length: 34\r\n\r\n{\"code\":\"invalid_task\",\"detail\":1}";
    for args in [&["batch", path][..], &["batch", path, "--then", "test.then"]] {
        let (url, _told) = scripted(vec!["", refused]).await?;
        Cli::at(&url).run(args).await?.failed(4, &["what is recorded is unknown", "--key "]);
    }
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
