//! The producer's settings.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use tasklane_common::config::{Common, CommonArgs, ConfigError, File, LimitTable, RETENTION_MS_MIN};
use tasklane_common::limit::{Bounds, Scope};
use tasklane_common::task::QueueName;

use crate::request::{MAX_ATTEMPTS_MAX, Rules};
use crate::routing::Routes;

/// The longest retention of a queue: 100 years.
const QUEUE_RETENTION_MS_MAX: u64 = 100 * 365 * 86_400_000;

/// Tasklane's producer: takes tasks over HTTP, records them in the ledger, and publishes them to RabbitMQ.
///
/// Exit codes: 0 stopped as asked, 2 bad flags or settings, 69 the ledger is unavailable or the address is taken,
/// 70 an internal error, 130 stopped at once by a second signal. Of doctor: 0 nothing to mend, 1 something to mend,
/// 2 bad flags or settings.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "tasklane-producer", version)]
pub struct ProducerArgs {
    /// doctor: look at broker and ledger, say what to mend, and end [default: serve]
    #[arg(value_enum, value_name = "COMMAND")]
    pub command: Option<Command>,
    /// With doctor: print JSON
    #[arg(long, requires = "command")]
    pub json: bool,
    /// What every program needs.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Where the HTTP API listens [default: 127.0.0.1:8080]
    #[arg(long, env = "TASKLANE_HTTP_ADDR", value_name = "ADDR")]
    pub http_addr: Option<String>,
    /// How often a task may start when its submission does not say [default: 20]
    #[arg(long, env = "TASKLANE_MAX_ATTEMPTS", value_name = "N")]
    pub max_attempts: Option<i32>,
}

/// What a program does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Command {
    /// Looks at broker and ledger and says what to mend.
    Doctor,
}

/// The settings of one run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What every program needs.
    pub common: Common,
    /// Where the HTTP API listens: host and port. Defaults to `127.0.0.1:8080`.
    pub http_addr: String,
    /// What the settings add to submissions: `max_attempts`, which defaults to 20, and the `[[route]]` tables.
    pub rules: Rules,
    /// The `[[limit]]` tables; without any the ledger's limits stay as they are.
    pub limits: Option<Vec<(Scope, Bounds)>>,
    /// How long finished tasks of a queue are kept, where that is not `retention_ms`; told to all processes at the start.
    /// Without any the ledger's stay as they are.
    pub queue_retention: Option<BTreeMap<QueueName, Duration>>,
}

impl ProducerArgs {
    /// Merges flags, environment, file and defaults.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file's line, or the setting.
    pub fn resolve(&self) -> Result<Settings, ConfigError> {
        self.settings(&self.common.read_file()?)
    }

    /// Merges flags and environment with this file and the defaults.
    ///
    /// # Errors
    /// [`ConfigError::Setting`] naming the setting.
    pub fn settings(&self, file: &File) -> Result<Settings, ConfigError> {
        let settings = Settings {
            common: self.common.resolve(file)?,
            http_addr: self
                .http_addr
                .clone()
                .or_else(|| file.http_addr.clone())
                .unwrap_or_else(|| "127.0.0.1:8080".to_owned()),
            rules: Rules {
                max_attempts: self.max_attempts.or(file.max_attempts).unwrap_or(20),
                routes: Routes::new(&file.route)?,
            },
            limits: file.limit.as_ref().map(|tables| tables.iter().map(LimitTable::check).collect()).transpose()?,
            queue_retention: file.queue_retention_ms.as_ref().map(queue_retention).transpose()?,
        };
        settings.validate()?;
        Ok(settings)
    }
}

impl Settings {
    fn validate(&self) -> Result<(), ConfigError> {
        let port = self.http_addr.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        if port.is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
            let message = format!("must be host:port, such as 127.0.0.1:8080, but is {}", self.http_addr);
            return Err(ConfigError::setting("http_addr", message));
        }
        let attempts = self.rules.max_attempts;
        if !(1..=MAX_ATTEMPTS_MAX).contains(&attempts) {
            let message = format!("must be from 1 to {MAX_ATTEMPTS_MAX}, but is {attempts}");
            return Err(ConfigError::setting("max_attempts", message));
        }
        Ok(())
    }
}

fn queue_retention(given: &BTreeMap<QueueName, u64>) -> Result<BTreeMap<QueueName, Duration>, ConfigError> {
    let checked = |(queue, ms): (&QueueName, &u64)| {
        if (RETENTION_MS_MIN..=QUEUE_RETENTION_MS_MAX).contains(ms) {
            return Ok((queue.clone(), Duration::from_millis(*ms)));
        }
        let range = format!("must be from {RETENTION_MS_MIN} to {QUEUE_RETENTION_MS_MAX}");
        Err(ConfigError::setting("queue_retention_ms", format!("{range}, but is {ms} for queue {queue}")))
    };
    given.iter().map(checked).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use tasklane_common::task::Kind;

    fn resolve(file: &str, flags: &[&str]) -> Result<Settings, String> {
        let mut config = tempfile::NamedTempFile::new().unwrap();
        config.write_all(file.as_bytes()).unwrap();
        let path = config.path().to_str().unwrap().to_owned();
        let args = ["tasklane-producer", "--config", &path].into_iter().chain(flags.iter().copied());
        let args = ProducerArgs::try_parse_from(args).map_err(|error| error.to_string())?;
        args.resolve().map_err(|error| error.to_string().replace(&path, "FILE"))
    }

    #[test]
    fn a_flag_goes_before_the_file() {
        let file = "http_addr = \"127.0.0.1:1\"\nmax_attempts = 3\n[[route]]\nkind = \"email.*\"\nqueue = \"emails\"\n";
        let settings = resolve(file, &["--http-addr", "localhost:2"]).unwrap();
        assert_eq!((settings.http_addr.as_str(), settings.rules.max_attempts), ("localhost:2", 3));
        let queue = settings.rules.routes.queue_of(&Kind::parse("email.welcome").unwrap());
        assert_eq!(queue.as_str(), "emails");
        let kept = resolve("[queue_retention_ms]\naudit = 7776000000\n", &[]).unwrap().queue_retention.unwrap();
        assert_eq!(kept[&QueueName::parse("audit").unwrap()], Duration::from_secs(90 * 86_400));
    }

    #[test]
    fn bad_settings_are_named() {
        assert!(resolve("", &["--http-addr", "8080"]).unwrap_err().starts_with("http_addr: "));
        assert!(resolve("max_attempts = 0", &[]).unwrap_err().starts_with("max_attempts: "));
        assert!(resolve("[[route]]\nkind = \"a b\"\nqueue = \"q\"", &[]).unwrap_err().starts_with("route.kind: "));
        let limit = |text: &str| resolve(&format!("[[limit]]\n{text}"), &[]).unwrap_err();
        assert!(limit("queue = \"a\"\nkind = \"b\"\nmax_running = 1").starts_with("limit: must name one of"));
        assert!(limit("key = \"a*b\"\nmax_running = 1").starts_with("limit: key: `a*b` must be"));
        assert!(
            limit("kind = \"a\"\nmax_running = 0").starts_with("limit: kind:a: max_running must be from 1 to 100000")
        );
        assert!(limit("kind = \"a\"\nmax_queued = 1").starts_with("limit: kind:a: max_queued is for queues only"));
        assert!(limit("kind = \"a\"\nrate = { per_ms = 5 }").contains("missing field `tasks`"));
        for (given, shown) in
            [("{ short = 999 }", "999 for queue short"), ("{ long = 3153600000001 }", "3153600000001 for")]
        {
            let error = resolve(&format!("queue_retention_ms = {given}"), &[]).unwrap_err();
            assert!(error.starts_with("queue_retention_ms: must be from 1000 to 3153600000000, but is "), "{error}");
            assert!(error.contains(shown), "{error}");
        }
        let error = resolve("queue_retention_ms = { \"No Queue\" = 1000 }", &[]).unwrap_err();
        assert!(error.starts_with("FILE:1:") && error.contains("must match [a-z0-9_-]+"), "{error}");
        assert!(resolve("port = 1", &[]).unwrap_err().starts_with("FILE:1:1: unknown field `port`"));
    }
}
