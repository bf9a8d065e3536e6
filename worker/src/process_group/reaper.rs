//! The process that outlives the worker by a moment, to kill what the worker leaves behind.
//!
//! It is a shell that reads from a pipe which groups live. However the worker ends, the kernel closes the pipe, and
//! the shell kills the groups that are left, and exits. Under a lease it also counts ticks: a worker that is stopped
//! (SIGSTOP, a debugger) keeps its pipe open but proves its lease no longer, while its commands would run on.
//! Rust cannot do it without `unsafe`, nor could a thread.

use std::collections::HashSet;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process_group};

/// What runs the reaper.
pub(crate) const SHELL: &str = "/bin/sh";
const TICK_MIN: Duration = Duration::from_millis(100);
const TICK_MAX: Duration = Duration::from_secs(1);
/// A lease has about as many ticks.
const TICKS: u32 = 15;

/// Arguments: seconds of a tick (0: none), ticks left, the groups that live.
/// The ticks and the worker's lines meet in one pipe, since no portable `read` has a time limit.
const SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM
tick=$1 left=$2
shift 2
{
    if [ "$tick" != 0 ]; then
        while sleep "$tick"; do echo tick; done &
    fi
    cat
    [ "$tick" = 0 ] || kill -9 $!
    echo end
} | {
    live=" $* "
    kill_all() {
        for id in $live; do kill -9 "-$id"; done
        live=' '
    }
    while read -r line; do
        id=${line#?}
        case $line in
            end) break ;;
            tick)
                [ "$left" -eq 0 ] || left=$((left - 1))
                [ "$left" -ne 0 ] || kill_all
                ;;
            ?*[!0-9]*) ;;
            =?*) left=$id ;;
            +?*)
                live="$live$id "
                [ "$left" -ne 0 ] || kill_all
                ;;
            -?*) case $live in *" $id "*) live="${live%% $id *} ${live#* $id }" ;; esac ;;
        esac
    done
    kill_all
}
"#;

/// One line to the reaper.
#[derive(Debug, Clone, Copy)]
pub(super) enum Line {
    /// The group lives now.
    Begun(Pid),
    /// The group has been killed.
    Ended(Pid),
    /// So many ticks may pass until the next of these lines.
    Proven(u64),
}

/// The pulse of a reaper under a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tick(Duration);

/// A running reaper. Dropped, it is gone and has killed nothing.
#[derive(Debug)]
pub(super) struct Reaper {
    child: Child,
    id: Pid,
    pipe: ChildStdin,
}

impl Tick {
    /// What fits a lease of this length.
    pub(super) fn of_lease(ttl: Duration) -> Self {
        Self((ttl / TICKS).clamp(TICK_MIN, TICK_MAX))
    }

    /// How many ticks may pass in nine tenths of this time; the rest is for a shell that gets its turn late.
    pub(super) fn count(self, remaining: Duration) -> u64 {
        let ticks = remaining.as_micros() * 9 / 10 / self.0.as_micros().max(1);
        u64::try_from(ticks).unwrap_or(u64::MAX).min(1_000_000)
    }
}

impl Reaper {
    /// Starts one that knows these groups. Under a lease it ticks, and so many ticks are left.
    pub(super) fn start(groups: &HashSet<Pid>, lease: Option<(Tick, u64)>) -> io::Result<Self> {
        let (tick, left) = lease.map_or((0.0, 1), |(tick, left)| (tick.0.as_secs_f64(), left));
        let mut child = Command::new(SHELL)
            .args(["-c", SCRIPT, "tasklane-reaper", &tick.to_string(), &left.to_string()])
            .args(groups.iter().map(|id| id.as_raw_pid().to_string()))
            // It holds nothing of the worker's: no secrets, no directory, no terminal.
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
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
        let reaper = Self { child, id, pipe };
        // A reaper that does not read must not block the worker.
        fcntl_setfl(&reaper.pipe, fcntl_getfl(&reaper.pipe)? | OFlags::NONBLOCK)?;
        Ok(reaper)
    }

    /// Writes one line, whole or not at all: it is far below the size that a pipe takes at once.
    pub(super) fn tell(&mut self, line: Line) -> io::Result<()> {
        let line = match line {
            Line::Begun(id) => format!("+{}\n", id.as_raw_pid()),
            Line::Ended(id) => format!("-{}\n", id.as_raw_pid()),
            Line::Proven(ticks) => format!("={ticks}\n"),
        };
        self.pipe.write_all(line.as_bytes())
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
        // Until then the unreaped shell keeps its id, even when it is dead already.
        let _ = kill_process_group(self.id, Signal::KILL);
        let _ = self.child.wait();
    }
}
