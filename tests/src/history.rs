//! The history of a run: what clients asked, what handlers did, which processes died, which faults were injected.
//!
//! One line of JSON for each operation, appended by whoever did it in a single write to a file opened with
//! `O_APPEND`, so that any number of processes share the file. Its clock is that of the machine since boot: the same
//! for all processes, never set back. [`check`] judges a history when everything is over.

pub mod check;
mod verdict;

#[cfg(test)]
mod planted;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rustix::fs::fdatasync;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tasklane_common::clock::since_boot;

pub use verdict::{Broken, Counts, Verdict, Violation};

/// One line of a history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// When, since the machine's boot.
    #[serde(rename = "at_s", serialize_with = "to_seconds", deserialize_with = "from_seconds")]
    pub at: Duration,
    /// When, in seconds since 1970; for people, and shell scripts leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wall_s: Option<f64>,
    /// Who writes this.
    pub pid: i32,
    /// What happened.
    #[serde(flatten)]
    pub op: Op,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// A client has submitted tasks, all under one name that is in their tags; or has tried so again.
    Submit {
        /// The name, different for every submission, the same for its repetitions.
        name: String,
        /// What it knows of it now.
        outcome: Answered,
        /// How many tasks were asked for.
        count: usize,
        /// The tasks, where the answer said which.
        tasks: Vec<String>,
    },
    /// A client has asked for a task's cancellation.
    Cancel {
        /// Which.
        task: String,
        /// The task's fence, as the answer told it, where there was one: no run may have a higher one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fence: Option<u64>,
    },
    /// A queue is paused for certain.
    Paused {
        /// Which.
        queue: String,
    },
    /// A queue is about to be asked to go on.
    Resumed {
        /// Which.
        queue: String,
    },
    /// Waiting tasks are about to be given to another queue, or were.
    Moved {
        /// Where they waited.
        from: String,
        /// Where they wait now.
        to: String,
        /// How many, as the answer told it, where there was one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        count: Option<u64>,
    },
    /// A client is about to ask for a waiting task's change, or has its answer.
    Edit(Edit),
    /// A handler has begun.
    Start {
        /// Which.
        #[serde(flatten)]
        run: Run,
        /// The number of the change that its args are of; 0 are those of the submission.
        #[serde(default, skip_serializing_if = "is_zero")]
        edition: u64,
        /// The queue from which its task came; shell scripts leave it out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        queue: Option<String>,
    },
    /// A handler has done what its task is for.
    Effect(Run),
    /// A handler is over.
    End {
        /// Which.
        #[serde(flatten)]
        run: Run,
        /// How.
        how: Ending,
    },
    /// A process was started.
    Spawned {
        /// Its name.
        who: String,
        /// Its id.
        process: i32,
    },
    /// A process stands still.
    Frozen {
        /// Its id.
        process: i32,
    },
    /// A process is about to go on.
    Thawed {
        /// Its id.
        process: i32,
    },
    /// A process is surely dead.
    Gone {
        /// Its name.
        who: String,
        /// Its id.
        process: i32,
        /// Its exit status in words.
        how: String,
        /// Was it killed, asked to stop, or did it end as its exit codes promise?
        expected: bool,
    },
    /// A fault begins.
    Fault {
        /// Which.
        what: String,
    },
    /// A fault is over.
    Healed {
        /// Which.
        what: String,
    },
}

/// One run of a task, as the handler was told.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Run {
    /// The task.
    pub task: String,
    /// The attempt.
    pub attempt: u32,
    /// The fence.
    pub fence: u64,
}

/// A change of a waiting task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edit {
    /// Which task.
    pub task: String,
    /// The number of the change, from 1 on: a client asks for one after the other, and for none twice.
    pub number: u64,
    /// Whether it changes the args; then they name its number.
    pub args: bool,
    /// The queue that it gives the task to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// What the client knows of it: `Unknown` before it is sent.
    pub outcome: Answered,
    /// A fence that the task had after the change, as the answer told it: whatever runs under a higher one has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
    /// When the task may start, since 1970, as the answer told it, where the change was about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_at: Option<Duration>,
}

/// What a client knows of a submission, or of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answered {
    /// It was refused, or never sent: there must be no task, or no change.
    Fail,
    /// No answer, or one that leaves it open: there may be a task, or a change.
    Unknown,
    /// Accepted: there must be a task, and it must be done; or the change, and it must be kept to.
    Ok,
}

/// How a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// With a result.
    Done,
    /// With an error or a snooze.
    Again,
    /// It was dropped, or panicked.
    Dropped,
}

/// A history to append to; clones of the file's owner share it with other processes by its path.
#[derive(Debug)]
pub struct Writer {
    file: File,
    synced: bool,
}

impl Writer {
    /// Opens a history, a new one if there is none. When `synced`, each line is on the disk before the next is
    /// written: then the history outlives the machine, and not only the processes that write it.
    pub fn open(path: &Path, synced: bool) -> Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        Ok(Self { file: file.with_context(|| format!("opening the history {}", path.display()))?, synced })
    }

    /// Appends what has happened just now, in this process.
    pub fn append(&self, op: Op) -> Result<()> {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let pid = i32::try_from(std::process::id())?;
        let line = Line { at: since_boot(), wall_s: Some(wall.as_secs_f64()), pid, op };
        let mut text = serde_json::to_string(&line)?;
        text.push('\n');
        // One write with O_APPEND: lines of several processes do not mix, but that of one killed in it may be cut.
        (&self.file).write_all(text.as_bytes()).context("appending to the history")?;
        if self.synced {
            fdatasync(&self.file).context("syncing the history")?;
        }
        Ok(())
    }
}

/// Reads a history, in the order of the file.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading the history {}", path.display()))?;
    parse(&text)
}

/// Reads the last lines of a history that is still being written, of about so many bytes.
pub fn tail(path: &Path, bytes: u64) -> Result<Vec<Line>> {
    let mut file = File::open(path)?;
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(end.saturating_sub(bytes)))?;
    let mut text = String::new();
    file.take(bytes).read_to_string(&mut text)?;
    // The first line is cut, unless this is the whole file; then it is one line less to look at.
    parse(text.split_once('\n').map_or("", |(_, whole)| whole))
}

/// Reads the text of a history.
///
/// A process that is killed in its write may leave the beginning of a line, which counts as not written; the next line, if
/// there is one, begins behind it.
pub fn parse(text: &str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for line in text.split_inclusive('\n') {
        let parsed = match (serde_json::from_str(line), line.rfind(LINE_BEGINS)) {
            (Err(_), Some(at @ 1..)) => serde_json::from_str(&line[at..]),
            (parsed, _) => parsed,
        };
        match parsed {
            Ok(parsed) => lines.push(parsed),
            Err(_) if !line.ends_with('\n') => {}
            Err(error) => return Err(error).with_context(|| format!("history: {line:?}")),
        }
    }
    Ok(lines)
}

/// How every line of a [`Writer`] begins.
const LINE_BEGINS: &str = "{\"at_s\":";

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn to_seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

fn from_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    Duration::try_from_secs_f64(f64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_reads_back() -> Result<()> {
        let place = tempfile::tempdir()?;
        let path = place.path().join("history");
        let run = Run { task: "0199".to_owned(), attempt: 2, fence: 7 };
        let ops = [
            Op::Submit { name: "s1".to_owned(), outcome: Answered::Ok, count: 1, tasks: vec!["0199".to_owned()] },
            Op::Start { run: run.clone(), edition: 2, queue: Some("other".to_owned()) },
            Op::End { run, how: Ending::Dropped },
            Op::Gone { who: "worker-1".to_owned(), process: 42, how: "signal: 9".to_owned(), expected: true },
        ];
        let before = since_boot();
        for op in &ops {
            Writer::open(&path, true)?.append(op.clone())?;
        }
        let lines = read(&path)?;
        assert_eq!(lines.iter().map(|line| line.op.clone()).collect::<Vec<_>>(), ops);
        assert!(lines.iter().all(|line| line.at + Duration::from_micros(1) >= before && line.wall_s.is_some()));
        Ok(())
    }

    #[test]
    fn what_a_killed_process_has_left_of_its_line_counts_as_not_written() -> Result<()> {
        let whole = r#"{"at_s":2.5,"pid":42,"op":"healed","what":"a"}"#;
        for cut in [r#"{"a"#, r#"{"at_s":"#, r#"{"at_s":2.1,"pid":41,"op":"sta"#, r#"{"a{"at_s"#] {
            assert_eq!(parse(&format!("{cut}{whole}"))?, parse(whole)?, "{cut}");
        }
        assert_eq!(parse(&format!("{whole}\n{}", &whole[..20]))?, parse(whole)?, "at the end of the file");
        assert!(parse("{\"at_s\":2.5,\"pid\":42,\"op\":\"heal\n").is_err(), "a whole line that says nothing");
        Ok(())
    }

    #[test]
    fn a_line_of_a_shell_script_is_read() -> Result<()> {
        let lines = parse(r#"{"op":"start","task":"t1","attempt":1,"fence":3,"pid":42,"at_s":12.34}"#)?;
        let run = Run { task: "t1".to_owned(), attempt: 1, fence: 3 };
        assert_eq!(
            lines,
            [Line {
                at: Duration::from_millis(12_340),
                wall_s: None,
                pid: 42,
                op: Op::Start { run, edition: 0, queue: None }
            }]
        );
        Ok(())
    }
}
