//! The conformance suite over SQLite, and what only SQLite promises.

use super::*;
use crate::ledger::conformance::{Store, suite};
use crate::ledger::{SCHEMA_VERSION, open};
use crate::state::{Event, TRANSITIONS};

async fn store() -> Store {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("sqlite://{}", folder.path().join("ledger.db").display());
    Store::new([open(&address).await.unwrap(), open(&address).await.unwrap()], folder)
}

suite!(store);

#[tokio::test]
async fn a_newer_schema_is_refused_in_clear_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    drop(SqliteLedger::open(&path).await.unwrap());
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
    let error = SqliteLedger::open(&path).await.unwrap_err();
    let told = error.to_string();
    assert!(matches!(error, LedgerError::NewerSchema { .. }), "{told}");
    assert!(told.contains("schema version 2, but this release knows only up to 1"), "{told}");
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_named() {
    let error = open("sqlite:///nowhere/at/all/ledger.db").await.unwrap_err().to_string();
    assert!(error.contains("/nowhere/at/all/ledger.db"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no.db");
    std::fs::write(&path, "this is no database, and long enough to have been one").unwrap();
    let error = SqliteLedger::open(&path).await.unwrap_err().to_string();
    assert!(error.contains("no.db") && error.contains("not a database"), "{error}");
}

#[tokio::test]
async fn commits_are_synced_and_the_log_is_write_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let connection = schema::open_writer(&path).unwrap();
    let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0));
    assert_eq!(pragma("journal_mode").unwrap(), rusqlite::types::Value::Text("wal".to_owned()));
    assert_eq!(pragma("synchronous").unwrap(), rusqlite::types::Value::Integer(2), "2 is FULL");
}

/// The SQL of this module holds the codes of states; they must be those of the state machine.
#[test]
fn the_codes_in_the_sql_are_those_of_the_machine() {
    let from = |event| {
        let mut codes: Vec<_> =
            TRANSITIONS.iter().filter(|(_, by, _)| *by == event).map(|(from, ..)| from.code()).collect();
        codes.sort_unstable();
        codes
    };
    assert_eq!(from(Event::Claim), [0, 1, 2, 4]);
    assert_eq!(from(Event::PutBack), [0, 1, 2, 4]);
    assert_eq!(from(Event::MarkQueued), [0, 1, 4]);
    assert_eq!(from(Event::Strand), [2]);
    assert_eq!(from(Event::Replay), [6, 7]);
    assert_eq!(from(Event::Complete), [3]);
    assert_eq!(State::ALL.into_iter().filter(|state| state.is_final()).map(State::code).min(), Some(5));
}

#[tokio::test]
async fn a_write_that_fails_takes_nobody_along() {
    let folder = tempfile::tempdir().unwrap();
    let writer = Writer::spawn(schema::open_writer(&folder.path().join("ledger.db")).unwrap()).unwrap();
    let good = |name: &'static str| {
        writer.write(1, move |db| db.execute("INSERT INTO queues (name, head_at) VALUES (?1, 0)", [name]))
    };
    let bad = writer.write(1, |db| db.execute("INSERT INTO nowhere VALUES (1)", []));
    let (before, failed, after) = tokio::join!(good("before"), bad, good("after"));
    assert_eq!((before.unwrap(), after.unwrap()), (1, 1));
    assert!(failed.unwrap_err().to_string().contains("nowhere"));
}
