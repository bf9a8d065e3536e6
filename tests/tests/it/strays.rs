//! What the ledger says that a worker runs, and what it runs: the two may differ for a moment, and for no longer.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tasklane_tests::ledger::{Ledger, LedgerKind};
use tasklane_tests::on_both_ledgers;
use tasklane_tests::stack::Stack;

use crate::load::{check_completed, ids, nothing_left, tasks};

const LIMIT: Duration = Duration::from_secs(60);

/// Longer than any outcome was once offered.
const LOCKED: Duration = Duration::from_secs(75);

/// How long an outcome that the ledger refuses is offered as it is.
const REFUSED: Duration = Duration::from_secs(60);

/// What a claim leaves whose answer nobody hears. The guarantee is `at_most_once`: a rescue would end the task.
const GRANTED_UNHEARD: &str = "
    UPDATE tasks SET state = 3, fence = fence + 1, attempt = attempt + 1, guarantee = 1, due_at = NULL,
        worker_id = (SELECT id FROM workers WHERE NOT dead), started_at = run_at, first_due_at = run_at
    WHERE state = 1";

on_both_ledgers! {
    async fn a_claim_whose_answer_never_came_is_given_back(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let worker = stack.test_worker(&log).short_lease().start().await?;
        let later = json!({"kind": "test.once", "delay_ms": 3_600_000});
        let submitted = ids(&producer.api.submit_batch(&vec![later; 3]).await?);
        stack.ledger.execute(GRANTED_UNHEARD).await?;
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        assert!(ended.iter().all(|task| task.attempt == 1 && task.errors.is_empty()), "{ended:#?}");
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        assert_eq!(worker.metrics().await?.sum("tasklane_strays_total", &[]), 3.0);
        nothing_left(&stack.vhost).await
    }

    async fn a_worker_that_stops_gives_back_what_it_never_heard_of(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let producer = stack.producer().start().await?;
        let mut worker = stack.test_worker(&log).start().await?;
        let later = json!({"kind": "test.once", "delay_ms": 3_600_000});
        let submitted = ids(&producer.api.submit_batch(&vec![later; 3]).await?);
        stack.ledger.execute(GRANTED_UNHEARD).await?;
        worker.process.terminate()?;
        let status = worker.process.exited(LIMIT).await?;
        assert!(status.success(), "{status}");
        let _other = stack.test_worker(&log).start().await?;
        let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
        check_completed(&ended, &submitted)?;
        assert!(ended.iter().all(|task| task.attempt == 1 && task.errors.is_empty()), "{ended:#?}");
        log.check_each_started_once(submitted.iter().map(String::as_str))?;
        nothing_left(&stack.vhost).await
    }
}

/// A connection past everybody to a ledger in PostgreSQL.
async fn by_hand(stack: &Stack) -> Result<PgConnection> {
    let Ledger::Postgres(database) = &stack.ledger else { anyhow::bail!("the ledger is in PostgreSQL") };
    Ok(PgConnection::connect(database.url()).await?)
}

/// As somebody does who makes an index without `CONCURRENTLY`: leases live on, and nothing can be written about tasks.
#[tokio::test]
async fn an_outcome_is_offered_as_long_as_the_lease_lives() -> Result<()> {
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).start().await?;
    let submitted = ids(&producer.api.submit_batch(&tasks(3, "test.once", &json!({"work_ms": 3000}))).await?);
    log.started(3, LIMIT).await?;
    let mut operator = by_hand(&stack).await?;
    let mut transaction = operator.begin().await?;
    sqlx::query("LOCK TABLE tasklane.tasks IN SHARE MODE").execute(&mut *transaction).await?;
    tokio::time::sleep(LOCKED).await;
    transaction.rollback().await?;
    let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
    check_completed(&ended, &submitted)?;
    assert!(ended.iter().all(|task| task.attempt == 1 && task.errors.is_empty()), "{ended:#?}");
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    let said = worker.process.log();
    assert_eq!(said.matches("the worker has entered the ledger").count(), 1, "its lease outlasts the lock:\n{said}");
    let complaints = said.matches("an outcome cannot be recorded").count();
    assert!((1..=3).contains(&complaints), "{complaints} lines in {LOCKED:?}:\n{said}");
    nothing_left(&stack.vhost).await
}

/// What no repetition mends is offered for a while, in case that somebody mends the ledger. Then the task ends by what can
/// be said of it; and as long as it stands, no more tasks are started than there are places.
#[tokio::test]
async fn an_outcome_that_the_ledger_refuses_ends_its_task_all_the_same() -> Result<()> {
    const PLACES: usize = 2;
    let stack = Stack::new(LedgerKind::Postgres).await?;
    let log = stack.operation_log()?;
    let producer = stack.producer().start().await?;
    let worker = stack.test_worker(&log).env("TASKLANE_CONCURRENCY", PLACES).start().await?;
    let refuse = "
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'no room for this'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON tasklane.tasks FOR EACH ROW WHEN (NEW.result LIKE '%unwelcome%')
        EXECUTE FUNCTION refuse()";
    sqlx::raw_sql(refuse).execute(&mut by_hand(&stack).await?).await?;
    let unwelcome = tasks(8, "test.once", &json!({"answer": "unwelcome"}));
    let submitted = ids(&producer.api.submit_batch(&unwelcome).await?);
    log.started(PLACES, LIMIT).await?;
    tokio::time::sleep(REFUSED / 4).await;
    let started = log.starts()?.len();
    assert!(started <= 3 * PLACES, "{started} were started while no outcome could be recorded");
    // Of those that start after them the outcomes are refused as well: the first ends tell enough.
    let discarded = producer.api.in_state(&log.starts()?[0].task, "discarded", REFUSED + LIMIT).await?;
    let error = discarded.errors.last().context("it says why")?;
    ensure!(error.message.contains("could not be recorded") && error.message.contains("no room for this"), "{error:?}");
    assert_eq!((discarded.reason.as_deref(), discarded.attempt), (Some("final_error"), 1));
    sqlx::raw_sql("DROP TRIGGER refuse ON tasklane.tasks").execute(&mut by_hand(&stack).await?).await?;
    let ended = producer.api.all_ended(submitted.len(), LIMIT).await?;
    assert_eq!(ended.len(), submitted.len());
    log.check_each_started_once(submitted.iter().map(String::as_str))?;
    drop(worker);
    nothing_left(&stack.vhost).await
}
