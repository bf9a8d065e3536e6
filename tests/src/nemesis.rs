//! The nemesis: it injects faults at random into a world under load, heals them, and has the history judged.
//!
//! All chance comes from one seed, so that a seed plays the same faults in the same order again; the programs under
//! test, and so the exact interleaving, stay as free as they are.

pub mod client;
pub mod cron;
pub mod duplicator;
pub mod editor;
pub mod fault;
pub mod limits;
pub mod measure;
pub mod member;
pub mod operator;
pub mod report;
pub mod run;
pub mod schedule;
pub mod world;
