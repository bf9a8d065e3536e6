//! How many clients the limit of open files leaves room for.

use rustix::process::{Resource, getrlimit};

/// What a process needs besides its clients and tasks: ledger, broker, logs.
pub const RESERVE: u64 = 128;
/// What one running task may need: three pipes of a command, or a connection, and their shadows.
pub const PER_TASK: u64 = 6;
/// Under any limit so many clients are let in, in turn.
const CLIENTS_MIN: u64 = 8;

/// How many clients there may be under this limit of open files, after what else is needed.
#[must_use]
pub fn clients(limit: Option<u64>, reserve: u64, most: usize) -> usize {
    let left = limit.unwrap_or(u64::MAX).saturating_sub(reserve).max(CLIENTS_MIN);
    usize::try_from(left).unwrap_or(usize::MAX).min(most)
}

/// The same under the limit of this process.
#[must_use]
pub fn clients_here(reserve: u64, most: usize) -> usize {
    clients(getrlimit(Resource::Nofile).current, reserve, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_limit_leaves_is_for_clients() {
        assert_eq!(clients(Some(1024), RESERVE, 16_384), 896);
        assert_eq!(clients(Some(1_000_000), RESERVE, 16_384), 16_384);
        assert_eq!(clients(None, RESERVE, 16_384), 16_384);
        assert_eq!(clients(Some(64), RESERVE, 16_384), 8);
    }
}
