//! The test harness: real brokers, real databases, real processes, and a wire in between that can be cut.
//!
//! Nothing here is a mock. One test goes like this:
//!
//! 1. [`stack::Stack::new`] gives the test a world of its own: a vhost on the shared RabbitMQ node
//!    ([`services`], [`vhost`]) and a ledger ([`ledger`]), SQLite or a database of its own on the shared
//!    PostgreSQL ([`postgres`]).
//! 2. [`stack::Stack::producer`] and [`stack::Stack::worker`] start the true binaries ([`process`]) and wait
//!    until they are ready.
//! 3. [`api::Api`] speaks HTTP to the producer; [`oplog`] is where the handlers of the test write down each
//!    start and end ([`history`] has the form), and where it is checked that no task ran twice.
//! 4. Faults: a [`broker::Broker`] of the test's own can be stopped, killed and frozen; a [`proxy::Proxy`]
//!    stands between any two programs; a [`process::Process`] takes signals.
//! 5. Whatever was started ends with the guard that started it, also when the test fails.
//!
//! Every wait has a limit ([`wait`]) and says what it waited for.

pub mod wait;

pub mod services;

pub mod broker;
pub mod cluster;
pub mod management;
pub mod vhost;
pub mod wire;

pub mod ledger;
pub mod postgres;

pub mod process;
pub mod proxy;
pub mod stack;
pub mod transcript;

pub mod fuzz;

pub mod bench;
pub mod api;
pub mod collector;
pub mod history;
pub mod metrics;
pub mod nemesis;
pub mod oplog;

mod http;
pub mod port;
mod teardown;

pub use port::free_port;
pub use wait::{eventually, within};
