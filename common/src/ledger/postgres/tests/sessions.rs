//! Connections and their sessions: how many there are, what they are told, and which server they lead to.

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

use super::server::Database;
use super::{ledger, worker};
use crate::ledger::conformance::{new_task, recorded, submission, until};
use crate::ledger::postgres::address;
use crate::ledger::postgres::connections::Source;
use crate::ledger::postgres::fault::Fault;
use crate::ledger::postgres::session::{self, OWN, Wanted};
use crate::ledger::{Ledger, LedgerError};

/// What rests is the server's again: only what the process cannot do without stays.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_rest_are_given_back() {
    let (ledger, database) = ledger().await;
    worker(&ledger).await;
    recorded(&ledger, 3, |_| {}).await;
    let many = (0..20).map(|_| async { ledger.queues().await.unwrap() });
    futures::future::join_all(many).await;
    until("the spare connections to go", async || (database.connections().await <= 2).then_some(())).await;
    ledger.ping().await.unwrap();
}

/// A pooler knows the parameters of a startup that every client sends, and refuses or ignores others.
#[tokio::test]
async fn the_startup_says_nothing_that_a_pooler_does_not_know() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://u:p@{}/db?sslmode=disable", listener.local_addr().unwrap());
    let accepting = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut bytes = vec![0; socket.read_u32().await.unwrap() as usize - 4];
        socket.read_exact(&mut bytes).await.unwrap();
        bytes
    };
    let source = Source::new(address::servers(&url).unwrap(), OWN, Wanted::Writable);
    let (bytes, _) = futures::join!(accepting, source.connect());
    let words: Vec<_> = bytes[4..].split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word)).collect();
    let mut names: Vec<_> = words.chunks(2).map(|pair| &*pair[0]).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    assert_eq!(names, ["DateStyle", "TimeZone", "application_name", "client_encoding", "database", "user"]);
}

/// Whatever role and database say: the settings that promises rest on are those of the session.
#[tokio::test]
async fn a_session_has_its_settings_whatever_the_database_says() {
    let database = Database::create().await;
    for setting in ["synchronous_commit = off", "lock_timeout = '1s'", "default_transaction_isolation = serializable"] {
        database.set(setting).await;
    }
    let mut connection = database.session().await;
    for (name, value) in OWN.iter().chain(&[("synchronous_commit", "on"), ("TimeZone", "UTC")]) {
        let sql = AssertSqlSafe(format!(
            "SELECT current_setting('{name}') = '{value}' OR '{value}' IN (SELECT setting FROM pg_settings WHERE name = '{name}')"
        ));
        let told: bool = sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap();
        assert!(told, "{name} is not {value}");
    }
    let isolation: String = sqlx::query_scalar("SHOW transaction_isolation").fetch_one(&mut connection).await.unwrap();
    assert_eq!(isolation, "read committed");
}

fn is_shared(answer: Result<(), Fault>) {
    assert!(matches!(&answer, Err(Fault::Refused(text)) if text.contains("pool_mode=session")), "{answer:?}");
}

/// A pooler that pools transactions hands a session that is somebody's to somebody else, or takes it away.
#[tokio::test]
async fn a_session_that_is_handed_around_is_refused() {
    let database = Database::create().await;
    let mut connection = PgConnection::connect(&database.url()).await.unwrap();
    let mark = session::begin(&mut connection, OWN, Wanted::Writable).await.unwrap();
    session::check(&mut connection, mark, Wanted::Writable).await.unwrap();
    is_shared(session::begin(&mut connection, OWN, Wanted::Writable).await.map(drop));
    let mut other = PgConnection::connect(&database.url()).await.unwrap();
    is_shared(session::check(&mut other, mark, Wanted::Writable).await);
    // What a pooler of sessions does between two clients.
    sqlx::query("DISCARD ALL").execute(&mut connection).await.unwrap();
    session::begin(&mut connection, OWN, Wanted::Writable).await.unwrap();
}

/// Of several servers the one that takes writes is found, and found again.
#[tokio::test]
async fn the_server_that_takes_writes_is_found() {
    let (standby, primary) = (Database::create().await, Database::create().await);
    standby.set("default_transaction_read_only = on").await;
    let of = |url: &str| address::servers(url).unwrap();
    let all = [of("postgres://u@127.0.0.1:1/db"), of(&standby.url()), of(&primary.url())].concat();
    let source = Source::new(all, OWN, Wanted::Writable);
    for _ in 0..2 {
        let (mut connection, _) = source.connect().await.unwrap();
        let row = sqlx::query("SELECT current_database()").fetch_one(&mut connection).await.unwrap();
        assert!(primary.url().contains(&row.get::<String, _>(0)));
    }
    let none = Source::new([of("postgres://u@127.0.0.1:1/db"), of(&standby.url())].concat(), OWN, Wanted::Writable);
    let fault = none.connect().await.unwrap_err();
    assert!(matches!(&fault, Fault::ReadOnly(text) if text.contains("127.0.0.1:1: ")), "{fault:?}");
}

/// A ledger that can only be read is no ledger: that is told, and its connections are not used again.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_no_writes_any_more_is_told_and_left() {
    let (ledger, database) = ledger().await;
    recorded(&ledger, 1, |_| {}).await;
    database.set("default_transaction_read_only = on").await;
    database.disconnect_all().await;
    let error = until("the ledger to say why", async || {
        let error = ledger.ping().await.err()?;
        error.to_string().contains("takes no writes: default_transaction_read_only is on").then_some(error)
    })
    .await;
    assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
    assert!(ledger.record(submission(vec![new_task()])).await.unwrap_err().is_retryable());
    database.set("default_transaction_read_only = off").await;
    until("the ledger to be back", async || ledger.ping().await.ok()).await;
    recorded(&ledger, 1, |_| {}).await;
}

/// The same in a session that is open already: the next look at it says so.
#[tokio::test]
async fn an_open_session_that_takes_no_writes_any_more_is_found_out() {
    let database = Database::create().await;
    let source = Source::new(address::servers(&database.url()).unwrap(), OWN, Wanted::Writable);
    let (mut connection, mark) = source.connect().await.unwrap();
    sqlx::query("SET default_transaction_read_only = on").execute(&mut connection).await.unwrap();
    let fault = session::check(&mut connection, mark, Wanted::Writable).await.unwrap_err();
    assert!(matches!(fault, Fault::ReadOnly(_)), "{fault:?}");
    session::check(&mut connection, mark, Wanted::Any).await.unwrap();
}

/// However long those wait who ask for much, what keeps the whole going has connections of its own.
#[tokio::test(flavor = "multi_thread")]
async fn slow_reads_hold_up_no_upkeep() {
    let (ledger, _database) = ledger().await;
    recorded(&ledger, 1, |_| {}).await;
    let mut slow = Vec::new();
    for _ in 0..ledger.shared.most() {
        slow.push(ledger.shared.lend().await.unwrap());
    }
    ledger.ping().await.unwrap();
    assert!(ledger.next_due().await.unwrap().is_some());
    assert_eq!(ledger.abandoned(1).await.unwrap(), []);
}
