//! With real processes. That they are gone is told by the kernel: a pipe ends when its last holder has died.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{kill_process, test_kill_process_group};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use std::time::Instant;

use super::*;

/// What the commands of tests are.
const SHELL: &str = "/bin/sh";
/// Tells the runner of the tests to be the reaper.
pub(super) const REAPER: &str = "TASKLANE_TEST_REAPER";
/// Far longer than anything here may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Tells the helper process what to do.
const HELPER: &str = "TASKLANE_TEST_HELPER";
/// Holds the witness with a leader and a child that outlives it.
const FAMILY: &str = r#"exec 3>"$WITNESS"; echo up >&3; sleep 600 & wait"#;

/// A named pipe that processes hold while they live.
pub(crate) struct Witness {
    directory: tempfile::TempDir,
    lines: UnboundedReceiver<String>,
}

impl Witness {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("witness");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let (sender, lines) = mpsc::unbounded_channel();
        // Opening waits for the first process that holds it.
        std::thread::spawn(move || {
            for line in BufReader::new(std::fs::File::open(path).unwrap()).lines() {
                let _ = sender.send(line.unwrap());
            }
        });
        Self { directory, lines }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("witness")
    }

    /// The next line that a holder wrote.
    pub(crate) async fn line(&mut self) -> String {
        timeout(LIMIT, self.lines.recv()).await.expect("no holder wrote a line").expect("all holders are gone")
    }

    /// Waits until all holders are gone.
    pub(crate) async fn gone(&mut self) {
        while timeout(LIMIT, self.lines.recv()).await.expect("there still are holders").is_some() {}
    }

    /// Whether there still are holders.
    pub(crate) fn held(&mut self) -> bool {
        self.lines.try_recv() != Err(mpsc::error::TryRecvError::Disconnected)
    }
}

fn shell(script: &str, witness: &Path) -> Command {
    let mut command = Command::new(SHELL);
    command.args(["-c", script]).env("WITNESS", witness).stdin(Stdio::null());
    command
}

async fn family(groups: &ProcessGroups) -> (Group, Witness) {
    let mut witness = Witness::new();
    let group = groups.spawn(&mut shell(FAMILY, &witness.path())).unwrap();
    assert_eq!(witness.line().await, "up");
    (group, witness)
}

#[tokio::test]
async fn a_dropped_group_is_gone_with_all_its_members() {
    let groups = ProcessGroups::new();
    let (group, mut witness) = family(&groups).await;
    assert_eq!(groups.count(), 1);
    drop(group);
    witness.gone().await;
    assert_eq!(groups.count(), 0);
}

#[tokio::test]
async fn a_group_is_gone_when_its_leader_has_ended() {
    let groups = ProcessGroups::new();
    let mut witness = Witness::new();
    let script = r#"exec 3>"$WITNESS"; echo up >&3; sleep 600 & exit 3"#;
    let mut group = groups.spawn(&mut shell(script, &witness.path())).unwrap();
    timeout(LIMIT, group.exited()).await.unwrap();
    assert_eq!(witness.line().await, "up");
    assert!(witness.held(), "the leader's child lives on");
    assert_eq!(group.end().await.unwrap().code(), Some(3));
    witness.gone().await;
    assert_eq!(groups.count(), 0);
}

#[tokio::test]
async fn an_ended_group_is_no_group_any_more() {
    let groups = ProcessGroups::new();
    let mut group = groups.spawn(&mut shell("exec sleep 600", Path::new(""))).unwrap();
    let id = group.id();
    assert_eq!(test_kill_process_group(id), Ok(()));
    group.terminate();
    timeout(LIMIT, group.exited()).await.unwrap();
    assert_eq!(group.end().await.unwrap().signal(), Some(Signal::TERM.as_raw()));
    assert_eq!(test_kill_process_group(id), Err(rustix::io::Errno::SRCH));
}

/// The lease's watchdog is a thread; it must reach the processes while the runtime hangs.
#[tokio::test]
async fn a_plain_thread_kills_all_groups_of_before_while_the_runtime_is_blocked() {
    let groups = ProcessGroups::new();
    let (mut one, mut first) = family(&groups).await;
    let (mut two, mut second) = family(&groups).await;
    let kill = groups.aim();
    let (_later, mut third) = family(&groups).await;
    std::thread::spawn(kill).join().unwrap();
    first.gone().await;
    second.gone().await;
    timeout(LIMIT, one.exited()).await.unwrap();
    timeout(LIMIT, two.exited()).await.unwrap();
    assert!(third.held(), "it began after the aim was taken");
}

#[tokio::test]
async fn what_cannot_start_leaves_nothing() {
    let groups = ProcessGroups::new();
    let error = groups.spawn(&mut Command::new("/no/such/program")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert_eq!(groups.count(), 0);
}

#[tokio::test]
async fn a_reaper_that_died_is_replaced_by_one_that_knows_all_groups() {
    let groups = ProcessGroups::new();
    let (_one, mut first) = family(&groups).await;
    let dead = groups.live().reaper.as_ref().unwrap().id();
    kill_process_group(dead, Signal::KILL).unwrap();
    // It is noticed though nothing happens to any group.
    let noticed = async {
        while groups.live().reaper.as_ref().is_none_or(|reaper| reaper.id() == dead) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = groups.keep_guarded() => {}
        noticed = timeout(LIMIT, noticed) => noticed.expect("nobody has noticed"),
    }
    let (_two, mut second) = family(&groups).await;
    assert!(first.held() && second.held());

    // As if this process had ended: the new reaper's pipe closes.
    let reaper = groups.live().reaper.take().unwrap();
    assert_ne!(reaper.id(), dead);
    reaper.abandon();
    first.gone().await;
    second.gone().await;
}

#[tokio::test]
async fn a_reaper_forgets_the_groups_that_have_ended() {
    let (one, mut lives) = family(&ProcessGroups::new()).await;
    let (two, mut dies) = family(&ProcessGroups::new()).await;
    let strangers = Groups::from([one.id(), two.id()].map(|id| (id, Began::of(id).unwrap())));
    let mut reaper = Reaper::start(&strangers, None).unwrap();
    reaper.tell(Line::Ended(one.id())).unwrap();
    reaper.abandon();
    dies.gone().await;
    assert!(lives.held());
}

/// An id goes to somebody else once its group is gone.
#[tokio::test]
async fn a_reaper_kills_no_stranger_with_the_id_of_a_group() {
    let (one, mut lives) = family(&ProcessGroups::new()).await;
    let (two, mut dies) = family(&ProcessGroups::new()).await;
    let earlier = Began::of(Pid::from_raw(1).unwrap()).unwrap();
    let known = Groups::from([(one.id(), earlier), (two.id(), Began::of(two.id()).unwrap())]);
    Reaper::start(&known, None).unwrap().abandon();
    dies.gone().await;
    assert!(lives.held(), "a stranger was killed");
}

/// A service manager may send SIGTERM to all processes of a service.
#[tokio::test]
async fn a_reaper_outlives_what_ends_its_worker() {
    let (group, mut dies) = family(&ProcessGroups::new()).await;
    let known = Groups::from([(group.id(), Began::of(group.id()).unwrap())]);
    let mut reaper = Reaper::start(&known, None).unwrap();
    // It listens once it has obeyed: the group is killed for an end that is long past.
    reaper.tell(Line::Proven(Duration::from_millis(1))).unwrap();
    dies.gone().await;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        kill_process(reaper.id(), signal).unwrap();
    }
    let (group, mut dies) = family(&ProcessGroups::new()).await;
    reaper.tell(Line::Begun(group.id(), Began::of(group.id()).unwrap())).unwrap();
    dies.gone().await;
    assert!(!reaper.has_ended());
}

/// The one fault that no code of the worker can answer.
#[tokio::test]
async fn a_killed_worker_leaves_no_processes_behind() {
    let mut witness = Witness::new();
    let mut helper = helper("killed", &witness);
    assert_eq!(witness.line().await, "up");
    helper.start_kill().unwrap();
    assert_eq!(helper.wait().await.unwrap().signal(), Some(Signal::KILL.as_raw()));
    witness.gone().await;
}

/// A worker that is stopped cannot give its lease up, but others take over when it has ended.
#[tokio::test]
async fn a_stopped_workers_processes_die_before_its_lease_ends() {
    let mut witness = Witness::new();
    let mut helper = helper("leased", &witness);
    assert_eq!(witness.line().await, "up");
    // It has proven its lease at least until now.
    let id = Pid::from_raw(i32::try_from(helper.id().unwrap()).unwrap()).unwrap();
    let stopped = Instant::now();
    kill_process(id, Signal::STOP).unwrap();
    witness.gone().await;
    assert!(stopped.elapsed() < LEASE_TTL, "gone only after {:?}", stopped.elapsed());
    helper.start_kill().unwrap();
    helper.wait().await.unwrap();
}

const LEASE_TTL: Duration = Duration::from_secs(3);

#[tokio::test]
async fn a_proven_lease_lets_processes_live_and_an_unproven_one_does_not() {
    let groups = ProcessGroups::new();
    groups.prove_lease(LEASE_TTL, LEASE_TTL);
    let (_group, mut witness) = family(&groups).await;
    let began = Instant::now();
    let mut renewals = tokio::time::interval(LEASE_TTL / 5);
    while began.elapsed() < LEASE_TTL + LEASE_TTL / 2 {
        renewals.tick().await;
        groups.prove_lease(LEASE_TTL, LEASE_TTL);
        assert!(witness.held(), "killed under a proven lease");
    }
    witness.gone().await;

    // What begins now is killed at once, perhaps before it holds anything.
    let mut late = groups.spawn(&mut shell("exec sleep 600", Path::new(""))).unwrap();
    timeout(LIMIT, late.exited()).await.unwrap();
    assert_eq!(late.end().await.unwrap().signal(), Some(Signal::KILL.as_raw()));
}

/// Runs this very test binary as a worker that can be killed.
fn helper(task: &str, witness: &Witness) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "process_group::tests::helper_process", "--nocapture"])
        .env(HELPER, task)
        .env("WITNESS", witness.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn helper_process() {
    let Ok(task) = std::env::var(HELPER) else { return };
    let witness = PathBuf::from(std::env::var_os("WITNESS").unwrap());
    let groups = ProcessGroups::new();
    if task == "leased" {
        groups.prove_lease(LEASE_TTL, LEASE_TTL);
    }
    let mut family = shell(&format!("read -r go; {FAMILY}"), &witness);
    let mut group = groups.spawn(family.stdin(Stdio::piped())).unwrap();
    // Only now may the worker be killed: the reaper knows the group.
    group.pipes().stdin.unwrap().write_all(b"go\n").await.unwrap();
    let mut renewals = tokio::time::interval(LEASE_TTL / 5);
    loop {
        tokio::select! {
            () = group.exited() => return,
            _ = renewals.tick(), if task == "leased" => groups.prove_lease(LEASE_TTL, LEASE_TTL),
        }
    }
}

/// The reaper of these tests.
#[test]
fn reaper_process() {
    if std::env::var_os(REAPER).is_some() {
        reaper::serve();
    }
}
