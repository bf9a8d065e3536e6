//! What the settings and this machine say by themselves.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use super::{Finding, Role, Subject};
use crate::web::files;

/// How many clients a producer should have room for.
const CLIENTS_OF_PRODUCER: u64 = 1024;
/// Under such a ttl a short pause of machine or ledger costs the lease.
const TTL_SHORT: Duration = Duration::from_secs(5);

pub(super) fn look(subject: &Subject) -> Vec<Finding> {
    let mut findings = vec![Finding::ok("settings", "they can be read and fit each other")];
    findings.extend(subject.common.secret_file.as_deref().map(settings_file));
    let limit = getrlimit(Resource::Nofile);
    match subject.role {
        // A producer raises its own limit as far as it may.
        Role::Producer => findings.push(open_files(limit.maximum, CLIENTS_OF_PRODUCER, "clients", 1)),
        Role::Worker { concurrency, lease_ttl, lease_renew, .. } => {
            findings.push(open_files(limit.current, u64::from(concurrency), "running tasks", files::PER_TASK));
            findings.push(lease(lease_ttl, lease_renew));
        }
    }
    findings
}

/// A settings file that holds a password.
fn settings_file(file: &Path) -> Finding {
    const CHECK: &str = "settings.file";
    match others_may(file) {
        Some(mode) => {
            let advice = format!("chmod 600 {}, or give the addresses by the environment", file.display());
            Finding::warn(
                CHECK,
                format!("{} holds a password, and others may read it ({mode:o})", file.display()),
                advice,
            )
        }
        None => Finding::ok(CHECK, format!("{} holds a password, and others may not read it", file.display())),
    }
}

/// The mode of a file that users beside its owner and group may read or write.
pub(super) fn others_may(file: &Path) -> Option<u32> {
    let mode = file.metadata().ok()?.permissions().mode() & 0o777;
    (mode & 0o006 != 0).then_some(mode)
}

/// Whether the limit has room for so many of what needs so many files each.
fn open_files(limit: Option<u64>, wanted: u64, what: &str, each: u64) -> Finding {
    const CHECK: &str = "host.open_files";
    let Some(limit) = limit else { return Finding::ok(CHECK, "no limit") };
    let room = limit.saturating_sub(files::RESERVE) / each;
    let seen = format!("{limit} may be open, room for {room} {what}");
    if room >= wanted {
        return Finding::ok(CHECK, seen);
    }
    let needed = files::RESERVE + wanted * each;
    let advice = format!("raise it to {needed} or more: ulimit -n, or LimitNOFILE= of the systemd unit");
    Finding::warn(CHECK, format!("{seen} of {wanted}"), advice)
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
        let tight = open_files(Some(256), 64, "running tasks", 6);
        assert_eq!(
            (tight.verdict, &*tight.message),
            (Verdict::Warn, "256 may be open, room for 21 running tasks of 64")
        );
        assert!(tight.advice.is_some_and(|advice| advice.starts_with("raise it to 512 or more")));
        let enough = open_files(Some(1152), 1024, "clients", 1);
        assert_eq!((enough.verdict, &*enough.message), (Verdict::Ok, "1152 may be open, room for 1024 clients"));
        assert_eq!(open_files(None, 200, "clients", 1).verdict, Verdict::Ok);
        assert_eq!(lease(Duration::from_secs(3), Duration::from_secs(1)).verdict, Verdict::Warn);
        assert_eq!(lease(Duration::from_secs(15), Duration::from_secs(3)).verdict, Verdict::Ok);
    }
}
