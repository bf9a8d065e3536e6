//! Looks at the real broker and ledger before they are needed, and says what a person should mend.
//!
//! Nothing is changed: no table, queue or message is made, and what cannot be seen is said to be not looked at. Every
//! look has a limit, so a server that never answers is a finding like any other.

mod host;
mod broker;
mod greeting;
mod probe;
mod policies;
mod ledger;
mod neighbours;
pub(crate) mod runs;
mod file_system;
mod report;

use std::time::Duration;

use serde::Serialize;

pub use self::report::{EXIT_FAIL, EXIT_SETTINGS, visit};
use crate::config::Common;
use crate::task::QueueName;

/// How long one look may take.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// What is thought of one thing that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and will hurt some day; or it could not be looked at.
    Warn,
    /// Tasklane does not work so, or does not keep its promises.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, such as `broker.version`: the same words in every release.
    pub check: String,
    /// What is thought of it.
    pub verdict: Verdict,
    /// What was seen. Never holds a password.
    pub message: String,
    /// What to do about it, where there is something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    fn ok(check: impl Into<String>, message: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Ok, message: message.into(), advice: None }
    }

    fn warn(check: impl Into<String>, message: impl Into<String>, advice: impl Into<String>) -> Self {
        let (check, message) = (check.into(), message.into());
        Self { check, verdict: Verdict::Warn, message, advice: Some(advice.into()) }
    }

    fn fail(check: impl Into<String>, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(check, message, advice) }
    }

    fn unseen(check: impl Into<String>, why: impl std::fmt::Display, advice: impl Into<String>) -> Self {
        Self::warn(check, format!("not looked at: {why}"), advice)
    }
}

/// The program in whose name is looked.
#[derive(Debug, Clone)]
pub struct Subject {
    /// What every program needs to know.
    pub common: Common,
    /// The queues it works with.
    pub queues: Vec<QueueName>,
    /// What it does with them.
    pub role: Role,
}

/// What a program does, as far as it asks something of its surroundings.
#[derive(Debug, Clone, Copy)]
pub enum Role {
    /// Publishes.
    Producer,
    /// Consumes.
    Worker {
        /// How many tasks run at once.
        concurrency: u16,
        /// How long a lease lives without renewal.
        lease_ttl: Duration,
        /// How often it is renewed.
        lease_renew: Duration,
        /// How long a delivery may stay unacked.
        custody_after: Duration,
        /// Whether it makes a ledger that is not there.
        create_ledger: bool,
    },
}

impl Role {
    /// Whether it makes a ledger's file that is not there.
    const fn makes_ledgers(self) -> bool {
        match self {
            Self::Producer => true,
            Self::Worker { create_ledger, .. } => create_ledger,
        }
    }
}

/// Looks at everything, for a quarter of a minute at most.
pub async fn examine(subject: &Subject) -> Vec<Finding> {
    let mut findings = host::look(subject);
    let (broker, (ledger, id)) = tokio::join!(broker::look(subject), ledger::look(subject));
    findings.extend(broker);
    findings.extend(ledger);
    findings.push(neighbours::look(subject, id).await);
    findings
}
