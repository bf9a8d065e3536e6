//! A handler's own writes in one transaction with its task's completion.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tasklane_common::ledger::{Native, SharedLedger, Transacted};
use tasklane_common::rusqlite::Connection;
use tasklane_common::sqlx::PgConnection;
use tasklane_common::task::Json;
use tokio::time::Instant;

use crate::decide::{Attempted, check_result};
use crate::handler::{Committed, HandlerError, Outcome, TaskContext};

/// How much longer than the run the server lets a statement take: the run's own timeout comes first, and says more.
const AFTER_DEADLINE: Duration = Duration::from_secs(1);

/// The transaction of one run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Transaction {
    /// Where it writes; none in a test that gave none.
    ledger: Option<SharedLedger>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
enum State {
    /// Nothing was committed.
    #[default]
    None,
    /// It is under way, or nobody heard its end: if this is what the run leaves, the commit may have happened.
    Open,
    /// The task is completed, whatever the handler says afterwards.
    Committed(Json),
}

impl TaskContext {
    /// Completes the task in one transaction with the handler's own writes, in a ledger on PostgreSQL.
    ///
    /// What `work` writes through the connection and the completion, with the value that `work` answers as the task's
    /// result, commit together: both happen, or neither. When this worker does not hold the task any more, or `work`
    /// answers an error, or is dropped by a timeout or a shutdown, everything is rolled back.
    ///
    /// ```
    /// # use tasklane_worker::{Handler, HandlerError, Options, Outcome, TaskContext};
    /// # use tasklane_worker::sqlx;
    /// # use tasklane_common::task::Guarantee;
    /// struct Count;
    ///
    /// impl Handler for Count {
    ///     const KIND: &'static str = "count";
    ///     type Args = i64;
    ///
    ///     fn options(&self) -> Options {
    ///         Options { guarantee: Guarantee::Transactional, ..Options::default() }
    ///     }
    ///
    ///     async fn handle(&self, step: i64, cx: &TaskContext) -> Result<Outcome, HandlerError> {
    ///         cx.complete_in_postgres(async |connection| {
    ///             let sql = "UPDATE counters SET n = n + $1 RETURNING n";
    ///             let n: i64 = sqlx::query_scalar(sql).bind(step).fetch_one(connection).await?;
    ///             Ok(n)
    ///         })
    ///         .await
    ///     }
    /// }
    /// ```
    ///
    /// Few of these transactions are under way at a time, each on a connection of its own: do what takes long before.
    /// `work` must not end the transaction; a `begin` of its own is a savepoint. What it sets, it sets with `SET LOCAL`.
    ///
    /// # Errors
    /// What `work` answers; an error that may be retried when the task is not this worker's any more or the end of the
    /// commit is unknown, which the worker then finds out; a final one when the ledger is not on PostgreSQL.
    pub async fn complete_in_postgres<T: Serialize>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, HandlerError>,
    ) -> Result<Outcome, HandlerError> {
        let Native::Postgres(ledger) = self.transaction.ledger()?.native() else {
            return Err(wrong_ledger("complete_in_postgres", "PostgreSQL", "SQLite", "complete_in_sqlite"));
        };
        let limit = self.deadline.saturating_duration_since(Instant::now()) + AFTER_DEADLINE;
        self.transaction.open()?;
        let bytes_max = self.result_bytes_max;
        let work = async |connection: &mut PgConnection| result_of(work(connection).await?, bytes_max);
        match ledger.transact((self.id, self.fence), limit, work).await {
            Ok(transacted) => self.transaction.end(transacted),
            Err(error) => {
                self.transaction.close();
                Err(HandlerError::from(error))
            }
        }
    }

    /// Completes the task in one transaction with the handler's own writes, in a ledger on SQLite.
    ///
    /// What `work` writes and the completion, with the value that `work` answers as the task's result, commit together:
    /// both happen, or neither. When this worker does not hold the task any more, or `work` answers an error, everything
    /// is rolled back.
    ///
    /// ```
    /// # use tasklane_worker::{Handler, HandlerError, Options, Outcome, TaskContext};
    /// # use tasklane_common::task::Guarantee;
    /// struct Count;
    ///
    /// impl Handler for Count {
    ///     const KIND: &'static str = "count";
    ///     type Args = i64;
    ///
    ///     fn options(&self) -> Options {
    ///         Options { guarantee: Guarantee::Transactional, ..Options::default() }
    ///     }
    ///
    ///     async fn handle(&self, step: i64, cx: &TaskContext) -> Result<Outcome, HandlerError> {
    ///         cx.complete_in_sqlite(move |db| {
    ///             let sql = "UPDATE counters SET n = n + ?1 RETURNING n";
    ///             let n: i64 = db.prepare_cached(sql)?.query_row([step], |row| row.get(0))?;
    ///             Ok(n)
    ///         })
    ///         .await
    ///     }
    /// }
    /// ```
    ///
    /// `work` runs on the thread that writes for the whole process, with whatever else is waiting in one commit, so it
    /// gets one second, and nothing but SQL belongs into it. It may be called again after what it did was rolled back.
    /// It cannot end the transaction, attach databases, use pragmas or write to the ledger's own tables.
    ///
    /// # Errors
    /// As [`TaskContext::complete_in_postgres`]; also a final one when `work` tries what it must not.
    pub async fn complete_in_sqlite<T: Serialize>(
        &self,
        mut work: impl FnMut(&Connection) -> Result<T, HandlerError> + Send + 'static,
    ) -> Result<Outcome, HandlerError> {
        let Native::Sqlite(ledger) = self.transaction.ledger()?.native() else {
            return Err(wrong_ledger("complete_in_sqlite", "SQLite", "PostgreSQL", "complete_in_postgres"));
        };
        self.transaction.open()?;
        let bytes_max = self.result_bytes_max;
        let transacted = ledger.transact(self.id, self.fence, move |db| result_of(work(db)?, bytes_max)).await;
        self.transaction.end(transacted)
    }
}

impl Transaction {
    pub(crate) fn new(ledger: SharedLedger) -> Self {
        Self { ledger: Some(ledger), state: Arc::default() }
    }

    /// How a run has really ended: a commit outweighs whatever the handler did and said after it.
    pub(crate) fn judge(&self, attempted: Option<Attempted>) -> Option<Attempted> {
        match (&*self.state(), attempted) {
            (State::Committed(result), _) => Some(Attempted::Committed(result.clone())),
            // It may have been rolled back, and then the writes are missing.
            (State::Open, Some(Attempted::Answered(Ok(Outcome::Complete(_))))) => {
                Some(Attempted::Answered(Err(HandlerError::retry("the end of the handler's transaction is unknown"))))
            }
            (_, attempted) => attempted,
        }
    }

    /// Whether the task may be completed although nobody here knows.
    pub(crate) fn is_in_doubt(&self) -> bool {
        matches!(*self.state(), State::Open)
    }

    fn ledger(&self) -> Result<&SharedLedger, HandlerError> {
        self.ledger
            .as_ref()
            .ok_or_else(|| HandlerError::discard("this test has no ledger: give it one with TestTask::with_ledger"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on the commit may happen, whoever hears of it.
    fn open(&self) -> Result<(), HandlerError> {
        let mut state = self.state();
        match *state {
            State::None => {
                *state = State::Open;
                Ok(())
            }
            State::Open => Err(HandlerError::retry("another transaction of this run has not ended")),
            State::Committed(_) => Err(HandlerError::discard("this run has completed its task already")),
        }
    }

    fn close(&self) {
        *self.state() = State::None;
    }

    fn end(&self, transacted: Transacted<HandlerError>) -> Result<Outcome, HandlerError> {
        let error = match transacted {
            Transacted::Committed(result) => {
                *self.state() = State::Committed(result);
                return Ok(Outcome::Committed(Committed(())));
            }
            Transacted::Unknown(error) => {
                return Err(HandlerError::retry(format!("the end of the handler's transaction is unknown: {error}")));
            }
            Transacted::Fenced => HandlerError::retry("the task is not this worker's any more"),
            Transacted::Failed(error) => error,
            Transacted::Forbidden(why) => HandlerError::discard(why),
        };
        self.close();
        Err(error)
    }
}

fn result_of(value: impl Serialize, bytes_max: usize) -> Result<Json, HandlerError> {
    let result = Outcome::json(&value)?;
    check_result(&result, bytes_max).map_err(HandlerError::discard)?;
    Ok(result)
}

fn wrong_ledger(called: &str, expected: &str, found: &str, other: &str) -> HandlerError {
    HandlerError::discard(format!(
        "{called} needs a ledger on {expected}, and this worker's is on {found}: use {other}"
    ))
}
