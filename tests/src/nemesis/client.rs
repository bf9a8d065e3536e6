//! The load: a client that submits tasks of many sorts at a steady pace, and repeats what it got no answer to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::api::{Answer, Api};
use crate::history::{Answered, Op, Writer};
use crate::nemesis::limits::{FEW, PACED, random_key};
use crate::nemesis::world::{COMMAND, QUEUES};

/// The tag that has the submission's name.
pub const NAME_TAG: &str = "submission";

/// The tag that has the queue to which the task was submitted.
pub const QUEUE_TAG: &str = "queue";

/// The kind of the tasks that follow batches.
pub const FOLLOW_UP: &str = "test.then";

/// The pause between two submissions.
const PACE: Duration = Duration::from_millis(50);

/// How long a client waits for an answer.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How many submissions may be under way; with more, the client waits, as a pool of connections does.
const UNDER_WAY: usize = 64;

/// How urgent a task may be.
pub(super) const PRIORITIES: [&str; 3] = ["high", "normal", "low"];

/// How often one submission is repeated at most.
const REPETITIONS: u32 = 8;

/// How many accepted submissions are regretted.
const REGRETS: f64 = 0.08;

/// How many batches have an end.
const ENDS: f64 = 0.4;

/// How many submissions are put off so that they can be changed, and how many are changed though they are not.
const EDITS: f64 = 0.12;
const LATE_EDITS: f64 = 0.04;

/// The most changes of one task.
const EDITS_MAX: u32 = 3;

/// How many unique keys there are: few, so that they are contended.
const KEYS: u32 = 6;

/// What a client has seen so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// Tasks accepted.
    pub accepted: AtomicUsize,
    /// Requests without an answer.
    pub unanswered: AtomicUsize,
}

/// One submission: what goes over the wire, as often as need be.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Its name, which is its idempotency key too, if it has one.
    pub name: String,
    /// Its tasks; one is sent as such, several as a batch.
    pub tasks: Vec<Value>,
    /// What follows the batch when all its tasks have ended.
    pub then: Option<Value>,
    /// Whether it may be repeated.
    pub keyed: bool,
    /// How often one of its tasks is changed.
    pub edits: u32,
}

impl Submission {
    /// Some equal tasks under one name.
    pub fn of(name: &str, count: usize, kind: &str, args: &Value) -> Self {
        let task = json!({"kind": kind, "args": args, "tags": {NAME_TAG: name}});
        Self { name: name.to_owned(), tasks: vec![task; count], then: None, keyed: true, edits: 0 }
    }

    fn random(name: String, rng: &mut StdRng) -> Self {
        if rng.random_bool(0.06) {
            return Self::unique(name, rng);
        }
        let count = if rng.random_bool(0.3) { rng.random_range(2..=8) } else { 1 };
        let mut tasks: Vec<Value> = (0..count).map(|_| random_task(&name, rng)).collect();
        let then = (count > 1 && rng.random_bool(ENDS)).then(|| follow_up(rng));
        // A killed program tells no end of its run, nor the edition of its args: neither places nor changes are judged by it.
        let judged = tasks.iter().all(|task| task["kind"] != COMMAND);
        if let Some(key) = random_key(rng).filter(|_| judged) {
            tasks.iter_mut().for_each(|task| task["concurrency_key"] = key.as_str().into());
        }
        let put_off = rng.random_bool(EDITS);
        if put_off {
            tasks.iter_mut().for_each(|task| task["delay_ms"] = rng.random_range(500..3_000).into());
        }
        let edits =
            if judged && (put_off || rng.random_bool(LATE_EDITS)) { rng.random_range(1..=EDITS_MAX) } else { 0 };
        Self { name, tasks, then, keyed: rng.random_bool(0.8), edits }
    }

    /// The only unfinished task of its key, or none.
    fn unique(name: String, rng: &mut StdRng) -> Self {
        let args = json!({"work_ms": rng.random_range(50..1_500)});
        let mut only = Self::of(&name, 1, "test.work", &args);
        only.tasks[0]["unique_key"] = format!("key-{}", rng.random_range(0..KEYS)).into();
        only
    }

    /// Sends it once, and writes down what the client knows then.
    pub async fn send(&self, api: &Api, history: &Writer) -> Result<(Answered, Vec<String>)> {
        let request = match &self.tasks[..] {
            [task] => api.client().post(api.url("/v1/tasks")).json(task),
            tasks => {
                let mut batch = json!({"tasks": tasks});
                if let Some(then) = &self.then {
                    batch["then"] = then.clone();
                }
                api.client().post(api.url("/v1/tasks/batch")).json(&batch)
            }
        };
        let request = if self.keyed { request.header("idempotency-key", &self.name) } else { request };
        let answer = timeout(ANSWER_LIMIT, api.send(request)).await;
        let (outcome, tasks) = match answer {
            Ok(Ok(answer)) => judge(&answer)?,
            // Nobody listened: it was never sent.
            Ok(Err(error)) if error.downcast_ref().is_some_and(reqwest::Error::is_connect) => (Answered::Fail, vec![]),
            Ok(Err(_)) | Err(_) => (Answered::Unknown, vec![]),
        };
        let (name, count) = (self.name.clone(), self.tasks.len());
        history.append(Op::Submit { name, outcome, count, tasks: tasks.clone() })?;
        Ok((outcome, tasks))
    }
}

/// What an answer means, and the tasks it names. A server's error leaves open whether the ledger has recorded.
fn judge(answer: &Answer) -> Result<(Answered, Vec<String>)> {
    match answer.status {
        200..=299 => Ok((Answered::Ok, named(&answer.json()?))),
        400..=499 => Ok((Answered::Fail, vec![])),
        _ => Ok((Answered::Unknown, vec![])),
    }
}

fn named(body: &Value) -> Vec<String> {
    let one = std::slice::from_ref(body);
    let all = body["tasks"].as_array().map_or(one, Vec::as_slice);
    all.iter().filter_map(|task| task["id"].as_str().map(str::to_owned)).collect()
}

/// A task of any of the sorts that the guarantees distinguish.
fn random_task(name: &str, rng: &mut StdRng) -> Value {
    let (kind, args) = match rng.random_range(0..100) {
        0..29 => ("test.work", json!({"work_ms": rng.random_range(0..50)})),
        29..33 => (FEW, json!({"work_ms": rng.random_range(100..700)})),
        33..35 => (PACED, json!({"work_ms": rng.random_range(0..50)})),
        35..50 => ("test.work", json!({"work_ms": rng.random_range(500..3_000)})),
        50..57 => ("test.work", json!({"failures": 1})),
        57..60 => ("test.work", json!({"failures": 1, "panics": true})),
        60..64 => ("test.work", json!({"snooze_ms": rng.random_range(1..1_000)})),
        64..80 => ("test.count", json!({"work_ms": rng.random_range(0..100)})),
        80..86 => ("test.once", json!({"work_ms": rng.random_range(0..100)})),
        86..93 => (COMMAND, json!({})),
        _ => ("test.once", json!({"work_ms": rng.random_range(500..2_000)})),
    };
    let queue = random_queue(rng);
    let mut task = json!({"kind": kind, "queue": queue, "args": args, "tags": {NAME_TAG: name, QUEUE_TAG: queue}});
    if rng.random_bool(0.05) {
        task["delay_ms"] = rng.random_range(1..2_000).into();
    }
    if let Some(priority) = random_priority(rng) {
        task["priority"] = priority.into();
    }
    task
}

/// The task that follows a batch. It bears no submission's name: the ledger submits it.
fn follow_up(rng: &mut StdRng) -> Value {
    let queue = random_queue(rng);
    let args = json!({"work_ms": rng.random_range(0..50)});
    json!({"kind": FOLLOW_UP, "queue": queue, "args": args, "tags": {QUEUE_TAG: queue}})
}

/// Most tasks say nothing of how urgent they are.
fn random_priority(rng: &mut StdRng) -> Option<&'static str> {
    rng.random_bool(0.4).then(|| PRIORITIES[rng.random_range(0..PRIORITIES.len())])
}

pub(super) fn random_queue(rng: &mut StdRng) -> &'static str {
    QUEUES[usize::from(rng.random_bool(0.35))]
}

/// A client of some producers.
#[derive(Clone, Debug)]
pub struct Client {
    /// The producers, each by its wire.
    pub apis: Vec<Api>,
    /// Where it writes.
    pub history: Arc<Writer>,
    /// What it has seen.
    pub seen: Arc<Seen>,
}

impl Client {
    /// Submits until it is told to stop, and then waits for what is under way.
    pub async fn run(self, seed: u64, stop: CancellationToken) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let slots = Arc::new(Semaphore::new(UNDER_WAY));
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sending = JoinSet::new();
        for number in 0_u64.. {
            pace.tick().await;
            while let Some(sent) = sending.try_join_next() {
                sent??;
            }
            let slot = tokio::select! {
                slot = Arc::clone(&slots).acquire_owned() => slot.context("the slots are never closed")?,
                () = stop.cancelled() => break,
            };
            if stop.is_cancelled() {
                break;
            }
            let submission = Submission::random(format!("s{number}"), &mut rng);
            let (client, rng) = (self.clone(), StdRng::from_rng(&mut rng));
            sending.spawn(async move {
                let _slot = slot;
                client.submit(submission, rng).await
            });
        }
        while let Some(sent) = sending.join_next().await {
            sent??;
        }
        Ok(())
    }

    /// Wants one of the tasks cancelled, at once or while it may run, and does not ask twice.
    async fn regret(&self, tasks: &[String], rng: &mut StdRng) -> Result<()> {
        let (Some(task), Some(api)) = (tasks.choose(rng), self.apis.choose(rng)) else { return Ok(()) };
        sleep(Duration::from_millis(rng.random_range(0..500))).await;
        let asking = |fence| Op::Cancel { task: task.clone(), fence };
        // Before the answer is known, since the cancellation may come true without one.
        self.history.append(asking(None))?;
        let request = api.client().post(api.url(&format!("/v1/tasks/{task}/cancel")));
        let Ok(Ok(answer)) = timeout(ANSWER_LIMIT, api.send(request)).await else { return Ok(()) };
        if matches!(answer.status, 200 | 202) {
            self.history.append(asking(answer.json()?["fence"].as_u64()))?;
        }
        Ok(())
    }

    /// Sends one submission; without an answer mostly again, by any producer, but only under its key.
    async fn submit(&self, submission: Submission, mut rng: StdRng) -> Result<()> {
        let mut accepted = false;
        for _ in 0..=REPETITIONS {
            let api = self.apis.choose(&mut rng).context("a client has a producer")?;
            let (outcome, tasks) = submission.send(api, &self.history).await?;
            let again = match outcome {
                Answered::Ok => {
                    let new = if accepted { 0 } else { submission.tasks.len() };
                    self.seen.accepted.fetch_add(new, Ordering::Relaxed);
                    if !std::mem::replace(&mut accepted, true) {
                        self.edit(&submission, &tasks, &mut rng).await?;
                        if rng.random_bool(REGRETS) {
                            self.regret(&tasks, &mut rng).await?;
                        }
                    }
                    // Now and then it asks again although it knows.
                    submission.keyed && rng.random_bool(0.03)
                }
                Answered::Unknown => {
                    self.seen.unanswered.fetch_add(1, Ordering::Relaxed);
                    submission.keyed && rng.random_bool(0.8)
                }
                Answered::Fail => true,
            };
            if !again {
                break;
            }
            sleep(Duration::from_millis(rng.random_range(50..1_000))).await;
        }
        Ok(())
    }
}
