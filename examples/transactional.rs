//! Exactly once, for data in the ledger's own database: what the handler writes and its task's completion commit together.
//!
//! A run that dies before that commit has written nothing, one that dies after it never starts again. So the balance
//! here is right although the first attempt fails after it has booked. With a producer running (`make demo`, or
//! `make programs`, then `target/release/tasklane-producer`), and the same `TASKLANE_LEDGER_URL`:
//!
//! ```sh
//! cargo run --release --example transactional
//! ```
//!
//! It makes a table of its own in the ledger's database. Effects anywhere else are for `idempotent.rs`.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tasklane_common::task::Guarantee;
use tasklane_examples::client::{Client, result_of};
use tasklane_examples::worker::LocalWorker;
use tasklane_worker::{Handler, HandlerError, Options, Outcome, Registry, TaskContext, rusqlite, sqlx};

const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Deserialize)]
struct Deposit {
    account: String,
    cents: i64,
}

/// What is answered for the task, and kept as its result.
#[derive(Debug, Serialize, Deserialize)]
struct Receipt {
    balance: i64,
}

/// Books in a ledger on SQLite.
struct InSqlite;

impl Handler for InSqlite {
    const KIND: &'static str = "example.deposit";
    type Args = Deposit;

    fn options(&self) -> Options {
        Options { guarantee: Guarantee::Transactional, ..Options::default() }
    }

    async fn handle(&self, deposit: Deposit, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let attempt = cx.attempt;
        // Before this: whatever takes time, such as asking others. In here: SQL only, since every writer waits for it.
        cx.complete_in_sqlite(move |db: &rusqlite::Connection| {
            db.execute_batch("CREATE TABLE IF NOT EXISTS example_accounts (name TEXT PRIMARY KEY, cents INTEGER)")?;
            let sql = "INSERT INTO example_accounts VALUES (?1, ?2)
                       ON CONFLICT (name) DO UPDATE SET cents = cents + excluded.cents RETURNING cents";
            let balance = db.query_row(sql, (&deposit.account, deposit.cents), |row| row.get(0))?;
            fail_at_first(attempt)?;
            Ok(Receipt { balance })
        })
        .await
    }
}

/// Books in a ledger on PostgreSQL.
struct InPostgres;

impl Handler for InPostgres {
    const KIND: &'static str = "example.deposit";
    type Args = Deposit;

    fn options(&self) -> Options {
        Options { guarantee: Guarantee::Transactional, ..Options::default() }
    }

    async fn handle(&self, deposit: Deposit, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        cx.complete_in_postgres(async |connection| {
            let table = "CREATE TABLE IF NOT EXISTS example_accounts (name text PRIMARY KEY, cents bigint)";
            sqlx::query(table).execute(&mut *connection).await?;
            let sql = "INSERT INTO example_accounts VALUES ($1, $2)
                       ON CONFLICT (name) DO UPDATE SET cents = example_accounts.cents + excluded.cents RETURNING cents";
            let booked = sqlx::query_scalar(sql).bind(&deposit.account).bind(deposit.cents);
            let balance = booked.fetch_one(connection).await?;
            fail_at_first(cx.attempt)?;
            Ok(Receipt { balance })
        })
        .await
    }
}

/// The worst moment: everything is written, and not committed.
fn fail_at_first(attempt: i32) -> Result<(), HandlerError> {
    if attempt == 1 { Err(HandlerError::retry_after("lost in the middle", Duration::ZERO)) } else { Ok(()) }
}

#[tokio::main]
async fn main() -> Result<()> {
    let client = Client::from_env()?;
    let on_postgres = std::env::var("TASKLANE_LEDGER_URL").is_ok_and(|url| url.starts_with("postgres"));
    let handlers = Registry::builder();
    let handlers = if on_postgres { handlers.handler(InPostgres) } else { handlers.handler(InSqlite) };
    let worker = LocalWorker::start(handlers, &client).await?;

    // An account of this run's own.
    let account = format!("Ada, {}", jiff::Timestamp::now());
    let deposit = json!({"kind": "example.deposit", "args": {"account": account, "cents": 1000}});
    for expected in [1000, 2000] {
        let ended = client.ended(client.submit(&deposit).await?.id, LIMIT).await?;
        let receipt: Receipt = result_of(&ended)?;
        println!("{} attempts, and the balance is {} cents", ended.attempt, receipt.balance);
        ensure!(receipt.balance == expected && ended.attempt == 2, "booked more or less than once");
    }
    println!("the worker: {}", worker.stop().await?);
    Ok(())
}
