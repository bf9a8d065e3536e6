//! What the settings and this machine say by themselves.

use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use super::{Finding, Role, Subject};

/// What a process needs besides its tasks and clients: connections, logs, the ledger.
const FILES_BASE: u64 = 128;
/// What one running task may need: three pipes of a command, or a connection, and their shadows.
const FILES_PER_TASK: u64 = 6;
/// What a producer needs for its clients.
const FILES_OF_PRODUCER: u64 = 1024;
/// Under such a ttl a short pause of machine or ledger costs the lease.
const TTL_SHORT: Duration = Duration::from_secs(5);

pub(super) fn look(subject: &Subject) -> Vec<Finding> {
    let mut findings = vec![Finding::ok("settings", "they can be read and fit each other")];
    let limit = getrlimit(Resource::Nofile);
    match subject.role {
        // A producer raises its own limit as far as it may.
        Role::Producer => findings.push(open_files(limit.maximum, FILES_OF_PRODUCER)),
        Role::Worker { concurrency, lease_ttl, lease_renew, .. } => {
            findings.push(open_files(limit.current, FILES_BASE + FILES_PER_TASK * u64::from(concurrency)));
            findings.push(lease(lease_ttl, lease_renew));
        }
    }
    findings
}

fn open_files(limit: Option<u64>, needed: u64) -> Finding {
    match limit {
        Some(limit) if limit < needed => Finding::warn(
            "host.open_files",
            format!("{limit} may be open, and up to {needed} may be needed"),
            "raise it: ulimit -n, or LimitNOFILE= of the systemd unit",
        ),
        Some(limit) => Finding::ok("host.open_files", format!("{limit} may be open")),
        None => Finding::ok("host.open_files", "no limit"),
    }
}

/// Pairs that cannot work are refused with the settings; this is about what is tight.
fn lease(ttl: Duration, renew: Duration) -> Finding {
    let seen = format!("lives {} ms, renewed every {} ms", ttl.as_millis(), renew.as_millis());
    if ttl < TTL_SHORT {
        let advice = "a pause of machine or ledger that is longer stops all tasks of the worker: 15000 is the default";
        return Finding::warn("lease", seen, advice);
    }
    Finding::ok("lease", seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn few_files_and_short_leases_are_warned_of() {
        assert_eq!(open_files(Some(100), 200).verdict, Verdict::Warn);
        assert_eq!(open_files(Some(200), 200).verdict, Verdict::Ok);
        assert_eq!(open_files(None, 200).verdict, Verdict::Ok);
        assert_eq!(lease(Duration::from_secs(3), Duration::from_secs(1)).verdict, Verdict::Warn);
        assert_eq!(lease(Duration::from_secs(15), Duration::from_secs(3)).verdict, Verdict::Ok);
    }
}
