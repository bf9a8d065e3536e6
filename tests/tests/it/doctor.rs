//! `doctor` says what is wrong with broker and ledger, in time, in both forms, without changing anything.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result};
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tasklane_common::ledger::SCHEMA_VERSION;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::postgres::Postgres;
use tasklane_tests::stack::{Program, Stack, Start};
use tasklane_tests::{eventually, on_both_ledgers};
use tokio::time::Instant;

const LIMIT: Duration = Duration::from_secs(30);

/// However silent the other side is.
const ANSWER_LIMIT: Duration = Duration::from_secs(25);

/// Stands in addresses and must not be seen again.
const PASSWORD: &str = "s3cr3t-Pa55";

const HANDLER: &str = "[[command]]\nkind = \"test.true\"\nargv = [\"true\"]\n";
const QUEUE: &str = "tasklane.q.default";

/// What may be odd on the machine of the tests.
const OF_THE_MACHINE: [&str; 4] = ["broker.version", "host.open_files", "ledger.file_system", "ledger.disk"];

/// The exit code and the JSON document.
struct Visit {
    code: Option<i32>,
    report: Value,
}

async fn visit<P: Program>(start: Start<P>) -> Result<Visit> {
    let (status, log) = start.arg("doctor").arg("--json").env("TASKLANE_LOG", "off").fail().await?;
    assert!(!log.contains(PASSWORD), "the password is told: {log}");
    assert!(!log.contains("panicked"), "{log}");
    let report = serde_json::from_str(&log).with_context(|| format!("not JSON: {log}"))?;
    Ok(Visit { code: status.code(), report })
}

impl Visit {
    fn findings(&self) -> Vec<&Value> {
        self.report["findings"].as_array().map(|all| all.iter().collect()).unwrap_or_default()
    }

    /// The verdict, the message and the advice of one check.
    fn of(&self, check: &str) -> Result<(String, String)> {
        let found = self.findings().into_iter().find(|finding| finding["check"] == check);
        let finding = found.with_context(|| format!("no {check}: {:#}", self.report))?;
        let text = format!("{} {}", finding["message"], finding["advice"]);
        Ok((finding["verdict"].as_str().unwrap_or_default().to_owned(), text))
    }

    /// This check has this verdict and says this.
    fn says(&self, check: &str, verdict: &str, words: &str) -> Result<()> {
        let (found, text) = self.of(check)?;
        assert!(found == verdict && text.contains(words), "{check}: {found} {text}");
        Ok(())
    }

    /// Everything that is not ok, but for what is the machine's.
    fn odd(&self) -> Vec<String> {
        let odd = self.findings().into_iter().filter(|finding| finding["verdict"] != "ok");
        let checks = odd.filter_map(|finding| finding["check"].as_str()).map(str::to_owned);
        checks.filter(|check| !OF_THE_MACHINE.contains(&check.as_str())).collect()
    }
}

fn worker(stack: &Stack) -> Start<tasklane_tests::stack::Worker> {
    stack.worker().config(HANDLER).env("TASKLANE_MANAGEMENT_URL", stack.vhost.node().management.url())
}

fn producer(stack: &Stack) -> Start<tasklane_tests::stack::Producer> {
    stack.producer().env("TASKLANE_MANAGEMENT_URL", stack.vhost.node().management.url())
}

on_both_ledgers! {
    /// Before and after the first start, and the doctor's visit leaves no trace.
    async fn a_healthy_installation_is_found_healthy(ledger) {
        let stack = Stack::new(ledger).await?;
        for visit in [visit(worker(&stack)).await?, visit(producer(&stack)).await?] {
            visit.says("broker.queue tasklane.q.default", "ok", "not there yet")?;
            visit.says("ledger.connection", "ok", "")?;
            let policies = [".high", "", ".low"].map(|lane| format!("broker.policy tasklane.q.default{lane}"));
            assert_eq!((visit.code, visit.odd()), (Some(0), policies.to_vec()));
        }
        assert_eq!(stack.vhost.depth(QUEUE).await?, None);
        assert!(stack.ledger.sqlite_file().is_none_or(|file| !file.exists()));

        let running = (producer(&stack).start().await?, worker(&stack).start().await?);
        // The management API knows a new queue's policy when the broker has counted it, every 5 s.
        eventually(LIMIT, "the policy to be seen", async || {
            let odd = visit(worker(&stack)).await?.odd();
            Ok(odd.iter().all(|check| !check.starts_with("broker.policy")).then_some(()))
        })
        .await?;
        for visit in [visit(worker(&stack)).await?, visit(producer(&stack)).await?] {
            visit.says("broker.queue tasklane.q.default", "ok", "quorum")?;
            visit.says("broker.policy tasklane.q.default", "ok", "tasklane-tasks")?;
            visit.says("broker.version", &visit.of("broker.version")?.0, "RabbitMQ ")?;
            visit.says("ledger.schema", "ok", &format!("version {SCHEMA_VERSION}"))?;
            assert_eq!((visit.code, visit.odd()), (Some(0), Vec::<String>::new()));
        }
        drop(running);
        let (status, table) = worker(&stack).arg("doctor").env("TASKLANE_LOG", "off").fail().await?;
        assert_eq!(status.code(), Some(0), "{table}");
        assert!(table.contains("ok    broker.connection") && table.contains(" 0 to mend"), "{table}");
        Ok(())
    }
}

on_both_ledgers! {
    /// The worker gives it back after twice its lease, which is far longer than the visit takes.
    async fn what_the_ledger_has_running_and_no_worker_runs_is_told(ledger) {
        let stack = Stack::new(ledger).await?;
        let running = (producer(&stack).start().await?, worker(&stack).env("TASKLANE_LEASE_TTL_MS", 120_000).start().await?);
        running.0.api.submit(&json!({"kind": "test.true", "delay_ms": 3_600_000})).await?;
        visit(worker(&stack)).await?.says("ledger.running", "ok", "0 tasks")?;
        let granted = "UPDATE tasks SET state = 3, fence = 1, attempt = 1, guarantee = 0, due_at = NULL,
            started_at = created_at - 60000, worker_id = (SELECT id FROM workers)";
        stack.ledger.execute(granted).await?;
        visit(producer(&stack)).await?.says("ledger.running", "warn", "runs 0 tasks, and the ledger has 1 running")
    }
}

#[tokio::test]
async fn a_broker_that_is_away_or_does_not_let_us_in_fails_without_its_password() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let node = stack.vhost.node();
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    for (url, words) in [
        (format!("amqp://user:{PASSWORD}@127.0.0.1:{port}/%2f"), "is the broker up"),
        (format!("amqp://{}:{PASSWORD}@{}/{}", node.user, node.amqp, stack.vhost.name()), "user and password"),
        (node.url(node.amqp, "no-such-vhost"), "virtual host"),
    ] {
        let visit = visit(worker(&stack).env("TASKLANE_AMQP_URL", url)).await?;
        assert_eq!(visit.code, Some(1));
        visit.says("broker.connection", "fail", words)?;
        visit.says("ledger.connection", "ok", "")?;
    }
    let closed = visit(worker(&stack).env("TASKLANE_MANAGEMENT_URL", format!("http://127.0.0.1:{port}"))).await?;
    closed.says("broker.policies", "warn", "not looked at")?;
    assert_eq!(closed.code, Some(0));
    Ok(())
}

#[tokio::test]
async fn servers_that_never_answer_are_found_in_time() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let addr = silent.local_addr()?;
    let began = Instant::now();
    let all_silent = worker(&stack)
        .env("TASKLANE_AMQP_URL", format!("amqp://user:{PASSWORD}@{addr}/%2f"))
        .env("TASKLANE_LEDGER_URL", format!("postgres://user:{PASSWORD}@{addr}/db"));
    let found = visit(all_silent).await?;
    assert_eq!(found.code, Some(1));
    found.says("broker.connection", "fail", "no answer within 5 s")?;
    found.says("ledger.connection", "fail", "no answer within the limit")?;
    let management = worker(&stack).env("TASKLANE_MANAGEMENT_URL", format!("http://{addr}"));
    visit(management).await?.says("broker.policies", "warn", "no answer within 5 s")?;
    assert!(began.elapsed() < ANSWER_LIMIT, "{:?}", began.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_classic_queue_under_our_name_fails() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let connection = stack.vhost.connect().await?;
    let channel = connection.create_channel().await?;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(QUEUE.into(), durable, FieldTable::default()).await?;
    for found in [visit(worker(&stack)).await?, visit(producer(&stack)).await?] {
        assert_eq!(found.code, Some(1));
        found.says("broker.queue tasklane.q.default", "fail", "not a durable quorum queue")?;
    }
    Ok(())
}

#[tokio::test]
async fn policies_that_lose_messages_are_warned_of() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    drop(worker(&stack).start().await?);
    let (management, vhost) = (&stack.vhost.node().management, stack.vhost.name());
    for (definition, words) in [
        (json!({"delivery-limit": 1000}), "without dead-letter-exchange"),
        (json!({"max-length": 1000, "dead-letter-exchange": "tasklane.dead"}), "reject-publish"),
    ] {
        let policy =
            json!({"pattern": "^tasklane\\.q\\.", "apply-to": "queues", "priority": 10, "definition": definition});
        management.put(&["policies", vhost, "tasklane-tasks"], &policy).await?;
        // The broker applies a policy a moment after it has taken it.
        eventually(LIMIT, words, async || {
            let found = visit(worker(&stack)).await?;
            let (verdict, text) = found.of("broker.policy tasklane.q.default")?;
            Ok((verdict == "warn" && text.contains(words) && found.code == Some(0)).then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn missing_permissions_are_named() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let (node, vhost) = (stack.vhost.node(), stack.vhost.name());
    let user = format!("user-{vhost}");
    node.management.put(&["users", &user], &json!({"password": PASSWORD, "tags": ""})).await?;
    let found_with = async |configure: &str, write: &str, read: &str| {
        let rights = json!({"configure": configure, "write": write, "read": read});
        node.management.put(&["permissions", vhost, &user], &rights).await?;
        visit(worker(&stack).env("TASKLANE_AMQP_URL", format!("amqp://{user}:{PASSWORD}@{}/{vhost}", node.amqp))).await
    };
    const OURS: &str = r"^tasklane\..*";
    const OURS_AND_NOTICES: &str = r"^(tasklane\..*|amq\.default)$";

    // Before and after the first start.
    for _ in 0..2 {
        let fine = found_with(OURS, OURS_AND_NOTICES, OURS).await?;
        fine.says("broker.permissions", "ok", "all that is needed")?;
        fine.says("broker.policies", "warn", "management")?;
        assert_eq!((fine.code, fine.odd()), (Some(0), vec!["broker.policies".to_owned(), "broker.ledgers".to_owned()]));
        found_with(OURS, OURS, OURS).await?.says("broker.notices", "warn", "default exchange")?;

        let no_configure = found_with("^$", OURS_AND_NOTICES, OURS).await?;
        no_configure.says("broker.permissions", "fail", "configure queue tasklane.q.default")?;
        no_configure.says("broker.permissions", "fail", "configure exchange tasklane.tasks")?;
        assert_eq!(no_configure.code, Some(1));
        found_with(OURS, "^amq.default$", OURS).await?.says(
            "broker.permissions",
            "fail",
            "write exchange tasklane.tasks",
        )?;
        found_with(OURS, OURS_AND_NOTICES, "^$").await?.says(
            "broker.permissions",
            "fail",
            "read queue tasklane.q.default",
        )?;
        drop(worker(&stack).start().await?);
    }
    Ok(())
}

#[tokio::test]
async fn a_server_that_loses_commits_fails() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let mut server = PgConnection::connect(&stack.ledger.url()).await?;
    visit(worker(&stack)).await?.says("ledger.durability", "ok", "synchronous_commit=on")?;
    let database: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&mut server).await?;
    let off = format!("ALTER DATABASE {database} SET synchronous_commit = off");
    sqlx::query(AssertSqlSafe(off)).execute(&mut server).await?;
    // The ledger's own sessions do not follow.
    visit(worker(&stack)).await?.says("ledger.durability", "ok", "synchronous_commit=on")?;
    let read_only = format!("ALTER DATABASE {database} SET default_transaction_read_only = on");
    sqlx::query(AssertSqlSafe(read_only)).execute(&mut server).await?;
    let found = visit(worker(&stack)).await?;
    found.says("ledger.writable", "fail", "read_only")?;
    assert_eq!(found.code, Some(1));

    let private = Postgres::private().await?;
    let mut server = PgConnection::connect(&private.url()).await?;
    for setting in ["fsync", "full_page_writes"] {
        sqlx::query(AssertSqlSafe(format!("ALTER SYSTEM SET {setting} = off"))).execute(&mut server).await?;
    }
    sqlx::query("SELECT pg_reload_conf()").execute(&mut server).await?;
    eventually(LIMIT, "the server to take its settings", async || {
        let found = visit(worker(&stack).env("TASKLANE_LEDGER_URL", private.url())).await?;
        let (verdict, text) = found.of("ledger.durability")?;
        Ok((verdict == "fail" && text.contains("fsync=off, full_page_writes=off")).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_newer_schema_fails() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    drop(stack.producer().start().await?);
    let mut connection = PgConnection::connect(&stack.ledger.url()).await?;
    sqlx::query("UPDATE tasklane.schema_version SET version = 999").execute(&mut connection).await?;
    let found = visit(producer(&stack)).await?;
    found.says("ledger.schema", "fail", "version 999")?;
    assert_eq!(found.code, Some(1));

    let stack = Stack::new(LedgerKind::Sqlite).await?;
    std::fs::write(stack.ledger.sqlite_file().context("a file")?, crate::settings::empty_sqlite_file(999))?;
    visit(producer(&stack)).await?.says("ledger.schema", "fail", "version 999")
}

#[tokio::test]
async fn what_is_in_the_ledgers_place_is_named() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    stack.ledger.execute("CREATE TABLE tasks (title text); CREATE TABLE schema_version (version varchar)").await?;
    visit(producer(&stack)).await?.says("ledger.schema", "ok", "none yet")?;
    stack.ledger.execute("CREATE SCHEMA tasklane; CREATE TABLE tasklane.tasks (title text)").await?;
    let found = visit(producer(&stack)).await?;
    found.says("ledger.schema", "fail", "the schema tasklane of the database")?;
    assert_eq!(found.code, Some(1));
    Ok(())
}

#[tokio::test]
async fn settings_that_make_no_sense_are_a_finding_too() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let pair = worker(&stack).env("TASKLANE_LEASE_TTL_MS", 3000).env("TASKLANE_LEASE_RENEW_MS", 3000);
    let found = visit(pair).await?;
    assert_eq!(found.code, Some(2));
    found.says("settings", "fail", "lease_renew_ms is 3000 and lease_ttl_ms is 3000")?;
    let found = visit(producer(&stack).env("TASKLANE_AMQP_URL", format!("http://user:{PASSWORD}@h"))).await?;
    assert_eq!(found.code, Some(2));
    found.says("settings", "fail", "amqp_url")?;
    let short = visit(worker(&stack).env("TASKLANE_LEASE_TTL_MS", 3000).env("TASKLANE_LEASE_RENEW_MS", 1000)).await?;
    short.says("lease", "warn", "lives 3000 ms, renewed every 1000 ms")
}
