//! The ledger beside an application's own tables, where an earlier release has left it, and where something is in its way.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection};

use super::super::layout::UNSCHEMED;
use super::super::schema::MIGRATIONS;
use super::PostgresLedger;
use super::server::Database;
use crate::ledger::conformance::{cancelled, complete, get, granted, one, settle, worker};
use crate::ledger::{LedgerError, SCHEMA_VERSION, Settled, Transacted};
use crate::state::State;
use crate::task::{Json, TaskId};

/// What Flyway keeps, an application that counts its migrations as our earlier releases did, and its own tasks.
const APPLICATION: &str = "
CREATE TABLE schema_version (installed_rank int PRIMARY KEY, version varchar(50), success boolean);
INSERT INTO schema_version VALUES (1, '10', true);
CREATE TABLE tasks (id serial PRIMARY KEY, title text NOT NULL);
INSERT INTO tasks (title) VALUES ('theirs');
CREATE TABLE workers (name text);
CREATE TABLE queues (name text);
CREATE FUNCTION now_ms() RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'";

async fn run(connection: &mut PgConnection, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection).await.unwrap();
}

async fn number(connection: &mut PgConnection, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(connection).await.unwrap()
}

/// A ledger as a release of this version left it, with one task that is queued.
async fn earlier(connection: &mut PgConnection, version: i64) -> TaskId {
    for step in &MIGRATIONS[..usize::try_from(version).unwrap()] {
        run(connection, *step).await;
    }
    let id = TaskId::new();
    run(
        connection,
        format!(
            "CREATE TABLE schema_version (version bigint PRIMARY KEY);
             INSERT INTO schema_version VALUES ({version});
             INSERT INTO tasks (id, kind, queue, state, args, max_attempts, created_at, run_at)
             VALUES ('{id}', 'test.work', 'default', 2, '{{}}', 3, 1, 1)"
        ),
    )
    .await;
    id
}

/// Why no ledger can be opened; nothing was made on the way.
async fn refused(database: &Database, url: &str) -> String {
    let sql = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'";
    let mut connection = database.connect_as_application().await;
    let before = number(&mut connection, sql).await;
    let error = PostgresLedger::connect(url).await.unwrap_err();
    assert!(matches!(error, LedgerError::Unsuitable(_)), "{error}");
    assert_eq!(number(&mut connection, sql).await, before, "{error}");
    error.to_string()
}

async fn refused_as_admin(database: &Database) -> String {
    refused(database, &database.url()).await
}

/// The application's tables are neither believed nor touched, and its handlers' transactions find them.
#[tokio::test]
async fn an_application_may_have_tables_of_our_names() {
    let database = Database::create().await;
    let mut application = database.connect_as_application().await;
    run(&mut application, APPLICATION).await;
    let ledger = PostgresLedger::connect(&database.url()).await.unwrap();
    let (holder, id) = (worker(&ledger).await, one(&ledger).await);
    let fence = granted(&ledger, id, holder).await.fence;
    let work = async |connection: &mut PgConnection| {
        sqlx::query("INSERT INTO tasks (title) VALUES ('by a handler')").execute(connection).await.map(|_| Json::null())
    };
    let done = ledger.transact((id, fence), Duration::from_secs(30), work).await.unwrap();
    assert!(matches!(done, Transacted::Committed(_)), "{done:?}");
    assert_eq!(get(&ledger, id).await.state, State::Completed);
    let theirs = "SELECT count(*) FROM tasks WHERE title IN ('theirs', 'by a handler')";
    assert_eq!(number(&mut application, theirs).await, 2);
    assert_eq!(number(&mut application, "SELECT count(*) FROM schema_version WHERE version = '10'").await, 1);
    assert_eq!(number(&mut application, "SELECT count(*) FROM tasklane.tasks").await, 1);
    PostgresLedger::connect(&database.url()).await.unwrap();
}

/// What a release of any earlier version has recorded goes on under this one, and that release is kept out.
#[tokio::test]
async fn every_earlier_ledger_is_moved_into_the_schema() {
    for version in 1..=UNSCHEMED {
        let database = Database::create().await;
        let mut application = database.connect_as_application().await;
        let id = earlier(&mut application, version).await;
        let ledger = PostgresLedger::connect(&database.url()).await.unwrap();
        let there =
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S')";
        assert_eq!(
            number(&mut application, there).await,
            1,
            "version {version}: what tells its release that it is too old"
        );
        assert_eq!(number(&mut application, "SELECT max(version) FROM schema_version").await, SCHEMA_VERSION);
        let functions = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace";
        assert_eq!(number(&mut application, functions).await, 0, "version {version}");
        let holder = worker(&ledger).await;
        let fence = granted(&ledger, id, holder).await.fence;
        assert_eq!(settle(&ledger, id, fence, complete()).await, Settled::Applied);
        let other = one(&ledger).await;
        assert_eq!(cancelled(&ledger, other, "old").await, State::Accepted);
        drop(ledger);
        PostgresLedger::connect(&database.url()).await.unwrap();
        assert_eq!(number(&mut application, "SELECT count(*) FROM tasklane.schema_version").await, 1);
    }
}

/// Also one that was kept in a schema by the address's search path, be it this very one.
#[tokio::test]
async fn an_earlier_ledger_is_found_by_the_search_path() {
    for schema in ["tasklane", "Other \"one\""] {
        let database = Database::create().await;
        let quoted = super::super::layout::quoted(schema);
        let mut application = database.connect_as_application().await;
        run(&mut application, format!("CREATE SCHEMA {quoted}; SET search_path = {quoted}")).await;
        let id = earlier(&mut application, UNSCHEMED).await;
        let name: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&mut application).await.unwrap();
        run(&mut application, format!("ALTER DATABASE {name} SET search_path = {quoted}, public")).await;
        let ledger = PostgresLedger::connect(&database.url()).await.unwrap();
        assert_eq!(get(&ledger, id).await.state, State::Queued, "{schema}");
        drop(ledger);
        PostgresLedger::connect(&database.url()).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_in_the_way_is_named() {
    let database = Database::create().await;
    let mut application = database.connect_as_application().await;
    run(&mut application, "CREATE SCHEMA tasklane; CREATE VIEW tasklane.report AS SELECT 1 AS one").await;
    let error = refused_as_admin(&database).await;
    assert!(error.contains("schema tasklane of the database") && error.contains("holds report"), "{error}");

    // Once it is gone, an empty schema is as good as none.
    run(&mut application, "DROP VIEW tasklane.report").await;
    let ledger = PostgresLedger::connect(&database.url()).await.unwrap();
    let id = one(&ledger).await;
    drop(ledger);

    run(&mut application, "ALTER TABLE tasklane.queues RENAME TO theirs; CREATE TABLE tasklane.queues (name int)")
        .await;
    let error = refused_as_admin(&database).await;
    assert!(error.contains("not a whole ledger: its table queues"), "{error}");
    run(&mut application, "DROP TABLE tasklane.queues; ALTER TABLE tasklane.theirs RENAME TO queues").await;
    assert_eq!(get(&PostgresLedger::connect(&database.url()).await.unwrap(), id).await.state, State::Accepted);
}

/// A table that an earlier release shared with an application is nobody's for sure.
#[tokio::test]
async fn what_may_belong_to_others_is_not_moved() {
    for (spoilt, named) in [
        ("DROP TABLE schema_version; CREATE TABLE schema_version (version bigint, name text)", "public.schema_version"),
        ("UPDATE schema_version SET version = 7777", "public.schema_version"),
        ("DELETE FROM schema_version", "public.schema_version"),
        ("ALTER TABLE limits RENAME TO gone; CREATE TABLE limits (scope text)", "public.limits"),
    ] {
        let database = Database::create().await;
        let mut application = database.connect_as_application().await;
        earlier(&mut application, UNSCHEMED).await;
        run(&mut application, spoilt).await;
        let error = refused_as_admin(&database).await;
        assert!(error.contains(named) && error.contains("tasklane_now()"), "{error}");
    }
}

#[tokio::test]
async fn two_ledgers_in_a_database_are_refused() {
    let database = Database::create().await;
    drop(PostgresLedger::connect(&database.url()).await.unwrap());
    earlier(&mut database.connect_as_application().await, UNSCHEMED).await;
    let error = refused_as_admin(&database).await;
    assert!(error.contains("two ledgers") && error.contains("schema public"), "{error}");
}

/// The rights that are needed are told; a schema that an administrator has made is enough.
#[tokio::test]
async fn missing_rights_are_named() {
    let database = Database::create().await;
    let mut admin = database.connect_as_application().await;
    let user = format!("user_{}", TaskId::new().0.simple());
    run(&mut admin, format!("CREATE ROLE {user} LOGIN PASSWORD 'a'")).await;
    let url = database.url_as(&user, "a");
    let error = refused(&database, &url).await;
    assert!(error.contains("CREATE SCHEMA tasklane AUTHORIZATION") && error.contains(&user), "{error}");
    run(&mut admin, "CREATE SCHEMA tasklane").await;
    let error = refused(&database, &url).await;
    assert!(error.contains("GRANT USAGE, CREATE ON SCHEMA tasklane TO"), "{error}");
    run(&mut admin, format!("GRANT USAGE, CREATE ON SCHEMA tasklane TO {user}")).await;
    one(&PostgresLedger::connect(&url).await.unwrap()).await;

    // Of an earlier ledger its owner must be there.
    let old = Database::create().await;
    let mut owner = old.connect_as_application().await;
    earlier(&mut owner, UNSCHEMED).await;
    run(&mut owner, format!("CREATE SCHEMA tasklane; GRANT USAGE, CREATE ON SCHEMA tasklane TO {user}")).await;
    run(&mut owner, format!("GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}")).await;
    let error = refused(&old, &old.url_as(&user, "a")).await;
    assert!(error.contains("start once as its owner"), "{error}");
    drop(PostgresLedger::connect(&old.url()).await.unwrap());
    run(&mut owner, format!("REVOKE ALL ON SCHEMA tasklane FROM {user}")).await;
    let error = refused(&old, &old.url_as(&user, "a")).await;
    assert!(error.contains("GRANT USAGE ON SCHEMA tasklane TO"), "{error}");
    for connection in [&mut owner, &mut admin] {
        run(connection, format!("DROP OWNED BY {user} CASCADE")).await;
    }
    run(&mut admin, format!("DROP ROLE {user}")).await;
}
