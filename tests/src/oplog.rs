//! The operation log: the starts and ends of handlers in a [`history`], and what must hold of them all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use uuid::Uuid;

use crate::history::{self, Ending, Line, Op, Run};
use crate::wait::eventually;

/// A log file and the scripts that write into it.
#[derive(Debug)]
pub struct OperationLog {
    file: PathBuf,
}

/// How a test's command behaves between its two lines.
#[derive(Clone, Debug)]
pub struct CommandKind {
    kind: String,
    body: String,
    effect: bool,
    toml: String,
}

impl CommandKind {
    /// A kind whose command does nothing and answers nothing.
    pub fn new(kind: &str) -> Self {
        Self { kind: kind.to_owned(), body: String::new(), effect: false, toml: String::new() }
    }

    /// Adds a line of shell, run after the start was logged. What it prints is the task's result; if it exits, no
    /// end is logged.
    #[must_use]
    pub fn then(mut self, shell: &str) -> Self {
        self.body.push_str(shell);
        self.body.push('\n');
        self
    }

    /// Lets the command take some time.
    #[must_use]
    pub fn lasting(self, time: Duration) -> Self {
        self.then(&format!("sleep {}", time.as_secs_f64()))
    }

    /// Logs an effect at the end.
    #[must_use]
    pub fn effect(mut self) -> Self {
        self.effect = true;
        self
    }

    /// Adds a line to its table in the worker's TOML, `timeout_ms = 500`, say.
    #[must_use]
    pub fn setting(mut self, toml: &str) -> Self {
        self.toml.push_str(toml);
        self.toml.push('\n');
        self
    }
}

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Start or end.
    pub step: Step,
    /// The task.
    pub task: String,
    /// Its attempt, as the handler was told.
    pub attempt: u32,
    /// Its fence, as the handler was told.
    pub fence: u64,
    /// The queue from which the task came, at a start of a handler that tells it.
    pub queue: Option<String>,
    /// The process that ran the handler.
    pub pid: i32,
    /// When, since the machine's boot.
    pub at: Duration,
}

/// What an entry marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The handler has begun.
    Start,
    /// The handler is about to return.
    End,
}

impl Entry {
    /// The start or end that a line tells of. A run that was dropped has no end here, as one that was killed has none.
    fn of(line: Line) -> Option<Self> {
        let (step, run, queue) = match line.op {
            Op::Start { run, queue, .. } => (Step::Start, run, queue),
            Op::End { run, how: Ending::Done | Ending::Again } => (Step::End, run, None),
            _ => return None,
        };
        let Run { task, attempt, fence } = run;
        Some(Self { step, task, attempt, fence, queue, pid: line.pid, at: line.at })
    }
}

impl OperationLog {
    /// A new, empty log in a folder.
    pub fn create(place: &Path) -> Result<Self> {
        let file = place.join(format!("operations-{}.log", Uuid::now_v7().simple()));
        fs::write(&file, "")?;
        Ok(Self { file })
    }

    /// A log that is there already.
    pub fn at(file: &Path) -> Self {
        Self { file: file.to_owned() }
    }

    /// The file, for handlers that are not scripts of ours.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Writes the script of a kind, and answers its `[[command]]` table for the worker's TOML.
    pub fn command(&self, command: &CommandKind) -> Result<String> {
        let CommandKind { kind, body, effect, toml } = command;
        let script = self.file.with_extension(format!("{kind}.sh"));
        // The same lines as those of `history::Writer`; the clock of /proc/uptime is that since boot.
        let line = |op| {
            format!(
                "read -r now rest < /proc/uptime\nprintf '{{{op},\"task\":\"%s\",\"attempt\":%s,\"fence\":%s,\
                 \"pid\":%s,\"at_s\":%s}}\\n' \"$TASKLANE_TASK_ID\" \"$TASKLANE_ATTEMPT\" \"$TASKLANE_FENCE\" \
                 $$ \"$now\" >> '{}'\n",
                self.file.display()
            )
        };
        let (start, end) = (line(r#""op":"start""#), line(r#""op":"end","how":"done""#));
        let effect = if *effect { line(r#""op":"effect""#) } else { String::new() };
        fs::write(&script, format!("set -u\n{start}{body}{effect}{end}"))?;
        Ok(format!("[[command]]\nkind = {kind:?}\nargv = [\"/bin/sh\", {:?}]\n{toml}", script.display().to_string()))
    }

    /// Everything logged so far, in the order of the file.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        Ok(history::read(&self.file)?.into_iter().filter_map(Entry::of).collect())
    }

    /// The starts logged so far.
    pub fn starts(&self) -> Result<Vec<Entry>> {
        Ok(self.entries()?.into_iter().filter(|entry| entry.step == Step::Start).collect())
    }

    /// Waits until at least `count` starts have been logged.
    pub async fn started(&self, count: usize, limit: Duration) -> Result<Vec<Entry>> {
        eventually(limit, &format!("{count} handlers to start"), async || {
            let starts = self.starts()?;
            Ok((starts.len() >= count).then_some(starts))
        })
        .await
    }

    /// Each of these tasks was started exactly once, and nothing else was.
    pub fn check_each_started_once<'a>(&self, tasks: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let mut missing: BTreeSet<String> = tasks.into_iter().map(str::to_owned).collect();
        let mut seen = BTreeSet::new();
        for start in self.starts()? {
            ensure!(
                seen.insert(start.task.clone()),
                "task {} was started twice: {:#?}",
                start.task,
                self.of(&start.task)?
            );
            ensure!(
                missing.remove(&start.task),
                "task {} was started, and is none of those that were to start",
                start.task
            );
        }
        ensure!(missing.is_empty(), "{} tasks were never started, {:?} among them", missing.len(), missing.first());
        Ok(())
    }

    /// No task was started twice under one fence, and later starts have higher fences.
    pub fn check_fences_rise(&self) -> Result<()> {
        for (task, entries) in self.by_task()? {
            let mut starts: Vec<&Entry> = entries.iter().filter(|entry| entry.step == Step::Start).collect();
            starts.sort_by_key(|start| start.at);
            for pair in starts.windows(2) {
                ensure!(pair[0].fence < pair[1].fence, "the fence of task {task} did not rise: {entries:#?}");
            }
        }
        Ok(())
    }

    /// No two runs of one task ran at the same time. A run without an end was killed; when, the log does not know.
    pub fn check_no_overlap(&self) -> Result<()> {
        for (task, entries) in self.by_task()? {
            let end_of = |fence| entries.iter().find(|entry| entry.step == Step::End && entry.fence == fence);
            let mut runs: Vec<(Duration, Option<Duration>)> = entries
                .iter()
                .filter(|entry| entry.step == Step::Start)
                .map(|start| (start.at, end_of(start.fence).map(|end| end.at)))
                .collect();
            runs.sort();
            for pair in runs.windows(2) {
                let overlaps = pair[0].1.is_some_and(|end| end > pair[1].0);
                ensure!(!overlaps, "two runs of task {task} overlapped: {entries:#?}");
            }
        }
        Ok(())
    }

    /// All that was logged of one task.
    pub fn of(&self, task: &str) -> Result<Vec<Entry>> {
        Ok(self.entries()?.into_iter().filter(|entry| entry.task == task).collect())
    }

    fn by_task(&self) -> Result<BTreeMap<String, Vec<Entry>>> {
        let mut tasks: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
        for entry in self.entries()? {
            tasks.entry(entry.task.clone()).or_default().push(entry);
        }
        Ok(tasks)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    /// A log of lines such as `start TASK ATTEMPT FENCE PID SECONDS`.
    fn log_of(lines: &str) -> Result<(tempfile::TempDir, OperationLog)> {
        let dir = tempfile::tempdir()?;
        let log = OperationLog::create(dir.path())?;
        let json = |line: &str| {
            let fields: Vec<&str> = line.split(' ').collect();
            let [op, task, attempt, fence, pid, at] = fields[..] else { anyhow::bail!("not six fields: {line:?}") };
            let how = if op == "end" { r#""how":"done","# } else { "" };
            Ok(format!(
                r#"{{"op":"{op}",{how}"task":"{task}","attempt":{attempt},"fence":{fence},"pid":{pid},"at_s":{at}}}"#
            ))
        };
        let lines = lines.lines().map(json).collect::<Result<Vec<_>>>()?;
        fs::write(log.file(), lines.join("\n"))?;
        Ok((dir, log))
    }

    #[test]
    fn a_dropped_run_has_no_end_here() -> Result<()> {
        let (_dir, log) = log_of("start a 1 1 9 1.0")?;
        let run = Run { task: "a".to_owned(), attempt: 1, fence: 1 };
        fs::write(log.file(), fs::read_to_string(log.file())? + "\n")?;
        history::Writer::open(log.file(), false)?.append(Op::End { run, how: Ending::Dropped })?;
        assert_eq!(log.entries()?.len(), 1);
        Ok(())
    }

    #[test]
    fn one_start_each_is_what_is_checked() -> Result<()> {
        let (_dir, log) = log_of("start a 1 1 9 1.0\nend a 1 1 9 2.0\nstart b 1 1 9 1.0\n")?;
        log.check_each_started_once(["a", "b"])?;
        assert!(log.check_each_started_once(["a"]).is_err(), "b was not submitted");
        assert!(log.check_each_started_once(["a", "b", "c"]).is_err(), "c was not started");
        let (_dir, log) = log_of("start a 1 1 9 1.0\nstart a 1 1 9 1.0\n")?;
        assert!(log.check_each_started_once(["a"]).is_err(), "a was started twice");
        Ok(())
    }

    #[test]
    fn a_fence_that_stands_still_is_found() -> Result<()> {
        let (_dir, log) = log_of("start a 1 1 9 1.0\nstart a 2 2 9 2.0\n")?;
        log.check_fences_rise()?;
        let (_dir, log) = log_of("start a 1 2 9 1.0\nstart a 2 2 9 2.0\n")?;
        assert!(log.check_fences_rise().is_err());
        Ok(())
    }

    #[test]
    fn an_overlap_is_found() -> Result<()> {
        let (_dir, log) = log_of("start a 1 1 9 1.0\nend a 1 1 9 2.0\nstart a 2 2 9 2.0\nend a 2 2 9 3.0\n")?;
        log.check_no_overlap()?;
        let (_dir, log) = log_of("start a 1 1 9 1.0\nstart a 2 2 9 1.5\nend a 1 1 9 2.0\n")?;
        assert!(log.check_no_overlap().is_err());
        Ok(())
    }

    #[tokio::test]
    async fn a_command_logs_its_start_and_end() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let log = OperationLog::create(dir.path())?;
        let command = CommandKind::new("test.echo").then("cat").setting("timeout_ms = 500");
        let toml: serde_json::Value = toml::from_str(&log.command(&command)?)?;
        let table = &toml["command"][0];
        assert_eq!((&table["kind"], &table["timeout_ms"]), (&"test.echo".into(), &500.into()));
        let script = table["argv"][1].as_str().context("argv")?;
        let output = tokio::process::Command::new("/bin/sh")
            .arg(script)
            .envs([("TASKLANE_TASK_ID", "t1"), ("TASKLANE_ATTEMPT", "1"), ("TASKLANE_FENCE", "3")])
            .stdin(std::process::Stdio::null())
            .output()
            .await?;
        assert!(output.status.success(), "{output:?}");
        let steps: Vec<_> = log.entries()?.into_iter().map(|entry| (entry.step, entry.task, entry.fence)).collect();
        assert_eq!(steps, [(Step::Start, "t1".to_owned(), 3), (Step::End, "t1".to_owned(), 3)]);
        log.check_each_started_once(["t1"])
    }
}
