//! One verb, one file.

pub mod submit;
pub mod batch;
pub mod group;
pub mod status;
pub mod limits;
pub mod list;
pub mod edit;
pub mod retry;
pub mod retry_many;
pub mod cancel;
pub mod cancel_many;
pub mod purge;
pub mod queues;
pub mod pause;
pub mod move_tasks;
pub mod schedules;
pub mod put_schedule;
pub mod pause_schedule;
pub mod workers;
pub mod events;
pub mod health;
pub mod docs;
