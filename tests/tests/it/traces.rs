//! Traces: the request, its task and every attempt are one, whoever made them; and a collector that is away costs nobody a task.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tasklane_tests::api::{Api, Task};
use tasklane_tests::collector::{Collector, Span};
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::stack::{Program, Stack, Start};
use tasklane_tests::{eventually, on_both_ledgers};

const LIMIT: Duration = Duration::from_secs(60);

/// What the client of these tests has begun, and wants to see.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT_SPAN: &str = "b7ad6b7169203331";

/// What a collector may ask for.
const TOKEN: &str = "s3cr3t-T0ken";

/// How long spans wait for others to be sent with, in milliseconds.
const DELAY: &str = "OTEL_BSP_SCHEDULE_DELAY";

/// Retries without a wait, and a command that answers with the trace that it was handed.
const SETTINGS: &str = r#"
[backoff]
base_ms = 1
max_ms = 1

[[command]]
kind = "test.trace"
argv = ["sh", "-c", 'printf %s "$TRACEPARENT"']
"#;

/// A program whose spans go to the collector soon after they have ended.
fn traced<P: Program>(start: Start<P>, collector: SocketAddr) -> Start<P> {
    start.env("TASKLANE_OTLP_URL", format!("http://{collector}")).env(DELAY, 50)
}

/// Submits a task as a part of the client's trace.
async fn submit(api: &Api, flags: &str, task: &Value) -> Result<Task> {
    let request = api.client().post(api.url("/v1/tasks?wait_ms=30000")).json(task);
    let answer = api.send(request.header("traceparent", format!("00-{TRACE}-{CLIENT_SPAN}-{flags}"))).await?;
    answer.expect(&[200])
}

/// Waits until so many spans of the client's trace have come that tell of this task or of requests.
async fn spans(collector: &Collector, count: usize) -> Result<Vec<Span>> {
    eventually(LIMIT, &format!("{count} spans"), async || {
        let spans: Vec<Span> = collector.spans().into_iter().filter(|span| span.trace == TRACE).collect();
        Ok((spans.len() >= count).then_some(spans))
    })
    .await
}

fn named<'s>(spans: &'s [Span], name: &str) -> Vec<&'s Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

#[tokio::test]
async fn a_collectors_token_goes_to_the_collector_alone() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let collector = Collector::start().await?;
    let settings = format!("{SETTINGS}\n[[command]]\nkind = \"test.env\"\nargv = [\"env\"]\n");
    let producer = traced(stack.producer(), collector.addr()).start().await?;
    let worker = traced(stack.worker().config(&settings), collector.addr());
    let _worker = worker.env("OTEL_EXPORTER_OTLP_HEADERS", format!("authorization={TOKEN}")).start().await?;

    let task = submit(&producer.api, "01", &json!({"kind": "test.env"})).await?;
    let told = task.result.as_str().context("the command's environment")?;
    assert!(told.contains("TRACEPARENT=") && !told.contains(TOKEN), "{told}");
    eventually(LIMIT, "spans with the token", async || Ok(collector.has_seen(TOKEN).then_some(()))).await
}

on_both_ledgers! {
    async fn a_request_and_every_attempt_of_its_task_are_one_trace(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let collector = Collector::start().await?;
        let producer = traced(stack.producer(), collector.addr()).start().await?;
        let _worker = traced(stack.test_worker(&log).config(SETTINGS), collector.addr()).start().await?;

        // The second attempt comes by a retry, out of the ledger.
        let task = submit(&producer.api, "01", &json!({"kind": "test.work", "args": {"failures": 1}})).await?;
        let spans = spans(&collector, 3).await?;
        let request = named(&spans, "POST /v1/tasks");
        let [request] = request[..] else { anyhow::bail!("one request: {spans:?}") };
        assert_eq!((request.service.as_str(), request.parent.as_str()), ("tasklane-producer", CLIENT_SPAN));
        assert_eq!(request.attributes["http.response.status_code"], "200");
        let mut runs = named(&spans, "process test.work");
        runs.sort_by_key(|run| run.attributes["task.attempt"].clone());
        let [failed, completed] = runs[..] else { anyhow::bail!("two runs: {spans:?}") };
        for (run, attempt) in [(failed, "1"), (completed, "2")] {
            assert_eq!((run.service.as_str(), &run.parent), ("test-worker", &request.id));
            assert_eq!(run.attributes["task.attempt"], attempt);
            assert_eq!(run.attributes["messaging.message.id"], task.id);
            assert_eq!(run.attributes["messaging.destination.name"], "default");
        }
        assert_eq!(failed.error.as_deref(), Some("attempt 1 fails"));
        assert_eq!(failed.attributes["task.outcome"], "retried");
        assert_eq!((&completed.error, completed.attributes["task.outcome"].as_str()), (&None, "completed"));
        Ok(())
    }
}

#[tokio::test]
async fn what_a_handler_starts_belongs_to_its_run() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let collector = Collector::start().await?;
    let producer = traced(stack.producer(), collector.addr()).start().await?;
    let _worker = traced(stack.worker().config(SETTINGS), collector.addr()).start().await?;

    let task = submit(&producer.api, "01", &json!({"kind": "test.trace"})).await?;
    let spans = spans(&collector, 2).await?;
    let runs = named(&spans, "process test.trace");
    let [run] = runs[..] else { anyhow::bail!("one run: {spans:?}") };
    assert_eq!(task.result, json!(format!("00-{TRACE}-{}-01", run.id)));
    Ok(())
}

#[tokio::test]
async fn without_a_collector_the_clients_trace_goes_to_the_handler_as_it_is() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let producer = stack.producer().start().await?;
    let _worker = stack.worker().config(SETTINGS).start().await?;
    let task = submit(&producer.api, "01", &json!({"kind": "test.trace"})).await?;
    assert_eq!(task.result, json!(format!("00-{TRACE}-{CLIENT_SPAN}-01")));
    Ok(())
}

#[tokio::test]
async fn a_client_decides_for_its_trace_and_the_ratio_for_all_others() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let collector = Collector::start().await?;
    let producer = traced(stack.producer(), collector.addr()).env("TASKLANE_TRACE_RATIO", 0).start().await?;
    let _worker =
        traced(stack.worker().config(SETTINGS), collector.addr()).env("TASKLANE_TRACE_RATIO", 0).start().await?;

    let task = json!({"kind": "test.trace"});
    let unsampled = submit(&producer.api, "00", &task).await?;
    let handed = unsampled.result.as_str().context("the handler's trace")?;
    assert!(handed.starts_with(&format!("00-{TRACE}-")) && handed.ends_with("-00"), "{handed}");
    producer.api.submit_and_wait(&task, 30_000).await?;
    // Spans are sent in the order in which they end: had the first two been sent, they would be there with these.
    submit(&producer.api, "01", &task).await?;
    let spans = spans(&collector, 2).await?;
    assert_eq!((spans.len(), collector.count()), (2, 2), "{:?}", collector.spans());
    Ok(())
}

#[tokio::test]
async fn the_spans_that_are_left_are_sent_when_a_program_stops() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let collector = Collector::start().await?;
    // By themselves they would be sent in an hour.
    let mut producer = traced(stack.producer(), collector.addr()).env(DELAY, 3_600_000).start().await?;
    let worker = traced(stack.worker().config(SETTINGS), collector.addr()).env(DELAY, 3_600_000);
    let mut worker = worker.start().await?;
    submit(&producer.api, "01", &json!({"kind": "test.trace"})).await?;
    for process in [&mut worker.process, &mut producer.process] {
        process.terminate()?;
        assert!(process.exited(LIMIT).await?.success(), "{}", process.log());
    }
    spans(&collector, 2).await?;
    Ok(())
}

#[tokio::test]
async fn a_collector_that_is_away_costs_spans_and_nothing_else() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let addr = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let producer = traced(stack.producer(), addr).start().await?;
    let worker = traced(stack.worker().config(SETTINGS), addr).start().await?;

    let task = json!({"kind": "test.trace"});
    submit(&producer.api, "01", &task).await?;
    for process in [&producer.process, &worker.process] {
        process.logged("traces cannot be sent", LIMIT).await?;
    }
    assert!(producer.api.metrics().await?.sum("tasklane_spans_total", &[("outcome", "lost")]) >= 1.0);
    let collector = Collector::at(addr).await?;
    submit(&producer.api, "01", &task).await?;
    spans(&collector, 2).await?;
    for process in [&producer.process, &worker.process] {
        process.logged("traces are sent again", LIMIT).await?;
        assert_eq!(process.log().matches("traces cannot be sent").count(), 1, "{}", process.log());
    }
    Ok(())
}
