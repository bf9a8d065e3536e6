//! Tasklane's producer: takes tasks over HTTP, records them in the ledger, and publishes them.
//!
//! In the order in which a request meets them: the common crate's listener takes its connection, the [`router`] finds its route
//! past [`observe`] and [`admission`], a verb of [`routes`] reads its [`body`] by [`extract`]; [`request`], [`batch`],
//! [`listing`], [`cancellation`], [`editing`], [`retrying`], [`scheduling`] and [`grouping`] check what it asks for, without any IO; [`sweep`] does it to all that meet a filter; [`record`] puts the tasks into the ledger behind the
//! [`gate`] and hands them to the publisher; [`wait`] waits for their end. Whatever goes wrong is an [`error`].

pub mod config;
pub mod serve;
pub mod app;
pub mod router;
pub mod observe;
pub mod admission;
pub mod routes;
pub mod body;
pub mod extract;
pub mod request;
mod args;
pub mod routing;
pub mod batch;
pub mod listing;
pub mod cancellation;
pub mod editing;
pub mod retrying;
pub mod sweep;
pub mod template;
pub mod scheduling;
pub mod grouping;
mod canonical;
pub mod idempotency;
pub mod caller;
pub mod intake;
mod trace_context;
pub mod record;
pub mod gate;
pub mod wait;
mod backlog;
mod queue_labels;
mod reference;
pub mod error;

pub use config::{Command, ProducerArgs, Settings};
pub use serve::{StartError, StopSummary, run};
