//! A private PostgreSQL cluster, and a database for each test.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rustix::process::Signal;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tempfile::TempDir;
use tokio::process::Command;
use url::Url;
use uuid::Uuid;

use crate::port::free_port;
use crate::process::{Launch, Process};
use crate::teardown;
use crate::wait::within;

/// How long the server may take to start, and `initdb` to prepare it.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long the server may take to stop when asked politely.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How long one small statement of the harness may take.
const LIMIT: Duration = Duration::from_secs(20);

/// PostgreSQL refuses to run as root; then it runs as this user, which its packages create.
const USER_INSTEAD_OF_ROOT: &str = "postgres";

/// A private server with a folder, a port and a password of its own. It ends when this guard is dropped.
#[derive(Debug)]
pub struct Postgres {
    process: Option<Process>,
    port: u16,
    password: String,
    user: Option<String>,
    programs: PathBuf,
    connections: u32,
    place: TempDir,
}

impl Postgres {
    /// Prepares and starts a server and waits until it accepts connections.
    pub async fn private() -> Result<Self> {
        Self::with_connections(300).await
    }

    /// A server that takes no more connections than this.
    pub async fn with_connections(connections: u32) -> Result<Self> {
        let place = tempfile::Builder::new().prefix("tasklane-postgres-").tempdir()?;
        let user = rustix::process::geteuid().is_root().then(|| USER_INSTEAD_OF_ROOT.to_owned());
        let mut server = Self {
            process: None,
            port: free_port()?,
            password: format!("{:032x}", rand::rng().random::<u128>()),
            user,
            programs: programs().await?,
            connections,
            place,
        };
        server.initialise().await?;
        server.start().await?;
        Ok(server)
    }

    /// The URL of its maintenance database, as a user who may do everything.
    pub fn url(&self) -> String {
        format!("postgres://postgres:{}@127.0.0.1:{}/postgres", self.password, self.port)
    }

    /// A fresh database on this server.
    pub async fn database(&self) -> Result<Database> {
        Database::create(&self.url()).await
    }

    /// Is it up?
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the server again after [`Postgres::stop`] or [`Postgres::crash`]: same port, same data.
    pub async fn start(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the server runs already");
        let settings = [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={}", self.port),
            "unix_socket_directories=".to_owned(),
            "shared_buffers=32MB".to_owned(),
            format!("max_connections={}", self.connections),
            "log_min_messages=warning".to_owned(),
        ];
        let mut process = Launch::new("postgres", self.programs.join("postgres"))
            .args(["-D".into(), self.data().into_os_string()])
            .args(settings.into_iter().flat_map(|setting| ["-c".to_owned(), setting]))
            .user(self.user.clone())
            .bare_env()
            // Its immediate shutdown: no child is left, nor is its shared memory.
            .on_parent_death("QUIT")
            .quiet()
            .spawn()?;
        let url = self.url();
        process.ready(START_LIMIT, async || connect(&url).await.map(Some)).await?.close().await?;
        self.process = Some(process);
        Ok(())
    }

    /// Stops the server: open transactions are rolled back, connections are closed, data are kept.
    pub async fn stop(&mut self) -> Result<()> {
        self.end(Signal::INT).await
    }

    /// Ends the server without any order; it recovers from its log at the next start.
    pub async fn crash(&mut self) -> Result<()> {
        self.end(Signal::QUIT).await
    }

    /// SIGKILL to the server and all its children at once, as the kernel does when memory ends.
    pub async fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the server is not running")?;
        process.kill_all();
        process.exited(STOP_LIMIT).await.map(drop)
    }

    /// SIGSTOP to the server and all its children: connections stay open, and nothing answers.
    pub fn freeze(&self) -> Result<()> {
        self.process.as_ref().context("the server is not running")?.signal_all(Signal::STOP);
        Ok(())
    }

    /// Lets a frozen server go on as if no time had passed.
    pub fn thaw(&self) -> Result<()> {
        self.process.as_ref().context("the server is not running")?.signal_all(Signal::CONT);
        Ok(())
    }

    async fn end(&mut self, signal: Signal) -> Result<()> {
        let mut process = self.process.take().context("the server is not running")?;
        process.signal(signal)?;
        process.exited(STOP_LIMIT).await.map(drop)
    }

    async fn initialise(&self) -> Result<()> {
        let password_file = self.place.path().join("password");
        fs::write(&password_file, &self.password)?;
        if let Some(user) = &self.user {
            let (uid, gid) = ids(user).await?;
            chown(self.place.path(), Some(uid), Some(gid))?;
            chown(&password_file, Some(uid), Some(gid))?;
        }
        let mut initdb = Launch::new("initdb", self.programs.join("initdb"))
            .args(["--auth=scram-sha-256", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"])
            .args(["--pgdata".into(), self.data().into_os_string()])
            .args(["--pwfile".into(), password_file.into_os_string()])
            .user(self.user.clone())
            .bare_env()
            .quiet()
            .spawn()?;
        let status = initdb.exited(START_LIMIT).await?;
        ensure!(status.success(), "initdb: {status}: {}", initdb.log());
        Ok(())
    }

    fn data(&self) -> PathBuf {
        self.place.path().join("data")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // SIGKILL, the process's own guard, would leave a segment of shared memory behind.
        if let Some(process) = &mut self.process
            && process.signal(Signal::QUIT).is_ok()
        {
            process.reap();
        }
    }
}

/// A database that is dropped, whoever is still connected, when this guard is dropped.
#[derive(Debug)]
pub struct Database {
    admin_url: String,
    name: String,
    url: String,
}

impl Database {
    /// Creates a database on the server of `admin_url`.
    pub async fn create(admin_url: &str) -> Result<Self> {
        let name = format!("test_{}", Uuid::now_v7().simple());
        let mut url: Url = admin_url.parse().context("the URL of the PostgreSQL server")?;
        url.set_path(&name);
        run(admin_url, format!("CREATE DATABASE {name}")).await?;
        Ok(Self { admin_url: admin_url.to_owned(), name, url: url.into() })
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection that finds the ledger's tables, and makes an application's where those are made.
    pub async fn connect(&self) -> Result<PgConnection> {
        let mut connection = connect(&self.url).await?;
        sqlx::query("SET search_path = public, tasklane").execute(&mut connection).await?;
        Ok(connection)
    }

    /// Its URL, the way leading through `addr`, a proxy before the same server.
    pub fn url_at(&self, addr: std::net::SocketAddr) -> Result<String> {
        let mut url: Url = self.url.parse()?;
        url.set_ip_host(addr.ip()).ok().context("the URL takes an address")?;
        url.set_port(Some(addr.port())).ok().context("the URL takes a port")?;
        Ok(url.into())
    }

    /// Ends every connection to the database, as an administrator would.
    pub async fn disconnect_all(&self) -> Result<()> {
        let name = &self.name;
        run(&self.admin_url, format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
            .await
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (url, name) = (self.admin_url.clone(), self.name.clone());
        // A server that has been stopped takes the database with it.
        teardown::run(&format!("dropping database {name}"), async move {
            match connect(&url).await {
                Ok(connection) => execute(connection, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await,
                Err(_) => Ok(()),
            }
        });
    }
}

async fn connect(url: &str) -> Result<PgConnection> {
    Ok(within(LIMIT, "a PostgreSQL connection", PgConnection::connect(url)).await??)
}

async fn run(url: &str, sql: String) -> Result<()> {
    execute(connect(url).await?, sql).await
}

async fn execute(mut connection: PgConnection, sql: String) -> Result<()> {
    let what = format!("PostgreSQL to run {sql:?}");
    within(LIMIT, &what, sqlx::query(AssertSqlSafe(sql)).execute(&mut connection)).await??;
    Ok(connection.close().await?)
}

/// The folder with `initdb` and `postgres`: the newest version Debian has installed, or what `pg_config` says.
async fn programs() -> Result<PathBuf> {
    if let Some(chosen) = std::env::var_os("TASKLANE_TEST_POSTGRES_DIR") {
        return Ok(chosen.into());
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path().join("bin"))))
        .filter(|(_, dir)| is_complete(dir))
        .max();
    if let Some((_, dir)) = newest {
        return Ok(dir);
    }
    let asked = Command::new("pg_config").arg("--bindir").output().await;
    let dir = asked.ok().map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    dir.filter(|dir| is_complete(dir))
        .context("no PostgreSQL found: install it, or set TASKLANE_TEST_POSTGRES_DIR to the folder of initdb")
}

fn is_complete(dir: &Path) -> bool {
    dir.join("initdb").is_file() && dir.join("postgres").is_file()
}

/// The numbers of a system user and its group.
async fn ids(user: &str) -> Result<(u32, u32)> {
    let mut numbers = Vec::new();
    for flag in ["-u", "-g"] {
        let output = Command::new("id").args([flag, user]).output().await.context("running id")?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        numbers.push(text.parse().with_context(|| format!("there is no user {user} to run PostgreSQL as"))?);
    }
    Ok((numbers[0], numbers[1]))
}
