//! What clients may do wrong, do twice, or do while the ledger is away; and where their tasks go.

use std::collections::BTreeSet;
use std::ops::RangeBounds;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::{Answer, Api};
use tasklane_tests::ledger::{Ledger, LedgerKind};
use tasklane_tests::oplog::{CommandKind, OperationLog, Step};
use tasklane_tests::postgres::Postgres;
use tasklane_tests::stack::{Producer, Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::load::{ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// How soon a request is refused while the ledger is known to be away.
const REFUSED_WITHIN: Duration = Duration::from_secs(3);

/// How many clients send the same request at the same time.
const CLIENTS: usize = 50;

const JSON: &str = "application/json";
const NDJSON: &str = "application/x-ndjson";

on_both_ledgers! {
    async fn fifty_parallel_requests_under_one_key_make_one_task(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let task = json!({"kind": "test.work", "args": {"answer": 1}, "tags": {"order": "7"}});
        let answers = fifty_times(&producer.api, "order-7", &task).await?;

        let mut ids = BTreeSet::new();
        for answer in &answers {
            ids.insert(answer.expect::<Value>(&[202])?["id"].to_string());
        }
        assert_eq!(ids.len(), 1, "{ids:?}");
        let replays = answers.iter().filter(|answer| answer.header("idempotent-replayed") == Some("true")).count();
        assert_eq!(replays, CLIENTS - 1);
        assert_eq!(producer.api.list_all(&[]).await?.len(), 1);

        let other = json!({"kind": "test.work", "args": {"answer": 2}, "tags": {"order": "7"}});
        for answer in fifty_times(&producer.api, "order-7", &other).await? {
            assert_eq!((answer.status, &answer.problem()?["code"]), (422, &json!("idempotency_key_reused")));
        }
        let _worker = stack.test_worker(&log).start().await?;
        assert_eq!(producer.api.all_ended(1, LIMIT).await?.len(), 1);
        assert_eq!(log.starts()?.len(), 1);

        let again = producer.api.submit_once("order-7", &task).await?;
        assert_eq!((again.status, again.header("idempotent-replayed")), (202, Some("true")));
        assert_eq!(again.json()?["state"], "completed", "a replay shows the task as it is now");
        Ok(())
    }

    async fn bad_requests_are_explained_and_leave_nothing_behind(ledger) {
        let stack = Stack::new(ledger).await?;
        let producer = stack.producer().start().await?;
        let api = &producer.api;
        for bad in bad_tasks().into_iter().chain(bad_batches()) {
            bad.check(&api.raw_body(bad.path, bad.content_type, bad.body.clone()).await?)?;
        }
        for (path, status, code, place) in [
            ("/v1/tasks?cursor=nonsense", 400, "invalid_query", Some("cursor")),
            ("/v1/tasks?state=lost", 400, "invalid_query", Some("state")),
            ("/v1/tasks?limit=0", 400, "invalid_query", Some("limit")),
            ("/v1/tasks?colour=red", 400, "invalid_query", Some("colour")),
            ("/v1/tasks/0197f3f0-0000-7000-8000-000000000000", 404, "unknown_task", None),
            ("/v1/tasks/0197f3f0-0000-7000-8000-000000000000?wait_ms=1000", 404, "unknown_task", None),
            ("/v1/tasks/nonsense", 404, "unknown_task", None),
            ("/v1/nothing", 404, "unknown_path", None),
        ] {
            let bad = Bad { what: path, status, code, place, ..Bad::task(path, "") };
            bad.check(&api.raw_get(path).await?)?;
        }
        assert!(api.list_all(&[]).await?.is_empty());
        assert!(api.under_way().await?.is_empty());
        assert!(matches!(stack.vhost.depth("tasklane.q.default").await?, None | Some(0)));

        let good = tasks(3, "test.work", &json!({}));
        for accepted in api.submit_lines(&good).await? {
            // Not only that they are taken: RabbitMQ 3.10 minds a queue that goes away while it is being made.
            api.in_state(&accepted.id, "queued", LIMIT).await?;
        }
        assert_eq!(api.list_all(&[]).await?.len(), 3, "and a good request is taken as ever");
        Ok(())
    }
}

async fn fifty_times(api: &Api, key: &'static str, task: &Value) -> Result<Vec<Answer>> {
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (api, task) = (api.clone(), task.clone());
        clients.spawn(async move { api.submit_once(key, &task).await });
    }
    clients.join_all().await.into_iter().collect()
}

/// A request that must be refused, and how.
struct Bad {
    what: &'static str,
    path: &'static str,
    content_type: &'static str,
    body: String,
    status: u16,
    code: &'static str,
    /// The first place that the answer must name.
    place: Option<&'static str>,
}

impl Bad {
    /// To `/v1/tasks`; a field does not fit.
    fn task(what: &'static str, body: impl Into<String>) -> Self {
        let (path, body) = ("/v1/tasks", body.into());
        Self { what, path, content_type: JSON, body, status: 422, code: "invalid_task", place: None }
    }

    fn at(self, place: &'static str) -> Self {
        Self { place: Some(place), ..self }
    }

    fn is(self, status: u16, code: &'static str) -> Self {
        Self { status, code, ..self }
    }

    fn check(&self, answer: &Answer) -> Result<()> {
        let problem = answer.problem().with_context(|| self.what.to_owned())?;
        let said = format!("{}: {problem}", self.what);
        assert_eq!((answer.status, &problem["code"]), (self.status, &json!(self.code)), "{said}");
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{said}");
        assert!(answer.body.len() < 64 * 1024, "{said}");
        if let Some(place) = self.place {
            assert_eq!(problem["errors"][0]["path"], place, "{said}");
            assert!(problem["errors"][0]["message"].is_string(), "{said}");
        }
        Ok(())
    }
}

fn bad_tasks() -> Vec<Bad> {
    let two_mib = "x".repeat(2 << 20);
    let hardly_too_large = "x".repeat((1 << 20) + 1);
    vec![
        Bad::task("not JSON", "{\"kind\": ").is(400, "invalid_json"),
        Bad::task("no body", "").is(400, "invalid_json"),
        Bad::task("not UTF-8", "kind=test.work").is(400, "invalid_json"),
        Bad { content_type: "text/plain", ..Bad::task("no JSON by its type", "{}") }.is(415, "unsupported_media_type"),
        Bad::task("a list", "[]"),
        Bad::task("no kind", "{}").at("kind"),
        Bad::task("a number for a kind", r#"{"kind":7}"#).at("kind"),
        Bad::task("a text for a number", r#"{"kind":"a","timeout_ms":"soon"}"#).at("timeout_ms"),
        Bad::task("a list for tags", r#"{"kind":"a","tags":["b"]}"#).at("tags"),
        Bad::task("an unknown field", r#"{"kind":"a","delay":7}"#).at("delay"),
        Bad::task("a kind of 300 characters", json!({"kind": "k".repeat(300)}).to_string()).at("kind"),
        Bad::task("a bad queue", r#"{"kind":"a","queue":"no queue"}"#).at("queue"),
        Bad::task("no attempts", r#"{"kind":"a","max_attempts":0}"#).at("max_attempts"),
        Bad::task("delay and time", r#"{"kind":"a","delay_ms":1,"run_at":"2100-01-01T00:00:00Z"}"#).at("run_at"),
        Bad::task("2 MiB args", json!({"kind": "a", "args": two_mib}).to_string()).is(413, "too_large"),
        Bad::task("args a little too large", json!({"kind": "a", "args": hardly_too_large}).to_string()).at("args"),
        Bad { path: "/v1/tasks?wait_ms=soon", ..Bad::task("a bad wait", r#"{"kind":"a"}"#) }
            .is(400, "invalid_query")
            .at("wait_ms"),
    ]
}

fn bad_batches() -> Vec<Bad> {
    let document =
        |what, tasks: &[Value]| Bad { path: "/v1/tasks/batch", ..Bad::task(what, json!({"tasks": tasks}).to_string()) };
    let lines = |what, tasks: &[Value], line_4321: Option<&str>| {
        let mut lines: Vec<String> = tasks.iter().map(Value::to_string).collect();
        if let Some(bad) = line_4321 {
            bad.clone_into(&mut lines[4320]);
        }
        Bad { path: "/v1/tasks/batch", content_type: NDJSON, ..Bad::task(what, lines.join("\n")) }
    };
    let many = tasks(10_001, "test.work", &json!({"n": 1}));
    let mut two_bad = tasks(5, "test.work", &json!({}));
    two_bad[1] = json!({"kind": "no kind"});
    two_bad[3] = json!({"queue": "default"});
    vec![
        Bad { path: "/v1/tasks/batch", ..Bad::task("no JSON in a batch", "{\"tasks\": [") }.is(400, "invalid_json"),
        document("an empty batch", &[]).at("tasks"),
        document("a batch of 10,001", &many).at("tasks"),
        document("two bad of five", &two_bad).at("tasks[1].kind"),
        document("a task with 2 MiB args", &[json!({"kind": "a", "args": "x".repeat(2 << 20)})]).at("tasks[0]"),
        lines("10,001 lines", &many, None).at("line 10001"),
        lines("line 4,321 is not JSON", &many[..5000], Some("{\"kind\":")).at("line 4321"),
        lines("line 4,321 has no good kind", &many[..5000], Some("{\"kind\":\"no kind\"}")).at("line 4321: kind"),
        lines("line 4,321 has an unknown field", &many[..5000], Some(r#"{"kind":"a","x":1}"#)).at("line 4321: x"),
        Bad { path: "/v1/tasks/batch", content_type: "text/csv", ..Bad::task("CSV", "kind\na") }
            .is(415, "unsupported_media_type"),
    ]
}

/// A world whose ledger can be stopped: its own PostgreSQL. Drop the server last.
async fn stoppable() -> Result<(Postgres, Stack)> {
    let server = Postgres::private().await?;
    let mut stack = Stack::new(LedgerKind::Sqlite).await?;
    stack.ledger = Ledger::Postgres(server.database().await?);
    Ok((server, stack))
}

#[tokio::test]
async fn a_ledger_that_is_away_is_told_at_once_and_recovered_from() -> Result<()> {
    let (mut server, stack) = stoppable().await?;
    let log = stack.operation_log()?;
    let mut producer = stack.producer().start().await?;
    let mut worker = stack.test_worker(&log).short_lease().start().await?;
    let api = producer.api.clone();
    let mut submitted = ids(&api.submit_batch(&tasks(20, "test.work", &json!({"work_ms": 4000}))).await?);
    log.started(20, LIMIT).await?;

    server.stop().await?;
    refuses_at_once(&api, submitted.first().context("an id")?).await?;
    assert_eq!(api.raw_get("/healthz").await?.status, 200);
    assert_eq!(api.raw_get("/readyz").await?.status, 503);
    assert_eq!(api.raw_get("/metrics").await?.status, 200);
    worker.process.logged("the lease cannot be proven any more", LIMIT).await?;
    eventually(LIMIT, "the worker to say that it is not ready", async || Ok((!worker.is_ready().await?).then_some(())))
        .await?;
    server.start().await?;

    submitted.extend(ids(&taken_again(&api).await?));
    let ended = api.all_ended(submitted.len(), LIMIT).await?;
    crate::load::check_completed(&ended, &submitted)?;
    assert_eq!(ended.len(), submitted.len(), "what was refused was not recorded");
    log.check_fences_rise()?;
    log.check_no_overlap()?;
    went_on(&mut producer, &mut worker, 2..)?;
    nothing_left(&stack.vhost).await
}

#[tokio::test]
async fn running_tasks_outlast_a_short_absence_of_the_ledger() -> Result<()> {
    let (mut server, stack) = stoppable().await?;
    let log = stack.operation_log()?;
    let mut producer = stack.producer().start().await?;
    let mut worker = stack.test_worker(&log).start().await?;
    let api = producer.api.clone();
    let mut submitted = ids(&api.submit_batch(&tasks(20, "test.work", &json!({"work_ms": 1000}))).await?);
    log.started(20, LIMIT).await?;

    server.crash().await?;
    refuses_at_once(&api, submitted.first().context("an id")?).await?;
    all_handlers_ended(&log, submitted.len()).await?;
    server.start().await?;

    submitted.extend(ids(&taken_again(&api).await?));
    crate::load::check_completed(&api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    went_on(&mut producer, &mut worker, 1..=1)?;
    nothing_left(&stack.vhost).await
}

async fn all_handlers_ended(log: &OperationLog, count: usize) -> Result<()> {
    eventually(LIMIT, "all handlers to end", async || {
        let ends = log.entries()?.into_iter().filter(|entry| entry.step == Step::End).count();
        Ok((ends >= count).then_some(()))
    })
    .await
}

/// After the first failure every request is refused in no time, and told when to come again.
async fn refuses_at_once(api: &Api, id: &str) -> Result<()> {
    let (task, batch) = (json!({"kind": "test.work"}), json!({"tasks": [{"kind": "test.work"}]}));
    let began = Instant::now();
    let first = api.raw_post("/v1/tasks", &task).await?;
    println!("the first request after the ledger went was answered after {:?}", began.elapsed());
    refused(&first)?;
    for _ in 0..5 {
        for request in 0..6 {
            let began = Instant::now();
            let answer = match request {
                0 => api.raw_post("/v1/tasks", &task).await?,
                1 => api.raw_post("/v1/tasks/batch", &batch).await?,
                2 => api.submit_once("while-away", &task).await?,
                3 => api.raw_get(&format!("/v1/tasks/{id}?wait_ms=5000")).await?,
                4 => api.raw_get("/v1/tasks").await?,
                _ => api.raw_get("/v1/queues").await?,
            };
            let took = began.elapsed();
            refused(&answer)?;
            ensure!(took < REFUSED_WITHIN, "request {request} was refused after {took:?}");
        }
    }
    Ok(())
}

fn refused(answer: &Answer) -> Result<()> {
    let problem = answer.problem()?;
    ensure!(answer.status == 503 && problem["code"] == "ledger_unavailable", "{problem}");
    let again = answer.header("retry-after").context("no Retry-After")?;
    ensure!(again.parse::<u32>().is_ok_and(|seconds| (1..=60).contains(&seconds)), "Retry-After: {again}");
    Ok(())
}

/// Submits a batch as soon as one is taken.
async fn taken_again(api: &Api) -> Result<Vec<tasklane_tests::api::Accepted>> {
    let began = Instant::now();
    let accepted = eventually(LIMIT, "the producer to take tasks again", async || {
        api.submit_batch(&tasks(10, "test.work", &json!({}))).await.map(Some)
    })
    .await?;
    println!("the producer took tasks again {:?} after the ledger was back", began.elapsed());
    Ok(accepted)
}

/// Neither program was started again; the worker has had so many names.
fn went_on(producer: &mut Producer, worker: &mut Worker, names: impl RangeBounds<usize>) -> Result<()> {
    assert_eq!((producer.process.has_exited()?, worker.process.has_exited()?), (None, None));
    let entered = worker.process.log().matches("the worker has entered the ledger").count();
    assert!(names.contains(&entered), "{entered} names: {}", worker.process.log());
    Ok(())
}

on_both_ledgers! {
    async fn tasks_go_to_the_queues_of_their_routes_and_workers_take_several(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let routes = "[[route]]\nkind = \"email.*\"\nqueue = \"emails\"\n\
                      [[route]]\nkind = \"report.build\"\nqueue = \"reports\"\n";
        let producer = stack.producer().config(routes).start().await?;
        let mut kinds = String::new();
        for kind in ["email.welcome", "email.bill.late", "report.build", "other"] {
            kinds.push_str(&log.command(&CommandKind::new(kind))?);
        }
        let _several = stack.worker().env("TASKLANE_QUEUES", "emails,reports").config(&kinds).start().await?;
        let _default = stack.worker().config(&kinds).start().await?;

        let places = [
            (json!({"kind": "email.welcome"}), "emails"),
            (json!({"kind": "email.bill.late"}), "emails"),
            (json!({"kind": "report.build"}), "reports"),
            (json!({"kind": "other"}), "default"),
            (json!({"kind": "email.welcome", "queue": "default"}), "default"),
            (json!({"kind": "other", "queue": "reports"}), "reports"),
        ];
        let batch: Vec<Value> = places.iter().map(|(task, _)| task.clone()).collect();
        let accepted = producer.api.submit_batch(&batch).await?;
        producer.api.all_ended(batch.len(), LIMIT).await?;

        let workers = producer.api.workers().await?;
        let consumed = |worker: Option<&String>| {
            workers.iter().find(|known| known["id"].as_str() == worker.map(String::as_str)).map(|known| known["queues"].clone())
        };
        for (accepted, (task, queue)) in accepted.iter().zip(&places) {
            let ended = producer.api.get(&accepted.id).await?;
            assert_eq!((ended.state.as_str(), ended.queue.as_str()), ("completed", *queue), "{task}");
            let queues = if *queue == "default" { json!(["default"]) } else { json!(["emails", "reports"]) };
            assert_eq!(consumed(ended.worker_id.as_ref()), Some(queues), "{task}");
        }
        log.check_each_started_once(accepted.iter().map(|task| task.id.as_str()))?;
        for queue in ["emails", "reports", "default"] {
            assert_eq!(stack.vhost.depth(&format!("tasklane.q.{queue}")).await?, Some(0), "{queue}");
        }
        Ok(())
    }
}
