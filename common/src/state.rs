//! The states of a task and the only ways between them.
//!
//! Every write to the ledger is one row of [`TRANSITIONS`]; the ledgers take their SQL conditions from it.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Recorded, and not known to be in the broker.
    Accepted,
    /// Waits for its time.
    Scheduled,
    /// The broker confirmed its message.
    Queued,
    /// A worker holds it under a lease and a fence.
    Running,
    /// Failed or interrupted; waits for its next attempt.
    Retryable,
    /// Its result is recorded. Final.
    Completed,
    /// Somebody, or its handler, said stop. Final.
    Cancelled,
    /// Its attempts are exhausted, or its error was final. Final.
    Discarded,
}

impl State {
    /// All states, in the order of a task's life.
    pub const ALL: [Self; 8] = [
        Self::Accepted,
        Self::Scheduled,
        Self::Queued,
        Self::Running,
        Self::Retryable,
        Self::Completed,
        Self::Cancelled,
        Self::Discarded,
    ];

    /// The name used in JSON, SQL comments and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Scheduled => "scheduled",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Retryable => "retryable",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Discarded => "discarded",
        }
    }

    /// The number that stands for the state in a ledger. Never change one: rows hold them.
    #[must_use]
    pub const fn code(self) -> i16 {
        match self {
            Self::Accepted => 0,
            Self::Scheduled => 1,
            Self::Queued => 2,
            Self::Running => 3,
            Self::Retryable => 4,
            Self::Completed => 5,
            Self::Cancelled => 6,
            Self::Discarded => 7,
        }
    }

    /// The state behind a ledger's number.
    #[must_use]
    pub fn from_code(code: i16) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.code() == code)
    }

    /// Whether the task will never move again by itself.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Discarded)
    }

    /// Whether a claim may take the task from here, once its time has come.
    ///
    /// `Accepted`, `Scheduled` and `Retryable` are claimable because a delivery can overtake the write
    /// that marks its task queued.
    #[must_use]
    pub fn is_claimable(self) -> bool {
        next(self, Event::Claim).is_some()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for State {
    type Err = UnknownState;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|state| state.as_str() == name).ok_or(UnknownState)
    }
}

/// The text is not the name of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be one of accepted, scheduled, queued, running, retryable, completed, cancelled, discarded")]
pub struct UnknownState;

/// What can happen to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Event {
    /// The broker confirmed the task's message.
    MarkQueued,
    /// A worker took the task under a new fence.
    Claim,
    /// The handler finished.
    Complete,
    /// The attempt failed and another may follow; also a crash that may be repeated.
    Retry,
    /// The handler asked for a later time; costs no attempt.
    Snooze,
    /// A shutdown cut the run short; costs no attempt.
    Interrupt,
    /// The handler, or somebody, said stop. A run is asked to stop first; what would start it again is this instead.
    Cancel,
    /// The error was final, the attempts are used up, or a crash must not be repeated.
    Discard,
    /// A worker without a handler for the kind gave the delivery back.
    PutBack,
    /// Somebody gave the task to another queue.
    Move,
    /// The broker lost the message.
    Strand,
    /// A person asked to run a finished failure again, or what waits for its time before it.
    Replay,
    /// A person changed what waits.
    Edit,
}

impl Event {
    /// The name used in documents and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MarkQueued => "mark queued",
            Self::Claim => "claim",
            Self::Complete => "complete",
            Self::Retry => "retry",
            Self::Snooze => "snooze",
            Self::Interrupt => "interrupt",
            Self::Cancel => "cancel",
            Self::Discard => "discard",
            Self::PutBack => "put back",
            Self::Move => "move",
            Self::Strand => "strand",
            Self::Replay => "replay",
            Self::Edit => "edit",
        }
    }
}

/// The whole machine: from a state, by an event, to a state. What is not here does not happen.
pub const TRANSITIONS: &[(State, Event, State)] = &[
    (State::Accepted, Event::MarkQueued, State::Queued),
    (State::Scheduled, Event::MarkQueued, State::Queued),
    (State::Retryable, Event::MarkQueued, State::Queued),
    (State::Accepted, Event::Claim, State::Running),
    (State::Scheduled, Event::Claim, State::Running),
    (State::Queued, Event::Claim, State::Running),
    (State::Retryable, Event::Claim, State::Running),
    (State::Running, Event::Complete, State::Completed),
    (State::Running, Event::Retry, State::Retryable),
    (State::Running, Event::Snooze, State::Scheduled),
    (State::Running, Event::Interrupt, State::Accepted),
    (State::Accepted, Event::Cancel, State::Cancelled),
    (State::Scheduled, Event::Cancel, State::Cancelled),
    (State::Queued, Event::Cancel, State::Cancelled),
    (State::Retryable, Event::Cancel, State::Cancelled),
    (State::Running, Event::Cancel, State::Cancelled),
    (State::Running, Event::Discard, State::Discarded),
    (State::Accepted, Event::PutBack, State::Accepted),
    (State::Scheduled, Event::PutBack, State::Accepted),
    (State::Queued, Event::PutBack, State::Accepted),
    (State::Retryable, Event::PutBack, State::Accepted),
    (State::Accepted, Event::Move, State::Accepted),
    (State::Scheduled, Event::Move, State::Scheduled),
    (State::Queued, Event::Move, State::Accepted),
    (State::Retryable, Event::Move, State::Retryable),
    (State::Queued, Event::Strand, State::Accepted),
    (State::Scheduled, Event::Replay, State::Accepted),
    (State::Retryable, Event::Replay, State::Accepted),
    (State::Cancelled, Event::Replay, State::Accepted),
    (State::Discarded, Event::Replay, State::Accepted),
    (State::Accepted, Event::Edit, State::Scheduled),
    (State::Scheduled, Event::Edit, State::Scheduled),
    (State::Queued, Event::Edit, State::Scheduled),
    (State::Retryable, Event::Edit, State::Scheduled),
];

/// Where an event leads from a state, or `None` when it must not happen there.
#[must_use]
pub fn next(from: State, event: Event) -> Option<State> {
    TRANSITIONS.iter().find(|(state, by, _)| (*state, *by) == (from, event)).map(|(_, _, to)| *to)
}

/// The transition table as Markdown, as it stands in `docs/STATE_MACHINE.md`.
#[must_use]
pub fn transition_table() -> String {
    let mut table = String::from("| from | event | to |\n| --- | --- | --- |\n");
    for (from, event, to) in TRANSITIONS {
        table.push_str(&format!("| `{from}` | {} | `{to}` |\n", event.as_str()));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENTS: [Event; 13] = [
        Event::MarkQueued,
        Event::Claim,
        Event::Complete,
        Event::Retry,
        Event::Snooze,
        Event::Interrupt,
        Event::Cancel,
        Event::Discard,
        Event::PutBack,
        Event::Move,
        Event::Strand,
        Event::Replay,
        Event::Edit,
    ];

    proptest! {
        /// Whatever happens, a completed task never moves again.
        #[test]
        fn completed_is_the_end(events in proptest::collection::vec(0..EVENTS.len(), 0..60)) {
            let mut state = State::Accepted;
            let mut completed = false;
            for event in events.into_iter().map(|index| EVENTS[index]) {
                if let Some(to) = next(state, event) {
                    prop_assert!(!completed, "left completed by {event:?}");
                    state = to;
                }
                completed = state == State::Completed;
            }
        }

        /// Only a claim starts a run, and only a running task produces an outcome.
        #[test]
        fn a_run_begins_with_a_claim(from in 0..8usize, event in 0..EVENTS.len()) {
            let (from, event) = (State::ALL[from], EVENTS[event]);
            if let Some(to) = next(from, event) {
                prop_assert_eq!(to == State::Running, event == Event::Claim);
                if matches!(event, Event::Complete | Event::Retry | Event::Snooze | Event::Interrupt | Event::Discard) {
                    prop_assert_eq!(from, State::Running);
                }
            }
        }
    }

    #[test]
    fn no_pair_leads_to_two_states() {
        let mut pairs: Vec<_> = TRANSITIONS.iter().map(|(from, event, _)| (*from, *event)).collect();
        pairs.sort_unstable();
        pairs.dedup();
        assert_eq!(pairs.len(), TRANSITIONS.len());
    }

    #[test]
    fn codes_and_names_round_trip() {
        for state in State::ALL {
            assert_eq!(State::from_code(state.code()), Some(state));
            assert_eq!(state.as_str().parse(), Ok(state));
        }
    }
}
