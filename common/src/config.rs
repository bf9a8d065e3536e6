//! Settings: one file for all programs, and what all of them need.
//!
//! Flags, environment variables and the file name the same settings; a flag goes before the environment, the
//! environment before the file, the file before the default.

mod discard;
pub mod environment;
mod tables;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

pub use self::tables::{CommandTable, HttpTable, LimitTable, RouteTable};
use crate::backoff::Backoff;
use crate::broker::Address;
use crate::task::QueueName;
use crate::web::hosts::Hosts;

/// The file that is read when none is named and it is there.
pub const DEFAULT_FILE: &str = "tasklane.toml";

/// The shortest retention: who waits for a task's end must find the task.
pub const RETENTION_MS_MIN: u64 = 1_000;

/// The longest that one place may take for a bundle: others have nothing to do for as long.
pub const BUNDLE_MS_MAX: u64 = 60_000;

/// Everything that `tasklane.toml` may hold, for every program. Unknown keys are errors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// Where it lies, if it was read from somewhere.
    #[serde(skip)]
    pub path: Option<PathBuf>,
    /// Where the broker is.
    pub amqp_url: Option<SecretString>,
    /// Where the ledger is.
    pub ledger_url: Option<SecretString>,
    /// Doctor: where the broker's management API is.
    pub management_url: Option<SecretString>,
    /// Which log lines are shown.
    pub log: Option<String>,
    /// How log lines look.
    pub log_format: Option<LogFormat>,
    /// The OpenTelemetry collector that is sent traces.
    pub otlp_url: Option<String>,
    /// Which part of the traces that begin here is sent.
    pub trace_ratio: Option<f64>,
    /// The names by which clients call a program's listener.
    pub http_hosts: Option<Vec<String>>,
    /// Producer: where the HTTP API listens.
    pub http_addr: Option<String>,
    /// Producer: how often a task may start when its submission does not say.
    pub max_attempts: Option<i32>,
    /// Producer: which queue a kind goes to when its submission does not say; the first that matches.
    pub route: Vec<RouteTable>,
    /// Producer: how much runs at once, how often it starts, and how much may wait, in all workers.
    pub limit: Option<Vec<LimitTable>>,
    /// Producer: how long finished tasks of a queue are kept, where that is not `retention_ms`.
    pub queue_retention_ms: Option<BTreeMap<QueueName, u64>>,
    /// Worker: what people call it.
    pub name: Option<String>,
    /// Worker: where `/healthz`, `/readyz` and `/metrics` listen.
    pub metrics_addr: Option<String>,
    /// Worker: whether it makes the ledger's SQLite file if it is not there.
    pub create_ledger: Option<bool>,
    /// Worker: the queues to consume.
    pub queues: Option<Vec<QueueName>>,
    /// Worker: how many tasks run at once.
    pub concurrency: Option<u16>,
    /// Worker: how long a lease lives without renewal.
    pub lease_ttl_ms: Option<u64>,
    /// Worker: how often the lease is renewed.
    pub lease_renew_ms: Option<u64>,
    /// How long a shutdown waits for what is under way.
    pub shutdown_grace_ms: Option<u64>,
    /// Worker: how long a delivery may stay unacked while its task runs.
    pub custody_after_ms: Option<u64>,
    /// Worker: how long one run may take when neither handler nor submission say.
    pub task_timeout_ms: Option<u64>,
    /// Worker: how long a run that shall be cancelled may take to end by itself.
    pub cancel_grace_ms: Option<u64>,
    /// Worker: how long failed attempts wait.
    pub backoff: Option<Backoff>,
    /// Worker: how many bytes of JSON a result may have.
    pub result_bytes_max: Option<usize>,
    /// How many crashes of its worker a task may cause before it is discarded as poison.
    pub max_crashes: Option<i32>,
    /// How long finished tasks are kept.
    pub retention_ms: Option<u64>,
    /// How long one place may take for the tasks that share a message; 0: each has its own.
    pub bundle_ms: Option<u64>,
    /// Worker: programs that handle kinds.
    pub command: Vec<CommandTable>,
    /// Worker: HTTP services that handle kinds.
    pub http: Vec<HttpTable>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people. The default.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The flags and environment variables of every program.
#[derive(Debug, Clone, Default, Args)]
pub struct CommonArgs {
    /// The TOML file with settings [default: tasklane.toml, if present]
    #[arg(long, env = "TASKLANE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where RabbitMQ is.
    #[arg(
        long,
        env = "TASKLANE_AMQP_URL",
        hide_env_values = true,
        value_name = "URL",
        help = "RabbitMQ [default: amqp://guest:guest@127.0.0.1:5672/%2f]"
    )]
    pub amqp_url: Option<SecretString>,
    /// The ledger, sqlite:// or postgres:// [default: sqlite://tasklane.db]
    #[arg(long, env = "TASKLANE_LEDGER_URL", hide_env_values = true, value_name = "URL")]
    pub ledger_url: Option<SecretString>,
    /// For doctor: RabbitMQ's management API [default: port 15672 of RabbitMQ's host]
    #[arg(long, env = "TASKLANE_MANAGEMENT_URL", hide_env_values = true, value_name = "URL")]
    pub management_url: Option<SecretString>,
    /// Which log lines are shown, such as warn or info,tasklane_worker=debug [default: info]
    #[arg(long, env = "TASKLANE_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// How log lines look [default: text]
    #[arg(long, env = "TASKLANE_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// The OpenTelemetry collector (OTLP over HTTP) that is sent traces [default: none, no traces]
    #[arg(long, env = "TASKLANE_OTLP_URL", value_name = "URL")]
    pub otlp_url: Option<String>,
    /// Which part of the traces that begin here is sent, from 0 to 1 [default: 1]
    #[arg(long, env = "TASKLANE_TRACE_RATIO", value_name = "RATIO")]
    pub trace_ratio: Option<f64>,
    /// How long a shutdown waits for what is under way [default: 30000]
    #[arg(long, env = "TASKLANE_SHUTDOWN_GRACE_MS", value_name = "MS")]
    pub shutdown_grace_ms: Option<u64>,
    /// How many crashes of its worker a task may cause before it is discarded as poison [default: 3]
    #[arg(long, env = "TASKLANE_MAX_CRASHES", value_name = "N")]
    pub max_crashes: Option<i32>,
    /// How long finished tasks are kept [default: 604800000, 7 days]
    #[arg(long, env = "TASKLANE_RETENTION_MS", value_name = "MS")]
    pub retention_ms: Option<u64>,
    /// How long one place may take for the tasks that share a message [default: 0, each has its own]
    #[arg(long, env = "TASKLANE_BUNDLE_MS", value_name = "MS")]
    pub bundle_ms: Option<u64>,
    /// The names, separated by commas, by which clients call the listener; * for any [default: none beside addresses and local names]
    #[arg(long, env = "TASKLANE_HTTP_HOSTS", value_name = "NAMES", value_delimiter = ',')]
    pub http_hosts: Option<Vec<String>>,
}

/// What every program needs to know.
#[derive(Debug, Clone)]
pub struct Common {
    /// The settings file, if it holds a password.
    pub secret_file: Option<PathBuf>,
    /// Where the broker is.
    pub amqp_url: Address,
    /// Where the ledger is.
    pub ledger_url: SecretString,
    /// Where the broker's management API is. Defaults to port 15672 of the broker's host.
    pub management_url: Option<SecretString>,
    /// Which log lines are shown.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// The OpenTelemetry collector that is sent traces; without one there are none.
    pub otlp_url: Option<String>,
    /// Which part of the traces that begin here is sent, from 0 to 1; those of a client go by its own decision. Defaults to 1.
    pub trace_ratio: f64,
    /// How long a shutdown waits for what is under way.
    pub shutdown_grace_ms: u64,
    /// How many crashes of its worker a task may cause.
    pub max_crashes: i32,
    /// How long finished tasks are kept.
    pub retention_ms: u64,
    /// How long one place may take for the tasks that share a message; 0: each has its own.
    pub bundle_ms: u64,
    /// The names by which clients call the listener. Defaults to none beside addresses and local names.
    pub http_hosts: Hosts,
}

/// Why a program does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file named by flag or environment cannot be read.
    #[error("cannot read the config file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or value that does not fit.
    #[error("{}:{line}:{column}: {message}{}", path.display(), key.as_ref().map(|key| format!(" (key `{key}`)")).unwrap_or_default())]
    File {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The column, counted from 1.
        column: usize,
        /// The key on that line, where there is one.
        key: Option<String>,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A setting, or a pair of settings, makes no sense.
    #[error("{setting}: {message}")]
    Setting {
        /// The setting, or settings.
        setting: &'static str,
        /// What is wrong, and what would be right.
        message: String,
    },
}

impl ConfigError {
    /// A setting that makes no sense.
    pub fn setting(setting: &'static str, message: impl Into<String>) -> Self {
        Self::Setting { setting, message: message.into() }
    }
}

impl CommonArgs {
    /// Reads the file: the named one, or [`DEFAULT_FILE`] where there is one.
    ///
    /// # Errors
    /// When a named file cannot be read, or a file does not fit.
    pub fn read_file(&self) -> Result<File, ConfigError> {
        match &self.config {
            Some(path) => File::read(path),
            None if Path::new(DEFAULT_FILE).exists() => File::read(Path::new(DEFAULT_FILE)),
            None => Ok(File::default()),
        }
    }

    /// Merges flags and environment with the file and the defaults.
    ///
    /// # Errors
    /// [`ConfigError::Setting`] for an address of another scheme, or a number out of its range.
    pub fn resolve(&self, file: &File) -> Result<Common, ConfigError> {
        let url = |flag: &Option<SecretString>, file: &Option<SecretString>, default: &str| {
            flag.clone().or_else(|| file.clone()).unwrap_or_else(|| default.into())
        };
        let common = Common {
            secret_file: file.path.clone().filter(|_| file.has_password()),
            amqp_url: url(&self.amqp_url, &file.amqp_url, "amqp://guest:guest@127.0.0.1:5672/%2f")
                .expose_secret()
                .parse()
                .map_err(|fault: String| ConfigError::setting("amqp_url", fault))?,
            ledger_url: url(&self.ledger_url, &file.ledger_url, "sqlite://tasklane.db"),
            management_url: self.management_url.clone().or_else(|| file.management_url.clone()),
            log: self.log.clone().or_else(|| file.log.clone()).unwrap_or_else(|| "info".to_owned()),
            log_format: self.log_format.or(file.log_format).unwrap_or_default(),
            otlp_url: self.otlp_url.clone().or_else(|| file.otlp_url.clone()),
            trace_ratio: self.trace_ratio.or(file.trace_ratio).unwrap_or(1.0),
            shutdown_grace_ms: self.shutdown_grace_ms.or(file.shutdown_grace_ms).unwrap_or(30_000),
            max_crashes: self.max_crashes.or(file.max_crashes).unwrap_or(3),
            retention_ms: self.retention_ms.or(file.retention_ms).unwrap_or(604_800_000),
            bundle_ms: self.bundle_ms.or(file.bundle_ms).unwrap_or(0),
            http_hosts: Hosts::parse(self.http_hosts.as_ref().or(file.http_hosts.as_ref()).map_or(&[], Vec::as_slice))
                .map_err(|fault| ConfigError::setting("http_hosts", fault))?,
        };
        common.validate()?;
        Ok(common)
    }
}

impl Common {
    /// [`Common::bundle_ms`] as a time.
    #[must_use]
    pub fn bundle(&self) -> Duration {
        Duration::from_millis(self.bundle_ms)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let web =
            |url: &SecretString| ["http://", "https://"].iter().any(|scheme| url.expose_secret().starts_with(scheme));
        if self.management_url.as_ref().is_some_and(|url| !web(url) || url::Url::parse(url.expose_secret()).is_err()) {
            return Err(ConfigError::setting("management_url", "must be an address such as http://host:15672"));
        }
        if self.otlp_url.as_deref().is_some_and(|url| !is_collector(url)) {
            return Err(ConfigError::setting(
                "otlp_url",
                "must be an address such as http://127.0.0.1:4318, without a password: OTEL_EXPORTER_OTLP_HEADERS has room for one",
            ));
        }
        if !(0.0..=1.0).contains(&self.trace_ratio) {
            return Err(ConfigError::setting(
                "trace_ratio",
                format!("must be from 0 to 1, but is {}", self.trace_ratio),
            ));
        }
        if self.max_crashes < 1 {
            return Err(ConfigError::setting(
                "max_crashes",
                format!("must be at least 1, but is {}", self.max_crashes),
            ));
        }
        if self.bundle_ms > BUNDLE_MS_MAX {
            return Err(ConfigError::setting(
                "bundle_ms",
                format!("must be at most {BUNDLE_MS_MAX}, but is {}", self.bundle_ms),
            ));
        }
        if self.retention_ms < RETENTION_MS_MIN {
            return Err(ConfigError::setting(
                "retention_ms",
                format!("must be at least {RETENTION_MS_MIN}, but is {}", self.retention_ms),
            ));
        }
        Ok(())
    }
}

impl File {
    /// Reads a settings file.
    ///
    /// # Errors
    /// When it cannot be read, or does not fit: then with line, column and key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Ok(Self { path: Some(path.to_owned()), ..Self::parse(path, &text)? })
    }

    /// Whether one of its addresses has a password.
    fn has_password(&self) -> bool {
        let urls = [&self.amqp_url, &self.ledger_url, &self.management_url];
        urls.into_iter().flatten().map(ExposeSecret::expose_secret).any(|url| {
            let given = url::Url::parse(url).ok().and_then(|url| url.password().map(str::to_owned));
            given.is_some_and(|password| password != "guest") || url.contains("password=")
        })
    }

    /// Reads the text of a settings file; `path` is told in errors.
    ///
    /// # Errors
    /// When it does not fit: with line, column and key.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start).min(text.len());
            let before = text.get(..at).unwrap_or_default();
            let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
            let line_text = text.get(line_start..).and_then(|rest| rest.lines().next()).unwrap_or_default();
            ConfigError::File {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                column: before[line_start..].chars().count() + 1,
                key: line_text.split_once('=').map(|(key, _)| key.trim()).filter(|key| is_key(key)).map(str::to_owned),
                message: error.message().to_owned(),
            }
        })
    }
}

/// An address to which a path can be added, and which may be logged.
fn is_collector(url: &str) -> bool {
    url::Url::parse(url).is_ok_and(|url| {
        ["http", "https"].contains(&url.scheme())
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    })
}

/// Only what can be a key is told as one: a line that lacks its key may be an address, password and all.
fn is_key(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

#[cfg(test)]
mod tests;
