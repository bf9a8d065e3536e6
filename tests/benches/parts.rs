//! The parts of one task's way, each for itself: `cargo bench -p tasklane-tests --bench parts`.
#![expect(clippy::unwrap_used, reason = "a measurement fails by panicking")]

use std::time::Duration;

use divan::Bencher;
use divan::counter::ItemsCount;
use futures::future::join_all;
use tasklane_common::backoff::Backoff;
use tasklane_common::envelope::Envelope;
use tasklane_common::ledger::sqlite::SqliteLedger;
use tasklane_common::ledger::{Belief, Claim, ClaimRequest, Ledger, Settlement, Submission, Transition, WorkerRecord};
use tasklane_common::task::{Fence, Guarantee, Json, Kind, LedgerId, NewTask, QueueName, TaskId, WorkerId};
use tasklane_worker::Outcome;
use tasklane_worker::decide::{Attempted, Policy, decide};
use tokio::runtime::Runtime;

fn main() {
    divan::main();
}

fn args() -> Json {
    Json::of(&serde_json::json!({"answer": "x".repeat(240)})).unwrap()
}

fn kind() -> Kind {
    Kind::parse("report.build").unwrap()
}

fn envelope() -> Envelope {
    let (fence, reply_to) = (Some(Fence(1)), Some("amq.gen-0123456789".to_owned()));
    let ledger = Some(LedgerId(TaskId::new().0));
    Envelope { id: TaskId::new(), kind: kind(), args: args(), fence, traceparent: None, reply_to, ledger }
}

#[divan::bench]
fn envelope_write(bencher: Bencher) {
    let envelope = envelope();
    bencher.bench(|| envelope.properties());
}

#[divan::bench]
fn envelope_read(bencher: Bencher) {
    let envelope = envelope();
    let (properties, body) = (envelope.properties(), envelope.args.as_str().as_bytes().to_vec());
    bencher.bench(|| Envelope::decode(&properties, &body).unwrap());
}

/// What the ledger compares args by, of short ones and of a MiB.
#[divan::bench(args = [100, 1 << 20])]
fn args_digest(bencher: Bencher, bytes: usize) {
    let args = Json::of(&"x".repeat(bytes)).unwrap();
    bencher.bench(|| args.digest());
}

#[divan::bench]
fn decide_completed(bencher: Bencher) {
    let policy = Policy {
        attempt: 1,
        max_attempts: 5,
        delays: Backoff::default().into(),
        age: Duration::ZERO,
        max_age: None,
        result_bytes_max: 1 << 20,
        discard_errors: Vec::new(),
        guarantee: Guarantee::AtLeastOnce,
    };
    let result = args();
    bencher
        .with_inputs(|| Attempted::Answered(Ok(Outcome::Complete(result.clone()))))
        .bench_values(|attempted| decide(attempted, &policy, 0.5));
}

/// A task's three writes, `at_once` tasks in one commit each: record, claim, settle.
#[divan::bench(args = [1, 32, 256], sample_count = 20)]
fn sqlite_three_writes(bencher: Bencher, at_once: usize) {
    let runtime = Runtime::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ledger = runtime.block_on(SqliteLedger::open(&folder.path().join("ledger.db"))).unwrap();
    let record = WorkerRecord {
        id: WorkerId::new(),
        name: None,
        host: "here".to_owned(),
        pid: 7,
        queues: vec![QueueName::default()],
        kinds: vec![kind()],
        concurrency: 256,
        version: "0".to_owned(),
    };
    let worker = record.id;
    runtime.block_on(ledger.register(record, Duration::from_secs(3_600))).unwrap();
    bencher
        .counter(ItemsCount::new(at_once))
        .with_inputs(|| std::iter::repeat_with(|| NewTask::new(kind(), args())).take(at_once).collect::<Vec<_>>())
        .bench_values(|tasks| runtime.block_on(three_writes(&ledger, worker, tasks)));
}

async fn three_writes(ledger: &SqliteLedger, worker: WorkerId, tasks: Vec<NewTask>) {
    let ids: Vec<TaskId> = tasks.iter().map(|task| task.id).collect();
    let reserve = Duration::from_secs(60);
    ledger.record(Submission { tasks, idempotency: None, reserve, group: None }).await.unwrap();
    let claims = ids.iter().map(|&id| {
        let guarantee = Guarantee::AtLeastOnce;
        let belief = Belief { kind: kind(), published: Some(Fence(0)), args: args().digest() };
        ledger.claim(ClaimRequest { id, worker, guarantee, belief, crashes_below: 2 })
    });
    let claims = join_all(claims).await;
    let settlements = ids.iter().zip(claims).map(|(&id, claim)| {
        let Ok(Claim::Granted(granted)) = claim else { unreachable!("nothing stands against the claim") };
        let transition = Transition::Complete { result: Json::null() };
        ledger.settle(Settlement { id, fence: granted.fence, transition })
    });
    for settled in join_all(settlements).await {
        settled.unwrap();
    }
}
