//! The way to the broker: addresses mean what they say, passwords stay secret, and one failure is one line of the log.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::json;
use tasklane_tests::broker::Broker;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::metrics::Metrics;
use tasklane_tests::stack::Stack;
use tasklane_tests::{eventually, free_port};

use crate::load::nothing_left;

const LIMIT: Duration = Duration::from_secs(60);
const PASSWORD: &str = "s3cr3t-Pa55";
const HANDLER: &str = "[[command]]\nkind = \"test.true\"\nargv = [\"true\"]\n";
const BAD_SETTINGS: i32 = 2;

#[tokio::test]
async fn an_address_that_says_nothing_sensible_ends_the_start_without_its_password() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    for (url, what) in [
        (format!("amqp://dig:12/{PASSWORD}@127.0.0.1/"), "percent-encode"),
        (format!("amqp://dig:12?{PASSWORD}@127.0.0.1/"), "percent-encode"),
        (format!("amqp://dig:{PASSWORD}@/%2f"), "must be an address"),
        (format!("amqp://dig:{PASSWORD}@127.0.0.1/%2f?frame_max=abc"), "frame_max must be a number from 4096 to"),
        (format!("amqp://dig:{PASSWORD}@127.0.0.1/%2f?verify=verify_none"), "there are auth_mechanism, cacertfile"),
    ] {
        for words in [&[][..], &["doctor"]] {
            let producer =
                words.iter().fold(stack.producer().env("TASKLANE_AMQP_URL", &url), |start, word| start.arg(word));
            let worker = words.iter().fold(stack.worker().config(HANDLER), |start, word| start.arg(word));
            let outcomes = [producer.fail().await?, worker.env("TASKLANE_AMQP_URL", &url).fail().await?];
            for (status, said) in outcomes {
                assert_eq!(status.code(), Some(BAD_SETTINGS), "{url}: {said}");
                assert!(said.contains("amqp_url") && said.contains(what), "{url}: {said}");
                assert!(!said.contains(PASSWORD) && !said.contains("12/"), "{said}");
            }
        }
    }
    Ok(())
}

/// A node that listens on 127.0.0.1 alone is not at `[::1]`.
#[tokio::test]
async fn an_ipv6_address_leads_nowhere_else() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let node = stack.vhost.node();
    let url = format!("amqp://{}:{}@[::1]:{}/{}", node.user, node.password, node.amqp.port(), stack.vhost.name());
    let (status, said) = stack.producer().env("TASKLANE_AMQP_URL", url).arg("doctor").fail().await?;
    assert_eq!(status.code(), Some(1), "{said}");
    let there = format!("[::1]:{}, user {}", node.amqp.port(), node.user);
    assert!(said.contains("FAIL  broker.connection") && said.contains(&there), "{said}");
    Ok(())
}

/// Who may not come in is told so once, and then once a minute, whatever number of connections there would be.
#[tokio::test]
async fn a_wrong_password_is_one_line_of_the_log() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let node = stack.vhost.node();
    let url = format!("amqp://{}:{PASSWORD}@{}/{}", node.user, node.amqp, stack.vhost.name());
    let mut producer = stack.producer().env("TASKLANE_AMQP_URL", &url).start().await?;
    let worker = stack.worker().config(HANDLER).env("TASKLANE_AMQP_URL", &url).spawn()?;
    tried_often(async || producer.api.metrics().await).await?;
    tried_often(async || worker.metrics().await).await?;
    for process in [&producer.process, &worker.process] {
        let log = process.log();
        let odd = lines_with(&log, &["WARN", "ERROR"]);
        let [only] = &odd[..] else { panic!("{log}") };
        assert!(only.contains("does not let us in") && only.contains(&format!("user {}", node.user)), "{only}");
        assert!(only.contains("are user and password right?") && !log.contains(PASSWORD), "{only}");
    }
    producer.process.terminate()?;
    producer.process.exited(LIMIT).await.map(drop)
}

/// Waits until the broker has refused for the tenth time.
async fn tried_often(metrics: impl AsyncFn() -> Result<Metrics>) -> Result<()> {
    eventually(LIMIT, "ten tries to connect", async || {
        let tries = metrics().await?.sum("tasklane_broker_reconnects_total", &[]);
        Ok((tries >= 10.0).then_some(()))
    })
    .await
}

/// The lines of a log of these levels.
pub(crate) fn lines_with<'l>(log: &'l str, levels: &[&str]) -> Vec<&'l str> {
    log.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|level| levels.contains(&level))).collect()
}

/// A certificate authority of its own, and what it has signed.
struct Certificates {
    place: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Result<Self> {
        let place = tempfile::tempdir()?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "a private authority");
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        std::fs::write(place.path().join("ca.pem"), authority.pem())?;
        for (name, host) in [("server", "127.0.0.1"), ("client", "client")] {
            let key = KeyPair::generate()?;
            let certificate = CertificateParams::new(vec![host.to_owned()])?.signed_by(&key, &authority)?;
            std::fs::write(place.path().join(format!("{name}.pem")), certificate.pem())?;
            std::fs::write(place.path().join(format!("{name}.key")), key.serialize_pem())?;
        }
        Ok(Self { place })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }
}

/// A broker whose certificate no system knows, and which lets nobody in without one of its own.
#[tokio::test]
async fn a_private_authority_and_a_clients_certificate_are_parameters_of_the_address() -> Result<()> {
    let certificates = Certificates::new()?;
    let port = free_port()?;
    let file = |name: &str| certificates.file(name).display().to_string();
    let broker = Broker::with_settings(&[
        format!("listeners.ssl.1 = 127.0.0.1:{port}"),
        format!("ssl_options.cacertfile = {}", file("ca.pem")),
        format!("ssl_options.certfile = {}", file("server.pem")),
        format!("ssl_options.keyfile = {}", file("server.key")),
        "ssl_options.verify = verify_peer".to_owned(),
        "ssl_options.fail_if_no_peer_cert = true".to_owned(),
    ])
    .await?;
    let stack = Stack::on(broker.node(), LedgerKind::Sqlite).await?;
    let node = broker.node();
    let url = format!("amqps://{}:{}@127.0.0.1:{port}/{}", node.user, node.password, stack.vhost.name());
    let ca = format!("cacertfile={}", file("ca.pem"));
    let proof = format!("certfile={}&keyfile={}", file("client.pem"), file("client.key"));

    let doctor = |url: &str| stack.worker().config(HANDLER).env("TASKLANE_AMQP_URL", url).arg("doctor").fail();
    for (url, words) in [
        (url.clone(), "UnknownIssuer"),
        // The alert may be lost behind the reset that follows it.
        (format!("{url}?{ca}"), "IO error"),
        (format!("{url}?cacertfile=/nowhere.pem"), "cacertfile /nowhere.pem: No such file"),
        (format!("{url}?cacertfile={}", file("server.key")), "it has no part BEGIN CERTIFICATE"),
    ] {
        let (status, said) = doctor(&url).await?;
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("FAIL  broker.connection") && said.contains(words), "{words}: {said}");
    }
    let by_environment = format!("{url}?{proof}");
    let trusted = stack.worker().config(HANDLER).env("SSL_CERT_FILE", file("ca.pem"));
    let (_, said) = trusted.env("TASKLANE_AMQP_URL", by_environment).arg("doctor").fail().await?;
    assert!(said.contains("lets us in"), "{said}");

    let url = format!("{url}?{ca}&{proof}");
    let producer = stack.producer().env("TASKLANE_AMQP_URL", &url).start().await?;
    let _worker = stack.worker().config(HANDLER).env("TASKLANE_AMQP_URL", &url).start().await?;
    let task = producer.api.submit(&json!({"kind": "test.true"})).await?;
    producer.api.in_state(&task.id, "completed", LIMIT).await?;
    nothing_left(&stack.vhost).await
}
