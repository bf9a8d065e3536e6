//! The command line: commands, flags, and their help.

mod limits;
mod schedules;
mod tail;

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use jiff::Timestamp;
use url::Url;
use uuid::Uuid;

pub(crate) use self::limits::{Limits, LimitsDo, SetLimit};
pub(crate) use self::schedules::{PutSchedule, Schedules, SchedulesDo};
pub(crate) use self::tail::Tail;
use crate::failure::Exit;
use crate::input::{self, IdArg, Pair};

/// The states that a list can be narrowed to.
const STATES: [&str; 8] =
    ["accepted", "scheduled", "queued", "running", "retryable", "completed", "cancelled", "discarded"];

const SUBMIT_EXAMPLES: &str = "Examples:
  tasklane submit report.build month=2026-11 dry=true --queue reports --delay 5m --tag team=blue
  tasklane submit mail --args @mail.json --wait 30s
  id=$(tasklane submit mail to=ada --quiet) && tasklane wait \"$id\"";

const BATCH_EXAMPLES: &str = "Examples:
  tasklane batch tasks.ndjson
  tasklane batch pages.ndjson --then report.join --then-args '{\"month\": \"2026-11\"}'
  jq -c '.[] | {kind: \"mail\", args: .}' people.json | tasklane batch --key november";

const LIST_EXAMPLES: &str = "Examples:
  tasklane list --state discarded --kind 'report.build'
  tasklane list --error 'no space left' --since 2h
  tasklane list --state retryable --json | jq -r '.errors[-1].message'";

const CANCEL_EXAMPLES: &str = "Examples:
  tasklane cancel 01a20751-1f82-705d-a198-4567bb46f288 --reason 'wrong month'
  tasklane cancel --kind report.build --tag team=blue --dry-run
  tasklane list --kind report.build --quiet --all | tasklane cancel -";

const PURGE_EXAMPLES: &str = "Examples:
  tasklane purge --kind report.build --state discarded --dry-run
  tasklane purge --tag team=blue --yes";

const MOVE_EXAMPLES: &str = "Examples:
  tasklane move default slow --kind report.build
  tasklane move default slow --dry-run";

const RETRY_EXAMPLES: &str = "Examples:
  tasklane retry 01a20751-1f82-705d-a198-4567bb46f288
  tasklane retry 01a20751-1f82-705d-a198-4567bb46f288 --args '{\"month\": \"2026-11\"}'
  tasklane retry --kind report.build --per-second 20 --dry-run
  tasklane retry --state retryable --kind mail.send --yes";

const EDIT_EXAMPLES: &str = "Examples:
  tasklane edit 01a20751-1f82-705d-a198-4567bb46f288 --delay 2h
  tasklane edit 01a20751-1f82-705d-a198-4567bb46f288 --args @mail.json --queue slow";

/// Submit, look at, wait for and cancel Tasklane's tasks, over a producer's HTTP API.
#[derive(Debug, Parser)]
#[command(name = "tasklane", version, max_term_width = 100, after_long_help = exit_codes())]
pub(crate) struct Cli {
    /// What every command knows.
    #[command(flatten)]
    pub(crate) global: Global,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The heading of the flags that every command knows.
const FOR_ALL: &str = "Options of every command";

/// What every command knows.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The producer's address
    #[arg(
        long, global = true, help_heading = FOR_ALL, env = "TASKLANE_URL", hide_env_values = true, value_name = "URL",
        default_value = "http://127.0.0.1:8080", value_parser = input::producer_url
    )]
    pub(crate) url: Url,
    /// Print the API's JSON: one document, or one a line where there are several
    #[arg(long, global = true, help_heading = FOR_ALL)]
    pub(crate) json: bool,
    /// Who makes changes, for the producer's log and the tasks; '' says nothing [default: the user of this machine]
    #[arg(
        long, global = true, help_heading = FOR_ALL, env = "TASKLANE_BY", hide_env_values = true, value_name = "NAME",
        value_parser = input::actor
    )]
    pub(crate) by: Option<String>,
    /// Colours; auto: on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, help_heading = FOR_ALL, value_enum, value_name = "WHEN", default_value_t = When::Auto)]
    pub(crate) color: When,
}

/// When there are colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    /// On a terminal.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Submit a task, and wait for its end if asked to
    #[command(after_help = SUBMIT_EXAMPLES)]
    Submit(Submit),
    /// Submit a file of tasks, one JSON object a line
    #[command(after_help = BATCH_EXAMPLES)]
    Batch(Batch),
    /// Show tasks
    Get(Ids),
    /// Wait until tasks have ended; the exit code says how
    Wait(Wait),
    /// Show a task until it ends, or the queues until Ctrl-C, again and again
    Watch(Watch),
    /// Show what happens to tasks, as it happens
    #[command(after_help = tail::EXAMPLES)]
    Tail(Tail),
    /// List tasks, newest first
    #[command(after_help = LIST_EXAMPLES)]
    List(List),
    /// Show where the tasks of a batch with --then stand
    Group(GroupId),
    /// Change a task that waits: its time, its args, its queue, its priority
    #[command(after_help = EDIT_EXAMPLES)]
    Edit(Edit),
    /// Cancel tasks, by id or all that meet a filter
    #[command(after_help = CANCEL_EXAMPLES)]
    Cancel(Cancel),
    /// Run cancelled or discarded tasks again, by id or all that meet a filter
    #[command(after_help = RETRY_EXAMPLES)]
    Retry(Retry),
    /// Delete finished tasks that meet a filter, for good
    #[command(after_help = PURGE_EXAMPLES)]
    Purge(Purge),
    /// Show what waits where
    Queues(Queues),
    /// Pause a queue: none of its tasks starts until it is resumed, and what runs goes on
    Pause(Pause),
    /// Let a paused queue go on
    Resume(Pause),
    /// Move waiting tasks from one queue to another
    #[command(after_help = MOVE_EXAMPLES)]
    Move(Move),
    /// Show, make and delete periodic tasks
    #[command(after_help = schedules::EXAMPLES)]
    Schedules(Schedules),
    /// Show, set and delete limits of queues, kinds and concurrency keys
    #[command(after_help = limits::EXAMPLES)]
    Limits(Limits),
    /// Show the live workers
    Workers,
    /// Look at the producer, its workers and queues, and say what to mend
    Doctor,
    /// Print completions for a shell
    Completions(Completions),
}

/// A task, as `submit` and `schedules put` take it.
#[derive(Debug, Args)]
pub(crate) struct TaskSpec {
    /// The work to do, such as report.build
    pub(crate) kind: String,
    /// The args, one by one: a value that is JSON is taken as such, any other as a string
    #[arg(value_name = "KEY=VALUE", value_parser = input::pair)]
    pub(crate) pairs: Vec<Pair>,
    /// All args at once: JSON, @FILE, or - for standard input
    #[arg(long, value_name = "JSON", conflicts_with = "pairs", allow_hyphen_values = true)]
    pub(crate) args: Option<String>,
    /// The queue that carries it [default: as the producer's routes say]
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Option<String>,
    /// How urgent it is: high, normal or low [default: normal]
    #[arg(long, value_name = "LEVEL", value_parser = ["high", "normal", "low"], hide_possible_values = true)]
    pub(crate) priority: Option<String>,
    /// How long one run may take [default: the handler decides]
    #[arg(long, value_name = "DURATION", value_parser = input::duration)]
    pub(crate) timeout: Option<Duration>,
    /// How long after its end its result is kept [default: the producer's setting, or as long as the task]
    #[arg(long, value_name = "DURATION", value_parser = input::duration)]
    pub(crate) result_ttl: Option<Duration>,
    /// How often it may start [default: the producer's setting]
    #[arg(long, value_name = "N")]
    pub(crate) max_attempts: Option<u32>,
    /// Whose it is, for limits that count each customer, say, for itself
    #[arg(long, value_name = "KEY")]
    pub(crate) concurrency_key: Option<String>,
    /// A label to find it by; may be repeated
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = input::pair)]
    pub(crate) tags: Vec<Pair>,
}

/// A task to be submitted.
#[derive(Debug, Args)]
pub(crate) struct Submit {
    /// The task.
    #[command(flatten)]
    pub(crate) task: TaskSpec,
    /// How long it waits before its first start, such as 5m
    #[arg(long, value_name = "DURATION", value_parser = input::duration, conflicts_with = "at")]
    pub(crate) delay: Option<Duration>,
    /// When it may start, such as 2030-01-31T08:00:00Z
    #[arg(long, value_name = "TIME")]
    pub(crate) at: Option<Timestamp>,
    /// Idempotency key: the same key and task again give the same task [default: a new one]
    #[arg(long, value_name = "KEY", value_parser = input::key)]
    pub(crate) key: Option<String>,
    /// Wait so long for its end, and show it
    #[arg(long, value_name = "DURATION", value_parser = input::duration)]
    pub(crate) wait: Option<Duration>,
    /// Print the id only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// A file of tasks.
#[derive(Debug, Args)]
pub(crate) struct Batch {
    /// The file; - is standard input
    #[arg(default_value = "-", hide_default_value = true)]
    pub(crate) file: PathBuf,
    /// How many tasks are recorded together, all or none
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) chunk: u32,
    /// Name of this run: the same file again under the same name records nothing twice [default: a new one]
    #[arg(long, value_name = "KEY", value_parser = input::run_key)]
    pub(crate) key: Option<String>,
    /// The kind of one more task, which runs when all have ended; the file is one request then, of 10,000 tasks at most
    #[arg(long, value_name = "KIND", conflicts_with = "chunk")]
    pub(crate) then: Option<String>,
    /// Its args: JSON, @FILE, or - for standard input
    #[arg(long, value_name = "JSON", requires = "then", allow_hyphen_values = true)]
    pub(crate) then_args: Option<String>,
    /// Print the ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Tasks by their ids.
#[derive(Debug, Args)]
pub(crate) struct Ids {
    /// The tasks; - reads ids from standard input, one a line
    #[arg(value_name = "ID", required = true, value_parser = input::id_arg)]
    pub(crate) ids: Vec<IdArg>,
}

/// A group.
#[derive(Debug, Args)]
pub(crate) struct GroupId {
    /// The group
    #[arg(value_name = "ID", value_parser = input::group_id)]
    pub(crate) id: Uuid,
}

/// Tasks to wait for.
#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// The tasks
    #[command(flatten)]
    pub(crate) ids: Ids,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = input::duration)]
    pub(crate) timeout: Duration,
}

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// The task; left out, the queues
    #[arg(value_parser = input::task_id)]
    pub(crate) id: Option<Uuid>,
    /// How often to look
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = input::duration)]
    pub(crate) every: Duration,
    /// How long to look [default: until the task has ended, or Ctrl-C]
    #[arg(long, value_name = "DURATION", value_parser = input::duration)]
    pub(crate) timeout: Option<Duration>,
}

/// Which tasks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub(crate) struct Filter {
    /// Only in this state
    #[arg(long, value_name = "STATE", value_parser = PossibleValuesParser::new(STATES))]
    pub(crate) state: Option<String>,
    /// Only of this kind
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<String>,
    /// Only of this queue
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Option<String>,
    /// Only with this tag
    #[arg(long, value_name = "KEY=VALUE", value_parser = input::pair)]
    pub(crate) tag: Option<Pair>,
}

impl Filter {
    /// The tag as the API has it in filters.
    pub(crate) fn tag(&self) -> Option<String> {
        self.tag.as_ref().map(tag_of)
    }
}

/// A tag as the API has it in filters.
pub(crate) fn tag_of(Pair { key, value }: &Pair) -> String {
    format!("{key}:{value}")
}

/// A list of tasks.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only in this state
    #[arg(long, value_name = "STATE", value_parser = PossibleValuesParser::new(STATES))]
    pub(crate) state: Option<String>,
    /// Only of this kind
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<String>,
    /// Only of this queue
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Option<String>,
    /// Only with this tag; may be repeated, and all must match
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = input::pair)]
    pub(crate) tags: Vec<Pair>,
    /// Only whose last error has this text in it
    #[arg(long, value_name = "TEXT")]
    pub(crate) error: Option<String>,
    /// Only with this reason, such as final_error or poison
    #[arg(long, value_name = "REASON")]
    pub(crate) reason: Option<String>,
    /// Only created since then: a time such as 2030-01-31T08:00:00Z, or how long ago, such as 2h
    #[arg(long, value_name = "TIME", value_parser = input::moment)]
    pub(crate) since: Option<Timestamp>,
    /// Only created before that: a time, or how long ago
    #[arg(long, value_name = "TIME", value_parser = input::moment)]
    pub(crate) until: Option<Timestamp>,
    /// Only what this worker runs, or was the last to run
    #[arg(long, value_name = "ID")]
    pub(crate) worker: Option<Uuid>,
    /// Only tasks of this group
    #[arg(long, value_name = "ID", value_parser = input::group_id)]
    pub(crate) group: Option<Uuid>,
    /// How many tasks at most
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) limit: u64,
    /// All tasks, however many
    #[arg(long, conflicts_with = "limit")]
    pub(crate) all: bool,
    /// Print the ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// A task to be changed.
#[derive(Debug, Args)]
#[command(group(
    ArgGroup::new("changes")
        .args(["delay", "at", "args", "queue", "priority", "max_attempts", "timeout"])
        .required(true)
        .multiple(true)
))]
pub(crate) struct Edit {
    /// The task
    #[arg(value_name = "ID", value_parser = input::task_id)]
    pub(crate) id: Uuid,
    /// How long it waits from now, such as 5m; 0s starts it at once
    #[arg(long, value_name = "DURATION", value_parser = input::duration, conflicts_with = "at")]
    pub(crate) delay: Option<Duration>,
    /// When it may start, such as 2030-01-31T08:00:00Z
    #[arg(long, value_name = "TIME")]
    pub(crate) at: Option<Timestamp>,
    /// All args anew: JSON, @FILE, or - for standard input
    #[arg(long, value_name = "JSON", allow_hyphen_values = true)]
    pub(crate) args: Option<String>,
    /// The queue that carries it
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Option<String>,
    /// How urgent it is: high, normal or low
    #[arg(long, value_name = "LEVEL", value_parser = ["high", "normal", "low"], hide_possible_values = true)]
    pub(crate) priority: Option<String>,
    /// How often it may start
    #[arg(long, value_name = "N")]
    pub(crate) max_attempts: Option<u32>,
    /// How long one run may take
    #[arg(long, value_name = "DURATION", value_parser = input::duration)]
    pub(crate) timeout: Option<Duration>,
}

/// Tasks to be cancelled.
#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// The tasks; - reads ids from standard input, one a line; or give a filter
    #[arg(
        value_name = "ID", value_parser = input::id_arg,
        required_unless_present_any = ["state", "kind", "queue", "tag"],
        conflicts_with_all = ["state", "kind", "queue", "tag", "dry_run", "yes"]
    )]
    pub(crate) ids: Vec<IdArg>,
    /// Which tasks.
    #[command(flatten)]
    pub(crate) filter: Filter,
    /// Who wants that, or why; shown with the tasks
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Only count what the filter meets
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask before cancelling by a filter
    #[arg(short, long)]
    pub(crate) yes: bool,
}

/// Tasks to be run again.
#[derive(Debug, Args)]
pub(crate) struct Retry {
    /// The tasks; - reads ids from standard input, one a line; or give a filter
    #[arg(
        value_name = "ID", value_parser = input::id_arg,
        required_unless_present_any = ["state", "kind", "queue", "tag", "reason"],
        conflicts_with_all = ["state", "kind", "queue", "tag", "reason", "dry_run", "yes", "per_second"]
    )]
    pub(crate) ids: Vec<IdArg>,
    /// Which tasks; discarded ones, unless --state says cancelled, or retryable or scheduled to start what waits
    #[command(flatten)]
    pub(crate) filter: Filter,
    /// Also those whose work another task does with other args
    #[arg(long)]
    pub(crate) replaced: bool,
    /// Only with this reason; poison, which took its workers down, starts again only if this asks for it
    #[arg(long, value_name = "REASON")]
    pub(crate) reason: Option<String>,
    /// Other args, as a new task: JSON, @FILE, or - for standard input
    #[arg(long, value_name = "JSON", allow_hyphen_values = true)]
    pub(crate) args: Option<String>,
    /// Spread the starts evenly, so many a second [default: all at once]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) per_second: Option<u32>,
    /// Only count what the filter meets
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask before retrying by a filter
    #[arg(short, long)]
    pub(crate) yes: bool,
}

/// Finished tasks to be deleted.
#[derive(Debug, Args)]
pub(crate) struct Purge {
    /// Which tasks.
    #[command(flatten)]
    pub(crate) filter: Filter,
    /// Only count what the filter meets
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask before
    #[arg(short, long)]
    pub(crate) yes: bool,
}

/// Waiting tasks to be moved.
#[derive(Debug, Args)]
pub(crate) struct Move {
    /// The queue in which they wait
    #[arg(value_name = "FROM", value_parser = input::path_name)]
    pub(crate) from: String,
    /// The queue that they go to
    #[arg(value_name = "TO")]
    pub(crate) to: String,
    /// Only of this kind
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<String>,
    /// Only with this tag
    #[arg(long, value_name = "KEY=VALUE", value_parser = input::pair)]
    pub(crate) tag: Option<Pair>,
    /// Only count what would be moved
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Queues.
#[derive(Debug, Args)]
pub(crate) struct Queues {
    /// This one only
    #[arg(value_parser = input::path_name)]
    pub(crate) name: Option<String>,
}

/// A queue to be paused or resumed.
#[derive(Debug, Args)]
pub(crate) struct Pause {
    /// The queue
    #[arg(value_name = "QUEUE", value_parser = input::path_name)]
    pub(crate) queue: String,
}

/// Which shell.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: Shell,
}

fn exit_codes() -> String {
    let mut text = "Exit codes:\n".to_owned();
    for exit in Exit::ALL {
        text.push_str(&format!("  {:>3}  {}\n", exit.code(), exit.meaning()));
    }
    text
}

#[cfg(test)]
mod tests;
