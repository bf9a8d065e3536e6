//! The README and the tour, run as they are printed by one shell after the other, in a folder that looks like a checkout.

use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::port::free_port;
use tasklane_tests::process::binary;
use tasklane_tests::proxy::Proxy;
use tasklane_tests::stack::Stack;
use tasklane_tests::transcript::{self, Ids, Shell};

/// Where the documents find the producer.
const PRINTED_ADDRESS: &str = "127.0.0.1:8080";

#[tokio::test]
async fn readme_and_tour_run_as_printed() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let broker = Proxy::to(stack.vhost.node().amqp).await?;
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let checkout = tempfile::tempdir()?;
    let programs = binary("tasklane-producer")?;
    std::fs::create_dir(checkout.path().join("target"))?;
    symlink(programs.parent().context("programs lie in a folder")?, checkout.path().join("target/release"))?;
    symlink(repository.join("examples"), checkout.path().join("examples"))?;
    let address = format!("127.0.0.1:{}", free_port()?);

    let mut shell = Shell::new(
        checkout.path(),
        &[
            ("TASKLANE_AMQP_URL", stack.vhost.url_through(&broker)),
            ("TASKLANE_HTTP_ADDR", address.clone()),
            ("TASKLANE_URL", format!("http://{address}")),
            ("USER", "ada".to_owned()),
        ],
    )?;
    shell.run("make() { :; }").await?;
    let mut ids = Ids::default();
    let mut wrong = Vec::new();
    for document in ["README.md", "docs/TOUR.md"] {
        let text = std::fs::read_to_string(repository.join(document))?;
        let (_, text) = text.split_at(text.find("## ").context("a document has sections")?);
        for step in transcript::steps(text) {
            match step.command.as_str() {
                "make down" => {
                    broker.refuse().await?;
                    broker.cut_all();
                }
                "make up" => broker.resume().await?,
                _ => {
                    let adapt = |text: &str| text.replace(PRINTED_ADDRESS, &address);
                    wrong.extend(transcript::run(&mut shell, &mut ids, &step, adapt).await?);
                }
            }
        }
        ensure!(wrong.is_empty(), "{document}:\n{}", wrong.join("\n"));
    }
    Ok(())
}
