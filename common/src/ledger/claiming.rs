//! What is said to a ledger about one run: from the publication and the claim to the outcome.

use std::time::Duration;

use jiff::Timestamp;

use crate::task::{Digest, ErrorKind, Fence, Guarantee, Json, Kind, Task, TaskId, WorkerId};

/// A publication that the broker has confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The task.
    pub id: TaskId,
    /// Its fence when it was published.
    pub fence: Fence,
    /// How long ago the confirm came: a mark that is late, as under load, still tells the task's place in its lane.
    pub ago: Duration,
}

/// Asks for a task.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// The task.
    pub id: TaskId,
    /// Who asks.
    pub worker: WorkerId,
    /// What a crash in this run will mean.
    pub guarantee: Guarantee,
    /// What the message says of it, by which it would be run.
    pub belief: Belief,
    /// Grant the task only if fewer crashes of its workers have hit it: [`Refusal::Suspect`].
    pub crashes_below: i32,
}

/// What a message says of its task. Anybody who may publish can say anything: the ledger compares it with the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Belief {
    /// The work.
    pub kind: Kind,
    /// The fence under which the message was published. `None`: it does not say, as those of older releases; it counts
    /// for a task that was never edited or moved.
    pub published: Option<Fence>,
    /// What its args are told by.
    pub args: Digest,
}

impl Belief {
    /// What a message of this moment would say.
    #[must_use]
    pub fn of(task: &Task) -> Self {
        Self { kind: task.kind.clone(), published: Some(task.fence), args: task.args.digest() }
    }

    /// The fence of the message as a number: below all others where it is not known.
    pub(crate) fn published_under(&self) -> i64 {
        self.published.map_or(-1, |fence| fence.0)
    }

    /// What is wrong with it, by what the row says. Of an older message the args may be others.
    pub(crate) fn refusal(&self, row: &Believed<'_>) -> Option<Refusal> {
        let published = self.published_under();
        if self.kind.as_str() != row.kind {
            return Some(Refusal::WrongKind);
        }
        if published > row.fence {
            return Some(Refusal::WrongFence);
        }
        if row.void_below.is_some_and(|void_below| void_below > published) {
            return Some(Refusal::Outdated);
        }
        row.args.is_some_and(|args| args != self.args.0).then_some(Refusal::WrongArgs)
    }

    /// Why its task is not put back. A message that does not say of when it is may be the newest there is.
    pub(crate) fn refusal_to_return(&self, row: &Believed<'_>) -> Option<Refusal> {
        self.refusal(row).filter(|reason| *reason != Refusal::Outdated || self.published.is_some())
    }
}

/// The columns of a task that a message is believed by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Believed<'r> {
    pub(crate) kind: &'r str,
    pub(crate) fence: i64,
    pub(crate) void_below: Option<i64>,
    /// `None` of a task that an earlier release has recorded.
    pub(crate) args: Option<i64>,
}

/// The ledger's answer to a claim.
#[derive(Debug, Clone, PartialEq)]
pub enum Claim {
    /// The task is the worker's, for as long as its lease lives.
    Granted(Granted),
    /// It is not, and the delivery may be acked: the ledger keeps custody.
    Refused(Refusal),
}

/// What a worker learns with a granted claim.
#[derive(Debug, Clone, PartialEq)]
pub struct Granted {
    /// The number that the outcome must carry.
    pub fence: Fence,
    /// This attempt, counted from 1.
    pub attempt: i32,
    /// How many there may be.
    pub max_attempts: i32,
    /// The submitter's limit on one run.
    pub timeout: Option<Duration>,
    /// When it could first have started, since it was recorded, replayed, or given a time by an edit: what its age counts from.
    pub first_due_at: Timestamp,
    /// When this attempt could have started.
    pub run_at: Timestamp,
    /// When it was marked queued, if it was: feeds the lane's watermark.
    pub queued_at: Option<Timestamp>,
    /// The ledger's time of the claim.
    pub started_at: Timestamp,
    /// Whether it has taken a place that others may wait for.
    pub limited: bool,
}

/// Why a claim was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It reached a final state.
    Finished,
    /// A worker holds it.
    Held,
    /// Its time has not come; the relay publishes it then.
    NotDue,
    /// The ledger has no such task.
    Unknown,
    /// It was edited or moved after the message was published; another one is there, or will be.
    Outdated,
    /// The message names another kind than the task has: it is nobody's of ours.
    WrongKind,
    /// The message was published under a higher fence than the task has: it is nobody's of ours, or the ledger was restored
    /// from a backup.
    WrongFence,
    /// The message has other args than the task: it is nobody's of ours.
    WrongArgs,
    /// Its queue is paused; a later claim may be granted.
    Paused,
    /// The asking worker's own lease has ended.
    LeaseLost,
    /// Too many crashes have hit it for this claim.
    Suspect,
    /// A limit has no place for it: the ledger holds it until [`release_held`](super::Ledger::release_held).
    Limited,
}

impl Refusal {
    /// The name used in metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Held => "held",
            Self::NotDue => "not_due",
            Self::Unknown => "unknown",
            Self::Outdated => "outdated",
            Self::WrongKind => "wrong_kind",
            Self::WrongFence => "wrong_fence",
            Self::WrongArgs => "wrong_args",
            Self::Paused => "paused",
            Self::LeaseLost => "lease_lost",
            Self::Suspect => "suspect",
            Self::Limited => "limited",
        }
    }
}

/// The outcome of a run, on its way to the ledger.
#[derive(Debug, Clone, PartialEq)]
pub struct Settlement {
    /// The task.
    pub id: TaskId,
    /// The fence under which it ran.
    pub fence: Fence,
    /// Where it goes.
    pub transition: Transition,
}

/// Where a running task goes. Delays count from the ledger's time of the write.
#[derive(Debug, Clone, PartialEq)]
pub enum Transition {
    /// To `completed`, with the handler's answer.
    Complete {
        /// The answer.
        result: Json,
    },
    /// To `retryable`.
    Retry {
        /// How long the next attempt waits.
        delay: Duration,
        /// What went wrong.
        error: Failure,
    },
    /// To `scheduled`; gives the attempt back.
    Snooze {
        /// How long it waits.
        delay: Duration,
    },
    /// To `accepted`, due at once; gives the attempt back.
    Interrupt,
    /// To `cancelled`.
    Cancel {
        /// Who said so, or why; the reason of a request, if there was one, stays.
        reason: String,
    },
    /// To `discarded`.
    Discard {
        /// Why: `exhausted`, `final_error`, `too_old`, `interrupted` or `poison`.
        reason: String,
        /// What went wrong.
        error: Failure,
    },
}

impl Transition {
    /// The event of the state machine.
    #[must_use]
    pub const fn event(&self) -> crate::state::Event {
        use crate::state::Event;
        match self {
            Self::Complete { .. } => Event::Complete,
            Self::Retry { .. } => Event::Retry,
            Self::Snooze { .. } => Event::Snooze,
            Self::Interrupt => Event::Interrupt,
            Self::Cancel { .. } => Event::Cancel,
            Self::Discard { .. } => Event::Discard,
        }
    }
}

/// A failure to be appended to the task's errors, with the attempt and the ledger's time.
///
/// One of kind [`ErrorKind::Crash`] also raises the task's crash count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What happened.
    pub message: String,
    /// Which sort of failure it was.
    pub kind: ErrorKind,
}

/// The ledger's answer to a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The outcome is durable.
    Applied,
    /// It would have led to another start, but the task was to be cancelled: that is durable instead.
    Cancelled,
    /// Somebody else holds or finished the task: the outcome was refused and changed nothing.
    Fenced,
}
