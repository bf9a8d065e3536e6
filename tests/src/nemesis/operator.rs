//! What people and other programs do to queues and tasks while all goes on.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lapin::BasicProperties;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tasklane_common::envelope::Envelope;
use tasklane_common::rusqlite;
use tasklane_common::task::{Json, TaskId};
use tasklane_common::topology::TASKS_EXCHANGE;
use tokio::time::{Instant, sleep, timeout};

use crate::api::Answer;
use crate::history::Op;
use crate::ledger::Ledger;
use crate::nemesis::world::{Lane, QUEUES, World, broker_queue};
use crate::wait::{eventually, within};

/// What every garbage message has in its body.
pub const GARBAGE: &str = "nemesis";

/// How long a deleted queue may take to be there again.
const ANEW_LIMIT: Duration = Duration::from_secs(30);

/// How long the write lock of the ledger's file is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(4);

/// How long a statement of the ledger may wait for a lock.
const STATEMENT_LIMIT: Duration = Duration::from_secs(5);

/// How long a request may take, and how long a pause may take to be taken back.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const RESUME_LIMIT: Duration = Duration::from_secs(40);

/// How long a request without an answer may still come true: far longer than any fault holds one up.
const DOUBT: Duration = Duration::from_secs(60);

/// How long a queue is paused at least: what is granted in the last second of a pause proves nothing.
const PAUSED_MIN: Duration = Duration::from_secs(2);

/// The pause between two moves.
const MOVE_PAUSE: Duration = Duration::from_millis(400);

/// Until when requests for the pausing of each queue may come true that nobody has answered.
pub type Doubts = BTreeMap<&'static str, Instant>;

/// Pauses a queue for a while. The history has it as paused only when that is certain: from the answer to the pause, and
/// until before it is asked to go on.
pub async fn pause(lane: &Lane, queue: &'static str, time: Duration) -> Result<()> {
    let mut doubts = lane.doubts.try_lock().context("another queue is paused at this moment")?;
    let doubt = doubts.get(queue).is_some_and(|until| Instant::now() < *until);
    ensure!(!doubt, "a request to resume {queue} may still come true");
    let paused = ask(lane, queue, "pause", &mut doubts).await;
    if paused.is_ok() {
        lane.history.append(Op::Paused { queue: queue.to_owned() })?;
    }
    sleep(PAUSED_MIN + time).await;
    resume(lane, queue, &mut doubts).await?;
    paused
}

/// Lets all queues go on.
pub async fn resume_all(lane: &Lane) -> Result<()> {
    let mut doubts = lane.doubts.lock().await;
    for queue in QUEUES {
        resume(lane, queue, &mut doubts).await?;
    }
    Ok(())
}

async fn resume(lane: &Lane, queue: &'static str, doubts: &mut Doubts) -> Result<()> {
    lane.history.append(Op::Resumed { queue: queue.to_owned() })?;
    eventually(RESUME_LIMIT, &format!("{queue} to go on"), async || ask(lane, queue, "resume", doubts).await.map(Some))
        .await
}

async fn ask(lane: &Lane, queue: &'static str, what: &str, doubts: &mut Doubts) -> Result<()> {
    // Noted before it is sent: this may be dropped at any moment.
    let earlier = doubts.insert(queue, Instant::now() + DOUBT);
    let answer = post(lane, &format!("/v1/queues/{queue}/{what}"), &json!({})).await?;
    ensure!(answer.status == 200, "{queue} cannot be told to {what}: {}", answer.text());
    match earlier {
        Some(earlier) => doubts.insert(queue, earlier),
        None => doubts.remove(queue),
    };
    Ok(())
}

/// Asks a producer that is there, past all wires.
async fn post(lane: &Lane, path: &str, body: &Value) -> Result<Answer> {
    for producer in lane.producers() {
        let ready = timeout(ANSWER_LIMIT / 5, producer.probe.raw_get("/readyz")).await;
        if matches!(ready, Ok(Ok(answer)) if answer.status == 200) {
            return timeout(ANSWER_LIMIT, producer.probe.raw_post(path, body)).await?;
        }
    }
    anyhow::bail!("no producer is ready")
}

/// Moves what waits from one queue to the other and back again, over and over.
pub async fn shuffle(lane: &Lane, from: usize, time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    let mut done = Err(anyhow::anyhow!("nothing was moved"));
    for turn in from.. {
        let [from, to] = [QUEUES[turn % 2], QUEUES[(turn + 1) % 2]];
        let note = |count| Op::Moved { from: from.to_owned(), to: to.to_owned(), count };
        // Before the answer is known, since it may come true without one.
        lane.history.append(note(None))?;
        let moved = move_once(lane, from, to).await;
        if let Ok(count) = &moved {
            lane.history.append(note(Some(*count)))?;
        }
        done = if done.is_ok() { done } else { moved.map(drop) };
        if Instant::now() >= until {
            break;
        }
        sleep(MOVE_PAUSE).await;
    }
    done
}

async fn move_once(lane: &Lane, from: &str, to: &str) -> Result<u64> {
    let answer: Value = post(lane, &format!("/v1/queues/{from}/move"), &json!({"to": to})).await?.expect(&[200])?;
    answer["moved"].as_u64().with_context(|| format!("how many were moved is not told: {answer}"))
}

/// Deletes a queue of the broker, and leaves the broker alone until somebody has declared it anew and it has settled.
pub async fn delete_queue(world: &World, lane: &Lane, name: &str) -> Result<()> {
    lane.stack.vhost.delete_queue(name).await?;
    let declared = eventually(ANEW_LIMIT, "the queue to be declared anew", async || {
        Ok(lane.stack.vhost.depth(name).await?.map(drop))
    })
    .await;
    world.unsettle().await;
    declared
}

/// Holds the write lock of the ledger's file, as somebody does who works on it by hand.
pub async fn lock(lane: &Lane, time: Duration) -> Result<()> {
    let file = lane.stack.ledger.sqlite_file().context("the ledger is a file")?;
    let locked = tokio::task::spawn_blocking(move || -> Result<()> {
        let connection = rusqlite::Connection::open(file)?;
        connection.busy_timeout(LOCK_LIMIT)?;
        connection.execute_batch("BEGIN IMMEDIATE")?;
        std::thread::sleep(time);
        Ok(connection.execute_batch("COMMIT")?)
    });
    locked.await?
}

/// Lets nobody write about tasks, as somebody does who makes an index: longer than a statement may take. Leases live on.
pub async fn lock_tasks(lane: &Lane, time: Duration) -> Result<()> {
    let Ledger::Postgres(database) = &lane.stack.ledger else { anyhow::bail!("the ledger is a file") };
    let mut connection = PgConnection::connect(database.url()).await?;
    let mut transaction = connection.begin().await?;
    let lock = sqlx::query("LOCK TABLE tasklane.tasks IN SHARE MODE").execute(&mut *transaction);
    within(LOCK_LIMIT, "the table's lock", lock).await??;
    sleep(STATEMENT_LIMIT + time).await;
    Ok(transaction.rollback().await?)
}

/// Sends what is no task: no properties at all, properties of somebody else's, and a task that the ledger does not know.
pub async fn litter(lane: &Lane, queue: &str) -> Result<()> {
    let (vhost, name) = (&lane.stack.vhost, broker_queue(queue));
    let body = format!("{{\"{GARBAGE}\": ").into_bytes();
    vhost.publish("", &name, &body, BasicProperties::default()).await?;
    let text = BasicProperties::default().with_content_type("text/plain".into()).with_message_id("7".into());
    vhost.publish(TASKS_EXCHANGE, &format!("{queue}.test.work"), GARBAGE.as_bytes(), text).await?;
    let args = Json::of(&json!({GARBAGE: true}))?;
    let unknown = Envelope {
        id: TaskId::new(),
        kind: "test.work".parse()?,
        args,
        fence: None,
        traceparent: None,
        reply_to: None,
        ledger: None,
    };
    vhost.publish("", &name, unknown.args.as_str().as_bytes(), unknown.properties()).await
}
