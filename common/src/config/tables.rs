//! The tables of `tasklane.toml` that may stand there several times.

use std::collections::BTreeMap;

use secrecy::SecretString;
use serde::Deserialize;

use super::{ConfigError, discard};
use crate::backoff::Retry;
use crate::limit::{Bounds, Rate, Scope};
use crate::task::{ErrorKind, Guarantee, Kind, QueueName};

/// `[[route]]`: kinds that match go to the queue.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteTable {
    /// A kind, or the beginning of kinds followed by `*`, such as `email.*`.
    pub kind: String,
    /// Where they go.
    pub queue: QueueName,
    /// How long after its task's end a result is kept when the submission does not say. Defaults to as long as the task.
    pub result_ttl_ms: Option<i64>,
}

/// `[[limit]]`: what the tasks of a queue, of a kind, or with a concurrency key share. Names one of the three.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitTable {
    /// The queue.
    pub queue: Option<String>,
    /// Or the kind.
    pub kind: Option<String>,
    /// Or the concurrency key; with `*` at its end each key that begins so, for itself.
    pub key: Option<String>,
    /// How many tasks run at once.
    pub max_running: Option<u32>,
    /// How often tasks start.
    pub rate: Option<Rate>,
    /// How many tasks may wait before submissions are refused; of a queue only.
    pub max_queued: Option<u32>,
}

impl LimitTable {
    /// Checks the table.
    ///
    /// # Errors
    /// [`ConfigError::Setting`] naming the key, and what would be right.
    pub fn check(&self) -> Result<(Scope, Bounds), ConfigError> {
        let names = [("queue", &self.queue), ("kind", &self.kind), ("key", &self.key)];
        let mut given = names.iter().filter_map(|(word, name)| Some((*word, name.as_deref()?)));
        let (Some((word, name)), None) = (given.next(), given.next()) else {
            return Err(ConfigError::setting("limit", "must name one of queue, kind and key"));
        };
        let scope = Scope::named(word, name)
            .map_err(|error| ConfigError::setting("limit", format!("{word}: `{name}` {error}")))?;
        let bounds = Bounds { max_running: self.max_running, rate: self.rate, max_queued: self.max_queued };
        match bounds.faults(Some(&scope)).into_iter().next() {
            Some((path, message)) => Err(ConfigError::setting("limit", format!("{scope}: {path} {message}"))),
            None => Ok((scope, bounds)),
        }
    }
}

/// `[[command]]`: a program that handles one kind.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandTable {
    /// The kind it handles.
    pub kind: Kind,
    /// The queue it expects; it is added to those the worker consumes.
    pub queue: Option<QueueName>,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// How long one run may take: SIGTERM to its process group, and SIGKILL 5 s later. Defaults to `task_timeout_ms`.
    pub timeout_ms: Option<u64>,
    /// What a crash in mid-run means. Defaults to `at_least_once`.
    #[serde(default)]
    pub guarantee: Guarantee,
    /// How failed attempts are followed by others. Defaults to the worker's `backoff`.
    #[serde(default)]
    pub retry: Retry,
    /// Exit codes after which no other attempt is made, besides 65. Defaults to none.
    #[serde(default, deserialize_with = "discard::exit_codes")]
    pub discard_exit_codes: Vec<i32>,
    /// Sorts of failure after which no other attempt is made. Defaults to none.
    #[serde(default, deserialize_with = "discard::errors")]
    pub discard_errors: Vec<ErrorKind>,
}

/// `[[http]]`: an HTTP service that handles one kind.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpTable {
    /// The kind it handles.
    pub kind: Kind,
    /// The queue it expects; it is added to those the worker consumes.
    pub queue: Option<QueueName>,
    /// Where args are POSTed.
    pub url: String,
    /// How long one run may take. Defaults to `task_timeout_ms`.
    pub timeout_ms: Option<u64>,
    /// What a crash in mid-run means. Defaults to `at_least_once`.
    #[serde(default)]
    pub guarantee: Guarantee,
    /// How failed attempts are followed by others. Defaults to the worker's `backoff`.
    #[serde(default)]
    pub retry: Retry,
    /// Statuses after which no other attempt is made, besides those of 3xx and 4xx that say so anyway. Defaults to none.
    #[serde(default, deserialize_with = "discard::statuses")]
    pub discard_statuses: Vec<u16>,
    /// Sorts of failure after which no other attempt is made. Defaults to none.
    #[serde(default, deserialize_with = "discard::errors")]
    pub discard_errors: Vec<ErrorKind>,
    /// Further request headers, such as an authorization.
    #[serde(default)]
    pub headers: BTreeMap<String, SecretString>,
}
