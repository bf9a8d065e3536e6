//! What the examples share: a small [`client`] of the HTTP API, and a [`worker`] inside of the example's own process,
//! so that each example is one command.

pub mod client;
pub mod worker;
