//! What the checker has found.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// The judgement of a whole history.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// What there was, and how often.
    pub counts: Counts,
    /// Every promise broken; empty is good.
    pub violations: Vec<Violation>,
}

impl Verdict {
    /// How many violations are of one kind.
    pub fn count(&self, broken: Broken) -> usize {
        self.violations.iter().filter(|violation| violation.broken == broken).count()
    }

    /// How many violations there are of each kind that there is.
    pub fn kinds(&self) -> BTreeMap<Broken, usize> {
        let mut kinds = BTreeMap::new();
        for violation in &self.violations {
            *kinds.entry(violation.broken).or_default() += 1;
        }
        kinds
    }
}

/// What a history has in it.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Tasks that a client was promised.
    pub submitted: usize,
    /// Submissions whose client never learnt what became of them, and that left no task.
    pub unknown_absent: usize,
    /// Submissions whose client never learnt what became of them, and whose tasks are there.
    pub unknown_present: usize,
    /// Tasks in the ledger.
    pub tasks: usize,
    /// Of them, completed.
    pub completed: usize,
    /// Of the completed, transactional.
    pub transactional: usize,
    /// Of them, discarded because their only run was cut.
    pub interrupted: usize,
    /// Of them, cancelled by a client.
    pub cancelled: usize,
    /// Groups that were followed by one task.
    pub followed: usize,
    /// Tasks given to another queue, as far as answers told.
    pub moved: u64,
    /// Pauses of queues.
    pub pauses: usize,
    /// How far each limit was used, by its name.
    pub limits: BTreeMap<String, Usage>,
    /// Changes of waiting tasks, as far as answers told.
    pub edits: usize,
    /// Changes that nobody has answered.
    pub edits_unknown: usize,
    /// Changes that were refused, for most because the task had been started.
    pub edits_refused: usize,
    /// Handlers started.
    pub starts: usize,
    /// Runs cut by the death of their process.
    pub killed_runs: usize,
    /// Runs dropped by a worker that lives on.
    pub dropped_runs: usize,
    /// From the death of a process to the next start of each task that it ran, without the time in which there was no
    /// broker, ledger, queue or other worker; sorted.
    pub takeovers: Vec<Duration>,
    /// The same with that time.
    pub takeovers_in_all: Vec<Duration>,
    /// Frozen runs that went on for a moment when they were thawed, beside the next run: the longest moment.
    pub longest_after_thaw: Duration,
}

/// How far a limit was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Runs of tasks that it is for.
    pub runs: usize,
    /// The most that there were of what it counts.
    pub most: usize,
    /// How many it allows.
    pub allowed: usize,
}

/// One promise broken once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which promise.
    pub broken: Broken,
    /// The task, submission, queue or process.
    pub subject: String,
    /// What was seen.
    pub evidence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { broken, subject, evidence } = self;
        write!(f, "{broken}: {subject}: {evidence}")
    }
}

/// The promises that a history can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Broken {
    /// An accepted task is not in the ledger.
    Lost,
    /// A task has not ended when everything was given time to.
    Unfinished,
    /// The ledger has a task running that no worker runs.
    Stray,
    /// A task ended in another way than its guarantee allows.
    WrongEnd,
    /// A completed task never had its effect.
    NoEffect,
    /// One submission has more tasks than it asked for.
    Doubled,
    /// A batch was recorded in part.
    Half,
    /// Something was recorded or ran that nobody submitted.
    Unasked,
    /// Two runs of a task ran at the same time.
    Overlapping,
    /// A later start has no higher fence.
    FenceStuck,
    /// A task started after its completion.
    StartedAfterEnd,
    /// A task started anew after its cancellation was answered.
    StartedAfterCancel,
    /// Two tasks with one unique key ran at the same time.
    KeyShared,
    /// More ran at the same time, or were started in a time, than a limit allows.
    OverLimit,
    /// A task ran, or ended, with other args, or ran earlier, than the answers to its changes say.
    Misedited,
    /// A task was granted while its queue was paused.
    StartedInPause,
    /// A task is in a queue that nobody has put it into.
    Misplaced,
    /// All tasks of a group have ended, and none has followed.
    Unfollowed,
    /// More than one task has followed a group.
    FollowedTwice,
    /// The task that follows a group began before all of the group's had ended.
    FollowedEarly,
    /// The task that follows a group was told other ends than those of its members.
    FollowedWrongly,
    /// An `at_most_once` task started twice.
    Repeated,
    /// The ledger and the handlers tell different stories of a task.
    Disagreement,
    /// A transactional effect is there without its completion, or twice, or not.
    Miscounted,
    /// A queue is missing, or holds something at the end.
    Leftover,
    /// A process ended that nobody had killed.
    Died,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "lost",
            Self::Unfinished => "unfinished",
            Self::Stray => "running without a run",
            Self::WrongEnd => "wrong end",
            Self::NoEffect => "no effect",
            Self::Doubled => "doubled",
            Self::Half => "half recorded",
            Self::Unasked => "unasked",
            Self::Overlapping => "overlapping",
            Self::FenceStuck => "fence not rising",
            Self::StartedAfterEnd => "started after completion",
            Self::StartedAfterCancel => "started after cancellation",
            Self::KeyShared => "unique key shared",
            Self::OverLimit => "over its limit",
            Self::Misedited => "not as it was edited",
            Self::StartedInPause => "started in a pause",
            Self::Misplaced => "misplaced",
            Self::Unfollowed => "group not followed",
            Self::FollowedTwice => "group followed twice",
            Self::FollowedEarly => "group followed too early",
            Self::FollowedWrongly => "group's ends told wrongly",
            Self::Repeated => "at_most_once repeated",
            Self::Disagreement => "ledger and log disagree",
            Self::Miscounted => "transactional effects miscounted",
            Self::Leftover => "left in the broker",
            Self::Died => "process died by itself",
        })
    }
}
