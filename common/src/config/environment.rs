//! Environment variables that look like settings and are none.

use std::collections::BTreeSet;
use std::ffi::OsString;

/// What all variables of Tasklane begin with.
const PREFIX: &str = "TASKLANE_";

/// How many letters may differ between a variable and the setting that was meant.
const DISTANCE_MAX: usize = 3;

/// The most variables that are named.
const NAMED_MAX: usize = 20;

/// The variables that are settings of a program.
pub const SETTINGS: [&str; 26] = [
    "TASKLANE_AMQP_URL",
    "TASKLANE_BUNDLE_MS",
    "TASKLANE_CANCEL_GRACE_MS",
    "TASKLANE_CONCURRENCY",
    "TASKLANE_CONFIG",
    "TASKLANE_CREATE_LEDGER",
    "TASKLANE_CUSTODY_AFTER_MS",
    "TASKLANE_HTTP_ADDR",
    "TASKLANE_HTTP_HOSTS",
    "TASKLANE_LEASE_RENEW_MS",
    "TASKLANE_LEASE_TTL_MS",
    "TASKLANE_LEDGER_URL",
    "TASKLANE_LOG",
    "TASKLANE_LOG_FORMAT",
    "TASKLANE_MANAGEMENT_URL",
    "TASKLANE_MAX_ATTEMPTS",
    "TASKLANE_MAX_CRASHES",
    "TASKLANE_METRICS_ADDR",
    "TASKLANE_NAME",
    "TASKLANE_OTLP_URL",
    "TASKLANE_QUEUES",
    "TASKLANE_RESULT_BYTES_MAX",
    "TASKLANE_RETENTION_MS",
    "TASKLANE_SHUTDOWN_GRACE_MS",
    "TASKLANE_TASK_TIMEOUT_MS",
    "TASKLANE_TRACE_RATIO",
];

/// Variables of the command `tasklane`, and those that a worker gives to the programs it starts.
const OTHERS: [&str; 6] =
    ["TASKLANE_ATTEMPT", "TASKLANE_BY", "TASKLANE_FENCE", "TASKLANE_KIND", "TASKLANE_TASK_ID", "TASKLANE_URL"];

/// Logs a warning for each variable of this process that was probably meant to be a setting.
pub(crate) fn warn_of_strays() {
    for (name, meant) in strays(std::env::vars_os().map(|(name, _)| name)) {
        tracing::warn!(variable = name, "this variable is no setting, and is ignored: is {meant} meant?");
    }
}

/// The variables among these that are no settings but nearly, with the setting that is nearest. Others, such as those
/// that Kubernetes sets for a service called `tasklane`, belong to somebody else.
fn strays(names: impl Iterator<Item = OsString>) -> BTreeSet<(String, &'static str)> {
    let ours = names.filter_map(|name| name.into_string().ok()).filter(|name| name.starts_with(PREFIX));
    let unknown = ours.filter(|name| !SETTINGS.contains(&name.as_str()) && !OTHERS.contains(&name.as_str()));
    let near = unknown.filter_map(|name| {
        let distances = SETTINGS.map(|setting| (strsim::osa_distance(&name, setting), setting));
        let (distance, meant) = distances.into_iter().min()?;
        (distance <= DISTANCE_MAX).then_some((name, meant))
    });
    near.take(NAMED_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Vec<(String, &'static str)> {
        strays(names.iter().map(OsString::from)).into_iter().collect()
    }

    #[test]
    fn a_slip_of_the_pen_is_told_with_what_was_meant() {
        for (name, meant) in [
            ("TASKLANE_CONCURENCY", "TASKLANE_CONCURRENCY"),
            ("TASKLANE_QUEUE", "TASKLANE_QUEUES"),
            ("TASKLANE_LEASE_TTL", "TASKLANE_LEASE_TTL_MS"),
            ("TASKLANE_AMPQ_URL", "TASKLANE_AMQP_URL"),
        ] {
            assert_eq!(found(&[name]), [(name.to_owned(), meant)]);
        }
    }

    #[test]
    fn settings_and_what_belongs_to_others_are_left_alone() {
        let others = ["TASKLANE_SERVICE_HOST", "TASKLANE_PRODUCER_PORT_8080_TCP", "TASKLANE_TEST_OPLOG", "CONCURENCY"];
        assert_eq!(found(&[&SETTINGS[..], &OTHERS[..], &others[..]].concat()), []);
    }
}
