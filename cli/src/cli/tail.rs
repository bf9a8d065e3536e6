//! `tail` on the command line.

use std::time::Duration;

use clap::Args;
use clap::builder::PossibleValuesParser;

use super::STATES;
use crate::input;

/// Shown below the help.
pub(super) const EXAMPLES: &str = "Examples:
  tasklane tail
  tasklane tail --kind 'mail.*' --state discarded
  tasklane tail --queue reports --for 1m --json | jq -r .event | sort | uniq -c";

/// Which events, and how long.
#[derive(Debug, Args)]
pub(crate) struct Tail {
    /// Only of this kind, or of those that begin so, as 'mail.*'
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<String>,
    /// Only of this queue
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Option<String>,
    /// Only what leads to this state
    #[arg(long, value_name = "STATE", value_parser = PossibleValuesParser::new(STATES))]
    pub(crate) state: Option<String>,
    /// How long to look [default: until Ctrl-C]
    #[arg(long = "for", value_name = "DURATION", value_parser = input::duration)]
    pub(crate) time: Option<Duration>,
    /// After how many events to end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}
