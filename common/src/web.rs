//! The HTTP side of every program: [`hosts`] says from where it may be called.

pub mod hosts;
