//! `schedules` on the command line.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::TaskSpec;
use crate::input;

/// Shown below the help.
pub(super) const EXAMPLES: &str = "Examples:
  tasklane schedules
  tasklane schedules put reports.nightly report.build of=yesterday --cron '30 2 * * MON-FRI' --timezone Europe/Berlin
  tasklane schedules pause reports.nightly";

/// Schedules; without a command, a list of all.
#[derive(Debug, Args)]
pub(crate) struct Schedules {
    /// What to do with them.
    #[command(subcommand)]
    pub(crate) action: Option<SchedulesDo>,
}

/// What to do with schedules.
#[derive(Debug, Subcommand)]
pub(crate) enum SchedulesDo {
    /// List all, by name; also without a command
    List,
    /// Show one, with its task and its next ticks
    Get(Named),
    /// Make or replace one; what is not given has its default, but for --paused
    Put(Box<PutSchedule>),
    /// Delete one: nothing is submitted any more, and what was stays
    Delete(Named),
    /// Let one submit nothing until it is resumed
    Pause(Named),
    /// Let a paused one go on with its next tick
    Resume(Named),
}

/// A schedule.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// The schedule
    #[arg(value_parser = input::path_name)]
    pub(crate) name: String,
}

/// A schedule to be made.
#[derive(Debug, Args)]
pub(crate) struct PutSchedule {
    /// The schedule.
    #[command(flatten)]
    pub(crate) named: Named,
    /// What each tick submits.
    #[command(flatten)]
    pub(crate) task: TaskSpec,
    /// When: five fields, six with the second first, or @hourly, @daily, @weekly, @monthly, @yearly
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) cron: String,
    /// The zone in which that is read, such as Europe/Berlin [default: UTC]
    #[arg(long, value_name = "ZONE")]
    pub(crate) timezone: Option<String>,
    /// How many ticks are made up for that nothing was there to fire: none, one or all [default: one]
    #[arg(long, value_name = "WHICH", value_parser = ["none", "one", "all"], hide_possible_values = true)]
    pub(crate) catch_up: Option<String>,
    /// How many, the newest, with --catch-up all [default: 100]
    #[arg(long, value_name = "N")]
    pub(crate) catch_up_max: Option<u32>,
    /// What becomes of a tick while an earlier one's task is unfinished: allow or skip [default: allow]
    #[arg(long, value_name = "WHAT", value_parser = ["allow", "skip"], hide_possible_values = true)]
    pub(crate) overlap: Option<String>,
    /// Each task waits so long at most after its tick [default: 0]
    #[arg(long, value_name = "DURATION", value_parser = input::duration)]
    pub(crate) jitter: Option<Duration>,
    /// Submits nothing until it is resumed; =false resumes it [default: as it is; a new one is not paused]
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_possible_values = true
    )]
    pub(crate) paused: Option<bool>,
}
