//! Handlers from the settings file: programs and HTTP services.
//!
//! What runs and where it goes is set here, by the worker's operator, and never by a submission.

mod command;
mod http;
mod output;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tasklane_common::config::{ConfigError, File};
use tasklane_common::task::Guarantee;

pub use self::command::CommandHandler;
pub use self::http::HttpHandler;
use crate::process_group::ProcessGroups;
use crate::registry::RegistryBuilder;

/// The longest timeout of a kind: 30 days.
const TIMEOUT_MS_MAX: u64 = 30 * 86_400_000;

/// Adds a handler for every `[[command]]` and `[[http]]` of the settings file. Commands run in `groups`.
///
/// # Errors
/// [`ConfigError::Setting`] names the kind whose table could never work, and why.
pub fn register(
    mut builder: RegistryBuilder,
    file: &File,
    groups: &ProcessGroups,
) -> Result<RegistryBuilder, ConfigError> {
    for table in &file.command {
        let handler = CommandHandler::new(table, groups.clone())?;
        builder = builder.named(table.kind.clone(), Arc::new(handler));
    }
    for table in &file.http {
        builder = builder.named(table.kind.clone(), Arc::new(HttpHandler::new(table)?));
    }
    Ok(builder)
}

/// A table's timeout, if it is one.
fn timeout(
    setting: &'static str,
    kind: &impl std::fmt::Display,
    ms: Option<u64>,
) -> Result<Option<Duration>, ConfigError> {
    match ms {
        Some(ms) if !(1..=TIMEOUT_MS_MAX).contains(&ms) => Err(ConfigError::setting(
            setting,
            format!("kind {kind}: timeout_ms must be between 1 and {TIMEOUT_MS_MAX}, but is {ms}"),
        )),
        ms => Ok(ms.map(Duration::from_millis)),
    }
}

/// A table's guarantee, if it can be given to what does not run inside of the worker.
fn guarantee(
    setting: &'static str,
    kind: &impl std::fmt::Display,
    guarantee: Guarantee,
) -> Result<Guarantee, ConfigError> {
    match guarantee {
        Guarantee::AtLeastOnce | Guarantee::AtMostOnce => Ok(guarantee),
        Guarantee::Transactional => Err(ConfigError::setting(
            setting,
            format!(
                "kind {kind}: guarantee must be at_least_once or at_most_once: transactional is for Rust handlers, which \
                 can write in the ledger's own transaction"
            ),
        )),
    }
}

/// Whether nothing could be begun since the machine, or this process, has no more of something.
fn is_scarcity(error: &io::Error) -> bool {
    let scarce = [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::NOBUFS];
    error.raw_os_error().is_some_and(|code| scarce.contains(&Errno::from_raw_os_error(code)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::decide::RESULT_BYTES_MAX;
    use crate::handler::TaskContext;
    use crate::registry::Registry;
    use tasklane_common::backoff::{Delays, Retry};
    use tasklane_common::task::{ErrorKind, Fence, Kind, QueueName, TaskId};
    use tokio::time::Instant;
    use tokio_util::sync::CancellationToken;

    /// The second attempt of a task of kind `test.kind`, under fence 7.
    pub(crate) fn context() -> TaskContext {
        TaskContext {
            id: TaskId::new(),
            kind: Kind::parse("test.kind").unwrap(),
            queue: QueueName::default(),
            attempt: 2,
            max_attempts: 5,
            fence: Fence(7),
            deadline: Instant::now() + Duration::from_secs(60),
            cancellation: CancellationToken::new(),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
            result_bytes_max: RESULT_BYTES_MAX,
            transaction: Default::default(),
        }
    }

    fn registered(toml: &str) -> Result<Registry, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tasklane.toml");
        std::fs::write(&path, toml).unwrap();
        let file = File::read(&path).unwrap();
        let builder = register(Registry::builder(), &file, &ProcessGroups::new()).map_err(|error| error.to_string())?;
        builder.build().map_err(|error| error.to_string())
    }

    #[test]
    fn tables_become_handlers_with_their_options() {
        let registry = registered(
            r#"
            [[command]]
            kind = "a"
            argv = ["sh", "-c", "true"]
            queue = "slow"
            timeout_ms = 1500
            guarantee = "at_most_once"
            retry = { policy = "fixed", delays_ms = [10, 20], max_age_ms = 60000 }
            discard_errors = ["timeout"]

            [[http]]
            kind = "b"
            url = "https://user:password@example.org/path"
            headers = { Authorization = "Bearer 1" }
            "#,
        )
        .unwrap();
        let options = registry.get(&Kind::parse("a").unwrap()).unwrap().options();
        assert_eq!(options.queue.unwrap().as_str(), "slow");
        assert_eq!(options.timeout, Some(Duration::from_millis(1500)));
        assert_eq!(options.guarantee, Guarantee::AtMostOnce);
        let delays = Delays::Fixed(vec![Duration::from_millis(10), Duration::from_millis(20)]);
        assert_eq!(options.retry, Retry { delays: Some(delays), max_age: Some(Duration::from_secs(60)) });
        assert_eq!(options.discard_errors, [ErrorKind::Timeout]);
        assert!(registry.get(&Kind::parse("b").unwrap()).is_some());
    }

    #[test]
    fn a_table_that_cannot_work_is_refused() {
        for (table, fault) in [
            ("[[command]]\nkind = 'k'\nargv = []", "command: kind k: argv must begin with a program"),
            (
                "[[command]]\nkind = 'k'\nargv = ['no-such-program']",
                "kind k: the program no-such-program is not in PATH",
            ),
            ("[[command]]\nkind = 'k'\nargv = ['/dev/null']", "kind k: /dev/null is no executable file"),
            ("[[command]]\nkind = 'k'\nargv = ['sh']\ntimeout_ms = 0", "timeout_ms must be between 1 and 2592000000"),
            (
                "[[command]]\nkind = 'k'\nargv = ['sh']\nguarantee = 'transactional'",
                "command: kind k: guarantee must be at_least_once or at_most_once: transactional is for Rust handlers",
            ),
            (
                "[[http]]\nkind = 'k'\nurl = 'http://x/'\nguarantee = 'transactional'",
                "http: kind k: guarantee must be at_least_once or at_most_once",
            ),
            ("[[http]]\nkind = 'k'\nurl = 'nowhere'", "http: kind k: url: relative URL without a base"),
            ("[[http]]\nkind = 'k'\nurl = 'ftp://x/'", "url must begin with http:// or https://, not ftp:"),
            ("[[http]]\nkind = 'k'\nurl = 'http://x/'\nheaders = { 'a b' = '' }", "\"a b\" is no header name"),
            ("[[http]]\nkind = 'k'\nurl = 'http://x/'\nheaders = { Tasklane-Fence = '1' }", "cannot be configured"),
            ("[[http]]\nkind = 'k'\nurl = 'http://x/'\nheaders = { a = \"\\n\" }", "the value of a is no header value"),
            (
                "[[http]]\nkind = 'k'\nurl = 'http://x/'\n[[command]]\nkind = 'k'\nargv = ['sh']",
                "kind k has two handlers",
            ),
        ] {
            let error = registered(table).unwrap_err();
            assert!(error.contains(fault), "{table}\n{error}");
        }
    }
}
