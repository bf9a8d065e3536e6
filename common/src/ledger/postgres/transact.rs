//! A handler's own writes in the transaction of its task's completion.
//!
//! The order is what makes a lost answer harmless: work, then the completion under the fence, then `COMMIT`, which is
//! sent only when the completion was answered. From then on the transaction holds the lock of the task's row. Wherever
//! it still is when its connection breaks, at the server, on the wire or nowhere any more, any other settlement of the
//! task waits for that lock, looks at the row again, and finds it either as it was or completed under the same fence.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, Transaction};
use tokio::time::{sleep, timeout};

use super::connections::Lent;
use super::fault::Fault;
use super::lane::Bulk;
use super::settle::Settling;
use super::{PostgresLedger, within};
use crate::clock::millis;
use crate::ledger::{CALL_TIMEOUT, LedgerError, Settled, Settlement, Transacted, Transition, complain};
use crate::task::{Fence, Json, TaskId};

/// How long a server that is away is left alone before the next try.
const PAUSE: Duration = Duration::from_millis(250);
/// The longest limit that the server knows.
const LIMIT_MS_MAX: i64 = i32::MAX as i64;

/// How a transaction ended at the server.
struct End<E> {
    transacted: Transacted<E>,
    /// Whether the connection may serve another one.
    clean: bool,
}

impl PostgresLedger {
    /// Commits what `work` writes together with the task's completion, if the fence still holds.
    ///
    /// While the server is away it waits; the caller sets the limit by dropping the future, and whatever is dropped
    /// before the commit is rolled back. A statement that takes longer than `limit` is ended by the server. The work
    /// must not end the transaction (its own `begin` is a savepoint), and what it sets must be set `LOCAL`.
    ///
    /// # Errors
    /// [`LedgerError`] when nothing was written.
    pub async fn transact<E>(
        &self,
        (id, fence): (TaskId, Fence),
        limit: Duration,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<Json, E>,
    ) -> Result<Transacted<E>, LedgerError> {
        loop {
            // Dropped before it is kept, the connection is closed, and the server rolls back.
            let mut lent = match self.transactions.lend().await {
                Err(Fault::Away(error) | Fault::Crowded(error) | Fault::ReadOnly(error)) => {
                    pause(error).await;
                    continue;
                }
                lent => lent?,
            };
            let transaction = match begin(&mut lent, limit).await {
                Err(Fault::Away(error) | Fault::Crowded(error) | Fault::ReadOnly(error)) => {
                    pause(error).await;
                    continue;
                }
                begun => begun?,
            };
            let End { transacted, clean } = finish(transaction, (id, fence), work).await?;
            if clean {
                lent.keep();
            }
            return Ok(transacted);
        }
    }
}

async fn pause(error: String) {
    complain(&LedgerError::Unavailable(error), "a handler's transaction cannot begin, trying again");
    sleep(PAUSE).await;
}

async fn begin<'a>(lent: &'a mut Lent<'_>, limit: Duration) -> Result<Transaction<'a, Postgres>, Fault> {
    let limit_ms = millis(limit).clamp(1, LIMIT_MS_MAX);
    let sql = AssertSqlSafe(format!("BEGIN; SET LOCAL statement_timeout = {limit_ms}"));
    let begun = timeout(CALL_TIMEOUT, (**lent).begin_with(sql)).await;
    Ok(begun.map_err(|_| Fault::late("beginning a transaction"))??)
}

/// Does the work, completes under the fence, and commits; or rolls back.
async fn finish<E>(
    mut transaction: Transaction<'_, Postgres>,
    (id, fence): (TaskId, Fence),
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<Json, E>,
) -> Result<End<E>, LedgerError> {
    let result = match work(&mut transaction).await {
        Ok(result) => result,
        Err(error) => {
            return Ok(rolled_back(transaction, Transacted::Failed(error)).await);
        }
    };
    let transition = Transition::Complete { result: result.clone() };
    match within(complete(&mut transaction, Settlement { id, fence, transition })).await? {
        // A completion is never turned into a cancellation.
        Settled::Fenced | Settled::Cancelled => Ok(rolled_back(transaction, Transacted::Fenced).await),
        // Only now: the completion holds the lock of the row, whatever becomes of the answer to this.
        Settled::Applied => match within(async { Ok(transaction.commit().await?) }).await {
            Ok(()) => Ok(End { transacted: Transacted::Committed(result), clean: true }),
            Err(error) => Ok(End { transacted: Transacted::Unknown(error), clean: false }),
        },
    }
}

async fn complete(connection: &mut PgConnection, completion: Settlement) -> Result<Settled, Fault> {
    let answer = Settling::write(connection, &[completion]).await?.pop();
    answer.unwrap_or_else(|| Err(Fault::corrupt("no answer to a completion")))
}

/// Rolls back. If that fails the connection is closed, and the server does.
async fn rolled_back<E>(transaction: Transaction<'_, Postgres>, transacted: Transacted<E>) -> End<E> {
    let clean = matches!(timeout(CALL_TIMEOUT, transaction.rollback()).await, Ok(Ok(())));
    End { transacted, clean }
}
