//! `limits` on the command line.

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};

use crate::api::Rate;
use crate::input;

/// What a limit may be of.
const SCOPES: [&str; 3] = ["queue", "kind", "key"];

/// Shown below the help.
pub(super) const EXAMPLES: &str = "Examples:
  tasklane limits
  tasklane limits set queue reports --max-running 20 --max-queued 50000
  tasklane limits set kind mail --rate 100/1s --burst 10
  tasklane limits set key 'customer:*' --max-running 2";

/// Limits; without a command, a list of all.
#[derive(Debug, Args)]
pub(crate) struct Limits {
    /// What to do with them.
    #[command(subcommand)]
    pub(crate) action: Option<LimitsDo>,
}

/// What to do with limits.
#[derive(Debug, Subcommand)]
pub(crate) enum LimitsDo {
    /// List all; also without a command
    List,
    /// Set one: what is not given is not limited any more
    Set(SetLimit),
    /// Delete one
    Delete(Limited),
}

/// What shares a limit.
#[derive(Debug, Args)]
pub(crate) struct Limited {
    /// What shares it
    #[arg(value_parser = PossibleValuesParser::new(SCOPES))]
    pub(crate) of: String,
    /// The queue, the kind, or the concurrency key; a key that ends in * stands for each that begins so
    #[arg(value_parser = input::limit_name)]
    pub(crate) name: String,
}

/// A limit to be set.
#[derive(Debug, Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("bounds").args(["max_running", "rate", "max_queued"]).required(true).multiple(true))]
pub(crate) struct SetLimit {
    /// What shares it.
    #[command(flatten)]
    pub(crate) limited: Limited,
    /// How many tasks run at once, on all workers
    #[arg(long, value_name = "N")]
    pub(crate) max_running: Option<u32>,
    /// How often tasks start, evenly spread, such as 100/1s
    #[arg(long, value_name = "N/DURATION", value_parser = input::rate)]
    pub(crate) rate: Option<Rate>,
    /// How many of them may start at once after a rest [default: 1]
    #[arg(long, value_name = "N", requires = "rate")]
    pub(crate) burst: Option<u32>,
    /// How many tasks may wait before submissions are refused; of a queue only
    #[arg(long, value_name = "N")]
    pub(crate) max_queued: Option<u32>,
}
