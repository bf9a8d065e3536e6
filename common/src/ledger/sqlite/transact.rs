//! A handler's own writes in the transaction of its task's completion.
//!
//! The work runs on the writer's thread, in the group commit, under a savepoint: a work that fails is rolled back to it
//! and takes none of its neighbours along, and many works share one sync of the disk. The file's lock is never held
//! across an await, since a work has none.
//!
//! When a caller gets no answer, its work waits (and is skipped, since nobody waits for it), or is being written. A
//! settlement sent afterwards passes the same thread behind it, so it finds the task as the work left it.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::{Connection, ffi};

use super::{SqliteLedger, write};
use crate::ledger::{Settled, Settlement, Transacted, Transition};
use crate::task::{Fence, Json, TaskId};

/// How long one work may keep all others from writing.
const WORK_LIMIT: Duration = Duration::from_secs(1);
/// As how many row writes a work counts, whatever it writes.
const WORK_ROWS: usize = 16;
/// How many steps of SQLite's machine lie between two looks at the clock.
const STEPS: std::ffi::c_int = 10_000;
const SAVEPOINT: &str = "tasklane_work";
/// The ledger's tables, which only the ledger writes.
pub(super) const TABLES: [&str; 13] = [
    "ledger",
    "limit_gates",
    "limit_places",
    "limits",
    "paused_queues",
    "queue_retention",
    "queues",
    "schedules",
    "task_args",
    "task_groups",
    "tasks",
    "unique_keys",
    "workers",
];

thread_local! {
    /// Whether this thread is inside of a work.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// Why the work that is under way, or was last, must not be committed.
    static FORBIDDEN: Cell<Option<&'static str>> = const { Cell::new(None) };
}

impl SqliteLedger {
    /// Commits what `work` writes together with the task's completion, if the fence still holds.
    ///
    /// The work may be called again when the transaction fails for another one's sake; what it did is rolled back
    /// before. It has one second, and must not end the transaction, attach databases, set pragmas or write to the
    /// ledger's tables. A panic in it goes on here.
    pub async fn transact<E: Send + 'static>(
        &self,
        id: TaskId,
        fence: Fence,
        work: impl FnMut(&Connection) -> Result<Json, E> + Send + 'static,
    ) -> Transacted<E> {
        let mut transaction = Transaction { id, fence, work, end: None };
        match self.writer.write(WORK_ROWS, move |db| transaction.apply(db)).await {
            Ok(Ok(transacted)) => transacted,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(error) => Transacted::Unknown(error),
        }
    }
}

/// How a work ended, or its panic.
type End<E> = Result<Transacted<E>, Box<dyn Any + Send>>;

struct Transaction<W, E> {
    id: TaskId,
    fence: Fence,
    work: W,
    /// How the work ended, when its failure took the whole transaction along.
    end: Option<End<E>>,
}

impl<E, W: FnMut(&Connection) -> Result<Json, E>> Transaction<W, E> {
    fn apply(&mut self, db: &Connection) -> rusqlite::Result<End<E>> {
        // Its neighbours are written again, and this one is not: it would only fail again.
        if let Some(end) = self.end.take() {
            return Ok(end);
        }
        run(db, "SAVEPOINT tasklane_work")?;
        let worked = confined(db, &mut self.work)?;
        let rolled_back = db.is_autocommit();
        let end = match worked {
            Ok(_) if rolled_back => {
                Ok(Transacted::Forbidden("the work went on after an error that undid the transaction".to_owned()))
            }
            Ok(result) => {
                let transition = Transition::Complete { result: result.clone() };
                if write::settle(db, &Settlement { id: self.id, fence: self.fence, transition })? == Settled::Applied {
                    run(db, "RELEASE tasklane_work")?;
                    return Ok(Ok(Transacted::Committed(result)));
                }
                Ok(Transacted::Fenced)
            }
            Err(end) => end,
        };
        if rolled_back {
            // An interrupted write, or a full disk, has undone all that the batch had written.
            self.end = Some(end);
            return Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_ABORT), None));
        }
        run(db, "ROLLBACK TO tasklane_work")?;
        run(db, "RELEASE tasklane_work")?;
        Ok(end)
    }
}

/// Not out of the cache of statements: a work could take it from there, past the authorizer, which looks at preparation.
fn run(db: &Connection, sql: &str) -> rusqlite::Result<()> {
    db.execute_batch(sql)
}

/// Runs a work within its limits; its answer, or how it ended without one.
fn confined<E>(
    db: &Connection,
    work: &mut impl FnMut(&Connection) -> Result<Json, E>,
) -> rusqlite::Result<Result<Json, End<E>>> {
    let until = Instant::now() + WORK_LIMIT;
    let late = move || {
        let late = Instant::now() >= until;
        if late {
            FORBIDDEN.set(Some("the work took longer than its 1 s, for which nobody else could write"));
        }
        late
    };
    db.progress_handler(STEPS, Some(late))?;
    FORBIDDEN.set(None);
    INSIDE.set(true);
    // A panic must not end the thread that writes for the whole process.
    let worked = catch_unwind(AssertUnwindSafe(|| work(db)));
    INSIDE.set(false);
    db.progress_handler(0, None::<fn() -> bool>)?;
    Ok(match (worked, FORBIDDEN.take()) {
        (Err(panic), _) => Err(Err(panic)),
        (Ok(_), Some(why)) => Err(Ok(Transacted::Forbidden(why.to_owned()))),
        (Ok(Ok(result)), None) => Ok(result),
        (Ok(Err(error)), None) => Err(Ok(Transacted::Failed(error))),
    })
}

/// Has the writer's connection refuse, inside of works, what would take the transaction or the ledger apart.
pub(super) fn confine(db: &Connection) -> rusqlite::Result<()> {
    db.authorizer(Some(|context: AuthContext<'_>| {
        let Some(why) = forbidden(&context).filter(|_| INSIDE.get()) else { return Authorization::Allow };
        FORBIDDEN.set(Some(why));
        Authorization::Deny
    }))
}

fn forbidden(context: &AuthContext<'_>) -> Option<&'static str> {
    match context.action {
        AuthAction::Transaction { .. } => Some("a work must not begin or end a transaction: it is in one"),
        AuthAction::Savepoint { savepoint_name: SAVEPOINT, .. } => Some("this savepoint is the ledger's"),
        AuthAction::Attach { .. } | AuthAction::Detach { .. } => Some("a work must not attach or detach databases"),
        AuthAction::Pragma { .. } => Some("a work must not use pragmas: they would stay set for the ledger"),
        AuthAction::Insert { table_name }
        | AuthAction::Update { table_name, .. }
        | AuthAction::Delete { table_name }
        | AuthAction::DropTable { table_name }
        | AuthAction::AlterTable { table_name, .. }
            if TABLES.contains(&table_name) =>
        {
            Some("a work must not write to the ledger's own tables")
        }
        _ => None,
    }
}
