//! Batches with an end: one task follows when all have ended, whoever is killed in between.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tasklane_tests::api::{Api, Task};
use tasklane_tests::eventually;
use tasklane_tests::on_both_ledgers;
use tasklane_tests::stack::Stack;

use crate::load::tasks;

const LIMIT: Duration = Duration::from_secs(60);
const MEMBERS: usize = 200;

/// How many idle groups are timed.
const GROUPS: usize = 5;
/// How many of them fail for good.
const FAILING: usize = 20;

/// Submits a batch with an end; answers its tasks and its group.
async fn submit(api: &Api, tasks: &[Value], then: &Value) -> Result<(Vec<String>, String)> {
    let answer = api.raw_post("/v1/tasks/batch", &json!({"tasks": tasks, "then": then})).await?;
    let answer: Value = answer.expect(&[202])?;
    let ids = answer["tasks"].as_array().context("no tasks")?.iter().filter_map(|task| task["id"].as_str());
    Ok((ids.map(str::to_owned).collect(), answer["group"]["id"].as_str().context("no group")?.to_owned()))
}

async fn look(api: &Api, group: &str) -> Result<Value> {
    api.raw_get(&format!("/v1/groups/{group}")).await?.expect(&[200])
}

/// The group once it is closed.
async fn closed(api: &Api, group: &str) -> Result<Value> {
    eventually(LIMIT, "the group to be closed", async || {
        Ok(Some(look(api, group).await?).filter(|group| group["finished_at"].is_string()))
    })
    .await
}

/// The tasks that followed, of all groups.
async fn followed(api: &Api) -> Result<Vec<Task>> {
    api.list_all(&[("kind", "test.then")]).await
}

on_both_ledgers! {
    async fn one_task_follows_two_hundred_whoever_is_killed(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let mut victim = stack.test_worker(&log).short_lease().start().await?;
        let _survivor = stack.test_worker(&log).start().await?;
        let mut batch = tasks(MEMBERS - FAILING, "test.work", &json!({"work_ms": 300}));
        let failing = json!({"kind": "test.work", "args": {"failures": 9}, "max_attempts": 1});
        batch.extend(std::iter::repeat_n(failing, FAILING));
        let then = json!({"kind": "test.then", "args": {"work_ms": 100}});
        let (ids, group) = submit(&producer.api, &batch, &then).await?;
        log.started(MEMBERS / 4, LIMIT).await?;
        victim.process.kill().await?;
        log.started(MEMBERS / 2, LIMIT).await?;
        producer.process.kill().await?;
        // The surviving worker alone may close the group.
        let producer = stack.producer().start().await?;
        let closed = closed(&producer.api, &group).await?;
        let (completed, discarded) = (MEMBERS - FAILING, FAILING);
        assert_eq!(closed["counts"], json!({"completed": completed, "discarded": discarded}));
        assert_eq!(closed["ended"], json!({"completed": completed, "cancelled": 0, "discarded": discarded}));
        producer.api.all_ended(MEMBERS + 1, LIMIT).await?;
        let [then] = &followed(&producer.api).await?[..] else { anyhow::bail!("not one task has followed") };
        assert_eq!(closed["then"]["id"], json!(then.id));
        let told = json!({
            "id": group, "total": MEMBERS, "completed": completed, "cancelled": 0, "discarded": discarded
        });
        assert_eq!(then.args, json!({"group": told, "args": {"work_ms": 100}}));
        assert_eq!((then.state.as_str(), &then.result, &then.group_id), ("completed", &told, &None));
        let members = producer.api.list_all(&[("group", &group)]).await?;
        ensure!(members.len() == MEMBERS && members.iter().all(|task| ids.contains(&task.id)), "{members:#?}");
        log.check_fences_rise()?;
        log.check_no_overlap()?;
        Ok(())
    }

    async fn an_idle_group_is_followed_within_a_second(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let then = json!({"kind": "test.then", "args": {}});
        let mut took = Vec::new();
        for _ in 0..GROUPS {
            let (ids, group) = submit(&producer.api, &tasks(2, "test.work", &json!({"work_ms": 100})), &then).await?;
            for id in &ids {
                producer.api.in_state(id, "completed", LIMIT).await?;
            }
            let began = std::time::Instant::now();
            let closed = closed(&producer.api, &group).await?;
            let id = closed["then"]["id"].as_str().context("nothing follows")?;
            eventually(LIMIT, "the follow-up's start", async || Ok(log.of(id)?.pop())).await?;
            took.push(began.elapsed());
        }
        println!("followed after {took:?}");
        took.sort_unstable();
        assert!(took[GROUPS / 2] < Duration::from_secs(1), "{took:?}");
        Ok(())
    }
}
