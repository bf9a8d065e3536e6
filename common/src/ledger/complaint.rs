//! What the ledger fails at is said in one place: at once, and then once a minute with its number.

use super::LedgerError;
use crate::recurring::Recurring;

static TOLD: Recurring = Recurring::new();

/// Logs that the ledger failed at something, unless that was said within the last minute; whether it was said now. `times`
/// counts how often it came since.
pub fn complain(error: &LedgerError, what: &'static str) -> bool {
    let told = TOLD.tell(what);
    if let Some(times) = told {
        tracing::warn!(%error, times, "{what}");
    }
    told.is_some()
}
