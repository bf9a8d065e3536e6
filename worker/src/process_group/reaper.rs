//! The process that outlives the worker by a moment, to kill what the worker leaves behind.
//!
//! It is this very program, started anew with nothing to do but to read from a pipe which groups live. However the worker
//! ends, the kernel closes the pipe, and the reaper kills the groups that are left, and exits. It also knows until when the
//! lease is proven: a worker that is stopped (SIGSTOP, a debugger) keeps its pipe open but proves its lease no longer, while
//! its commands would run on. No thread could do that.
//!
//! Once it runs it starts nothing and opens nothing but a file of the kernel's: what keeps the worker from starting processes
//! does not keep the reaper from its work.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process_group};
use tasklane_common::clock::since_boot;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::signal::unix::{self, SignalKind};
use tokio::time::sleep;

/// The program that is running, even when its file has been replaced meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// How the reaper is called, and what tells it from a worker.
const NAME: &str = "tasklane-reaper";
const FLAG: &str = "--reap-process-groups";
/// How often it looks at the clock at least: its timers stand still while the machine sleeps.
const LOOK_PERIOD: Duration = Duration::from_millis(200);
const LOOK_PERIOD_MIN: Duration = Duration::from_millis(10);

/// Groups by their ids, each with the beginning of its leader: an id can go to another process, and so to another group.
pub(super) type Groups = HashMap<Pid, Began>;

/// When a process began, in the kernel's ticks since boot; 0 when that is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Began(u64);

/// One line to the reaper.
#[derive(Debug, Clone, Copy)]
pub(super) enum Line {
    /// The group lives now.
    Begun(Pid, Began),
    /// The group has been killed.
    Ended(Pid),
    /// The groups may live until then, by the time since boot, unless another of these lines comes.
    Proven(Duration),
}

/// A running reaper. Dropped, it is gone and has killed nothing.
#[derive(Debug)]
pub(super) struct Reaper {
    child: Child,
    id: Pid,
    pipe: ChildStdin,
}

impl Began {
    /// That of a process now; `None` when there is none.
    pub(super) fn of(id: Pid) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", id.as_raw_pid())).ok()?;
        // The name may hold anything; the fields behind it are numbers, and this is the 22nd of all.
        let (_, fields) = stat.rsplit_once(')')?;
        fields.split_whitespace().nth(19)?.parse().ok().map(Self)
    }

    pub(super) const UNKNOWN: Self = Self(0);
}

impl Reaper {
    /// Starts one that knows these groups, and until when they may live.
    pub(super) fn start(groups: &Groups, until: Option<Duration>) -> io::Result<Self> {
        let mut child = this_program()
            // It holds nothing of the worker's: no directory, no terminal.
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let (Some(id), Some(pipe)) = (id, child.stdin.take()) else {
            return Err(io::Error::other("the reaper has no process id or no pipe"));
        };
        let mut reaper = Self { child, id, pipe };
        let known =
            until.map(Line::Proven).into_iter().chain(groups.iter().map(|(&id, &began)| Line::Begun(id, began)));
        reaper.pipe.write_all(known.map(Line::text).collect::<String>().as_bytes())?;
        // A reaper that does not read must not block the worker.
        fcntl_setfl(&reaper.pipe, fcntl_getfl(&reaper.pipe)? | OFlags::NONBLOCK)?;
        Ok(reaper)
    }

    /// Writes one line, whole or not at all: it is far below the size that a pipe takes at once.
    pub(super) fn tell(&mut self, line: Line) -> io::Result<()> {
        self.pipe.write_all(line.text().as_bytes())
    }

    /// Whether it is gone, though nobody let it go.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    #[cfg(test)]
    pub(super) fn id(&self) -> Pid {
        self.id
    }

    /// Closes the pipe of a living reaper, as the end of the worker would.
    #[cfg(test)]
    pub(super) fn abandon(mut self) {
        let (read, write) = io::pipe().unwrap();
        drop(read);
        self.pipe = ChildStdin::from(std::os::fd::OwnedFd::from(write));
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        // Killed before its pipe closes, or it would kill the groups it knows. SIGKILL makes the wait a short one.
        // Until then it is unreaped and keeps its id, even when it is dead already.
        let _ = kill_process_group(self.id, Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Line {
    fn text(self) -> String {
        match self {
            Self::Begun(id, Began(began)) => format!("+{} {began}\n", id.as_raw_pid()),
            Self::Ended(id) => format!("-{}\n", id.as_raw_pid()),
            Self::Proven(until) => format!("={}\n", until.as_millis()),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let pid = |text: &str| text.parse().ok().and_then(Pid::from_raw);
        let (sign, rest) = text.split_at_checked(1)?;
        match sign {
            "+" => {
                let (id, began) = rest.split_once(' ')?;
                Some(Self::Begun(pid(id)?, Began(began.parse().ok()?)))
            }
            "-" => pid(rest).map(Self::Ended),
            "=" => rest.parse().ok().map(Duration::from_millis).map(Self::Proven),
            _ => None,
        }
    }
}

/// Is the reaper, in a process that was started as one, and ends it then.
pub(super) fn serve_if_called() {
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| name == NAME) && args.next().is_some_and(|flag| flag == FLAG) {
        serve();
    }
}

#[cfg(not(test))]
fn this_program() -> Command {
    let mut command = Command::new(THIS_PROGRAM);
    // No secrets either.
    command.arg0(NAME).arg(FLAG).env_clear();
    command
}

/// The runner of the tests, which has a test that is the reaper.
#[cfg(test)]
fn this_program() -> Command {
    let mut command = Command::new(THIS_PROGRAM);
    let args = ["--exact", "process_group::tests::reaper_process", "--nocapture"];
    command.arg0(NAME).args(args).env_clear().env(super::tests::REAPER, FLAG);
    command
}

/// Reaps until the worker is gone, and exits.
pub(super) fn serve() -> ! {
    let code = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(reap()).map_or(1, |()| 0),
        Err(_) => 1,
    };
    std::process::exit(code)
}

async fn reap() -> io::Result<()> {
    // Whoever ends the worker's service sends these to all of its processes, and without an ear they would end this one.
    let kinds = [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::quit(), SignalKind::terminate()];
    let _ears = kinds.into_iter().map(unix::signal).collect::<io::Result<Vec<_>>>()?;
    let pipe = pipe::Receiver::from_owned_fd(io::stdin().as_fd().try_clone_to_owned()?)?;
    let mut lines = BufReader::new(pipe).lines();
    let mut watched = Watched::default();
    loop {
        tokio::select! {
            biased;
            line = lines.next_line() => match line {
                Ok(Some(line)) => watched.hear(&line),
                Ok(None) | Err(_) => break,
            },
            () = sleep(watched.pause()) => {}
        }
        if watched.is_over() {
            watched.kill_all();
        }
    }
    watched.kill_all();
    Ok(())
}

/// What the reaper knows.
#[derive(Debug, Default)]
struct Watched {
    groups: Groups,
    /// Until when they may live, by the time since boot.
    until: Option<Duration>,
}

impl Watched {
    fn hear(&mut self, line: &str) {
        match Line::parse(line) {
            Some(Line::Begun(id, began)) => drop(self.groups.insert(id, began)),
            Some(Line::Ended(id)) => drop(self.groups.remove(&id)),
            Some(Line::Proven(until)) => self.until = Some(until),
            None => {}
        }
    }

    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| since_boot() >= until)
    }

    fn pause(&self) -> Duration {
        let left = self.until.map_or(LOOK_PERIOD, |until| until.saturating_sub(since_boot()));
        left.clamp(LOOK_PERIOD_MIN, LOOK_PERIOD)
    }

    fn kill_all(&mut self) {
        for (id, began) in self.groups.drain() {
            // While its leader is there, dead or alive, or any other member, a group keeps its id.
            let is_another = began != Began::UNKNOWN && Began::of(id).is_some_and(|now| now != began);
            if !is_another {
                let _ = kill_process_group(id, Signal::KILL);
            }
        }
    }
}
