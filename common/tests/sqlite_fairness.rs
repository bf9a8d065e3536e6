//! Three processes write to one SQLite ledger without pause: none of them starves, and no lease is lost.
#![expect(clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tasklane_common::ledger::sqlite::SqliteLedger;
use tasklane_common::ledger::{Ledger, Renewal, Renewed, Submission, WorkerRecord};
use tasklane_common::task::{Json, Kind, NewTask, WorkerId};

const PROCESSES: usize = 3;
const WRITERS: usize = 64;
const LOAD: Duration = Duration::from_secs(4);
const TTL: Duration = Duration::from_secs(2);
/// Longer waits endanger leases; SQLite's own busy handler has been seen to wait 4 s.
const WAIT_MAX: Duration = Duration::from_millis(250);
/// The syncs that a commit may sit behind: its own, the one of the group before it, and the other processes' turns.
const SYNCS_BEFORE: u32 = PROCESSES as u32 + 1;
/// Names the file to a process that this test starts from its own executable.
const CHILD: &str = "TASKLANE_FAIRNESS_LEDGER";

fn task() -> NewTask {
    NewTask::new(Kind::parse("k").unwrap(), Json::of(&"x".repeat(256)).unwrap())
}

async fn write_until(ledger: Arc<SqliteLedger>, end: Instant) -> (u64, Duration) {
    let (mut writes, mut longest) = (0, Duration::ZERO);
    while Instant::now() < end {
        let began = Instant::now();
        let submission =
            Submission { tasks: vec![task()], idempotency: None, reserve: Duration::from_secs(5), group: None };
        ledger.record(submission).await.unwrap();
        longest = longest.max(began.elapsed());
        writes += 1;
    }
    (writes, longest)
}

/// The longest time that a renewal took, and how many leases were lost.
async fn renew_until(ledger: Arc<SqliteLedger>, end: Instant) -> (Duration, u32) {
    let worker = WorkerId::new();
    let record = WorkerRecord {
        id: worker,
        name: None,
        host: "h".to_owned(),
        pid: 7,
        queues: vec![],
        kinds: vec![],
        concurrency: 1,
        version: "0".to_owned(),
    };
    ledger.register(record, TTL).await.unwrap();
    let mut longest = Duration::ZERO;
    while Instant::now() < end {
        let began = Instant::now();
        let renewal = Renewal { worker, ttl: TTL, running: 0, heads: vec![] };
        let renewed = ledger.renew(renewal).await.unwrap();
        longest = longest.max(began.elapsed());
        if renewed == Renewed::Lost {
            return (longest, 1);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    (longest, 0)
}

async fn load(path: &Path) {
    let ledger = Arc::new(SqliteLedger::open(path).await.unwrap());
    let end = Instant::now() + LOAD;
    let renewing = tokio::spawn(renew_until(Arc::clone(&ledger), end));
    let writers: Vec<_> = (0..WRITERS).map(|_| tokio::spawn(write_until(Arc::clone(&ledger), end))).collect();
    let (mut writes, mut longest) = (0, Duration::ZERO);
    for writer in writers {
        let (some, wait) = writer.await.unwrap();
        writes += some;
        longest = longest.max(wait);
    }
    let (renewal, lost) = renewing.await.unwrap();
    println!("writes {writes} longest_ms {} renewal_ms {} lost {lost}", longest.as_millis(), renewal.as_millis());
}

/// The longest time that the disk itself took for one page while `go_on`: no ledger is faster than its disk.
fn longest_sync(folder: &Path, go_on: &AtomicBool) -> Duration {
    let mut probe = std::fs::File::create(folder.join("probe")).unwrap();
    let mut longest = Duration::ZERO;
    while go_on.load(Ordering::Relaxed) {
        let began = Instant::now();
        probe.seek(SeekFrom::Start(0)).unwrap();
        probe.write_all(&[7; 4096]).unwrap();
        probe.sync_data().unwrap();
        longest = longest.max(began.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    longest
}

/// The figure that follows `name` in a child's line.
fn figure(line: &str, name: &str) -> u64 {
    let mut words = line.split_whitespace().skip_while(|word| *word != name);
    words.nth(1).and_then(|figure| figure.parse().ok()).unwrap_or_else(|| panic!("no {name} in: {line}"))
}

fn start(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "three_processes_share_one_file_fairly", "--nocapture"])
        .env(CHILD, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_processes_share_one_file_fairly() {
    if let Some(path) = std::env::var_os(CHILD) {
        return load(Path::new(&path)).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let children: Vec<_> = (0..PROCESSES).map(|_| start(&path)).collect();
    let go_on = Arc::new(AtomicBool::new(true));
    let probe = std::thread::spawn({
        let (folder, go_on) = (folder.path().to_owned(), Arc::clone(&go_on));
        move || longest_sync(&folder, &go_on)
    });
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    go_on.store(false, Ordering::Relaxed);
    let sync = probe.join().unwrap();
    println!("longest sync of the disk alone: {sync:?}");
    let allowed = (WAIT_MAX + sync * SYNCS_BEFORE).as_millis();
    let mut shares = Vec::new();
    for output in outputs {
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "a process failed: {told}");
        let line = told.lines().find(|line| line.contains("longest_ms")).expect("each process tells its figures");
        println!("{line}");
        for wait in ["longest_ms", "renewal_ms"] {
            assert!(u128::from(figure(line, wait)) <= allowed, "over {allowed} ms (longest sync: {sync:?}): {line}");
        }
        // A disk that stands still for as long as a lease loses it, whoever writes.
        if allowed < TTL.as_millis() {
            assert_eq!(figure(line, "lost"), 0, "a lease was lost under load (longest sync: {sync:?})");
        }
        shares.push(figure(line, "writes"));
    }
    let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
    assert!(least * 2 >= *most, "shares are unequal: {shares:?}");
}
