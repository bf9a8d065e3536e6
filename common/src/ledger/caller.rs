//! Who changes something by a call, and what the ledgers keep of it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::clock::timestamp;
use crate::task::{ChangeCall, LastChange};

/// Longest name of an actor, in bytes.
pub const ACTOR_BYTES_MAX: usize = 128;

/// Who makes a call, as far as the call says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// The name that the client gave: at most [`ACTOR_BYTES_MAX`] bytes without control characters.
    pub actor: Option<String>,
    /// The request's id, which is in the log, too.
    pub request_id: Option<String>,
}

/// A [`LastChange`] as the ledgers store it, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    call: ChangeCall,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    /// Milliseconds since 1970; a ledger with a clock of its own adds it when it writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<i64>,
}

impl Caller {
    /// Somebody who says nothing of itself.
    pub const UNKNOWN: Self = Self { actor: None, request_id: None };

    /// What is stored with whatever the call changes, without its time where the ledger adds that.
    pub(crate) fn change(&self, call: ChangeCall, at: Option<i64>) -> String {
        let stored = Stored { call, by: self.actor.clone(), request_id: self.request_id.clone(), at };
        // Strings and numbers always have a JSON form.
        serde_json::to_string(&stored).unwrap_or_default()
    }
}

/// Reads what [`Caller::change`] made.
pub(crate) fn last_change(text: &str) -> Result<LastChange, serde_json::Error> {
    let Stored { call, by, request_id, at } = serde_json::from_str(text)?;
    Ok(LastChange { call, by, at: at.map_or(Timestamp::UNIX_EPOCH, timestamp), request_id })
}
