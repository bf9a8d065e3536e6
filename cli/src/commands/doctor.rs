//! `doctor`: what can be seen of a Tasklane from outside, and what to mend.

mod schedules;

use std::collections::BTreeSet;

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::Context;
use super::get::made;
use crate::api::{Queue, QueueList, Readiness, Worker, WorkerList};
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::text::{brief_ms, count, wrapped};

/// A task that has been able to start for so long is worth a look.
const WAITING_MS_MAX: i64 = 5 * 60_000;

/// How narrow a finding's words may become.
const NARROWEST: usize = 24;

/// What is thought of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at; of the form that the other programs' doctors have.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report<'r> {
    program: &'r str,
    version: &'r str,
    verdict: Verdict,
    findings: &'r [Finding],
}

pub(super) async fn run(cx: &Context<'_>) -> Result<Exit, Failure> {
    let (findings, reached) = match cx.client.look(["healthz"]).await {
        Ok(answer) if answer.status == 200 => (examine(cx).await?, true),
        Ok(answer) => {
            let message = format!("{} answers /healthz with {}", cx.client.address(), answer.status);
            (vec![fail("producer.alive", message, "is --url the address of a Tasklane producer?")], true)
        }
        Err(failure) => (
            vec![fail("producer.alive", failure.message, "start one, or say with --url or TASKLANE_URL where it is")],
            false,
        ),
    };
    let verdict = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    if cx.output.json {
        let report = Report { program: "tasklane", version: env!("CARGO_PKG_VERSION"), verdict, findings: &findings };
        cx.output.json(&serde_json::to_string(&report).unwrap_or_default())?;
    } else {
        cx.output.text(&table(&findings, cx.output))?;
    }
    match (reached, verdict) {
        (false, _) => Ok(Exit::Unreachable),
        (true, Verdict::Fail) => Ok(Exit::Failed),
        (true, Verdict::Ok | Verdict::Warn) => Ok(Exit::Done),
    }
}

async fn examine(cx: &Context<'_>) -> Result<Vec<Finding>, Failure> {
    let mut findings = vec![ok("producer.alive", format!("{} answers", cx.client.address()))];
    let openapi: Value = cx.client.look(["openapi.json"]).await?.read().unwrap_or_default();
    findings.push(version(openapi["info"]["version"].as_str()));
    let ready: Readiness = cx.client.look(["readyz"]).await?.read()?;
    findings.extend(readiness(&ready));
    if ready.ledger {
        let workers = cx.client.call(Call::get(["v1", "workers"])).await?.read::<WorkerList>()?.workers;
        let queues = cx.client.call(Call::get(["v1", "queues"])).await?.read::<QueueList>()?.queues;
        findings.extend(service(&workers, &queues));
        let mut seen = schedules::Seen::default();
        super::schedules::pages(cx, |page| {
            page.unreadable.iter().for_each(|one| seen.unreadable(one));
            for json in &page.schedules {
                seen.look(&super::schedules::read(json)?, Timestamp::now());
            }
            Ok(())
        })
        .await?;
        findings.extend(seen.findings());
    }
    Ok(findings)
}

fn version(of_producer: Option<&str>) -> Finding {
    let own = env!("CARGO_PKG_VERSION");
    match of_producer {
        Some(version) if version == own => ok("producer.version", format!("{version}, as this program")),
        other => warn(
            "producer.version",
            format!("{}, but this program is {own}", other.unwrap_or("unknown")),
            "use the program that came with the producer",
        ),
    }
}

fn readiness(ready: &Readiness) -> Vec<Finding> {
    let mut findings = vec![
        match ready.ledger {
            true => ok("producer.ledger", "the ledger answers"),
            false => fail("producer.ledger", "the ledger is away: nothing can be recorded", "tasklane-producer doctor"),
        },
        match ready.broker {
            true => ok("producer.broker", "the broker takes messages"),
            false => warn(
                "producer.broker",
                "the broker is away: tasks are recorded, and published when it is back",
                "tasklane-producer doctor",
            ),
        },
    ];
    if ready.stopping {
        findings.push(fail("producer.stopping", "it is about to stop", "ask another one"));
    }
    findings
}

/// Whether somebody does the work.
fn service(workers: &[Worker], queues: &[Queue]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (running, places): (i64, i64) = workers
        .iter()
        .fold((0, 0), |(running, places), worker| (running + worker.running, places + worker.concurrency));
    findings.push(match workers.len() as u64 {
        0 => warn(
            "workers.alive",
            "no worker is alive: no task will run",
            "start tasklane-worker; tasklane-worker doctor",
        ),
        number => ok("workers.alive", format!("{}, running {running} of {places} tasks", count(number, "worker"))),
    });
    let versions: BTreeSet<_> = workers.iter().map(|worker| worker.version.as_str()).collect();
    if versions.len() > 1 {
        let versions = versions.into_iter().collect::<Vec<_>>().join(", ");
        findings.push(warn(
            "workers.versions",
            format!("workers of several versions: {versions}"),
            "finish the upgrade",
        ));
    }
    for queue in queues {
        let Some(waiting_ms) = queue.oldest_waiting_ms else { continue };
        let name = &queue.name;
        let oldest = format!("{name}: the oldest waiting task has waited for {}", brief_ms(waiting_ms));
        if queue.paused {
            let advice = format!("tasklane resume {name}, when that is over for which it was paused");
            let paused =
                queue.paused_at.map(|at| format!(" {}", made(at, queue.paused_by.as_deref(), Timestamp::now())));
            let message = format!("{oldest}, and the queue was paused{}", paused.unwrap_or_default());
            findings.push(warn("queues.paused", message, advice));
        } else if !workers.iter().any(|worker| worker.queues.contains(name)) {
            let message = format!("{oldest}, and no live worker consumes the queue");
            findings.push(fail("queues.consumed", message, format!("start a worker with TASKLANE_QUEUES={name}")));
        } else if waiting_ms > WAITING_MS_MAX {
            let advice = "more workers, or a look at what they run: tasklane list --state running";
            findings.push(warn("queues.waiting", oldest, advice));
        }
    }
    if findings.iter().all(|finding| !finding.check.starts_with("queues.")) {
        findings
            .push(ok("queues.waiting", format!("no task waits for long in {}", count(queues.len() as u64, "queue"))));
    }
    findings
}

fn table(findings: &[Finding], output: &Output) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let plain = Style::new();
    // Below the message stands more of it, where the terminal ends; far to the right nobody would read it.
    let room = output.width.map_or(usize::MAX, |terminal| terminal.saturating_sub(width + 8).max(NARROWEST));
    let mut text = String::new();
    let mut counts = [0; 3];
    for Finding { check, verdict, message, advice } in findings {
        let word = match verdict {
            Verdict::Ok => output.paint("ok  ", AnsiColor::Green.on_default()),
            Verdict::Warn => output.paint("warn", AnsiColor::Yellow.on_default()),
            Verdict::Fail => output.paint("FAIL", AnsiColor::Red.on_default().bold()),
        };
        counts[*verdict as usize] += 1;
        let mut lines = wrapped(message, room).into_iter();
        text.push_str(&format!("{word}  {check:width$}  {}\n", output.paint(&lines.next().unwrap_or_default(), plain)));
        let advice = advice.iter().flat_map(|advice| wrapped(&format!("→ {advice}"), room));
        for line in lines.chain(advice) {
            text.push_str(&format!("      {:width$}  {}\n", "", output.paint(&line, plain)));
        }
    }
    let [fine, odd, bad] = counts;
    text.push_str(&format!("{fine} ok, {odd} to look at, {bad} to mend\n"));
    text.push_str("Beside them, tasklane-producer doctor and tasklane-worker doctor look at broker and ledger.\n");
    text
}

fn ok(check: &'static str, message: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Ok, message: message.into(), advice: None }
}

fn warn(check: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Warn, message: message.into(), advice: Some(advice.into()) }
}

fn fail(check: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Fail, ..warn(check, message, advice) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    fn seen(workers: Value, queues: Value) -> Vec<(&'static str, Verdict)> {
        let (workers, queues): (Vec<Worker>, Vec<Queue>) = (from_value(workers).unwrap(), from_value(queues).unwrap());
        service(&workers, &queues).iter().map(|finding| (finding.check, finding.verdict)).collect()
    }

    fn worker(queue: &str, version: &str) -> Value {
        json!({"id": "w", "host": "h", "queues": [queue], "kinds": ["k"], "concurrency": 4, "running": 1,
            "version": version, "started_at": "2026-11-23T07:31:26Z", "lease_age_ms": 1})
    }

    fn queue(name: &str, waiting_ms: Option<i64>) -> Value {
        json!({"name": name, "counts": {}, "oldest_waiting_ms": waiting_ms, "broker_depth": null, "consumers": null})
    }

    #[test]
    fn a_queue_that_nobody_consumes_is_a_finding() {
        assert_eq!(
            seen(json!([worker("a", "1")]), json!([queue("a", Some(3)), queue("b", None)])),
            [("workers.alive", Verdict::Ok), ("queues.waiting", Verdict::Ok)]
        );
        assert_eq!(
            seen(json!([worker("a", "1"), worker("a", "2")]), json!([queue("a", Some(400_000)), queue("b", Some(3))])),
            [
                ("workers.alive", Verdict::Ok),
                ("workers.versions", Verdict::Warn),
                ("queues.waiting", Verdict::Warn),
                ("queues.consumed", Verdict::Fail),
            ]
        );
        assert_eq!(seen(json!([]), json!([]))[0], ("workers.alive", Verdict::Warn));
    }

    #[test]
    fn a_paused_queue_in_which_tasks_wait_is_worth_a_look() {
        let paused = |waiting_ms| {
            let mut queue = queue("a", waiting_ms);
            queue["paused"] = json!(true);
            queue
        };
        assert_eq!(seen(json!([]), json!([paused(Some(3))]))[1], ("queues.paused", Verdict::Warn));
        assert_eq!(seen(json!([]), json!([paused(None)]))[1], ("queues.waiting", Verdict::Ok));
    }
}
