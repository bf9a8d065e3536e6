//! Tasklane's worker: consumes deliveries, claims their tasks in the ledger, runs the handlers, settles, acks.
//!
//! Write a [`Handler`] and give it to [`program::main`]: that is a worker program. `tasklane-worker` is one without
//! handlers of its own, only with commands and HTTP services from its settings file. To run a worker inside of another
//! program, put handlers into a [`Registry`], and that into a [`Worker`].
//!
//! In the order of a task's way: [`consume`] takes a [`delivery`] of one of the [`lanes`] when the [`arbiter`] has a place for its lane, under the eyes of a [`lookout`]; [`execute`] leads it through decode, claim,
//! run, [`decide`], settle and ack; all of it inside one [`life`], which lasts as long as the [`lease`] and knows what is [`held`]. [`cancel`] stops runs on somebody's word, [`pause`] a queue's consumers.

pub mod handler;
pub mod registry;
pub mod config;
pub mod worker;
pub mod life;
pub mod held;
mod audit;
pub mod meters;
pub mod lease;
pub mod consume;
pub mod arbiter;
pub mod lanes;
pub mod lookout;
pub mod cancel;
pub mod pause;
pub mod delivery;
mod acks;
pub mod execute;
mod foreign;
mod run;
mod settle;
mod transaction;
pub mod decide;
pub mod builtin;
pub mod process_group;
mod init;
pub mod readiness;
mod health;
pub mod program;
pub mod testing;

pub use handler::{Committed, Handler, HandlerError, Options, Outcome, TaskContext};
pub use registry::{DynHandler, Registry, RegistryBuilder, RegistryError};
pub use tasklane_common::{rusqlite, sqlx};
pub use worker::{Shutdown, StopSummary, Worker};
