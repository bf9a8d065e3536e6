//! Schedules over the API: every tick has one task, whoever is killed and however long nobody is there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tasklane_tests::api::{Api, Task};
use tasklane_tests::oplog::OperationLog;
use tasklane_tests::stack::{Producer, Stack, Worker};
use tasklane_tests::{eventually, on_both_ledgers};

const LIMIT: Duration = Duration::from_secs(60);
/// For how long processes are killed.
const CHAOS: Duration = Duration::from_secs(20);
/// How often a timetable is written anew.
const CHANGES: usize = 12;
/// For how long nobody is there.
const ABSENCE_SECONDS: i64 = 6;

async fn put(api: &Api, name: &str, schedule: &Value) -> Result<Value> {
    api.raw_put(&format!("/v1/schedules/{name}"), schedule).await?.expect(&[200, 201])
}

async fn look(api: &Api, name: &str) -> Result<Value> {
    api.raw_get(&format!("/v1/schedules/{name}")).await?.expect(&[200])
}

fn second(time: &Value) -> Result<i64> {
    Ok(time.as_str().context("no time")?.parse::<Timestamp>()?.as_second())
}

/// Waits until a schedule has fired a tick of this second or a later one.
async fn fired(api: &Api, name: &str, at: i64) -> Result<()> {
    eventually(LIMIT, "the schedule to fire", async || {
        let last = look(api, name).await?["last_tick"].clone();
        Ok(Some(()).filter(|()| second(&last).is_ok_and(|last| last >= at)))
    })
    .await
}

/// The tasks of a schedule by the second of their tick; more than one of a tick is an error.
async fn by_tick(api: &Api, name: &str) -> Result<BTreeMap<i64, Task>> {
    let mut ticks = BTreeMap::new();
    for task in api.list_all(&[("tag", &format!("schedule:{name}"))]).await? {
        let tick = task.tags["tick"].parse::<Timestamp>()?.as_second();
        if let Some(other) = ticks.insert(tick, task) {
            anyhow::bail!("the tick {tick} has two tasks, one of them {other:?}");
        }
    }
    Ok(ticks)
}

/// Three producers and two workers.
struct Crew<'s> {
    stack: &'s Stack,
    log: &'s OperationLog,
    producers: Vec<Producer>,
    workers: Vec<Worker>,
}

impl<'s> Crew<'s> {
    async fn start(stack: &'s Stack, log: &'s OperationLog) -> Result<Self> {
        let mut crew = Self { stack, log, producers: Vec::new(), workers: Vec::new() };
        for _ in 0..3 {
            crew.producers.push(stack.producer().start().await?);
        }
        for _ in 0..2 {
            crew.workers.push(stack.test_worker(log).short_lease().start().await?);
        }
        Ok(crew)
    }

    /// Kills one of them, sometimes two, and has others started in their place.
    async fn kill_one_at_random(&mut self, random: &mut StdRng) -> Result<()> {
        for _ in 0..random.random_range(1..=2) {
            let victim = random.random_range(0..5);
            if victim < 3 {
                self.producers[victim].process.kill().await?;
                self.producers[victim] = self.stack.producer().spawn()?;
            } else {
                self.workers[victim - 3].process.kill().await?;
                self.workers[victim - 3] = self.stack.test_worker(self.log).short_lease().spawn()?;
            }
        }
        Ok(())
    }
}

on_both_ledgers! {
    async fn every_tick_has_one_task_whoever_is_killed(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut crew = Crew::start(&stack, &log).await?;
        let every_second = json!({"cron": "* * * * * *", "catch_up": "all", "task": {"kind": "test.work"}});
        let made = put(&crew.producers[0].api, "chaos", &every_second).await?;
        let first = second(&made["next_runs"][0])?;
        let seed: u64 = rand::random();
        println!("the seed of the kills is {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let end = std::time::Instant::now() + CHAOS;
        while std::time::Instant::now() < end {
            // About a tick, and never the same time before it.
            tokio::time::sleep(Duration::from_millis(random.random_range(200..1200))).await;
            crew.kill_one_at_random(&mut random).await?;
        }
        let producer = stack.producer().start().await?;
        fired(&producer.api, "chaos", Timestamp::now().as_second()).await?;
        let paused = json!({"cron": "* * * * * *", "catch_up": "all", "task": {"kind": "test.work"}, "paused": true});
        let shown = put(&producer.api, "chaos", &paused).await?;
        let (last, until) = (second(&shown["last_tick"])?, second(&shown["updated_at"])?);
        let count = usize::try_from(last - first + 1)?;
        let _worker = stack.test_worker(&log).start().await?;
        producer.api.all_ended(count, LIMIT).await?;
        let ticks = by_tick(&producer.api, "chaos").await?;
        assert_eq!(ticks.keys().copied().collect::<Vec<_>>(), (first..=last).collect::<Vec<_>>());
        for task in ticks.values() {
            ensure!(task.state == "completed", "{task:#?}");
        }
        let shown = look(&producer.api, "chaos").await?;
        // What was due in the moment of the pause and not fired yet is given up.
        let missed = shown["ticks"]["missed"].as_i64().context("no count")?;
        assert!((0..=until - last).contains(&missed), "{missed} from {last} to {until}");
        assert_eq!(shown["ticks"], json!({"fired": count, "skipped": 0, "missed": missed}));
        log.check_no_overlap()?;
        Ok(())
    }

    async fn each_tick_is_fired_or_counted_while_the_timetable_is_written_anew(ledger) {
        let stack = Stack::new(ledger).await?;
        let producers = [stack.producer().start().await?, stack.producer().start().await?];
        let schedule = |cron: &str| json!({"cron": cron, "catch_up": "all", "task": {"kind": "test.work"}});
        let first = second(&put(&producers[0].api, "anew", &schedule("* * * * * *")).await?["next_runs"][0])?;
        let mut random = StdRng::seed_from_u64(rand::random());
        for change in 1..=CHANGES {
            // The same second each: another text is another timetable.
            let text = ["* * * * * *", "*/1 * * * * *", "0-59 * * * * *"][change % 3];
            // Right behind a tick, in the moment in which it is fired.
            let now = u64::try_from(Timestamp::now().as_millisecond())?;
            tokio::time::sleep(Duration::from_millis(1_000 - now % 1_000 + random.random_range(0..8))).await;
            put(&producers[change % 2].api, "anew", &schedule(text)).await?;
        }
        let paused = producers[0].api.raw_post("/v1/schedules/anew/pause", &json!({})).await?;
        let shown: Value = paused.expect(&[200])?;
        let ticks = by_tick(&producers[0].api, "anew").await?;
        let (fired, missed) = (shown["ticks"]["fired"].as_i64(), shown["ticks"]["missed"].as_i64());
        assert_eq!(fired, Some(ticks.len() as i64));
        let (fired, missed) = (fired.context("no count")?, missed.context("no count")?);
        let until = second(&shown["updated_at"])?;
        // The pause may have come to be in the second before that in which it was written.
        assert!((until - first..=until - first + 1).contains(&(fired + missed)), "{fired} and {missed} from {first} to {until}");
        assert!(fired > 0, "{shown}");
        Ok(())
    }

    async fn missed_ticks_are_made_up_for_as_the_schedule_says(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let mut first = 0;
        for catch_up in ["none", "one", "all"] {
            let schedule = json!({"cron": "* * * * * *", "catch_up": catch_up, "task": {"kind": "test.work"}});
            let made = put(&producer.api, catch_up, &schedule).await?;
            first = first.max(second(&made["next_runs"][0])?);
        }
        fired(&producer.api, "none", first + 1).await?;
        producer.process.kill().await?;
        let back = Timestamp::now().as_second() + ABSENCE_SECONDS;
        eventually(LIMIT, "the absence to pass", async || Ok((Timestamp::now().as_second() >= back).then_some(()))).await?;
        // One process, so that the same one judges all three.
        let producer = stack.producer().start().await?;
        let enough = Timestamp::now().as_second() + 2;
        for name in ["none", "one", "all"] {
            fired(&producer.api, name, enough).await?;
        }
        let range = first..=enough;
        let of = async |name: &str| -> Result<BTreeSet<i64>> {
            Ok(by_tick(&producer.api, name).await?.into_keys().filter(|tick| range.contains(tick)).collect())
        };
        let (none, one, all) = (of("none").await?, of("one").await?, of("all").await?);
        assert_eq!(all, range.clone().collect(), "each tick");
        let missed: Vec<i64> = all.difference(&none).copied().collect();
        assert!(missed.len() as i64 >= ABSENCE_SECONDS - 1, "{none:?}");
        let (begin, newest) = (missed[0], missed[missed.len() - 1]);
        assert_eq!(missed, (begin..=newest).collect::<Vec<_>>(), "one gap");
        assert!(newest < enough - 1, "it fires again: {none:?}");
        let made_up: Vec<i64> = one.difference(&none).copied().filter(|tick| *tick > begin).collect();
        assert_eq!(made_up, [newest], "the newest for all that were missed: {one:?}");
        assert_eq!(look(&producer.api, "none").await?["ticks"]["missed"], json!(missed.len()));
        for name in ["none", "one", "all"] {
            assert_eq!(producer.api.raw_delete(&format!("/v1/schedules/{name}")).await?.status, 204);
        }
        let _worker = stack.test_worker(&log).start().await?;
        let ended = producer.api.all_ended(none.len() + one.len() + all.len(), LIMIT).await?;
        ensure!(ended.iter().all(|task| task.state == "completed"), "{ended:#?}");
        let metrics = producer.api.metrics().await?;
        assert!(metrics.sum("tasklane_schedule_ticks_total", &[("outcome", "missed")]) >= missed.len() as f64);
        Ok(())
    }

    /// One of a later release, say. It is told once, named where schedules are listed, and can be deleted.
    async fn a_schedule_that_cannot_be_read_keeps_no_other_from_firing(ledger) {
        let stack = Stack::new(ledger).await?;
        let producer = stack.producer().start().await?;
        let every_second = json!({"cron": "* * * * * *", "task": {"kind": "test.work"}});
        for name in ["a-bad", "good"] {
            put(&producer.api, name, &every_second).await?;
        }
        stack.ledger.execute("UPDATE schedules SET definition = replace(definition, '\"one\"', '\"some\"') WHERE name = 'a-bad'").await?;
        producer.process.logged("this process cannot fire the schedule", LIMIT).await?;
        let now = Timestamp::now().as_second();
        fired(&producer.api, "good", now + 2).await?;
        assert_eq!(producer.process.log().matches("cannot fire the schedule").count(), 1);
        let listed: Value = producer.api.raw_get("/v1/schedules").await?.expect(&[200])?;
        assert_eq!((&listed["schedules"][0]["name"], &listed["unreadable"][0]["name"]), (&json!("good"), &json!("a-bad")));
        let page: Value = producer.api.raw_get("/v1/schedules?limit=1").await?.expect(&[200])?;
        let next = page["next_cursor"].as_str().context("another page")?;
        let page: Value = producer.api.raw_get(&format!("/v1/schedules?limit=1&cursor={next}")).await?.expect(&[200])?;
        assert_eq!((&page["schedules"][0]["name"], &page["unreadable"]), (&json!("good"), &json!([])));
        assert_eq!(producer.api.raw_delete("/v1/schedules/a-bad").await?.status, 204);
        Ok(())
    }

    async fn a_tick_is_skipped_while_the_task_before_it_runs(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let _worker = stack.test_worker(&log).start().await?;
        let schedule = json!({
            "cron": "* * * * * *", "overlap": "skip", "task": {"kind": "test.work", "args": {"work_ms": 2500}}
        });
        let first = second(&put(&producer.api, "slow", &schedule).await?["next_runs"][0])?;
        fired(&producer.api, "slow", first + 6).await?;
        assert_eq!(producer.api.raw_delete("/v1/schedules/slow").await?.status, 204);
        producer.api.all_ended(2, LIMIT).await?;
        let ticks: Vec<Task> = by_tick(&producer.api, "slow").await?.into_values().collect();
        let after = |pair: &[Task]| pair[0].finished_at.is_some_and(|end| end <= pair[1].created_at);
        assert!(ticks.len() >= 2 && ticks.windows(2).all(after), "{ticks:#?}");
        let of_it = [("schedule", "slow"), ("outcome", "skipped")];
        let skipped = producer.api.metrics().await?.sum("tasklane_schedule_ticks_total", &of_it);
        assert!(skipped >= 1.0 || ticks.len() > 2, "{skipped}");
        Ok(())
    }
}
