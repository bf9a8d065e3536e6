//! The integration tests: one module per promise, all in one binary, on real brokers, databases and processes.

mod broker_away;
mod crash;
mod examples;
mod harness;
mod load;
mod main_job;
mod requests;
mod settings;
mod messages;
mod shutdown;
mod smoke;
