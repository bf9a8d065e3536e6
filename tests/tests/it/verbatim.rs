//! Args and results are bytes that nobody on their way rewrites: long numbers, the order of keys, keys that come twice.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tasklane_tests::api::{Answer, Api};
use tasklane_tests::oplog::CommandKind;
use tasklane_tests::process::binary;
use tasklane_tests::stack::{Producer, Stack};
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::process::Command;

/// However slow the machine is.
const LIMIT: Duration = Duration::from_secs(60);

const JSON: &str = "application/json";
const NDJSON: &str = "application/x-ndjson";

/// What a parser of JSON that keeps values, and not texts, would change.
const ARGS: &str =
    r#"{"z":123456789012345678901234567890,"f":1.0,"a":-0,"e":1E2,"z":0.10,"l":[1.10, {"b":0,"b":1}],"u":"\u00fc/\/"}"#;
/// What no reader's types can hold.
const UNREADABLE: &str = "1e400";

/// The command `tasklane`.
async fn cli(producer: &Producer, args: &[&str], input: &str) -> Result<String> {
    let mut command = Command::new(binary("tasklane")?);
    command.args(args).env_clear().env("TASKLANE_URL", producer.api.url("")).kill_on_drop(true);
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), input)?;
    let output = command.stdin(file.reopen()?).output().await?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{args:?}: {said}");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

async fn send(api: &Api, method: Method, path: &str, body: String) -> Result<Answer> {
    api.send(api.client().request(method, api.url(path)).header("content-type", JSON).body(body)).await
}

async fn post(api: &Api, path: &str, body: &str) -> Result<Value> {
    api.raw_body(path, JSON, body.to_owned()).await?.expect(&[200, 202])
}

fn id(answer: &Value) -> Result<String> {
    answer["id"].as_str().map(str::to_owned).with_context(|| format!("no id in {answer}"))
}

/// The tasks of all ways into the ledger, each under its way's name.
async fn by_all_ways(producer: &Producer) -> Result<Vec<(&'static str, String)>> {
    let api = &producer.api;
    let task = format!(r#"{{"kind":"test.echo","args":{ARGS}}}"#);
    let failed = id(&post(api, "/v1/tasks", r#"{"kind":"test.none","delay_ms":9000000}"#).await?)?;
    post(api, &format!("/v1/tasks/{failed}/cancel"), "{}").await?;
    let waits = async || id(&post(api, "/v1/tasks", r#"{"kind":"test.echo","delay_ms":9000000}"#).await?);
    let mut made = Vec::new();

    made.push(("POST", id(&post(api, "/v1/tasks", &task).await?)?));
    let batch = post(api, "/v1/tasks/batch", &format!(r#"{{"tasks":[{task},{task}]}}"#)).await?;
    made.push(("batch", id(&batch["tasks"][1])?));
    let lines = api.raw_body("/v1/tasks/batch", NDJSON, format!("{task}\n{task}")).await?.expect::<Value>(&[202])?;
    made.push(("NDJSON", id(&lines["tasks"][1])?));
    let edited = waits().await?;
    let edit = format!(r#"{{"delay_ms":0,"args":{ARGS}}}"#);
    let answer = send(api, Method::PATCH, &format!("/v1/tasks/{edited}"), edit).await?;
    ensure!(answer.status == 200, "{}", answer.text());
    made.push(("PATCH", edited));

    made.push(("submit --args", cli(producer, &["submit", "-q", "test.echo", "--args", ARGS], "").await?));
    made.push(("submit --args -", cli(producer, &["submit", "-q", "test.echo", "--args", "-"], ARGS).await?));
    let batch = cli(producer, &["batch", "-q"], &format!("{task}\n")).await?;
    made.push(("tasklane batch", batch));
    let edited = waits().await?;
    cli(producer, &["edit", &edited, "--delay", "0s", "--args", ARGS], "").await?;
    made.push(("tasklane edit", edited));
    // Both end as tasks of a kind that nobody runs, so only what is kept is looked at.
    let again = post(api, &format!("/v1/tasks/{failed}/retry"), &format!(r#"{{"args":{ARGS}}}"#)).await?;
    made.push(("POST retry", id(&again)?));
    let again = cli(producer, &["retry", &failed, "--args", ARGS, "--json"], "").await?;
    made.push(("tasklane retry", id(&serde_json::from_str(&again)?)?));
    Ok(made)
}

/// The bytes that stand behind `"member":` in a task's JSON.
async fn shown(api: &Api, id: &str) -> Result<String> {
    Ok(api.raw_get(&format!("/v1/tasks/{id}")).await?.text())
}

on_both_ledgers! {
    async fn args_and_results_are_kept_as_they_were_written(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let echo = CommandKind::new("test.echo").then("cat");
        let _worker = stack.worker().config(&log.command(&echo)?).start().await?;
        let kept = format!("\"args\":{ARGS},");
        for (way, id) in by_all_ways(&producer).await? {
            let text = shown(&producer.api, &id).await?;
            ensure!(text.contains(&kept), "{way}: {text}");
            if text.contains("\"test.none\"") {
                continue;
            }
            // The handler read them, and answered with the same bytes.
            producer.api.in_state(&id, "completed", LIMIT).await?;
            let text = shown(&producer.api, &id).await?;
            ensure!(text.contains(&kept) && text.contains(&format!("\"result\":{ARGS},")), "{way}: {text}");
            let printed = cli(&producer, &["get", &id, "--json"], "").await?;
            ensure!(printed.contains(&kept) && printed.contains(&format!("\"result\":{ARGS},")), "{way}: {printed}");
        }
        let listed = cli(&producer, &["list", "--all", "--json", "--kind", "test.echo"], "").await?;
        ensure!(listed.lines().count() == 10 && listed.lines().all(|line| line.contains(&kept)), "{listed}");
        let pairs = ["submit", "-q", "test.echo", "z=123456789012345678901234567890", "f=1.0", "a=-0", "e=1E2"];
        let text = shown(&producer.api, &cli(&producer, &pairs, "").await?).await?;
        ensure!(text.contains(r#""args":{"z":123456789012345678901234567890,"f":1.0,"a":-0,"e":1E2}"#), "{text}");
        Ok(())
    }

    async fn what_is_recorded_later_gets_its_args_as_they_were_written(ledger) {
        let stack = Stack::new(ledger).await?;
        let producer = stack.producer().start().await?;
        let api = &producer.api;
        let task = format!(r#"{{"kind":"test.none","args":{ARGS}}}"#);
        let batch = format!(r#"{{"tasks":[{{"kind":"test.none","delay_ms":9000000}}],"then":{task}}}"#);
        let mut groups = vec![post(api, "/v1/tasks/batch", &batch).await?["group"]["id"].clone()];
        let then = ["batch", "--json", "--then", "test.none", "--then-args", ARGS];
        let by_cli = cli(&producer, &then, "{\"kind\":\"test.none\",\"delay_ms\":9000000}\n").await?;
        groups.push(serde_json::from_str::<Value>(&by_cli)?["group"]["id"].clone());
        let schedule = format!(r#"{{"cron":"* * * * * *","task":{task}}}"#);
        let put: Answer = send(api, Method::PUT, "/v1/schedules/api", schedule).await?;
        ensure!(put.status == 201 && put.text().contains(&format!("\"args\":{ARGS},")), "{}", put.text());
        let args = ["schedules", "put", "cli", "test.none", "--cron", "* * * * * *", "--args", ARGS];
        cli(&producer, &args, "").await?;

        post(api, "/v1/tasks/cancel", r#"{"state":"scheduled"}"#).await?;
        for group in groups {
            let path = format!("/v1/groups/{}", group.as_str().context("a group")?);
            let followed = eventually(LIMIT, "the task that follows", async || {
                let group: Value = api.raw_get(&path).await?.expect(&[200])?;
                Ok(group["then"]["id"].as_str().map(str::to_owned))
            });
            let text = shown(api, &followed.await?).await?;
            ensure!(text.contains(&format!(",\"args\":{ARGS}}},\"tags\"")), "{text}");
        }
        for name in ["api", "cli"] {
            let text = eventually(LIMIT, "a tick's task", async || {
                let text = api.raw_get(&format!("/v1/tasks?tag=schedule:{name}&limit=1")).await?.text();
                Ok(text.contains("\"id\"").then_some(text))
            })
            .await?;
            ensure!(text.contains(&format!("\"args\":{ARGS},")), "{name}: {text}");
        }
        Ok(())
    }

    async fn args_that_nobody_can_read_are_refused_on_every_path(ledger) {
        let stack = Stack::new(ledger).await?;
        let producer = stack.producer().start().await?;
        let api = &producer.api;
        let waits = id(&post(api, "/v1/tasks", r#"{"kind":"test.none","delay_ms":9000000}"#).await?)?;
        let failed = id(&post(api, "/v1/tasks", r#"{"kind":"test.none","delay_ms":9000000}"#).await?)?;
        post(api, &format!("/v1/tasks/{failed}/cancel"), "{}").await?;
        for args in [UNREADABLE, "[-1e400]", r#"{"a":"\ud800"}"#] {
            let task = format!(r#"{{"kind":"test.none","args":{args}}}"#);
            let batch = "/v1/tasks/batch";
            let answers = [
                ("args", api.raw_body("/v1/tasks", JSON, task.clone()).await?),
                ("tasks[0].args", api.raw_body(batch, JSON, format!(r#"{{"tasks":[{task}]}}"#)).await?),
                ("line 1: args", api.raw_body(batch, NDJSON, task.clone()).await?),
                (
                    "then.args",
                    api.raw_body(batch, JSON, format!(r#"{{"tasks":[{{"kind":"a"}}],"then":{task}}}"#)).await?,
                ),
                (
                    "args",
                    api.raw_body(&format!("/v1/tasks/{failed}/retry"), JSON, format!(r#"{{"args":{args}}}"#)).await?,
                ),
                ("args", send(api, Method::PATCH, &format!("/v1/tasks/{waits}"), format!(r#"{{"args":{args}}}"#)).await?),
                (
                    "task.args",
                    send(api, Method::PUT, "/v1/schedules/s", format!(r#"{{"cron":"@daily","task":{task}}}"#)).await?,
                ),
            ];
            for (place, answer) in answers {
                let problem = answer.problem()?;
                assert_eq!((answer.status, &problem["errors"][0]["path"]), (422, &json!(place)), "{args}: {problem}");
            }
        }
        assert_eq!(api.list_all(&[]).await?.len(), 2);
        Ok(())
    }
}
