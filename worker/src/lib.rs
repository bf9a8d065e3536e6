//! Tasklane's worker: consumes deliveries, claims their tasks in the ledger, runs the handlers, settles, acks.
//!
//! Write a [`Handler`], put it into a [`Registry`], and give that to [`Worker::run`]; or use the `tasklane-worker`
//! program, whose handlers are commands and HTTP services from its settings file.

pub mod handler;
pub mod registry;
pub mod builtin;
pub mod process_group;

pub use handler::{Handler, HandlerError, Options, Outcome, TaskContext};
pub use registry::{DynHandler, Registry, RegistryBuilder, RegistryError};
