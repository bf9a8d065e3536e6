//! A PostgreSQL server for this test process, and a database for each test.
//!
//! The server is the one of `TASKLANE_TEST_PG_URL`, as a user who may create databases, or else a private one. Where
//! PostgreSQL is not installed the tests fail: nothing is skipped.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use url::Url;
use uuid::Uuid;

use crate::ledger::postgres::connections;
use crate::ledger::postgres::session::Wanted;

/// Prepares a server in a folder that only it can read, starts it on a socket in there, and says so. When the test
/// process ends, however it does, its end of the standard input closes: then the server ends and the folder goes.
const SCRIPT: &str = r#"
trap '' INT TERM
place=$(mktemp -d) || exit 1
as=
if [ "$(id -u)" = 0 ]; then chown postgres "$place" && as='setpriv --reuid=postgres --regid=postgres --clear-groups'; fi
cd "$place" || exit 1
$as "$1/initdb" --pgdata="$place/data" --username=postgres --auth=trust --encoding=UTF8 --locale=C --no-sync >&2 || exit 1
$as "$1/pg_ctl" start --wait --silent --pgdata="$place/data" --log="$place/log" --options="-h '' -k $place \
    -c fsync=off -c shared_buffers=32MB -c max_connections=300 -c autovacuum_naptime=5s" >&2 || exit 1
echo "$place"
read -r _
$as "$1/pg_ctl" stop --mode=immediate --silent --pgdata="$place/data" >&2
cd / && rm -rf "$place"
"#;

/// A database of a test's own; dropped with everything in it, whoever is still connected.
pub(super) struct Database {
    server: Url,
    name: String,
}

impl Database {
    pub(super) async fn create() -> Self {
        let server = Url::parse(server()).unwrap();
        let database = Self { server, name: format!("test_{}", Uuid::now_v7().simple()) };
        database.administer(format!("CREATE DATABASE {} ENCODING 'UTF8' TEMPLATE template0", database.name)).await;
        database
    }

    pub(super) fn url(&self) -> String {
        let mut url = self.server.clone();
        url.set_path(&self.name);
        url.into()
    }

    /// The address as another user would give it.
    pub(super) fn url_as(&self, user: &str, password: &str) -> String {
        let mut url = Url::parse(&self.url()).unwrap();
        url.set_username(user).unwrap();
        url.set_password(Some(password)).unwrap();
        url.into()
    }

    /// A connection that is none of the ledger's, and finds its tables.
    pub(super) async fn connect(&self) -> PgConnection {
        let mut connection = self.connect_as_application().await;
        sqlx::query("SET search_path = public, tasklane").execute(&mut connection).await.unwrap();
        connection
    }

    /// A session like the ledger's own.
    pub(super) async fn session(&self) -> PgConnection {
        connections::own(&self.url(), Wanted::Writable).unwrap().connect().await.unwrap().0
    }

    /// A connection as an application has it.
    pub(super) async fn connect_as_application(&self) -> PgConnection {
        PgConnection::connect(&self.url()).await.unwrap()
    }

    /// Ends all connections to the database, as a restart of the server would.
    pub(super) async fn disconnect_all(&self) {
        let name = &self.name;
        self.administer(format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
            .await;
    }

    /// How many connections to it there are.
    pub(super) async fn connections(&self) -> i64 {
        let sql =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
        sqlx::query_scalar(sql).fetch_one(&mut self.connect().await).await.unwrap()
    }

    /// Sets something for the sessions that come.
    pub(super) async fn set(&self, setting: &str) {
        self.administer(format!("ALTER DATABASE {} SET {setting}", self.name)).await;
    }

    /// Lets the server refuse new connections to the database, or take them again.
    pub(super) async fn allow_connections(&self, allowed: bool) {
        self.administer(format!("ALTER DATABASE {} ALLOW_CONNECTIONS {allowed}", self.name)).await;
    }

    async fn administer(&self, sql: String) {
        let mut connection = PgConnection::connect(self.server.as_str()).await.unwrap();
        sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = PgConnection::connect(server.as_str()).await.unwrap();
                let sql = AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"));
                sqlx::query(sql).execute(&mut connection).await.unwrap();
            });
        });
        if dropping.join().is_err() {
            eprintln!("the database {} could not be dropped", self.name);
        }
    }
}

/// The address of the server that all tests of this process share.
fn server() -> &'static str {
    static ADDRESS: OnceLock<String> = OnceLock::new();
    ADDRESS.get_or_init(|| match std::env::var("TASKLANE_TEST_PG_URL") {
        Ok(url) => url,
        Err(_) => start(),
    })
}

fn start() -> String {
    /// Held open until the process ends.
    static LIFELINE: OnceLock<(Child, ChildStdin)> = OnceLock::new();
    let mut child = Command::new("sh")
        .args(["-c", SCRIPT, "postgres-for-tests"])
        .arg(programs())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut place = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut place).unwrap();
    assert!(!place.is_empty(), "a private PostgreSQL server could not be started");
    let stdin = child.stdin.take().unwrap();
    LIFELINE.set((child, stdin)).unwrap();
    format!("postgres://postgres@localhost/postgres?host={}", place.trim())
}

/// The folder with `initdb` and `pg_ctl`, of the newest version that is installed.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path().join("bin"))))
        .filter(|(_, folder)| folder.join("initdb").exists())
        .max();
    let asked = || {
        let output = Command::new("pg_config").arg("--bindir").output().ok()?;
        Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim())).filter(|it| it.join("initdb").exists())
    };
    newest.map(|(_, folder)| folder).or_else(asked).expect("PostgreSQL is not installed, and the tests need it")
}
