//! What Tasklane's producer and worker share.
//!
//! In the order in which a task meets them: a [`task`] in a [`state`] is recorded in the [`ledger`], wrapped in an
//! [`envelope`] and sent by the [`publisher`] to the exchanges of the [`topology`] on the [`broker`]. The [`relay`]
//! publishes what is due or was missed, the [`ticker`] records the tasks of each [`schedule`] from its [`template`], [`gather`]
//! the one that follows a [`group`], [`rescue`] takes over from dead workers, [`reconcile`] finds tasks whose
//! messages the broker lost, and [`prune`] forgets what finished long ago;
//! [`maintenance`] runs these six in every process. [`completion`] tells waiting clients, [`control`] tells workers, [`events`] tells those who look, and the [`doctor`] looks at broker and
//! ledger before they are needed.

pub mod task;
pub mod state;
pub mod template;
pub mod schedule;
pub mod group;
pub mod limit;
pub mod ledger;
pub mod envelope;
pub mod topology;
pub mod broker;
pub mod publisher;
pub mod relay;
pub mod ticker;
pub mod gather;
pub mod release;
pub mod rescue;
pub mod reconcile;
pub mod leap;
pub mod prune;
pub mod maintenance;
pub mod completion;
pub mod control;
pub mod events;
pub mod backoff;
pub mod recurring;
pub mod clock;
pub mod seldom;
pub mod standstill;
pub mod vital;
pub mod config;
pub mod telemetry;
pub mod web;
pub mod labels;
pub mod traces;
pub mod shutdown;
pub mod memory;
pub mod doctor;

/// The library behind the ledger in a file, in the version that handlers meet in their transactions.
pub use rusqlite;
/// The library behind the ledger on a server, in the version that handlers meet in their transactions.
pub use sqlx;
