//! The worker's settings: flags and environment before the file, the file before the defaults; then checked in pairs.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use tasklane_common::backoff::Backoff;
use tasklane_common::config::{Common, CommonArgs, ConfigError, File};
use tasklane_common::task::QueueName;

use crate::decide::RESULT_BYTES_MAX;

/// The broker closes a channel whose delivery stays unacked for so long (its default): custody must come before.
const BROKER_ACK_TIMEOUT_MS: u64 = 1_800_000;

/// Somebody waits for a cancellation.
const CANCEL_GRACE_MAX: Duration = Duration::from_secs(60);

/// A column of a table has room for so much.
const NAME_BYTES_MAX: usize = 64;

/// A page of tasks, and every process that reads one, has the results in memory.
const RESULT_BYTES_LIMIT: usize = 16 * 1024 * 1024;

/// Consumes tasks from RabbitMQ, runs their handlers, and settles the outcomes in the ledger.
///
/// Exit codes: 0 stopped as asked; 2 bad settings; 69 the ledger cannot be used; 70 internal error; 75 the lease was
/// lost and a handler could not be stopped, so that the process ended itself: start it again. Of doctor: 0 nothing to
/// mend, 1 something to mend, 2 bad settings.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "tasklane-worker", version, max_term_width = 100)]
pub struct WorkerArgs {
    /// doctor: look at broker and ledger, say what to mend, and end [default: work]
    #[arg(value_enum, value_name = "COMMAND")]
    pub command: Option<Command>,
    /// With doctor: print JSON
    #[arg(long, requires = "command")]
    pub json: bool,
    #[command(flatten)]
    /// What all programs have.
    pub common: CommonArgs,
    /// What people call this worker, shown with it [default: nothing beside host and process number]
    #[arg(long, env = "TASKLANE_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// Where /healthz, /readyz and /metrics listen [default: no listener]
    #[arg(long, env = "TASKLANE_METRICS_ADDR", value_name = "ADDR")]
    pub metrics_addr: Option<String>,
    /// Make the SQLite file of ledger_url if it is not there, instead of the producer [default: false]
    #[arg(long, env = "TASKLANE_CREATE_LEDGER", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub create_ledger: Option<bool>,
    /// The queues to consume, separated by commas [default: default]
    #[arg(long, env = "TASKLANE_QUEUES", value_name = "QUEUES", value_delimiter = ',')]
    pub queues: Option<Vec<QueueName>>,
    /// How many tasks run at once [default: 64]
    #[arg(long, env = "TASKLANE_CONCURRENCY", value_name = "N")]
    pub concurrency: Option<u16>,
    /// How long a lease lives without renewal [default: 15000]
    #[arg(long, env = "TASKLANE_LEASE_TTL_MS", value_name = "MS")]
    pub lease_ttl_ms: Option<u64>,
    /// How often the lease is renewed [default: 3000]
    #[arg(long, env = "TASKLANE_LEASE_RENEW_MS", value_name = "MS")]
    pub lease_renew_ms: Option<u64>,
    /// How long a delivery may stay unacked while its task runs; then the ledger alone holds it [default: 600000]
    #[arg(long, env = "TASKLANE_CUSTODY_AFTER_MS", value_name = "MS")]
    pub custody_after_ms: Option<u64>,
    /// How long one run may take when neither its handler nor its submission say [default: 3600000]
    #[arg(long, env = "TASKLANE_TASK_TIMEOUT_MS", value_name = "MS")]
    pub task_timeout_ms: Option<u64>,
    /// How long a run that shall be cancelled may take to end by itself; then it is ended [default: 5000]
    #[arg(long, env = "TASKLANE_CANCEL_GRACE_MS", value_name = "MS")]
    pub cancel_grace_ms: Option<u64>,
    /// How many bytes of JSON a result may have; a larger one discards its task [default: 1048576]
    #[arg(long, env = "TASKLANE_RESULT_BYTES_MAX", value_name = "BYTES")]
    pub result_bytes_max: Option<usize>,
}

/// What a program does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Command {
    /// Looks at broker and ledger and says what to mend.
    Doctor,
}

/// What a worker needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What every program needs to know.
    pub common: Common,
    /// What people call this worker. Defaults to nothing.
    pub name: Option<String>,
    /// Where `/healthz`, `/readyz` and `/metrics` listen. Defaults to no listener.
    pub metrics_addr: Option<SocketAddr>,
    /// Whether it makes the SQLite file of `ledger_url` if it is not there. Defaults to no: beside the producer's it would be
    /// another ledger.
    pub create_ledger: bool,
    /// The queues to consume. Defaults to `default`.
    pub queues: Vec<QueueName>,
    /// How many tasks run at once. Defaults to 64.
    pub concurrency: u16,
    /// How long a lease lives without renewal; a dead worker's tasks are taken over after it. Defaults to 15 s.
    pub lease_ttl: Duration,
    /// How often the lease is renewed; at most a third of the ttl. Defaults to 3 s.
    pub lease_renew: Duration,
    /// How long a delivery may stay unacked. Defaults to 10 min, under the broker's ack timeout of 30.
    pub custody_after: Duration,
    /// How long one run may take when neither handler nor submission say. Defaults to 1 h.
    pub task_timeout: Duration,
    /// How long a run that shall be cancelled may take to end by itself; at most a minute. Defaults to 5 s.
    pub cancel_grace: Duration,
    /// How many bytes of JSON a result may have; at most 16 MiB. Defaults to 1 MiB.
    pub result_bytes_max: usize,
    /// How long failed attempts wait when their handler does not say.
    pub backoff: Backoff,
}

impl WorkerArgs {
    /// Merges the sources and checks the result.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and key, or the settings, at fault.
    pub fn settings(&self, file: &File) -> Result<Settings, ConfigError> {
        let number = |flag: Option<u64>, file: Option<u64>, default| flag.or(file).unwrap_or(default);
        let millis = |flag, file, default| Duration::from_millis(number(flag, file, default));
        let metrics_addr = self.metrics_addr.as_ref().or(file.metrics_addr.as_ref()).map(|addr| {
            addr.parse().map_err(|_| {
                ConfigError::setting(
                    "metrics_addr",
                    format!("must be an address such as 127.0.0.1:9100, but is {addr:?}"),
                )
            })
        });
        let settings = Settings {
            common: self.common.resolve(file)?,
            name: self.name.clone().or_else(|| file.name.clone()),
            metrics_addr: metrics_addr.transpose()?,
            create_ledger: self.create_ledger.or(file.create_ledger).unwrap_or(false),
            queues: self.queues.clone().or_else(|| file.queues.clone()).unwrap_or_else(|| vec![QueueName::default()]),
            concurrency: self.concurrency.or(file.concurrency).unwrap_or(64),
            lease_ttl: millis(self.lease_ttl_ms, file.lease_ttl_ms, 15_000),
            lease_renew: millis(self.lease_renew_ms, file.lease_renew_ms, 3_000),
            custody_after: millis(self.custody_after_ms, file.custody_after_ms, 600_000),
            task_timeout: millis(self.task_timeout_ms, file.task_timeout_ms, 3_600_000),
            cancel_grace: millis(self.cancel_grace_ms, file.cancel_grace_ms, 5_000),
            result_bytes_max: self.result_bytes_max.or(file.result_bytes_max).unwrap_or(RESULT_BYTES_MAX),
            backoff: file.backoff.unwrap_or_default(),
        };
        settings.validate()?;
        Ok(settings)
    }
}

impl Settings {
    /// Refuses settings that make no sense, alone or together.
    ///
    /// # Errors
    /// [`ConfigError::Setting`] names them and what would be right.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let (ttl, renew) = (self.lease_ttl.as_millis(), self.lease_renew.as_millis());
        let fault = |setting, message: String| Err(ConfigError::setting(setting, message));
        let fits = |name: &String| (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control);
        if !self.name.as_ref().is_none_or(fits) {
            return fault("name", format!("must be 1 to {NAME_BYTES_MAX} bytes without control characters"));
        }
        if self.queues.is_empty() {
            return fault("queues", "must name at least one queue".to_owned());
        }
        if self.concurrency == 0 {
            return fault("concurrency", "must be between 1 and 65535, but is 0".to_owned());
        }
        if ttl < 1_000 {
            return fault("lease_ttl_ms", format!("must be at least 1000, but is {ttl}"));
        }
        if renew == 0 || renew * 3 > ttl {
            return fault(
                "lease_renew_ms and lease_ttl_ms",
                format!(
                    "the lease must be renewed at least three times in its ttl, but lease_renew_ms is {renew} and lease_ttl_ms is {ttl}"
                ),
            );
        }
        if !(1..BROKER_ACK_TIMEOUT_MS).contains(&u64::try_from(self.custody_after.as_millis()).unwrap_or(u64::MAX)) {
            return fault(
                "custody_after_ms",
                format!(
                    "must be between 1 and {}, under the broker's ack timeout, but is {}",
                    BROKER_ACK_TIMEOUT_MS - 1,
                    self.custody_after.as_millis()
                ),
            );
        }
        if self.task_timeout.is_zero() {
            return fault("task_timeout_ms", "must be at least 1, but is 0".to_owned());
        }
        if self.cancel_grace > CANCEL_GRACE_MAX {
            let (most, grace) = (CANCEL_GRACE_MAX.as_millis(), self.cancel_grace.as_millis());
            return fault("cancel_grace_ms", format!("must be at most {most}, but is {grace}"));
        }
        if !(1..=RESULT_BYTES_LIMIT).contains(&self.result_bytes_max) {
            let given = self.result_bytes_max;
            return fault("result_bytes_max", format!("must be from 1 to {RESULT_BYTES_LIMIT}, but is {given}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(arguments: &[&str]) -> String {
        let arguments = WorkerArgs::parse_from([&["tasklane-worker"], arguments].concat());
        arguments.settings(&File::default()).unwrap_err().to_string()
    }

    #[test]
    fn bad_pairs_are_named() {
        let pair = fault(&["--lease-ttl-ms", "3000", "--lease-renew-ms", "3000"]);
        assert!(pair.contains("lease_renew_ms is 3000 and lease_ttl_ms is 3000"), "{pair}");
        assert!(fault(&["--concurrency", "0"]).starts_with("concurrency:"));
        assert!(fault(&["--custody-after-ms", "1800000"]).starts_with("custody_after_ms:"));
        assert!(fault(&["--cancel-grace-ms", "60001"]).starts_with("cancel_grace_ms:"));
        assert_eq!(
            fault(&["--result-bytes-max", "16777217"]),
            "result_bytes_max: must be from 1 to 16777216, but is 16777217"
        );
        assert!(fault(&["--result-bytes-max", "0"]).starts_with("result_bytes_max: must be from 1"));
        for bad in ["", "a\nb", &"x".repeat(65)] {
            assert!(fault(&["--name", bad]).starts_with("name: must be 1 to 64 bytes"), "{bad:?}");
        }
        assert!(fault(&["--metrics-addr", "nowhere"]).contains("\"nowhere\""));
    }

    #[test]
    fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
        let arguments = WorkerArgs::parse_from(["tasklane-worker", "--concurrency", "3"]);
        let file = File { concurrency: Some(7), lease_ttl_ms: Some(20_000), ..File::default() };
        let settings = arguments.settings(&file).unwrap();
        assert_eq!((settings.concurrency, settings.lease_ttl), (3, Duration::from_secs(20)));
        assert_eq!(settings.lease_renew, Duration::from_secs(3));
    }
}
