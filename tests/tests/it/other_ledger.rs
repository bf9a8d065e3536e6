//! Two ledgers on one broker: a worker with the wrong one keeps nothing from the right one's.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tasklane_common::topology::DEAD_QUEUE;
use tasklane_tests::eventually;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::stack::Stack;

use crate::load::{check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(120);
const TASKS: usize = 6;

/// A message that counts as delivered more often than that is lost.
const DELIVERY_LIMIT: usize = 2;

#[tokio::test]
async fn messages_of_another_ledger_are_handed_back_until_its_worker_comes() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let strict = json!({"name": "strict", "pattern": "^tasklane[.]q[.]", "apply-to": "queues", "priority": 99,
        "definition": {"dead-letter-exchange": "tasklane.dead", "delivery-limit": DELIVERY_LIMIT}});
    stack.vhost.import(&json!({"policies": [strict]})).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let submitted = ids(&producer.api.submit_batch(&tasks(TASKS, "test.work", &json!({"answer": 1}))).await?);

    let other = format!("sqlite://{}", stack.place().join("other.db").display());
    let astray = stack.test_worker(&log).env("TASKLANE_LEDGER_URL", &other).start().await?;
    let handed_back = async || {
        let handed_back = [("reason", "other_ledger")];
        let count = astray.metrics().await?.sum("tasklane_claims_refused_total", &handed_back);
        Ok((count > (TASKS * (DELIVERY_LIMIT + 1)) as f64).then_some(()))
    };
    eventually(LIMIT, "the messages to be handed back", handed_back).await?;
    let file = other.trim_start_matches("sqlite://");
    astray.process.logged(&format!("belongs to another ledger than {file}"), LIMIT).await?;
    astray.process.logged(&format!("ledger=\"{file}\""), LIMIT).await?;
    assert!(log.starts()?.is_empty());
    assert_eq!(stack.vhost.depth(DEAD_QUEUE).await?, Some(0));
    let management = stack.vhost.node().management.url();
    eventually(LIMIT, "the doctor to see it", async || {
        let doctor = stack.producer().arg("doctor").env("TASKLANE_MANAGEMENT_URL", management);
        let (_, said) = doctor.fail().await?;
        let warned = said.lines().any(|line| line.starts_with("warn") && line.contains("broker.ledgers"));
        Ok((warned && said.contains("tasklane worker ")).then_some(()))
    })
    .await?;

    // Its own tasks pass the others.
    let its_producer = stack.producer().env("TASKLANE_LEDGER_URL", &other).start().await?;
    let own = its_producer.api.submit(&json!({"kind": "test.work", "args": {"answer": 2}})).await?;
    its_producer.api.in_state(&own.id, "completed", LIMIT).await?;

    let _worker = stack.test_worker(&log).start().await?;
    let ended = producer.api.all_ended(TASKS, LIMIT).await?;
    check_completed(&ended, &submitted)?;
    assert!(ended.iter().all(|task| task.attempt == 1), "{ended:#?}");
    log.check_each_started_once(submitted.iter().map(String::as_str).chain([own.id.as_str()]))?;
    nothing_left(&stack.vhost).await
}

#[tokio::test]
async fn a_worker_makes_no_ledger_unless_told_to() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let worker = stack.worker().config("[[command]]\nkind = \"test.true\"\nargv = [\"true\"]");
    let (status, said) = worker.env("TASKLANE_CREATE_LEDGER", false).fail().await?;
    let file = stack.ledger.sqlite_file().expect("it is a file");
    assert_eq!(status.code(), Some(69), "{said}");
    assert!(said.contains(&format!("there is no ledger at {}", file.display())), "{said}");
    assert!(said.contains("create_ledger") && !file.exists(), "{said}");
    Ok(())
}
