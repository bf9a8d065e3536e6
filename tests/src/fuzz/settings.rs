//! The settings file, from its text to what both programs make of it.

use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use secrecy::ExposeSecret;
use tasklane_common::clock;
use tasklane_common::config::{ConfigError, File, RouteTable};
use tasklane_common::task::Kind;
use tasklane_producer::ProducerArgs;
use tasklane_producer::routing::Routes;
use tasklane_worker::Registry;
use tasklane_worker::builtin;
use tasklane_worker::config::WorkerArgs;
use tasklane_worker::process_group::ProcessGroups;
use url::Url;

/// How many tables of handlers are tried: each looks for a program, or makes an HTTP client.
const HANDLERS_MAX: usize = 3;
/// Secrets shorter than this may stand in a text by chance.
const SECRET_BYTES_MIN: usize = 8;

/// Reads a file for producer and worker. A fault has a place within the file; what is accepted can be reckoned with;
/// and no address is told, neither in an error nor in a debug print.
pub fn settings(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match File::parse(Path::new("t.toml"), text) {
        Ok(file) => check_file(&file, text),
        Err(error) => check_place(&error, text),
    }
}

fn check_place(error: &ConfigError, text: &str) {
    let ConfigError::File { line, column, .. } = error else { return };
    let lines: Vec<_> = text.split('\n').collect();
    assert!((1..=lines.len()).contains(line), "line {line} of {}", lines.len());
    let columns = lines.get(line - 1).map_or(0, |line| line.chars().count());
    assert!((1..=columns + 1).contains(column), "column {column} of {columns}");
}

fn check_file(file: &File, text: &str) {
    let mut told = format!("{file:?}");
    match (ProducerArgs::default()).settings(file) {
        Ok(settings) => {
            told += &format!("{settings:?}");
            check_duration(Duration::from_millis(settings.common.shutdown_grace_ms));
            check_duration(Duration::from_millis(settings.common.retention_ms));
        }
        Err(error) => told += &error.to_string(),
    }
    match (WorkerArgs::default()).settings(file) {
        Ok(settings) => {
            told += &format!("{settings:?}");
            let times = [settings.lease_ttl, settings.lease_renew, settings.custody_after, settings.task_timeout];
            times.into_iter().for_each(check_duration);
            [1, 2, 1000, i32::MAX].into_iter().for_each(|attempt| {
                check_duration(settings.backoff.delay_with(attempt, 1.0));
            });
        }
        Err(error) => told += &error.to_string(),
    }
    if let Ok(routes) = Routes::new(&file.route) {
        check_routes(&routes, &file.route);
    }
    told += &handlers(file);
    let addresses = [&file.amqp_url, &file.ledger_url, &file.management_url];
    let secrets = addresses.into_iter().flatten().chain(file.http.iter().flat_map(|table| table.headers.values()));
    for secret in secrets.map(ExposeSecret::expose_secret).filter(|secret| secret.len() >= SECRET_BYTES_MIN) {
        // What also stands where no secret belongs may be told there.
        assert!(text.matches(secret).count() != 1 || !told.contains(secret), "{secret:?} is told: {told}");
    }
}

/// Any moment of now may be added to it, in the clocks of this process and of the ledger.
fn check_duration(time: Duration) {
    assert!(Instant::now().checked_add(time).is_some(), "{time:?}");
    let now_ms = Timestamp::now().as_millisecond();
    assert!(now_ms.checked_add(clock::millis(time)).is_some(), "{time:?}");
}

/// The first route that matches decides.
fn check_routes(routes: &Routes, tables: &[RouteTable]) {
    for name in tables.iter().map(|table| table.kind.replace('*', "x")) {
        let Ok(kind) = Kind::parse(&name) else { continue };
        let matches = |pattern: &str| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        };
        let first = tables.iter().find(|table| matches(&table.kind));
        assert_eq!(Some(routes.queue_of(&kind)), first.map(|table| table.queue.clone()), "{name}");
    }
}

/// What is said of the handlers' tables.
fn handlers(file: &File) -> String {
    let mut file = file.clone();
    file.command.truncate(HANDLERS_MAX);
    file.http.truncate(HANDLERS_MAX);
    // A client for https reads all of the system's certificates each time.
    file.http.retain(|table| Url::parse(&table.url).is_ok_and(|url| url.scheme() != "https"));
    match builtin::register(Registry::builder(), &file, &ProcessGroups::new()) {
        Ok(builder) => builder.build().err().map(|error| error.to_string()).unwrap_or_default(),
        Err(error) => error.to_string(),
    }
}

pub(super) fn large() -> Vec<Vec<u8>> {
    [
        format!("log = {}", "[".repeat(100_000)),
        format!("log{} = 1", ".a".repeat(100_000)),
        format!("{}{}", "[a.".repeat(10_000), "]".repeat(10_000)),
        format!("{} = 1", "k".repeat(1 << 20)),
        format!("retention_ms = {}", "9".repeat(1 << 16)),
        "[[route]]\nkind = \"*\"\nqueue = \"q\"\n".repeat(1_000),
    ]
    .map(String::into_bytes)
    .into()
}
