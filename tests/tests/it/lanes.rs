//! Each lane stands for itself: one that cannot be consumed is told, costs the others nothing, and is taken up when it is mended.

use std::time::Duration;

use anyhow::{Context, Result};
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::json;
use tasklane_tests::eventually;
use tasklane_tests::ledger::LedgerKind;
use tasklane_tests::stack::Stack;

const LIMIT: Duration = Duration::from_secs(120);

/// A queue of another type, one that may not be read, and one whose members are down.
#[tokio::test]
async fn what_cannot_be_consumed_costs_the_others_nothing_and_comes_back() -> Result<()> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let (node, vhost) = (stack.vhost.node(), stack.vhost.name());
    let log = stack.operation_log()?;
    let queues = "default,classic,secret,down";
    // Before anything of ours: a name that was a quorum queue's, and is one again after that, is at times refused for good.
    let channel = stack.vhost.connect().await?.create_channel().await?;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare("tasklane.q.classic.low".into(), durable, FieldTable::default()).await?;
    let first = stack.test_worker(&log).env("TASKLANE_QUEUES", queues).start().await?;
    for queue in ["tasklane.q.secret", "tasklane.q.down"] {
        eventually(LIMIT, "the queue to be declared", async || stack.vhost.depth(queue).await).await?;
    }
    drop(first);

    let user = format!("user-{vhost}");
    node.management.put(&["users", &user], &json!({"password": "secret", "tags": ""})).await?;
    let may_read = async |what: &str| {
        let rights = json!({"configure": ".*", "write": ".*", "read": what});
        node.management.put(&["permissions", vhost, &user], &rights).await
    };
    may_read(r"^(?!tasklane\.q\.secret$).*").await?;
    let ctl = node.ctl.as_ref().context("a node of ours")?;
    let member = |verb: &str| format!("ok = ra:{verb}(quorum_queues, {{'{vhost}_tasklane.q.down', node()}}).");
    ctl.run(&["eval", &member("stop_server")]).await?;

    let producer = stack.producer().start().await?;
    let url = format!("amqp://{user}:secret@{}/{vhost}", node.amqp);
    let worker = || stack.test_worker(&log).env("TASKLANE_QUEUES", queues).env("TASKLANE_AMQP_URL", &url);
    let running = worker().start().await?;
    let bad = ["classic.low", "secret", "down"];
    eventually(LIMIT, "the bad lanes to be named, and no other", async || {
        let (status, said) = running.readiness().await?;
        let named = said.lines().filter(|line| line.contains("cannot be consumed")).count();
        let all = bad.iter().all(|lane| said.contains(&format!("queue {lane} cannot be consumed: ")));
        Ok((status == 200 && named == bad.len() && all).then_some(()))
    })
    .await?;
    let good = [("default", "low"), ("classic", "high"), ("classic", "normal"), ("secret", "low"), ("down", "high")];
    let task = |(queue, priority)| json!({"kind": "test.work", "queue": queue, "priority": priority});
    producer.api.submit_batch(&good.map(task)).await?;
    producer.api.all_ended(good.len(), LIMIT).await?;
    let (_, told) = worker().arg("doctor").env("TASKLANE_LOG", "off").fail().await?;
    for words in ["tasklane.q.classic.low", "read queue tasklane.q.secret", "tasklane.q.down"] {
        assert!(told.lines().any(|line| line.starts_with("FAIL") && line.contains(words)), "{words}: {told}");
    }

    stack.vhost.delete_queue("tasklane.q.classic.low").await?;
    may_read(".*").await?;
    ctl.run(&["eval", &member("restart_server")]).await?;
    let mended = [("classic", "low"), ("secret", "normal"), ("down", "normal")];
    producer.api.submit_batch(&mended.map(task)).await?;
    producer.api.all_ended(good.len() + mended.len(), LIMIT).await?;
    eventually(LIMIT, "nothing to be bad", async || {
        Ok((running.readiness().await? == (200, "ready\n".to_owned())).then_some(()))
    })
    .await?;
    let said = running.process.log();
    for lane in bad {
        let lines = said
            .lines()
            .filter(|line| line.contains("cannot be consumed") && line.contains(&format!("queue={lane} ")))
            .count();
        assert!((1..=4).contains(&lines), "{lane} is told {lines} times: {said}");
    }
    Ok(())
}
