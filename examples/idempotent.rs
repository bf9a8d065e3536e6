//! An effect outside of the ledger, made safe by the two numbers that every handler gets: the task's id and its fence.
//!
//! A task never runs twice at the same time, and never again after its completion is recorded. What is left is the run
//! that dies between its effect and that record: the next attempt must find the effect instead of repeating it, and
//! what the dead run still sends must be refused. The account book here does both. With a producer running
//! (`make demo`, or `make programs`, then `target/release/tasklane-producer`), and the same `TASKLANE_LEDGER_URL`:
//!
//! ```sh
//! cargo run --release --example idempotent
//! ```

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use rusqlite::{Connection, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tasklane_common::task::{Fence, TaskId};
use tasklane_examples::client::{Client, result_of};
use tasklane_examples::worker::LocalWorker;
use tasklane_worker::{Handler, HandlerError, Outcome, Registry, TaskContext};

const LIMIT: Duration = Duration::from_secs(60);

/// Somebody else's database, which knows nothing of Tasklane but these two columns.
struct AccountBook(Mutex<Connection>);

#[derive(Debug, PartialEq)]
enum Booked {
    Now,
    /// By an earlier attempt: nothing was changed.
    Before,
    /// A later attempt was here: this one has lost its task, and changes nothing.
    Stale,
}

impl AccountBook {
    fn new() -> Result<Self> {
        let db = Connection::open_in_memory()?;
        db.execute_batch(
            "CREATE TABLE seen (task TEXT PRIMARY KEY, fence INTEGER NOT NULL, booked INTEGER NOT NULL DEFAULT 0);
             CREATE TABLE accounts (name TEXT PRIMARY KEY, cents INTEGER NOT NULL);",
        )?;
        Ok(Self(Mutex::new(db)))
    }

    /// Says that a run begins: from here on every lower fence is refused.
    fn begin(&self, task: TaskId, fence: Fence) -> rusqlite::Result<()> {
        let sql = "INSERT INTO seen (task, fence) VALUES (?1, ?2)
                   ON CONFLICT (task) DO UPDATE SET fence = max(fence, excluded.fence)";
        self.0.lock().unwrap_or_else(PoisonError::into_inner).execute(sql, params![task.to_string(), fence.0])?;
        Ok(())
    }

    /// Adds to an account: once a task, and only for the newest run. Check and effect are one transaction.
    fn book(&self, task: TaskId, fence: Fence, deposit: &Deposit) -> rusqlite::Result<Booked> {
        let mut db = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let seen = tx.query_row("SELECT fence, booked FROM seen WHERE task = ?1", [task.to_string()], |row| {
            Ok((Fence(row.get(0)?), row.get::<_, bool>(1)?))
        })?;
        match seen {
            (newest, _) if newest > fence => return Ok(Booked::Stale),
            (_, true) => return Ok(Booked::Before),
            (_, false) => {}
        }
        tx.execute("UPDATE seen SET booked = 1 WHERE task = ?1", [task.to_string()])?;
        tx.execute(
            "INSERT INTO accounts VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET cents = cents + excluded.cents",
            params![deposit.account, deposit.cents],
        )?;
        tx.commit()?;
        Ok(Booked::Now)
    }

    fn balance(&self, account: &str) -> rusqlite::Result<i64> {
        let db = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        db.query_row("SELECT cents FROM accounts WHERE name = ?1", [account], |row| row.get(0))
    }
}

struct MakeDeposit(&'static AccountBook);

#[derive(Deserialize)]
struct Deposit {
    account: String,
    cents: i64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Receipt {
    attempt: i32,
    booked_before: bool,
    /// What the book said to the first attempt's fence, when that came late.
    latecomer_was_refused: bool,
}

impl Handler for MakeDeposit {
    const KIND: &'static str = "account.deposit";
    type Args = Deposit;

    async fn handle(&self, deposit: Deposit, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        self.0.begin(cx.id, cx.fence)?;
        let booked = self.0.book(cx.id, cx.fence, &deposit)?;
        if cx.attempt == 1 {
            // The worst moment: the effect is there, its completion is not recorded.
            return Err(HandlerError::retry_after("lost the connection after booking", Duration::ZERO));
        }
        // The first run comes back from the dead and tries to book.
        let late = self.0.book(cx.id, Fence(cx.fence.0 - 1), &deposit)?;
        Outcome::complete(Receipt {
            attempt: cx.attempt,
            booked_before: booked == Booked::Before,
            latecomer_was_refused: late == Booked::Stale,
        })
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let book: &'static AccountBook = Box::leak(Box::new(AccountBook::new()?));
    let client = Client::from_env()?;
    let worker = LocalWorker::start(Registry::builder().handler(MakeDeposit(book)), &client).await?;

    let task = client.submit(&json!({"kind": MakeDeposit::KIND, "args": {"account": "Ada", "cents": 1000}})).await?;
    let ended = client.ended(task.id, LIMIT).await?;
    let receipt: Receipt = result_of(&ended)?;
    let cents = book.balance("Ada")?;
    println!("{} attempts, fence {}: {receipt:?}", ended.attempt, ended.fence);
    println!("booked once: the balance is {cents} cents");
    println!("the worker: {}", worker.stop().await?);
    ensure!(cents == 1000 && receipt.booked_before && receipt.latecomer_was_refused, "the account book is wrong");
    Ok(())
}
