//! Documents that are run: each shell block of a Markdown file is given to one shell, and what it says is held against
//! what the document shows.
//!
//! A block `sh` is a script: it must succeed, and what it prints does not matter. A block `console` is what a terminal
//! showed: commands behind `$ `, their further lines behind `> `, and what they printed. There `…` stands for anything, a
//! time for any time, a duration for any duration, and white space for any. An id stands for one id: the same one
//! wherever it comes again, in commands as well. `[exit code N]` at the end is the command's exit code, 0 without.
//! A block below a line `<!-- not run: why -->` is left out.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use regex::{Captures, Regex};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use uuid::Uuid;

use crate::wait::within;

/// How long one step may take.
const STEP_LIMIT: Duration = Duration::from_secs(180);

/// What differs from one run to the next: ids, times, durations.
const VARYING: &str = concat!(
    r"(?P<id>[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})",
    r"|(?P<time>\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d+)?Z)",
    r"|(?P<duration>\b(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+\b)",
    r"|(?P<any>…)",
    r"|(?P<space>\s+)",
);

/// One thing to do, and what is seen then.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// The line of the document, from 1.
    pub line: usize,
    /// What the shell is given.
    pub command: String,
    /// What it prints; `None` where the document does not show it.
    pub shown: Option<String>,
    /// How it ends.
    pub exit_code: i32,
}

/// The steps of a document, in its order.
pub fn steps(markdown: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut lines = (1..).zip(markdown.lines()).peekable();
    let mut skipped = false;
    while let Some((number, line)) = lines.next() {
        let fence = line.strip_prefix("```");
        let mut block =
            || std::iter::from_fn(|| lines.next_if(|(_, line)| !line.starts_with("```"))).collect::<Vec<_>>();
        match fence {
            Some("sh") if !skipped => {
                let command = block().into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("\n");
                steps.push(Step { line: number + 1, command, shown: None, exit_code: 0 });
            }
            Some("console") if !skipped => steps.extend(transcript(block())),
            Some(_) => drop(block()),
            None => {
                skipped = line.starts_with("<!-- not run:");
                continue;
            }
        }
        lines.next();
        skipped = false;
    }
    steps
}

fn transcript(lines: Vec<(usize, &str)>) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (number, line) in lines {
        if let Some(command) = line.strip_prefix("$ ") {
            steps.push(Step { line: number, command: command.to_owned(), shown: Some(String::new()), exit_code: 0 });
            continue;
        }
        let Some(step) = steps.last_mut() else { continue };
        if let Some(more) = line.strip_prefix("> ") {
            step.command.push('\n');
            step.command.push_str(more);
        } else if let Some(code) = line.strip_prefix("[exit code ").and_then(|rest| rest.strip_suffix(']')) {
            step.exit_code = code.parse().unwrap_or(-1);
        } else if let Some(shown) = &mut step.shown {
            shown.push_str(line);
            shown.push('\n');
        }
    }
    steps
}

/// The ids of a document, and those that stand in their places in this run.
#[derive(Debug, Default)]
pub struct Ids(HashMap<String, String>);

impl Ids {
    /// A command with this run's ids.
    pub fn in_command(&self, command: &str) -> Result<String> {
        let varying = Regex::new(VARYING)?;
        let own = |found: &Captures<'_>| {
            let text = &found[0];
            self.0.get(text).cloned().unwrap_or_else(|| text.to_owned())
        };
        Ok(varying.replace_all(command, own).into_owned())
    }

    /// Does the output look as shown? Ids seen for the first time are learnt.
    pub fn match_output(&mut self, shown: &str, output: &str) -> Result<bool> {
        let (pattern, new) = self.pattern(shown.trim())?;
        let Some(found) = Regex::new(&pattern)?.captures(output.trim()) else { return Ok(false) };
        for (group, id) in new {
            self.0.insert(id, found[group.as_str()].to_owned());
        }
        Ok(true)
    }

    /// A regular expression, and the names of the groups in it that are new ids.
    fn pattern(&self, shown: &str) -> Result<(String, Vec<(String, String)>)> {
        let mut pattern = String::from("(?s)^");
        let mut new: Vec<(String, String)> = Vec::new();
        let mut end = 0;
        for found in Regex::new(VARYING)?.captures_iter(shown) {
            let whole = found.get_match();
            pattern.push_str(&regex::escape(&shown[end..whole.start()]));
            end = whole.end();
            let id = found.name("id").map(|id| id.as_str());
            match id {
                Some(id) if let Some(own) = self.0.get(id) => pattern.push_str(&regex::escape(own)),
                // The expression cannot refer back: a second new one in the same output is any.
                Some(id) if new.iter().all(|(_, known)| known != id) => {
                    let group = format!("id{}", new.len());
                    write!(pattern, "(?P<{group}>[0-9a-f-]{{36}})")?;
                    new.push((group, id.to_owned()));
                }
                Some(_) => pattern.push_str("[0-9a-f-]{36}"),
                None if found.name("time").is_some() => pattern.push_str(r"\d{4}-\d\d-\d\dT[0-9:.]+Z"),
                None if found.name("duration").is_some() => pattern.push_str(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+"),
                None if found.name("any").is_some() => pattern.push_str(".*"),
                None => pattern.push_str(r"\s*"),
            }
        }
        pattern.push_str(&regex::escape(&shown[end..]));
        pattern.push('$');
        Ok((pattern, new))
    }
}

/// A shell that keeps its variables, folder and jobs from one step to the next; dropped with all that it has started.
#[derive(Debug)]
pub struct Shell {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// The line that ends a step's output begins so.
    mark: String,
}

impl Shell {
    /// A `bash` with this environment and `PATH`, in this folder.
    pub fn new(dir: &std::path::Path, env: &[(&str, String)]) -> Result<Self> {
        let mut child = Command::new("bash")
            .args(["--noprofile", "--norc"])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs(env.iter().map(|(key, value)| (key, value)))
            .current_dir(dir)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("bash")?;
        let input = child.stdin.take().context("piped")?;
        let output = BufReader::new(child.stdout.take().context("piped")?).lines();
        Ok(Self { child, input, output, mark: format!("end-{}", Uuid::now_v7()) })
    }

    /// Runs a step's command; answers what it printed, standard error included, and its exit code.
    pub async fn run(&mut self, command: &str) -> Result<(String, i32)> {
        let script = format!("{{ {command}\n}} 2>&1 </dev/null\nprintf '\\n{} %d\\n' $?\n", self.mark);
        self.input.write_all(script.as_bytes()).await?;
        let mut printed = String::new();
        let read = async {
            loop {
                let line = self.output.next_line().await?.context("the shell has ended")?;
                if let Some(code) = line.strip_prefix(&self.mark) {
                    return anyhow::Ok(code.trim().parse()?);
                }
                // The shell tells of the end of a job whenever it has learnt of it.
                if !(line.starts_with("bash: line ") && line.contains(" Killed ")) {
                    printed.push_str(&line);
                    printed.push('\n');
                }
            }
        };
        let code = within(STEP_LIMIT, "the end of a step", read).await;
        let code = code.and_then(|code| code).with_context(|| format!("$ {command}\n{printed}"))?;
        Ok((printed, code))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if let Some(group) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            // It may have ended by itself.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Runs a step in the shell and holds what it printed against what is shown; answers what differs.
pub async fn run(
    shell: &mut Shell,
    ids: &mut Ids,
    step: &Step,
    adapt: impl Fn(&str) -> String,
) -> Result<Option<String>> {
    let command = ids.in_command(&adapt(&step.command))?;
    let (printed, code) = shell.run(&command).await?;
    println!("$ {command}\n{printed}");
    let as_shown = match &step.shown {
        Some(shown) => ids.match_output(&adapt(shown), &printed)?,
        None => true,
    };
    Ok((code != step.exit_code || !as_shown).then(|| {
        let Step { line, shown, exit_code, .. } = step;
        let shown = shown.as_deref().unwrap_or_default();
        format!("line {line}: $ {command}\nprinted, with exit code {code}:\n{printed}shown, with exit code {exit_code}:\n{shown}")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "01a20751-1f82-705d-a198-4567bb46f288";
    const TWO: &str = "01a2131f-5dff-7163-a35d-65e76d583cd7";

    #[test]
    fn scripts_and_transcripts_are_told_apart_and_the_rest_is_left() {
        let document = "a\n```sh\nmake up\n\nmake down\n```\n```toml\n$ no\n```\n<!-- not run: it takes days -->\n```sh\nno\n```\n\
            ```console\n$ printf '%s' \\\n> b\nb\nc\n$ false\n[exit code 1]\n```\n";
        let step = |line, command: &str, shown: Option<&str>, exit_code| Step {
            line,
            command: command.to_owned(),
            shown: shown.map(str::to_owned),
            exit_code,
        };
        let expected = [
            step(3, "make up\n\nmake down", None, 0),
            step(15, "printf '%s' \\\nb", Some("b\nc\n"), 0),
            step(19, "false", Some(""), 1),
        ];
        assert_eq!(steps(document), expected);
    }

    #[test]
    fn ids_are_learnt_and_kept() {
        let mut ids = Ids::default();
        assert!(ids.match_output(&format!("{ONE} is\nhere"), &format!("{TWO} is here\n")).unwrap());
        assert_eq!(ids.in_command(&format!("get {ONE}")).unwrap(), format!("get {TWO}"));
        assert!(ids.match_output(ONE, TWO).unwrap());
        assert!(!ids.match_output(ONE, ONE).unwrap(), "it stands for another one");
    }

    #[test]
    fn what_varies_may_vary_and_nothing_else() {
        let mut ids = Ids::default();
        let shown = "{\"at\":\"2026-11-23T07:31:26.722Z\",…,\n \"words\": 6}  ran 2.3s";
        let mut fits = |output: &str| ids.match_output(shown, output).unwrap();
        assert!(fits("{\"at\":\"2027-01-01T00:00:00.001Z\",\"x\":[],\"words\": 6} ran 1m12s"));
        assert!(!fits("{\"at\":\"2027-01-01T00:00:00.001Z\",\"x\":[],\"words\": 7} ran 1m12s"));
        assert!(!fits("{\"at\":\"soon\",\"x\":[],\"words\": 6} ran 1m12s"));
    }

    #[tokio::test]
    async fn a_shell_keeps_its_variables_and_says_how_a_step_ends() {
        let place = tempfile::tempdir().unwrap();
        let mut shell = Shell::new(place.path(), &[("OUTER", "set".to_owned())]).unwrap();
        assert_eq!(shell.run("a=$OUTER; echo no end of line >&2").await.unwrap(), ("no end of line\n\n".to_owned(), 0));
        assert_eq!(shell.run("printf %s $a; cat; (exit 3)").await.unwrap(), ("set\n".to_owned(), 3));
    }
}
