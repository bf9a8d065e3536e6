//! Child processes: started in a group of their own, their output kept in a file, killed with the guard.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::{NamedTempFile, TempPath};
use tokio::process::{Child, Command};

use crate::wait::{eventually, within};

/// How many of a process's last lines are told when its guard is dropped.
const TOLD_LINES: usize = 200;

/// How long a killed process may take to vanish before its guard no longer waits for it.
const REAP_LIMIT: Duration = Duration::from_secs(5);

/// What to start and how; [`Launch::spawn`] starts it.
#[derive(Debug)]
pub struct Launch {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    bare_env: bool,
    dir: Option<PathBuf>,
    user: Option<String>,
    parent_death: &'static str,
    log: Option<PathBuf>,
    log_told: LogTold,
}

/// When a guard prints the end of its process's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LogTold {
    /// On every drop. The test runners show it only for tests that failed, whether by a panic or by an `Err`.
    Always,
    /// Only while the test panics: for brokers and databases, which have much to say and are seldom to blame.
    OnPanic,
}

impl Launch {
    /// A program by its path; `name` is how it is called in messages.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            bare_env: false,
            dir: None,
            user: None,
            parent_death: "KILL",
            log: None,
            log_told: LogTold::Always,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable; the last one set under a name counts.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Gives the process only `PATH` and what [`Launch::env`] sets.
    #[must_use]
    pub fn bare_env(mut self) -> Self {
        self.bare_env = true;
        self
    }

    /// The folder in which the process starts.
    #[must_use]
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Runs the process as another system user; only root may.
    #[must_use]
    pub fn user(mut self, user: Option<String>) -> Self {
        self.user = user;
        self
    }

    /// The signal (as `setpriv` calls it) the process gets when the test process dies without running its guards.
    #[must_use]
    pub fn on_parent_death(mut self, signal: &'static str) -> Self {
        self.parent_death = signal;
        self
    }

    /// Prints the log only when the test panics.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.log_told = LogTold::OnPanic;
        self
    }

    /// Appends what the process says to a file that stays, instead of to one that goes with its guard.
    #[must_use]
    pub fn log_to(mut self, file: Option<PathBuf>) -> Self {
        self.log = file;
        self
    }

    /// Starts the process.
    pub fn spawn(self) -> Result<Process> {
        let (output, log) = match &self.log {
            Some(path) => (File::options().append(true).create(true).open(path)?, Log::Kept(path.clone())),
            None => {
                let file = NamedTempFile::with_prefix(format!("{}-", self.name)).context("creating a log file")?;
                (file.as_file().try_clone()?, Log::Temporary(file.into_temp_path()))
            }
        };
        let errors = output.try_clone()?;
        let child = self
            .command()
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {} ({})", self.name, self.program.display()))?;
        let id = child.id().context("a child just started has an id")?;
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).context("a process id is positive")?;
        Ok(Process { name: self.name, pid, child, ended: None, log, log_told: self.log_told })
    }

    /// The command line, behind `setpriv`, which makes the kernel end the process when the test process is killed
    /// (by the runner's time limit, say) and no guard runs. It replaces itself, so the process id stays the same.
    fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        if let Some(user) = &self.user {
            command.args([format!("--reuid={user}"), format!("--regid={user}"), "--init-groups".to_owned()]);
        }
        command.args(["--pdeathsig", self.parent_death, "--"]).arg(&self.program).args(&self.args);
        if self.bare_env {
            command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        command
    }
}

/// A running (or ended) child process. Dropping it kills the whole of it.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Pid,
    child: Child,
    ended: Option<ExitStatus>,
    log: Log,
    log_told: LogTold,
}

/// Where a process's output is.
#[derive(Debug)]
enum Log {
    /// Deleted with the guard.
    Temporary(TempPath),
    /// Stays.
    Kept(PathBuf),
}

impl Log {
    fn path(&self) -> &Path {
        match self {
            Self::Temporary(path) => path,
            Self::Kept(path) => path,
        }
    }
}

impl Process {
    /// The process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("sending {signal:?} to {}", self.name))
    }

    /// SIGTERM: the polite end.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGSTOP: the process stands still, its connections stay open.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT: the process goes on as if no time had passed.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// SIGKILL, and waits until the process is gone.
    pub async fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.exited(REAP_LIMIT).await.map(drop)
    }

    /// Waits until the process has ended, and says how.
    pub async fn exited(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let what = format!("{} (pid {}) to exit", self.name, self.pid());
        let status = within(limit, &what, self.child.wait()).await??;
        self.ended = Some(status);
        Ok(status)
    }

    /// How the process ended, if it has.
    pub fn has_exited(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Waits until `ready` answers `Some`, and fails at once, with the end of the log, if the process ends instead.
    pub async fn ready<T>(&mut self, limit: Duration, mut ready: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
        let what = format!("{} to become ready", self.name);
        let answer = eventually(limit, &what, async || match self.has_exited()? {
            Some(status) => Ok(Some(Err(status))),
            None => Ok(ready().await?.map(Ok)),
        })
        .await;
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(status)) => Err(anyhow!("{} ended ({status}) before it was ready:\n{}", self.name, self.log_end())),
            Err(error) => Err(error.context(format!("the end of the log of {}:\n{}", self.name, self.log_end()))),
        }
    }

    /// All that the process has written to its standard output and error.
    pub fn log(&self) -> String {
        fs::read(self.log.path()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until the process has written `text`.
    pub async fn logged(&self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("{} to log {text:?}", self.name);
        eventually(limit, &what, async || Ok(self.log().contains(text).then_some(()))).await
    }

    /// The memory of the process that is in RAM right now.
    pub fn rss_bytes(&self) -> Result<u64> {
        rss_bytes(self.pid())
    }

    /// Sends a signal to the process and to all its descendants. One that has ended meanwhile needs none.
    pub fn signal_all(&self, signal: Signal) {
        let below = descendants(self.pid());
        for pid in std::iter::once(self.pid).chain(below.into_iter().filter_map(Pid::from_raw)) {
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGKILL to the process's group and to all its descendants, and waits until the process itself is gone.
    pub(crate) fn kill_all(&mut self) {
        if matches!(self.has_exited(), Ok(Some(_))) {
            return;
        }
        let below = descendants(self.pid());
        // Both fail only for what is gone already.
        let _ = kill_process_group(self.pid, Signal::KILL);
        for pid in below.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        self.reap();
    }

    /// Waits (blocking, this runs in guards) until the killed process has been collected.
    pub(crate) fn reap(&mut self) {
        let step = Duration::from_millis(2);
        let mut left = REAP_LIMIT;
        while !matches!(self.has_exited(), Ok(Some(_))) && !left.is_zero() {
            std::thread::sleep(step);
            left = left.saturating_sub(step);
        }
    }

    fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(TOLD_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_all();
        let told = self.log_told == LogTold::Always && matches!(self.log, Log::Temporary(_));
        if told || std::thread::panicking() {
            eprintln!("---- the end of the log of {} (pid {}):\n{}\n----", self.name, self.pid(), self.log_end());
        }
    }
}

/// The memory of a process that is in RAM right now.
pub fn rss_bytes(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("reading /proc status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in /proc status")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse().context("VmRSS is a number of kB")?;
    Ok(kib * 1024)
}

/// Is there a process with this id, and is it more than a zombie?
pub fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|(_, state)| state != "Z")
}

/// A binary of this workspace, found beside the running test executable.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("asking for the path of the test executable")?;
    let profile = me
        .ancestors()
        .skip(1)
        .find(|dir| dir.file_name() != Some(OsStr::new("deps")))
        .context("the test executable lies in a folder")?;
    let path = profile.join(name);
    anyhow::ensure!(
        File::open(&path).is_ok(),
        "{} is missing: run `cargo build --workspace --bins --examples` (with the same profile) first",
        path.display()
    );
    Ok(path)
}

/// Every process started by `root` or by one of its descendants, as far as their parents still live.
fn descendants(root: i32) -> Vec<i32> {
    let all: Vec<(i32, i32)> = fs::read_dir(Path::new("/proc"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| stat(pid).map(|(parent, _)| (pid, parent)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(all.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

/// The parent's id and the one-letter state of a process.
fn stat(pid: i32) -> Option<(i32, String)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets, and may itself hold brackets and blanks.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.to_owned();
    Some((fields.next()?.parse().ok()?, state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<Process> {
        Launch::new("shell", "/bin/sh").args(["-c", script]).quiet().spawn()
    }

    async fn in_state(process: &Process, wanted: &str) -> Result<()> {
        let what = format!("the process state {wanted}");
        eventually(Duration::from_secs(5), &what, async || {
            Ok(stat(process.pid()).filter(|(_, state)| state == wanted).map(drop))
        })
        .await
    }

    #[tokio::test]
    async fn output_and_exit_status_are_kept() -> Result<()> {
        let mut process = shell("echo out; echo err >&2; exit 7")?;
        let status = process.exited(Duration::from_secs(10)).await?;
        assert_eq!(status.code(), Some(7));
        assert_eq!(process.log(), "out\nerr\n");
        Ok(())
    }

    #[tokio::test]
    async fn the_guard_kills_children_in_groups_of_their_own() -> Result<()> {
        let process = shell("setsid sleep 300 & echo child $! up; wait")?;
        process.logged(" up", Duration::from_secs(10)).await?;
        let log = process.log();
        let child: i32 = log.split(' ').nth(1).context("the child's id")?.parse()?;
        let parent = process.pid();
        assert!(is_alive(child) && is_alive(parent));
        drop(process);
        assert!(!is_alive(parent));
        eventually(Duration::from_secs(5), "the child to die", async || Ok((!is_alive(child)).then_some(()))).await
    }

    #[tokio::test]
    async fn a_process_that_ends_early_is_reported_at_once_with_its_log() -> Result<()> {
        let mut process = shell("echo cannot open the ledger; exit 2")?;
        let ready = process.ready(Duration::from_secs(60), async || Ok(None::<()>)).await;
        let error = format!("{:#}", ready.expect_err("it has ended"));
        assert!(error.contains("exit status: 2") && error.contains("cannot open the ledger"), "{error}");
        Ok(())
    }

    #[tokio::test]
    async fn freeze_and_thaw_stop_and_continue() -> Result<()> {
        let mut process = shell("echo up; exec sleep 300")?;
        process.logged("up", Duration::from_secs(10)).await?;
        process.freeze()?;
        in_state(&process, "T").await?;
        process.thaw()?;
        in_state(&process, "S").await?;
        assert!(process.rss_bytes()? > 0);
        process.kill().await
    }

    #[test]
    fn a_missing_binary_says_what_to_do() {
        let error = binary("tasklane-no-such-program").expect_err("it does not exist");
        assert!(error.to_string().contains("cargo build --workspace --bins --examples"));
    }
}
