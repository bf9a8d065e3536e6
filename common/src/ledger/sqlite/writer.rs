//! Group commit: one thread drains whatever writes wait and commits them in one transaction.
//!
//! There is no timer: an idle write costs one commit, and under load the batches grow by themselves. Urgent writes
//! (lease renewals) go to the front, so they wait for one transaction under way at most.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::guard::Guard;
use crate::ledger::{CALL_TIMEOUT, LedgerError};

/// Row writes that go into one transaction: bounds how long other processes wait for the file's lock.
const BATCH_ROWS_MAX: u32 = 512;
/// How long writes go on joining a transaction: bounds how long a renewal waits, whatever handlers do in theirs.
const BATCH_TIME_MAX: Duration = Duration::from_millis(100);
/// Row writes that may wait; callers beyond wait for room.
const WAITING_ROWS_MAX: u32 = 16_384;

/// A write that waits for its turn.
trait Pending: Send {
    /// Executes the statements; called again, alone, when the batch that it was in failed.
    fn apply(&mut self, connection: &Connection) -> rusqlite::Result<()>;
    /// Whether nobody waits for it any more.
    fn is_forsaken(&self) -> bool;
    /// Answers the caller, after the commit.
    fn answer(self: Box<Self>, outcome: Result<(), LedgerError>);
}

struct Write<T, F> {
    statements: F,
    value: Option<T>,
    reply: oneshot::Sender<Result<T, LedgerError>>,
}

impl<T: Send, F: FnMut(&Connection) -> rusqlite::Result<T> + Send> Pending for Write<T, F> {
    fn apply(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.value = Some((self.statements)(connection)?);
        Ok(())
    }

    fn is_forsaken(&self) -> bool {
        self.reply.is_closed()
    }

    fn answer(self: Box<Self>, outcome: Result<(), LedgerError>) {
        let Self { value, reply, .. } = *self;
        let missing = || LedgerError::Unavailable("the write was not executed".to_owned());
        // The caller may have stopped waiting.
        let _ = reply.send(outcome.and_then(|()| value.ok_or_else(missing)));
    }
}

struct Job {
    write: Box<dyn Pending>,
    rows: u32,
    _room: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Inbox {
    urgent: VecDeque<Job>,
    normal: VecDeque<Job>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    filled: Condvar,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.normal.is_empty()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, job: Job, urgent: bool) {
        let mut inbox = self.lock();
        if urgent {
            inbox.urgent.push_back(job)
        } else {
            inbox.normal.push_back(job)
        }
        self.filled.notify_one();
    }

    /// Gives back what did not fit; it keeps its turn.
    fn put_back(&self, jobs: Vec<Job>) {
        let mut inbox = self.lock();
        jobs.into_iter().rev().for_each(|job| inbox.normal.push_front(job));
    }

    /// Blocks until writes wait; false when the ledger is closed and everything is written.
    fn wait(&self) -> bool {
        let inbox = self
            .filled
            .wait_while(self.lock(), |inbox| inbox.is_empty() && !inbox.closed)
            .unwrap_or_else(PoisonError::into_inner);
        !inbox.is_empty()
    }

    /// What goes into one transaction; nothing, if nobody waits for it any more.
    fn take(&self) -> Vec<Job> {
        let mut inbox = self.lock();
        let mut batch: Vec<_> = inbox.urgent.drain(..).collect();
        let mut rows = 0;
        while let Some(job) = inbox.normal.pop_front() {
            // A grant that nobody hears would hold its task, and a caller who was told of a failure shall be right.
            if job.write.is_forsaken() {
                continue;
            }
            rows += job.rows;
            batch.push(job);
            if rows >= BATCH_ROWS_MAX {
                break;
            }
        }
        batch
    }
}

/// The handle to the writer thread, which ends with its handle after what waits is written.
pub(super) struct Writer {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
}

impl Writer {
    /// Starts the thread. To be called within the runtime.
    pub(super) fn spawn(connection: Connection, guard: Arc<Guard>) -> Result<Self, LedgerError> {
        let shared = Arc::new(Shared::default());
        let thread = Arc::clone(&shared);
        // Never more than waits for its turn, which the room bounds.
        let (committed, answers) = mpsc::unbounded_channel();
        crate::vital::spawn("ledger answers", answer_batches(answers));
        std::thread::Builder::new()
            .name("ledger-writer".to_owned())
            .spawn(move || {
                crate::vital::run_thread("ledger writer", || write_batches(&connection, &guard, &thread, &committed))
            })
            .map_err(|error| LedgerError::Unavailable(format!("cannot start the writer thread: {error}")))?;
        Ok(Self { shared, room: Arc::new(Semaphore::new(WAITING_ROWS_MAX as usize)) })
    }

    /// Executes statements that write about `rows` rows, with whatever else is waiting, and waits for the commit.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        rows: usize,
        statements: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let rows = u32::try_from(rows).unwrap_or(u32::MAX).clamp(1, WAITING_ROWS_MAX);
        self.submit(rows, false, statements).await
    }

    /// As [`Writer::write`], before everything that waits.
    pub(super) async fn write_urgently<T: Send + 'static>(
        &self,
        statements: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        self.submit(0, true, statements).await
    }

    async fn submit<T: Send + 'static>(
        &self,
        rows: u32,
        urgent: bool,
        statements: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let answered = async {
            let gone = |_| LedgerError::Unavailable("the writer has ended".to_owned());
            let room = Arc::clone(&self.room).acquire_many_owned(rows).await.map_err(|_| gone(()))?;
            let (reply, answer) = oneshot::channel();
            let job = Job { write: Box::new(Write { statements, value: None, reply }), rows, _room: room };
            self.shared.put(job, urgent);
            answer.await.map_err(|_| gone(()))?
        };
        let late = |_| LedgerError::Unavailable(format!("no answer within {} s", CALL_TIMEOUT.as_secs()));
        timeout(CALL_TIMEOUT, answered).await.map_err(late)?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.filled.notify_one();
    }
}

/// Tells the callers of whole batches. A thread outside of the runtime would wake one of its threads for each.
async fn answer_batches(mut committed: mpsc::UnboundedReceiver<Vec<Job>>) {
    while let Some(batch) = committed.recv().await {
        batch.into_iter().for_each(|job| job.write.answer(Ok(())));
    }
}

fn write_batches(connection: &Connection, guard: &Guard, shared: &Shared, committed: &mpsc::UnboundedSender<Vec<Job>>) {
    while shared.wait() {
        // The lock first: whatever comes while another process writes goes along. And with it a transaction that reads and then
        // writes meets no lock that it must not wait for.
        let begun = begin(connection, guard);
        let mut batch = shared.take();
        if !batch.is_empty() {
            metrics::histogram!("tasklane_ledger_batch_writes", "ledger" => "sqlite").record(batch.len() as f64);
        }
        match begun.and_then(|()| commit(connection, guard, &mut batch)) {
            Ok(written) => {
                shared.put_back(batch.split_off(written));
                match batch.len() {
                    1 => batch.into_iter().for_each(|job| job.write.answer(Ok(()))),
                    // At the end of the runtime nobody waits for an answer any more.
                    _ => drop(committed.send(batch)),
                }
            }
            // A write that cannot succeed must not take its neighbours along.
            Err(fault) if fault.may_be_of_one() => {
                for mut job in batch {
                    let outcome = begin(connection, guard)
                        .and_then(|()| commit(connection, guard, std::slice::from_mut(&mut job)).map(drop));
                    job.write.answer(outcome.map_err(|fault| fault.told(guard)));
                }
            }
            Err(fault) => batch.into_iter().for_each(|job| job.write.answer(Err(fault.told(guard)))),
        }
    }
}

/// Why nothing was committed, or for nobody.
enum Fault {
    Sqlite(rusqlite::Error),
    /// The file is not the one that everybody has.
    Replaced(PathBuf),
}

impl Fault {
    /// Whether the others of the batch may fare better alone.
    fn may_be_of_one(&self) -> bool {
        match self {
            Self::Sqlite(error) => !is_busy(error),
            Self::Replaced(_) => false,
        }
    }

    fn told(&self, guard: &Guard) -> LedgerError {
        match self {
            Self::Sqlite(error) => guard.fault(error),
            Self::Replaced(file) => LedgerError::Replaced(file.clone()),
        }
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn check(guard: &Guard) -> Result<(), Fault> {
    match guard.check() {
        Err(LedgerError::Replaced(file)) => Err(Fault::Replaced(file)),
        _ => Ok(()),
    }
}

fn begin(connection: &Connection, guard: &Guard) -> Result<(), Fault> {
    check(guard)?;
    Ok(connection.execute_batch("BEGIN IMMEDIATE")?)
}

/// Commits the batch in the transaction that has begun, or as much of its beginning as there is time for; answers how many writes
/// that were.
fn commit(connection: &Connection, guard: &Guard, batch: &mut [Job]) -> Result<usize, Fault> {
    let before = connection.total_changes();
    let applied = apply(connection, batch);
    match applied.and_then(|written| connection.execute_batch("COMMIT").map(|()| written)) {
        Ok(written) => {
            // Again: nobody is told of a write that went into a file which is gone.
            check(guard)?;
            if connection.total_changes() != before {
                guard.wrote();
            }
            Ok(written)
        }
        Err(error) => {
            // Some errors roll back by themselves, and then this one has nothing to do.
            let _ = connection.execute_batch("ROLLBACK");
            Err(error.into())
        }
    }
}

fn apply(connection: &Connection, batch: &mut [Job]) -> rusqlite::Result<usize> {
    let began = Instant::now();
    for (index, job) in batch.iter_mut().enumerate() {
        job.write.apply(connection)?;
        if began.elapsed() >= BATCH_TIME_MAX {
            return Ok(index + 1);
        }
    }
    Ok(batch.len())
}

pub(super) fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked))
}
