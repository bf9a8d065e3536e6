//! Every body and error of the API, over a real SQLite ledger, while the broker is away.

#[cfg(test)]
mod changes;
#[cfg(test)]
mod schedules;
#[cfg(test)]
mod support;

mod submit;
mod batch;
mod limits;
mod origin;
mod look;
mod retry;
mod cancel;
mod pause;
mod sweep;
mod edit;
mod faults;
mod group;
mod idempotency;
mod openapi;
mod events;
