//! A handler's own writes: with the completion, or not at all.

use std::time::Duration;

use futures::future::join_all;
use futures::join;

use super::{complete, get, granted, one, recorded, retry, run, settle, worker};
use crate::ledger::{Ledger, Native, Settled, Transacted};
use crate::state::State;
use crate::task::{Fence, Json, TaskId};

/// Longer than any work here.
const LIMIT: Duration = Duration::from_secs(60);

const ADD: &str = "UPDATE counter SET n = n + 1";

/// Executes statements in the transaction of a completion with the result `7`, or fails after them.
async fn work(ledger: &dyn Ledger, id: TaskId, fence: Fence, sql: &'static str, fails: bool) -> Transacted<String> {
    let answer = move |done: Result<(), String>| match done {
        Ok(()) if fails => Err("as told".to_owned()),
        Ok(()) => Ok(Json::of(&7).unwrap()),
        Err(error) => Err(error),
    };
    match ledger.native() {
        Native::Sqlite(ledger) => {
            let statements = move |db: &rusqlite::Connection| db.execute_batch(sql).map_err(|error| error.to_string());
            ledger.transact(id, fence, move |db| answer(statements(db))).await
        }
        Native::Postgres(ledger) => {
            let work = async |connection: &mut sqlx::PgConnection| {
                let done = sqlx::raw_sql(sql).execute(connection).await;
                answer(done.map(|_| ()).map_err(|error| error.to_string()))
            };
            ledger.transact((id, fence), LIMIT, work).await.unwrap()
        }
    }
}

/// Makes a counter that stands at 0.
async fn counter(ledger: &dyn Ledger) {
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let fence = granted(ledger, id, worker).await.fence;
    let sql = "CREATE TABLE counter (n BIGINT NOT NULL); INSERT INTO counter VALUES (0)";
    let made = work(ledger, id, fence, sql, false).await;
    assert!(matches!(made, Transacted::Committed(_)), "{made:?}");
}

/// Where the counter stands: read in a work that fails, so that it needs no task.
async fn counted(ledger: &dyn Ledger) -> i64 {
    const SQL: &str = "SELECT n FROM counter";
    let (id, fence) = (TaskId::new(), Fence(0));
    let read = match ledger.native() {
        Native::Sqlite(ledger) => {
            ledger.transact(id, fence, |db| Err(db.query_row(SQL, [], |row| row.get(0)).unwrap())).await
        }
        Native::Postgres(ledger) => {
            let read = async |connection: &mut sqlx::PgConnection| {
                Err(sqlx::query_scalar(SQL).fetch_one(connection).await.unwrap())
            };
            ledger.transact((id, fence), LIMIT, read).await.unwrap()
        }
    };
    match read {
        Transacted::Failed(n) => n,
        other => panic!("no count: {other:?}"),
    }
}

/// Both are there, and the task's row is that of any completed task.
pub async fn work_and_completion_commit_together(ledger: &dyn Ledger) {
    counter(ledger).await;
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let fence = granted(ledger, id, worker).await.fence;
    let done = work(ledger, id, fence, ADD, false).await;
    assert!(matches!(&done, Transacted::Committed(result) if result.as_str() == "7"), "{done:?}");
    let task = get(ledger, id).await;
    assert_eq!((task.state, task.attempt, task.fence), (State::Completed, 1, fence));
    assert_eq!(task.result, Some(Json::of(&7).unwrap()));
    assert!(task.finished_at >= task.started_at && task.finished_at.is_some());
    assert_eq!((counted(ledger).await, ledger.next_due().await.unwrap()), (1, None));
    let again = work(ledger, id, fence, ADD, false).await;
    assert!(matches!(again, Transacted::Fenced), "{again:?}");
    assert_eq!(settle(ledger, id, fence, complete()).await, Settled::Fenced);
    assert_eq!(counted(ledger).await, 1);
}

/// What it wrote is gone, and its holder may settle the task in any way.
pub async fn a_failing_work_leaves_nothing_and_the_task_running(ledger: &dyn Ledger) {
    counter(ledger).await;
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let fence = granted(ledger, id, worker).await.fence;
    let told = work(ledger, id, fence, ADD, true).await;
    assert!(matches!(&told, Transacted::Failed(error) if error == "as told"), "{told:?}");
    let broken = work(ledger, id, fence, "UPDATE counter SET n = n + 1; INSERT INTO nowhere VALUES (1)", false).await;
    assert!(matches!(&broken, Transacted::Failed(error) if error.contains("nowhere")), "{broken:?}");
    let task = get(ledger, id).await;
    assert_eq!((task.state, task.fence, counted(ledger).await), (State::Running, fence, 0));
    assert!(matches!(work(ledger, id, fence, ADD, false).await, Transacted::Committed(_)));
    assert_eq!(counted(ledger).await, 1);
}

/// Whoever held the task before writes nothing, while it runs elsewhere and after it.
pub async fn a_stale_fence_rolls_the_work_back(ledger: &dyn Ledger) {
    counter(ledger).await;
    let (id, worker) = (one(ledger).await, worker(ledger).await);
    let stale = run(ledger, id, worker, retry(Duration::ZERO, "taken away")).await.fence;
    let held = granted(ledger, id, worker).await.fence;
    let before = get(ledger, id).await;
    for fence in [stale, Fence(held.0 + 1)] {
        let late = work(ledger, id, fence, ADD, false).await;
        assert!(matches!(late, Transacted::Fenced), "{late:?}");
    }
    assert_eq!((get(ledger, id).await, counted(ledger).await), (before, 0));
    assert!(matches!(work(ledger, id, held, ADD, false).await, Transacted::Committed(_)));
    assert_eq!(counted(ledger).await, 1);
}

/// Two of one run at the same moment, and a settlement beside them: one of the three counts.
pub async fn one_of_two_transactions_commits(ledger: &dyn Ledger) {
    counter(ledger).await;
    let (worker, mut added) = (worker(ledger).await, 0);
    for id in recorded(ledger, 10, |_| {}).await {
        let fence = granted(ledger, id, worker).await.fence;
        let (one, other, settled) = join!(
            work(ledger, id, fence, ADD, false),
            work(ledger, id, fence, ADD, false),
            settle(ledger, id, fence, retry(Duration::ZERO, "both")),
        );
        let committed = [&one, &other].iter().filter(|it| matches!(it, Transacted::Committed(_))).count();
        assert_eq!(committed + usize::from(settled == Settled::Applied), 1, "{one:?} {other:?} {settled:?}");
        let completed = get(ledger, id).await.state == State::Completed;
        assert_eq!(completed, committed == 1);
        added += i64::from(completed);
    }
    assert_eq!(counted(ledger).await, added);
}

/// Those that fail, and those that have lost their task, take no neighbour along.
pub async fn many_at_once_add_up(ledger: &dyn Ledger) {
    counter(ledger).await;
    let worker = worker(ledger).await;
    let ids = recorded(ledger, 90, |_| {}).await;
    let works = ids.iter().enumerate().map(async |(index, &id)| {
        let fence = granted(ledger, id, worker).await.fence;
        let fence = if index % 3 == 1 { Fence(fence.0 + 1) } else { fence };
        (id, work(ledger, id, fence, ADD, index % 3 == 2).await)
    });
    for (index, (id, ended)) in join_all(works).await.into_iter().enumerate() {
        let state = get(ledger, id).await.state;
        match index % 3 {
            0 => assert!(matches!(ended, Transacted::Committed(_)) && state == State::Completed, "{ended:?}"),
            1 => assert!(matches!(ended, Transacted::Fenced) && state == State::Running, "{ended:?}"),
            _ => assert!(matches!(ended, Transacted::Failed(_)) && state == State::Running, "{ended:?}"),
        }
    }
    assert_eq!(counted(ledger).await, 30);
}
