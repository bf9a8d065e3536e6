//! Child processes that end with their run, whatever happens to the worker.
//!
//! Every command leads a process group of its own. A [`Group`] kills the whole group when it is dropped;
//! [`ProcessGroups::aim`] kills all of them at once from any thread, even when the runtime hangs; and the
//! reaper, a small process beside the worker, kills them when the worker itself dies, be it by SIGKILL, and when the
//! worker is stopped for longer than its lease lives. It is the same program once more: see [`serve_if_reaper`].
//!
//! A process group's id can go to a stranger as soon as its leader is reaped and its last member is gone. So a group
//! is killed and forgotten, by this process and by the reaper, while its leader is still unreaped and pins the id.
//! What is left of that race: when the worker dies, its dead leaders are reaped by the system, perhaps an instant
//! before the reaper's kill. And a program whose worker is killed in the instant between its start and the line to the
//! reaper lives on; it has read nothing from its stdin by then.
//!
//! A process that leaves its group (`setsid`) also leaves this care.

mod reaper;

use std::io;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tasklane_common::clock::since_boot;
use tasklane_common::seldom::Seldom;
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::signal::unix::{self, SignalKind};
use tokio::time::{sleep, timeout};

use self::reaper::{Began, Groups, Line, Reaper};

/// How long a killed leader may take to be gone; longer only when the kernel holds it.
const REAP_MAX: Duration = Duration::from_secs(1);
/// How often a reaper that could not be started is tried again.
const GUARD_PERIOD: Duration = Duration::from_millis(500);
const UNGUARDED: &str =
    "the reaper of command processes cannot be started: no command starts, and those that run may outlive this worker";
/// It is tried again and again, and told once a minute.
static TOLD: Seldom = Seldom::once_in(Duration::from_secs(60));
/// Whether this program may be started anew as a reaper.
static SERVES: AtomicBool = AtomicBool::new(cfg!(test));

/// All process groups of a worker that are alive. Clones are the same collection.
#[derive(Debug, Clone, Default)]
pub struct ProcessGroups(Arc<Mutex<Live>>);

/// One process group, led by a child of this process. Dropped, it is killed with SIGKILL.
#[derive(Debug)]
#[must_use = "a dropped group is killed"]
pub struct Group {
    child: Child,
    id: Pid,
    child_ended: unix::Signal,
    groups: ProcessGroups,
}

/// This side of a child's streams, as far as they are pipes.
#[derive(Debug)]
pub struct Pipes {
    /// What the child reads.
    pub stdin: Option<ChildStdin>,
    /// What the child writes.
    pub stdout: Option<ChildStdout>,
    /// What the child complains.
    pub stderr: Option<ChildStderr>,
}

#[derive(Debug, Default)]
struct Live {
    groups: Groups,
    /// Until when the groups may live unless told otherwise, by the time since boot.
    until: Option<Duration>,
    reaper: Option<Reaper>,
    /// Whether there must be a reaper from now on.
    wanted: bool,
}

/// The reaper, in a process that was started as one; it does not return then.
///
/// Every program whose worker runs commands calls this first of all; [`program::main`](crate::program::main) does. The worker
/// starts its program once more to have one.
pub fn serve_if_reaper() {
    reaper::serve_if_called();
    SERVES.store(true, Ordering::Release);
}

impl ProcessGroups {
    /// No groups yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says that this worker's lease, which lives for `ttl` after each renewal, ends in `remaining`.
    ///
    /// From the first call on, all groups are killed a little before that end unless this is called again: the reaper
    /// sees to it even when this process is stopped. Before the first call they may live as long as this process.
    pub fn prove_lease(&self, ttl: Duration, remaining: Duration) {
        // Behind the moment in which this process stops them itself, and before the one in which it ends itself.
        self.live().prove((since_boot() + remaining).saturating_sub(ttl / 10));
    }

    /// Sees to it that there is a reaper as long as there was one: it may be killed like any process.
    pub async fn keep_guarded(&self) {
        let mut child_ended = unix::signal(SignalKind::child()).ok();
        loop {
            self.live().attend();
            let ended = async {
                match &mut child_ended {
                    Some(ended) => drop(ended.recv().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = ended => {}
                () = sleep(GUARD_PERIOD) => {}
            }
        }
    }

    /// Starts a program as the leader of a new group.
    ///
    /// When this returns, the reaper knows the group; what is written to the program's stdin from then on is read by
    /// nobody who could outlive the worker.
    ///
    /// # Errors
    /// When the program, or the reaper, cannot be started. Then nothing runs. [`io::ErrorKind::BrokenPipe`] when the program was
    /// started and killed at once, since the reaper was gone.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Group> {
        // Before there is anything to guard: the reaper learns of the group as soon as it exists.
        self.live().guard()?;
        // Listens before the child exists: its end cannot be missed.
        let child_ended = unix::signal(SignalKind::child())?;
        let child = command.process_group(0).spawn()?;
        let id = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let id = id.ok_or_else(|| io::Error::other("a child that was just started has no process id"))?;
        let began = Began::of(id).unwrap_or(Began::UNKNOWN);
        let group = Group { child, id, child_ended, groups: self.clone() };
        // Should it fail, the guard kills the child.
        let added = self.live().add(id, began);
        added.map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, format!("{UNGUARDED}: {error}")))?;
        Ok(group)
    }

    /// What kills, when called, the groups that are alive now with SIGKILL, and none that begins in between. Needs no runtime: a
    /// watchdog's thread may call it while that hangs.
    pub fn aim(&self) -> impl FnOnce() + use<> {
        let (groups, aimed) = (self.clone(), self.live().groups.clone());
        move || {
            let live = groups.live();
            for (&id, _) in live.groups.iter().filter(|(id, began)| aimed.get(id) == Some(began)) {
                signal(id, Signal::KILL);
            }
        }
    }

    /// How many groups are alive.
    #[must_use]
    pub fn count(&self) -> usize {
        self.live().groups.len()
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    /// Takes the pipes to the leader; `None` where they were taken already, or are no pipes.
    pub fn pipes(&mut self) -> Pipes {
        Pipes { stdin: self.child.stdin.take(), stdout: self.child.stdout.take(), stderr: self.child.stderr.take() }
    }

    /// The group's id, which is its leader's process id.
    #[must_use]
    pub fn id(&self) -> Pid {
        self.id
    }

    /// Waits until the leader has exited, without reaping it. May be dropped and called again.
    pub async fn exited(&mut self) {
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        // An error means that there is no such child any more.
        while let Ok(None) = waitid(WaitId::Pid(self.id), look) {
            if self.child_ended.recv().await.is_none() {
                return;
            }
        }
    }

    /// Asks all processes of the group to end, with SIGTERM.
    pub fn terminate(&self) {
        signal(self.id, Signal::TERM);
    }

    /// Kills what is left of the group, then reaps the leader.
    ///
    /// # Errors
    /// When the leader does not go away, or its status is not to be had.
    pub async fn end(mut self) -> io::Result<ExitStatus> {
        self.close();
        timeout(REAP_MAX, self.child.wait()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// Kills the group and forgets it, in this order and before its leader is reaped. A second call does nothing.
    fn close(&self) {
        self.groups.live().remove(self.id);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The leader is dropped unreaped after this, and the runtime reaps it.
        self.close();
    }
}

impl Live {
    fn add(&mut self, id: Pid, began: Began) -> io::Result<()> {
        self.groups.insert(id, began);
        self.tell(Line::Begun(id, began))
    }

    fn remove(&mut self, id: Pid) {
        if !self.groups.contains_key(&id) {
            return;
        }
        signal(id, Signal::KILL);
        self.groups.remove(&id);
        if let Err(error) = self.tell(Line::Ended(id)) {
            complain(&error);
        }
    }

    fn prove(&mut self, until: Duration) {
        self.until = Some(until);
        if let Err(error) = self.tell(Line::Proven(until)) {
            complain(&error);
        }
    }

    /// Tells the reaper one line; a reaper that does not listen is replaced by one that knows all.
    fn tell(&mut self, line: Line) -> io::Result<()> {
        if self.reaper.as_mut().is_some_and(|reaper| reaper.tell(line).is_ok()) {
            return Ok(());
        }
        if self.groups.is_empty() {
            self.reaper = None;
            return Ok(());
        }
        self.start_reaper()
    }

    /// Sees to a reaper, be there groups or not.
    fn guard(&mut self) -> io::Result<()> {
        self.wanted = true;
        let is_there = self.reaper.as_mut().is_some_and(|reaper| !reaper.has_ended());
        if is_there { Ok(()) } else { self.start_reaper() }
    }

    /// Replaces a reaper that is gone.
    fn attend(&mut self) {
        if !self.wanted {
            return;
        }
        if self.reaper.as_mut().is_some_and(Reaper::has_ended) {
            tracing::warn!("the reaper of command processes has ended: another one takes its place");
        }
        if let Err(error) = self.guard() {
            complain(&error);
        }
    }

    fn start_reaper(&mut self) -> io::Result<()> {
        if !SERVES.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "a program whose worker runs commands must begin with tasklane_worker::program::main, or with \
                 tasklane_worker::process_group::serve_if_reaper",
            ));
        }
        // The old one first: alive, it would kill these groups when its pipe closes.
        self.reaper = None;
        self.reaper = Some(Reaper::start(&self.groups, self.until)?);
        Ok(())
    }
}

fn complain(error: &io::Error) {
    if let Some(left_out) = TOLD.admit() {
        tracing::error!(%error, left_out, "{UNGUARDED}");
    }
}

fn signal(group: Pid, signal: Signal) {
    // Fails when all of the group is gone, and that is what was wanted.
    let _ = kill_process_group(group, signal);
}

#[cfg(test)]
pub(crate) mod tests;
