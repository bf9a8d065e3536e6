//! Group commit: writes of one kind that wait at the same time share one statement.
//!
//! A lane is a task with connections of its own. It takes whatever waits, writes it as one multi-row statement, and
//! answers every caller. There is no timer: an idle lane writes a single item at once, and while a statement is under way
//! the next batch gathers. A second connection pays once many wait: while one statement waits for the server's disk, the
//! next is computed. For a few it does not: each commit waits for the server's log, and half as many carry twice as much.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::connections::Connections;
use super::fault::Fault;
use crate::task::TaskId;

/// How many tasks one statement writes, unless a single submission brings more.
const ROWS_MAX: usize = 512;
/// As soon as so many tasks wait, they do not wait for the statement that is under way.
const TOGETHER: usize = 64;
/// How many bytes of args and results one statement carries, unless a single item brings more.
const BYTES_MAX: usize = 8 * 1024 * 1024;
/// How many items wait in a lane before callers wait outside.
const WAITING_MAX: usize = 1024;
/// How long one statement may take; the server's own limit comes first.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// How often a statement is tried that the server gives up for another one's sake.
pub(super) const TRIES: u32 = 4;

/// What a batch's statement says to each of its items, in their order.
pub(super) type Answers<T> = Result<Vec<Result<T, Fault>>, Fault>;

/// A kind of write that can be grouped.
pub(super) trait Bulk: Send + 'static {
    /// One caller's part.
    type Item: Send + Sync + 'static;
    /// What that caller hears.
    type Answer: Send + 'static;

    /// How much the item adds to a statement.
    fn size(item: &Self::Item) -> Size;

    /// The task that a statement may name only once: the second item is answered by another statement, which waits
    /// for the row's lock and sees what the first one did.
    fn only(item: &Self::Item) -> Option<TaskId>;

    /// Writes the items in one statement; durable when it returns.
    fn write(connection: &mut PgConnection, items: &[Self::Item])
    -> impl Future<Output = Answers<Self::Answer>> + Send;
}

/// What an item adds to a statement.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Size {
    pub(super) rows: usize,
    pub(super) bytes: usize,
}

/// The callers' end of a lane; the lane ends when it is dropped.
pub(super) struct Lane<B: Bulk> {
    sender: mpsc::Sender<Waiting<B>>,
}

struct Waiting<B: Bulk> {
    item: B::Item,
    caller: oneshot::Sender<Result<B::Answer, Fault>>,
}

impl<B: Bulk> Lane<B> {
    /// Starts a lane that writes with all of the connections; they are opened when there is something to write.
    pub(super) fn start(connections: Connections) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        crate::vital::spawn("ledger lane", run::<B>(Arc::new(connections), receiver));
        Self { sender }
    }

    /// Waits for its turn in a batch and for the answer. The caller sets the limit.
    pub(super) async fn write(&self, item: B::Item) -> Result<B::Answer, Fault> {
        let (caller, answer) = oneshot::channel();
        let ended = || Fault::Away("the ledger is closed".to_owned());
        self.sender.send(Waiting { item, caller }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

async fn run<B: Bulk>(connections: Arc<Connections>, mut receiver: mpsc::Receiver<Waiting<B>>) {
    let turns = Arc::new(Semaphore::new(connections.most()));
    let mut backlog = VecDeque::new();
    loop {
        if backlog.is_empty() {
            match receiver.recv().await {
                Some(first) => backlog.push_back(first),
                None => return,
            }
        }
        // Only now, when there is a connection to write with, is it decided what goes into the batch.
        let turn = take_turn(&turns, connections.most(), &mut backlog, &mut receiver).await;
        let (items, callers) = take_batch(&mut backlog);
        if !items.is_empty() {
            let connections = Arc::clone(&connections);
            tokio::spawn(async move {
                write_batch::<B>(&connections, items, callers).await;
                drop(turn);
            });
        }
    }
}

/// Waits for one of the turns: for any of them when many items wait, else until all are free. More items gather meanwhile.
async fn take_turn<B: Bulk>(
    turns: &Arc<Semaphore>,
    all: usize,
    backlog: &mut VecDeque<Waiting<B>>,
    receiver: &mut mpsc::Receiver<Waiting<B>>,
) -> Option<OwnedSemaphorePermit> {
    let all = u32::try_from(all).unwrap_or(u32::MAX);
    let mut closed = false;
    loop {
        while backlog.len() < WAITING_MAX
            && let Ok(next) = receiver.try_recv()
        {
            backlog.push_back(next);
        }
        let rows: usize = backlog.iter().map(|waiting| B::size(&waiting.item).rows).sum();
        let wanted = if rows >= TOGETHER { 1 } else { all };
        tokio::select! {
            biased;
            turn = Arc::clone(turns).acquire_many_owned(wanted) => return turn.ok()?.split(1),
            next = receiver.recv(), if !closed && backlog.len() < WAITING_MAX => match next {
                Some(next) => backlog.push_back(next),
                None => closed = true,
            },
        }
    }
}

type Callers<B> = Vec<oneshot::Sender<Result<<B as Bulk>::Answer, Fault>>>;

/// Takes the oldest items that fit in one statement. Items that must wait for an earlier one of their task, and
/// those that do not fit any more, stay in order.
fn take_batch<B: Bulk>(backlog: &mut VecDeque<Waiting<B>>) -> (Vec<B::Item>, Callers<B>) {
    let (mut items, mut callers) = (Vec::new(), Vec::new());
    let (mut total, mut named, mut later) = (Size::default(), HashSet::new(), VecDeque::new());
    while let Some(waiting) = backlog.pop_front() {
        // Nobody waits for it any more. For a claim this matters: a grant that no one hears holds the task.
        if waiting.caller.is_closed() {
            continue;
        }
        let size = B::size(&waiting.item);
        let full = total.rows + size.rows > ROWS_MAX || total.bytes + size.bytes > BYTES_MAX;
        if full && !items.is_empty() {
            later.push_back(waiting);
            break;
        }
        if B::only(&waiting.item).is_some_and(|id| !named.insert(id)) {
            later.push_back(waiting);
            continue;
        }
        total = Size { rows: total.rows + size.rows, bytes: total.bytes + size.bytes };
        items.push(waiting.item);
        callers.push(waiting.caller);
    }
    later.append(backlog);
    *backlog = later;
    (items, callers)
}

async fn write_batch<B: Bulk>(connections: &Connections, items: Vec<B::Item>, callers: Callers<B>) {
    let answers = match write_again::<B>(connections, &items).await {
        Ok(answers) => answers,
        // One item that the server will never take must not take the others with it.
        Err(Fault::Refused(_)) if items.len() > 1 => write_singly::<B>(connections, &items).await,
        Err(fault) => items.iter().map(|_| Err(fault.clone())).collect(),
    };
    for (caller, answer) in callers.into_iter().zip(answers) {
        // A caller that gave up in the meantime counts its write as of unknown outcome.
        let _ = caller.send(answer);
    }
}

async fn write_singly<B: Bulk>(connections: &Connections, items: &[B::Item]) -> Vec<Result<B::Answer, Fault>> {
    let mut answers = Vec::with_capacity(items.len());
    let mut away = None;
    for item in items {
        let answer = match &away {
            Some(fault) => Err(Fault::clone(fault)),
            None => match write_again::<B>(connections, std::slice::from_ref(item)).await {
                Ok(mut one) => one.pop().unwrap_or_else(|| Err(Fault::corrupt("no answer to a write"))),
                Err(fault) => Err(fault),
            },
        };
        if let (None, Err(fault @ (Fault::Away(_) | Fault::Crowded(_) | Fault::ReadOnly(_)))) = (&away, &answer) {
            away = Some(fault.clone());
        }
        answers.push(answer);
    }
    answers
}

/// Writes a batch, again where the server rolled it back for the sake of another statement.
async fn write_again<B: Bulk>(connections: &Connections, items: &[B::Item]) -> Answers<B::Answer> {
    let mut tries = 1;
    loop {
        match write_once::<B>(connections, items).await {
            Err(Fault::Collided(_)) if tries < TRIES => tries += 1,
            written => return written,
        }
    }
}

async fn write_once<B: Bulk>(connections: &Connections, items: &[B::Item]) -> Answers<B::Answer> {
    let mut lent = connections.lend().await?;
    let answers = timeout(WRITE_LIMIT, B::write(&mut lent, items)).await.map_err(|_| Fault::late("a write"))??;
    lent.keep();
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Items are (task, rows); nothing is written.
    struct Nothing;

    impl Bulk for Nothing {
        type Item = (TaskId, usize);
        type Answer = ();

        fn size(item: &Self::Item) -> Size {
            Size { rows: item.1, bytes: 0 }
        }

        fn only(item: &Self::Item) -> Option<TaskId> {
            Some(item.0)
        }

        async fn write(_: &mut PgConnection, items: &[Self::Item]) -> Answers<()> {
            Ok(items.iter().map(|_| Ok(())).collect())
        }
    }

    type Receivers = Vec<oneshot::Receiver<Result<(), Fault>>>;

    fn backlog(items: &[(TaskId, usize)]) -> (VecDeque<Waiting<Nothing>>, Receivers) {
        let entries = items.iter().map(|&item| {
            let (caller, receiver) = oneshot::channel();
            (Waiting { item, caller }, receiver)
        });
        entries.unzip()
    }

    #[test]
    fn a_task_named_twice_is_written_in_two_batches_in_order() {
        let (a, b) = (TaskId::new(), TaskId::new());
        let (mut waiting, _receivers) = backlog(&[(a, 1), (a, 2), (b, 1), (a, 3)]);
        assert_eq!(take_batch(&mut waiting).0, [(a, 1), (b, 1)]);
        assert_eq!(take_batch(&mut waiting).0, [(a, 2)]);
        assert_eq!(take_batch(&mut waiting).0, [(a, 3)]);
        assert!(waiting.is_empty());
    }

    #[test]
    fn a_batch_is_bounded_but_never_empty() {
        let items: Vec<_> = [ROWS_MAX + 1, ROWS_MAX, 1].map(|rows| (TaskId::new(), rows)).into();
        let (mut waiting, _receivers) = backlog(&items);
        for item in items {
            assert_eq!(take_batch(&mut waiting).0, [item]);
        }
    }

    #[test]
    fn items_whose_callers_left_are_not_written() {
        let (stays, leaves) = (TaskId::new(), TaskId::new());
        let (mut waiting, mut receivers) = backlog(&[(leaves, 1), (stays, 1)]);
        drop(receivers.remove(0));
        assert_eq!(take_batch(&mut waiting).0, [(stays, 1)]);
    }
}
