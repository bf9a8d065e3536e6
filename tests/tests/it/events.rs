//! Events: whoever looks sees what happens on all processes, and nothing is published while nobody looks.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use rustix::process::Signal;
use serde_json::{Value, json};
use tasklane_common::topology::EVENTS_EXCHANGE;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::stack::{Producer, Stack};
use tasklane_tests::{eventually, on_both_ledgers, within};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

/// A stream of `/v1/events`, read as it comes.
struct Listener {
    response: reqwest::Response,
    text: String,
}

/// One event of the stream: its name, and its data.
type Told = (String, Value);

impl Listener {
    /// Listens, and waits until events come.
    async fn at(producer: &Producer, query: &str) -> Result<Self> {
        let response = producer.api.client().get(producer.api.url(&format!("/v1/events{query}"))).send().await?;
        ensure!(response.status() == 200, "{}", response.status());
        let mut listener = Self { response, text: String::new() };
        let (name, _) = listener.next().await?;
        ensure!(name == "listening", "the first event is {name}");
        Ok(listener)
    }

    async fn next(&mut self) -> Result<Told> {
        within(LIMIT, "an event", async {
            loop {
                if let Some((event, rest)) = self.text.split_once("\n\n") {
                    let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
                    let told = field("event: ").zip(field("data: "));
                    let told = told.map(|(name, data)| anyhow::Ok((name.to_owned(), serde_json::from_str(data)?)));
                    self.text = rest.to_owned();
                    // What is left is a comment.
                    if let Some(told) = told.transpose()? {
                        return Ok(told);
                    }
                } else {
                    let part = self.response.chunk().await?.context("the stream has ended")?;
                    self.text.push_str(std::str::from_utf8(&part)?);
                }
            }
        })
        .await?
    }

    /// What is told of one task, up to an event of this name.
    async fn until(&mut self, id: &str, last: &str) -> Result<Vec<Told>> {
        let mut told = Vec::new();
        loop {
            let (name, event) = self.next().await?;
            ensure!(name != "lost", "events were lost: {event}");
            if event["id"] == id {
                told.push((name.clone(), event));
                if name == last {
                    return Ok(told);
                }
            }
        }
    }

    /// Waits until all is told of a task that is submitted to this producer: each process hears a moment later than the
    /// others that events are wanted.
    async fn hears(&mut self, producer: &Producer) -> Result<()> {
        eventually(LIMIT, "all to be told of a task", async || {
            let probe = producer.api.submit(&json!({"kind": "test.work", "args": {}})).await?.id;
            let mut names = BTreeSet::new();
            while names.len() < ALL.len() {
                // What is not told by then will not be.
                let Ok(told) = timeout(Duration::from_secs(2), self.next()).await else { bail!("only {names:?}") };
                let (name, event) = told?;
                if event["id"] == probe.as_str() {
                    names.insert(name);
                }
            }
            ensure!(names.iter().eq(&ALL), "{names:?}");
            Ok(Some(()))
        })
        .await
    }
}

/// What is told of a task that succeeds, by name.
const ALL: [&str; 3] = ["completed", "started", "submitted"];

fn at(event: &Value) -> Result<Timestamp> {
    Ok(event["at"].as_str().context("no time")?.parse()?)
}

fn named<'t>(told: &'t [Told], name: &str) -> Result<&'t Value> {
    let found = told.iter().find(|(other, _)| other == name);
    found.map(|(_, event)| event).with_context(|| format!("no {name}: {told:?}"))
}

fn position(told: &[Told], name: &str) -> Option<usize> {
    told.iter().position(|(other, _)| other == name)
}

on_both_ledgers! {
    async fn a_listener_sees_what_happens_on_every_process(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let (here, there) = (stack.producer().start().await?, stack.producer().start().await?);
        let worker = stack.test_worker(&log).start().await?;
        let mut listener = Listener::at(&here, "").await?;
        listener.hears(&here).await?;
        listener.hears(&there).await?;

        // Submitted at the other producer.
        let task = there.api.submit(&json!({"kind": "test.work", "args": {"work_ms": 50}})).await?;
        let mut told = listener.until(&task.id, "completed").await?;
        // Of two processes the later one's event may come first.
        if position(&told, "submitted").is_none() {
            told.extend(listener.until(&task.id, "submitted").await?);
        }
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(position(&told, "started") < position(&told, "completed"), "one process tells in order: {told:?}");
        let (submitted, started, completed) =
            (named(&told, "submitted")?, named(&told, "started")?, named(&told, "completed")?);
        assert!(at(submitted)? <= at(started)? && at(started)? <= at(completed)?, "{told:?}");
        assert_eq!((&submitted["state"], &submitted["attempt"], &submitted["worker_id"]), (&json!("accepted"), &json!(0), &Value::Null));
        let by = here.api.get(&task.id).await?.worker_id;
        for (event, state) in [(started, "running"), (completed, "completed")] {
            assert_eq!((&event["state"], &event["attempt"]), (&json!(state), &json!(1)));
            assert_eq!((&event["kind"], &event["queue"]), (&json!("test.work"), &json!("default")));
            assert!(event["worker_id"].is_string() && (by.is_none() || event["worker_id"] == json!(by)), "{event}");
        }
        eventually(LIMIT, "the worker to count what it told", async || {
            Ok((worker.metrics().await?.sum("tasklane_events_published_total", &[]) >= 6.0).then_some(()))
        })
        .await?;
        assert_eq!(worker.metrics().await?.sum("tasklane_events_dropped_total", &[]), 0.0);
        Ok(())
    }

    async fn every_way_in_which_a_run_ends_is_told(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let worker = stack.test_worker(&log).env("TASKLANE_SHUTDOWN_GRACE_MS", 0).start().await?;
        let mut listener = Listener::at(&producer, "").await?;
        listener.hears(&producer).await?;
        let mut story = async |task: Value, last: &str| {
            let id = producer.api.submit(&task).await?.id;
            let told = listener.until(&id, last).await?;
            let told: Vec<_> = told.into_iter().filter(|(name, _)| name != "submitted").collect();
            anyhow::Ok(told.iter().map(|(name, event)| format!("{name} {} {}", event["state"], event["attempt"])).collect::<Vec<_>>())
        };
        let work = |args: Value| json!({"kind": "test.work", "args": args});
        assert_eq!(
            story(work(json!({"failures": 1})), "completed").await?,
            ["started \"running\" 1", "retried \"retryable\" 1", "started \"running\" 2", "completed \"completed\" 2"]
        );
        assert_eq!(
            story(work(json!({"snooze_ms": 50})), "completed").await?,
            ["started \"running\" 1", "snoozed \"scheduled\" 1", "started \"running\" 1", "completed \"completed\" 1"]
        );
        let once = json!({"kind": "test.work", "args": {"failures": 9}, "max_attempts": 1});
        assert_eq!(story(once, "discarded").await?, ["started \"running\" 1", "discarded \"discarded\" 1"]);

        let waits = producer.api.submit(&json!({"kind": "test.work", "args": {}, "delay_ms": 3_600_000})).await?;
        let other = producer.api.submit(&json!({"kind": "test.work", "args": {}, "delay_ms": 3_600_000})).await?;
        producer.api.raw_post(&format!("/v1/tasks/{}/cancel", waits.id), &json!({})).await?;
        let told = listener.until(&waits.id, "cancelled").await?;
        assert_eq!((&named(&told, "submitted")?["state"], &named(&told, "cancelled")?["attempt"]), (&json!("scheduled"), &json!(0)));
        producer.api.raw_post("/v1/tasks/cancel", &json!({"state": "scheduled"})).await?;
        listener.until(&other.id, "cancelled").await?;

        let runs = producer.api.submit(&work(json!({"work_ms": 60_000}))).await?;
        listener.until(&runs.id, "started").await?;
        producer.api.raw_post(&format!("/v1/tasks/{}/cancel", runs.id), &json!({})).await?;
        let told = listener.until(&runs.id, "cancelled").await?;
        assert!(named(&told, "cancelled")?["worker_id"].is_string(), "{told:?}");

        let runs = producer.api.submit(&work(json!({"work_ms": 60_000}))).await?;
        listener.until(&runs.id, "started").await?;
        worker.process.signal(Signal::TERM)?;
        let told = listener.until(&runs.id, "interrupted").await?;
        assert_eq!(named(&told, "interrupted")?["state"], "accepted");
        Ok(())
    }

    async fn what_is_taken_from_a_dead_worker_is_told(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut worker = stack.test_worker(&log).short_lease().start().await?;
        let mut listener = Listener::at(&producer, "").await?;
        listener.hears(&producer).await?;
        let mut run = async |kind: &str| {
            let task = json!({"kind": kind, "args": {"work_ms": 60_000, "work_again_ms": 0}});
            let id = producer.api.submit(&task).await?.id;
            let told = listener.until(&id, "started").await?;
            anyhow::Ok((id, named(&told, "started")?["worker_id"].clone()))
        };
        let (again, by) = run("test.work").await?;
        let (once, _) = run("test.once").await?;
        worker.process.kill().await?;
        let mut told: BTreeMap<String, Told> = BTreeMap::new();
        while told.len() < 2 {
            let (name, event) = listener.next().await?;
            let id = event["id"].as_str().unwrap_or_default().to_owned();
            // Told by another process, this may come late.
            if name != "submitted" && (id == again || id == once) {
                told.insert(id, (name, event));
            }
        }
        for (id, name, state) in [(&again, "rescued", "retryable"), (&once, "discarded", "discarded")] {
            let (told, event) = &told[id];
            assert_eq!((told.as_str(), &event["state"], &event["attempt"]), (name, &json!(state), &json!(1)));
            assert_eq!((&event["worker_id"], &event["queue"]), (&by, &json!("default")), "the one that died");
        }
        let _other = stack.test_worker(&log).start().await?;
        producer.api.in_state(&again, "completed", LIMIT).await?;
        Ok(())
    }

    async fn what_follows_a_batch_and_what_is_run_again_by_hand_is_told(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let mut listener = Listener::at(&producer, "").await?;
        listener.hears(&producer).await?;
        let batch = json!({"tasks": [{"kind": "test.work", "args": {}}], "then": {"kind": "test.then", "queue": "after", "args": {}}});
        producer.api.raw_post("/v1/tasks/batch", &batch).await?.expect::<Value>(&[202])?;
        let submitted = loop {
            let (name, event) = listener.next().await?;
            if name == "submitted" && event["kind"] == "test.then" {
                break event;
            }
        };
        assert_eq!((&submitted["state"], &submitted["queue"], &submitted["attempt"]), (&json!("accepted"), &json!("after"), &json!(0)));

        let fails = json!({"kind": "test.work", "args": {"failures": 9}, "max_attempts": 1});
        let id = producer.api.submit(&fails).await?.id;
        listener.until(&id, "discarded").await?;
        for (path, body) in [(format!("/v1/tasks/{id}/retry"), json!({})), ("/v1/tasks/retry".to_owned(), json!({"kind": "test.work"}))] {
            producer.api.raw_post(&path, &body).await?.expect::<Value>(&[200, 202])?;
            let mut told = listener.until(&id, "discarded").await?;
            // Of two processes the later one's event may come first.
            if position(&told, "replayed").is_none() {
                told.extend(listener.until(&id, "replayed").await?);
            }
            let replayed = named(&told, "replayed").with_context(|| path.clone())?;
            assert_eq!((&replayed["state"], &replayed["worker_id"]), (&json!("accepted"), &Value::Null));
        }
        Ok(())
    }

    async fn a_listener_that_comes_late_sees_what_happens_from_then_on(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let (here, there) = (stack.producer().start().await?, stack.producer().start().await?);
        let _worker = stack.test_worker(&log).start().await?;
        let mut first = Listener::at(&here, "").await?;
        first.hears(&here).await?;
        let task = here.api.submit(&json!({"kind": "test.work", "args": {"work_ms": 60_000, "heeds": true}})).await?;
        first.until(&task.id, "started").await?;

        let mut late = Listener::at(&there, "").await?;
        let mut choosy = Listener::at(&there, "?kind=test.w*&queue=default&state=cancelled").await?;
        here.api.raw_post(&format!("/v1/tasks/{}/cancel", task.id), &json!({})).await?;
        let told = late.until(&task.id, "cancelled").await?;
        assert_eq!(told.len(), 1, "not what was before: {told:?}");
        let (name, event) = choosy.next().await?;
        assert_eq!((name.as_str(), &event["id"]), ("cancelled", &json!(task.id)), "nothing else meets its filter");
        Ok(())
    }
}

/// The queues from which producers read events.
async fn readers(stack: &Stack) -> Result<usize> {
    let queues = stack.vhost.node().management.get(&["queues", stack.vhost.name()]).await?;
    let names = queues.as_array().context("no list of queues")?.iter().filter_map(|queue| queue["name"].as_str());
    Ok(names.filter(|name| name.starts_with(&format!("{EVENTS_EXCHANGE}."))).count())
}

#[tokio::test]
async fn nothing_is_published_while_nobody_looks() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let _worker = stack.test_worker(&log).start().await?;
    let tap = stack.vhost.tap(EVENTS_EXCHANGE, "#").await?;
    let work = async || {
        let (task, ended) = producer.api.submit_and_wait(&json!({"kind": "test.work", "args": {}}), 30_000).await?;
        ensure!(ended, "{task:?}");
        anyhow::Ok(())
    };
    work().await?;
    assert_eq!(stack.vhost.take(&tap).await?.len(), 0);

    let mut listener = Listener::at(&producer, "").await?;
    listener.hears(&producer).await?;
    let published = stack.vhost.take(&tap).await?;
    let keys: BTreeSet<_> = published.iter().map(|message| message.routing_key.to_string()).collect();
    for event in ALL {
        assert!(keys.contains(&format!("{event}.default.test.work")), "{keys:?}");
    }
    assert_eq!(readers(&stack).await?, 1);

    drop(listener);
    eventually(LIMIT, "the producer to read no more", async || Ok((readers(&stack).await? == 0).then_some(()))).await?;
    eventually(LIMIT, "nothing to be published any more", async || {
        stack.vhost.take(&tap).await?;
        work().await?;
        let published = stack.vhost.take(&tap).await?.len();
        ensure!(published == 0, "{published} events of one task");
        Ok(Some(()))
    })
    .await
}

#[tokio::test]
async fn a_stream_ends_with_its_producer_and_survives_the_broker() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let mut producer = stack.producer().start().await?;
    let _worker = stack.test_worker(&log).start().await?;
    let mut listener = Listener::at(&producer, "").await?;
    listener.hears(&producer).await?;
    // Again and again: the broker's management does not know a new connection at once.
    eventually(LIMIT, "another greeting", async || {
        stack.vhost.close_connections().await?;
        while let Ok(told) = timeout(Duration::from_secs(2), listener.next()).await {
            if told?.0 == "listening" {
                return Ok(Some(()));
            }
        }
        bail!("the connection for events was not closed")
    })
    .await?;
    listener.hears(&producer).await?;

    producer.process.signal(Signal::TERM)?;
    producer.process.exited(LIMIT).await?;
    let end = async {
        while listener.response.chunk().await?.is_some() {}
        anyhow::Ok(())
    };
    within(LIMIT, "the stream to end", end).await??;
    Ok(())
}
