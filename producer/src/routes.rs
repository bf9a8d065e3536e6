//! One verb, one file.

pub mod submit;
pub mod batch;
pub mod status;
pub mod list;
pub mod retry;
pub mod queues;
pub mod workers;
pub mod health;
pub mod docs;
