//! The harness itself: what it starts is real, isolated, and gone afterwards.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, PgConnection};
use tasklane_tests::broker::Broker;
use tasklane_tests::ledger::Ledger;
use tasklane_tests::postgres::Postgres;
use tasklane_tests::process::{binary, is_alive};
use tasklane_tests::proxy::{Direction, Proxy};
use tasklane_tests::vhost::Vhost;
use tasklane_tests::{eventually, on_both_ledgers, services, stack, within};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_vhost_is_the_tests_own_and_goes_with_its_guard() -> Result<()> {
    let node = &services::shared().await?.node;
    let (mine, other) = (Vhost::on(node).await?, Vhost::on(node).await?);
    mine.bind("q", "amq.topic", "a.#").await?;
    let tap = mine.tap("amq.topic", "a.b").await?;
    mine.publish("amq.topic", "a.b", b"hello", BasicProperties::default()).await?;
    eventually(LIMIT, "the message to be ready", async || Ok((mine.depth("q").await? == Some(1)).then_some(())))
        .await?;
    assert_eq!(other.depth("q").await?, None);
    let taken = mine.take(&tap).await?;
    assert_eq!(taken.iter().map(|message| message.data.as_slice()).collect::<Vec<_>>(), [b"hello"]);
    assert_eq!(mine.purge("q").await?, 1);
    mine.delete_queue("q").await?;
    assert_eq!(mine.depth("q").await?, None);
    let name = mine.name().to_owned();
    drop(mine);
    let vhosts = node.management.get(&["vhosts"]).await?;
    assert!(!vhosts.to_string().contains(&name), "{vhosts}");
    Ok(())
}

#[tokio::test]
async fn the_repository_definitions_fit_into_a_vhost() -> Result<()> {
    let vhost = Vhost::on(&services::shared().await?.node).await?;
    vhost.import(&stack::definitions()?).await?;
    assert_eq!(vhost.depth("tasklane.dead").await?, Some(0));
    let policies = vhost.node().management.get(&["policies", vhost.name()]).await?;
    assert!(policies.as_array().is_some_and(|policies| !policies.is_empty()), "{policies}");
    Ok(())
}

on_both_ledgers! {
    async fn a_ledger_is_the_tests_own_and_goes_with_its_guard(kind) {
        let (ledger, other) = (Ledger::fresh(kind).await?, Ledger::fresh(kind).await?);
        assert_ne!(ledger.url(), other.url());
        let url = ledger.url();
        if let Some(file) = ledger.sqlite_file() {
            std::fs::write(&file, "")?;
            drop(ledger);
            assert!(!file.exists());
        } else {
            let held = PgConnection::connect(&url).await?;
            drop(ledger);
            let again = PgConnection::connect(&url).await;
            ensure!(again.is_err(), "the database is dropped, though a connection was open");
            drop(held);
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_private_node_keeps_its_data_over_a_stop_and_a_kill_but_not_over_a_lost_disk() -> Result<()> {
    let mut broker = Broker::private().await?;
    let vhost = broker.vhost().await?;
    vhost.bind("q", "amq.topic", "#").await?;
    for round in 0..2 {
        vhost.publish("amq.topic", "k", b"kept", BasicProperties::default()).await?;
        if round == 0 {
            broker.stop().await?
        } else {
            broker.kill().await?
        }
        assert!(vhost.connect().await.is_err(), "the node is down");
        broker.start().await?;
        // A quorum queue of one member elects its leader after the node has begun to accept connections.
        eventually(LIMIT, "the queue to have its messages", async || {
            Ok((vhost.depth("q").await? == Some(round + 1)).then_some(()))
        })
        .await?;
    }
    broker.kill().await?;
    broker.lose_disk()?;
    broker.start().await?;
    vhost.create().await?;
    assert_eq!(vhost.depth("q").await?, None);
    Ok(())
}

#[tokio::test]
async fn a_private_node_can_raise_an_alarm_freeze_and_close_connections() -> Result<()> {
    let broker = Broker::private().await?;
    let vhost = broker.vhost().await?;
    broker.raise_memory_alarm().await?;
    let blocked = vhost.publish("amq.topic", "k", b"x", BasicProperties::default());
    assert!(tokio::time::timeout(Duration::from_secs(1), blocked).await.is_err(), "publishing is blocked");
    broker.clear_memory_alarm().await?;
    eventually(LIMIT, "publishing to go on", async || {
        vhost.publish("amq.topic", "k", b"x", BasicProperties::default()).await.map(Some)
    })
    .await?;

    broker.process()?.freeze()?;
    assert!(tokio::time::timeout(Duration::from_secs(1), vhost.connect()).await.is_err(), "the node stands still");
    broker.process()?.thaw()?;

    let connection = eventually(LIMIT, "a connection", async || vhost.connect().await.map(Some)).await?;
    eventually(LIMIT, "the connection to be closed", async || {
        vhost.close_connections().await?;
        Ok((!connection.status().connected()).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_proxy_cuts_between_publish_and_confirm() -> Result<()> {
    let vhost = Vhost::on(&services::shared().await?.node).await?;
    vhost.bind("q", "amq.topic", "#").await?;
    let proxy = Proxy::to(vhost.node().amqp).await?;
    let url = vhost.url_through(&proxy);
    let connection = within(LIMIT, "AMQP", lapin::Connection::connect(&url, Default::default())).await??;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;

    proxy.stall(Direction::ToClient);
    let sent = proxy.bytes(Direction::ToServer);
    let options = BasicPublishOptions::default();
    let confirm =
        channel.basic_publish("amq.topic".into(), "k".into(), options, b"x", BasicProperties::default()).await?;
    proxy.passed(Direction::ToServer, sent, 1, LIMIT).await?;
    eventually(LIMIT, "the message to be queued", async || Ok((vhost.depth("q").await? == Some(1)).then_some(())))
        .await?;
    proxy.cut_all();
    let outcome = within(LIMIT, "the confirm to fail", confirm).await?;
    assert!(outcome.is_err(), "published, never confirmed: {outcome:?}");
    Ok(())
}

#[tokio::test]
async fn a_private_postgres_keeps_its_data_over_a_stop_and_a_crash() -> Result<()> {
    let mut server = Postgres::private().await?;
    let database = server.database().await?;
    let mut connection = PgConnection::connect(database.url()).await?;
    sqlx::query("CREATE TABLE kept (n int)").execute(&mut connection).await?;
    for crash in [false, true] {
        sqlx::query("INSERT INTO kept VALUES (1)").execute(&mut connection).await?;
        if crash {
            server.crash().await?
        } else {
            server.stop().await?
        }
        assert!(sqlx::query("SELECT 1").execute(&mut connection).await.is_err(), "the server is down");
        server.start().await?;
        connection = PgConnection::connect(database.url()).await?;
    }
    let rows: Vec<i32> = sqlx::query_scalar("SELECT n FROM kept").fetch_all(&mut connection).await?;
    assert_eq!(rows, [1, 1]);
    database.disconnect_all().await?;
    assert!(sqlx::query("SELECT 1").execute(&mut connection).await.is_err(), "the connection was ended");
    Ok(())
}

#[tokio::test]
async fn the_wrapper_gives_the_exit_code_and_the_addresses_through() -> Result<()> {
    let output = Command::new(binary("test-services")?)
        .args(["--", "sh", "-c", "echo $TASKLANE_TEST_AMQP_URL $TASKLANE_TEST_PG_URL; exit 3"])
        .kill_on_drop(true)
        .output();
    let output = within(Duration::from_secs(180), "the wrapper", output).await??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text.contains("amqp://") && text.contains("postgres://"), "{text}");
    Ok(())
}

#[tokio::test]
async fn the_wrapper_ends_everything_when_it_is_terminated() -> Result<()> {
    let mut wrapper = Command::new(binary("test-services")?)
        .args(["--", "sh", "-c", "echo $$ $TASKLANE_TEST_RABBITMQ_HOME; exec sleep 600"])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(wrapper.stdout.take().context("piped")?).lines();
    let line = within(Duration::from_secs(180), "the wrapper", lines.next_line()).await??.context("no line")?;
    let (child, home) = line.split_once(' ').context("two words")?;
    let (child, home): (i32, &Path) = (child.parse()?, Path::new(home));
    let node: i32 = std::fs::read_to_string(home.join("pid"))?.trim().parse()?;
    ensure!(is_alive(child) && is_alive(node));

    let pid = wrapper.id().and_then(|id| Pid::from_raw(id.cast_signed())).context("it runs")?;
    kill_process(pid, Signal::TERM)?;
    let status = within(LIMIT * 3, "the wrapper to end", wrapper.wait()).await??;
    assert_eq!(status.code(), Some(143));
    assert!(!is_alive(child) && !is_alive(node) && !home.exists());
    Ok(())
}
