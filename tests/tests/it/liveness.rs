//! A worker that says it is ready is handed what waits: connected and consuming nothing is told, and mended.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tasklane_tests::eventually;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::stack::Stack;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::load::{check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// How soon a worker must say that it is handed nothing.
const TOLD_WITHIN: Duration = Duration::from_secs(30);

/// A wire to the broker on which deliveries get lost while all else passes: heartbeats, answers, confirms.
struct Deaf {
    addr: SocketAddr,
    rule: Arc<Rule>,
    acceptor: JoinHandle<()>,
}

#[derive(Default)]
struct Rule {
    deaf: AtomicBool,
    lost: AtomicU64,
}

impl Deaf {
    async fn before(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (addr, rule) = (listener.local_addr()?, Arc::new(Rule::default()));
        let rule_of_all = Arc::clone(&rule);
        let acceptor = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, server, Arc::clone(&rule_of_all)));
            }
        });
        Ok(Self { addr, rule, acceptor })
    }

    fn set(&self, deaf: bool) {
        self.rule.deaf.store(deaf, Ordering::SeqCst);
    }

    fn lost(&self) -> u64 {
        self.rule.lost.load(Ordering::SeqCst)
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

async fn carry(client: TcpStream, server: SocketAddr, rule: Arc<Rule>) -> Result<()> {
    let server = TcpStream::connect(server).await?;
    let ((mut from_client, to_client), (from_server, mut to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        there = copy(&mut from_client, &mut to_server) => drop(there?),
        back = frames(from_server, to_client, &rule) => back?,
    }
    Ok(())
}

/// Passes the broker's frames on, but for deliveries: a method frame and the content behind it.
async fn frames(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, rule: &Rule) -> Result<()> {
    const METHOD: u8 = 1;
    const CONTENT: [u8; 2] = [2, 3];
    const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
    let mut losing = HashSet::new();
    loop {
        let mut frame = vec![0; 7];
        from.read_exact(&mut frame).await?;
        let (sort, channel) = (frame[0], [frame[1], frame[2]]);
        let size = u32::from_be_bytes([frame[3], frame[4], frame[5], frame[6]]) as usize;
        frame.resize(7 + size + 1, 0);
        from.read_exact(&mut frame[7..]).await?;
        if sort == METHOD {
            losing.remove(&channel);
            if frame[7..].starts_with(&BASIC_DELIVER) && rule.deaf.load(Ordering::SeqCst) {
                losing.insert(channel);
                rule.lost.fetch_add(1, Ordering::SeqCst);
                continue;
            }
        }
        if !(CONTENT.contains(&sort) && losing.contains(&channel)) {
            to.write_all(&frame).await?;
        }
    }
}

#[tokio::test]
async fn a_worker_that_is_handed_nothing_is_not_ready_within_30_s_and_mends_itself() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let node = stack.vhost.node();
    let wire = Deaf::before(node.amqp).await?;
    let url = node.url(wire.addr, stack.vhost.name());
    let worker = stack.test_worker(&log).env("TASKLANE_AMQP_URL", url).env("TASKLANE_CONCURRENCY", 2).start().await?;
    let before = ids(&producer.api.submit_batch(&tasks(3, "test.work", &json!({}))).await?);
    producer.api.all_ended(before.len(), LIMIT).await?;

    wire.set(true);
    let mut submitted = ids(&producer.api.submit_batch(&tasks(20, "test.work", &json!({}))).await?);
    submitted.extend(before);
    let waiting = Instant::now();
    let problem =
        eventually(TOLD_WITHIN, "the worker to say that it is handed nothing", async || worker.problem().await).await?;
    println!("told after {:.1?}: {problem}", waiting.elapsed());
    assert!(problem.contains("none is delivered"), "{problem}");
    assert!(wire.lost() > 0, "the test proves nothing");
    assert!(stack.vhost.depth("tasklane.q.default").await?.context("a queue")? > 0);
    worker.process.logged("messages are ready and there is room, but none is delivered", LIMIT).await?;
    // The new connection is as deaf: the worker may not call itself ready again just because it is connected.
    eventually(LIMIT, "the worker to be connected again", async || {
        Ok(worker.problem().await?.filter(|problem| problem.contains("none is delivered")))
    })
    .await?;
    assert_eq!(worker.metrics().await?.sum("tasklane_worker_stalled", &[("queue", "default")]), 1.0);

    wire.set(false);
    eventually(LIMIT, "the worker to be ready again", async || Ok(worker.problem().await?.is_none().then_some(())))
        .await?;
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT).await?, &submitted)?;
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    assert_eq!(worker.metrics().await?.sum("tasklane_worker_stalled", &[]), 0.0);
    nothing_left(&stack.vhost).await
}

#[tokio::test]
async fn a_worker_without_room_or_work_is_not_called_stalled() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let busy = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", 1).start().await?;
    let idle = stack.test_worker(&log).env("TASKLANE_QUEUES", "idle").start().await?;
    let mut batch = tasks(1, "test.work", &json!({"work_ms": (TOLD_WITHIN + Duration::from_secs(10)).as_millis()}));
    batch.extend(tasks(1, "test.work", &json!({})));
    let submitted = ids(&producer.api.submit_batch(&batch).await?);
    log.started(1, LIMIT).await?;
    let until = Instant::now() + TOLD_WITHIN - Duration::from_secs(2);
    let mut look = Instant::now();
    while look < until {
        assert_eq!((busy.problem().await?, idle.problem().await?), (None, None));
        assert!(!busy.process.log().contains("connecting anew"));
        look += Duration::from_millis(500);
        sleep_until(look).await;
    }
    assert_eq!(stack.vhost.depth("tasklane.q.default").await?, Some(1), "the test proves nothing");
    check_completed(&producer.api.all_ended(submitted.len(), LIMIT * 2).await?, &submitted)
}

/// Handlers in Rust can block every thread that the worker has, and still somebody must be told that it lives.
#[tokio::test]
async fn health_answers_while_every_thread_is_blocked() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).env("TASKLANE_LEASE_TTL_MS", 120_000).start().await?;
    let threads = std::thread::available_parallelism()?.get();
    let blocking = tasks(2 * threads, "test.work", &json!({"blocks": true, "work_ms": 40_000}));
    producer.api.submit_batch(&blocking).await?;
    log.started(threads, LIMIT).await?;
    assert_eq!(worker.get("/healthz").await?.status, 200);
    assert_eq!(worker.get("/metrics").await?.status, 200);
    worker.get("/readyz").await?;
    assert!(log.starts()?.len() < 2 * threads, "the test proves nothing: a run has ended");
    Ok(())
}

/// Connections that do nothing take neither the listener's places nor the files that tasks need.
#[tokio::test]
async fn idle_connections_keep_no_probe_out_and_cost_no_attempt() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).config("[[command]]\nkind = \"shell.echo\"\nargv = [\"/bin/cat\"]");
    let worker = worker.env("TASKLANE_CONCURRENCY", 8).under(&["prlimit", "--nofile=256", "--"]).start().await?;
    let mut idle = Vec::new();
    for begun in 0..300 {
        let mut client = TcpStream::connect(worker.addr).await?;
        if begun % 2 == 0 {
            // Those that the listener has closed since say so.
            let _ = client.write_all(b"GET /healthz HTTP/1.1\r\nHo").await;
        }
        idle.push(client);
    }
    assert_eq!(worker.get("/healthz").await?.status, 200);
    let submitted = ids(&producer.api.submit_batch(&tasks(40, "shell.echo", &json!({"a": 1}))).await?);
    for task in producer.api.all_ended(submitted.len(), LIMIT).await? {
        assert_eq!((task.state.as_str(), task.attempt), ("completed", 1), "{task:?}");
    }
    assert_eq!(worker.get("/healthz").await?.status, 200);
    drop(idle);
    Ok(())
}

/// Nothing is published to it, so no publisher declares it anew, and no look at what is ready finds it.
#[tokio::test]
async fn an_idle_workers_consumer_that_the_broker_cancels_is_made_anew() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).start().await?;
    let consumers = async || {
        let queue: Value = producer.api.raw_get("/v1/queues/default").await?.expect(&[200])?;
        Ok((queue["consumers"] == 1).then_some(()))
    };
    let first = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
    producer.api.in_state(&first, "completed", LIMIT).await?;
    eventually(LIMIT, "the worker to consume", consumers).await?;
    assert_eq!(stack.vhost.delete_queue("tasklane.q.default").await?, 0);
    eventually(LIMIT / 2, "the worker to consume anew", consumers).await?;
    worker.process.logged("the broker cancelled the consumer", LIMIT).await?;
    let second = producer.api.submit(&json!({"kind": "test.work"})).await?.id;
    producer.api.in_state(&second, "completed", LIMIT).await?;
    nothing_left(&stack.vhost).await
}
