//! What is said between a ledger and those who set limits and let held tasks go.

use std::time::Duration;

use crate::limit::Scope;

/// For how long a place is kept for a task that was let go and is on its way to a worker.
pub(crate) const KEPT_FOR: Duration = Duration::from_secs(60);

/// When the task was let go, in microseconds, whose place is kept until then.
pub(crate) const fn let_go_us(kept_until: i64) -> i64 {
    (kept_until - KEPT_FOR.as_millis() as i64) * 1_000
}

/// What became of a wish to set a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitSet {
    /// There was none.
    Made,
    /// There was one.
    Replaced,
    /// The ledger has as many as it takes.
    TooMany,
}

/// What a look at the held tasks has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Released {
    /// So many tasks are due for publication now.
    pub tasks: u32,
    /// There may be more: the look ended behind this scope.
    pub next: Option<Scope>,
    /// A rate lets another one start in so long.
    pub wait: Option<Duration>,
}
