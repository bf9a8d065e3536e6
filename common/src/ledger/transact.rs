//! A handler's own writes and its task's completion, in one transaction of the ledger.
//!
//! Each ledger takes the work in the words of its own library: [`SqliteLedger::transact`](super::sqlite::SqliteLedger::transact)
//! and [`PostgresLedger::transact`](super::postgres::PostgresLedger::transact).

use super::LedgerError;
use super::postgres::PostgresLedger;
use super::sqlite::SqliteLedger;
use crate::task::Json;

/// A ledger as what it is.
#[derive(Debug, Clone, Copy)]
pub enum Native<'a> {
    /// In a SQLite file.
    Sqlite(&'a SqliteLedger),
    /// In a PostgreSQL database.
    Postgres(&'a PostgresLedger),
}

/// What became of a piece of work and the completion with it. Both happened, or neither.
#[derive(Debug)]
pub enum Transacted<E> {
    /// Both are durable, and this is the task's result.
    Committed(Json),
    /// Neither happened: somebody else holds or finished the task.
    Fenced,
    /// Neither happened: the work failed.
    Failed(E),
    /// Neither happened: the work did what no work may do.
    Forbidden(String),
    /// Which of the two is unknown: the answer to the commit was lost.
    ///
    /// Any settlement under the same fence finds out. It waits behind the transaction wherever that still is, and then
    /// either is applied, so neither happened, or is refused while the task is `completed` under this fence, so both did.
    Unknown(LedgerError),
}
