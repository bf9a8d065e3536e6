//! The HTTP side of every program: the [`listener`] takes connections, as many as there are [`files`] for; [`hosts`] says
//! from where requests may come, and [`answers`] what all answers under way may hold.

pub mod listener;
pub mod files;
pub mod hosts;
pub mod answers;

mod body;
mod connection;
