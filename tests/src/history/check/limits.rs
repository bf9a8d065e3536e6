//! Limits: at no moment did more run, and in no time were more started, than they allow.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use tasklane_common::task::Guarantee;

use super::super::verdict::Usage;
use super::{AFTER_THAW, Broken, Evidence, FinalTask, Freezes, Ran, Runs, Verdict};

/// A limit that held all the time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Of what.
    pub scope: Scope,
    /// What is bounded.
    pub bound: Bound,
}

/// What a limit is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All tasks of a kind together.
    Kind(String),
    /// The tasks of each concurrency key that begins so, for themselves.
    Keys(String),
    /// All tasks of a queue together, for as long as they are in it.
    Queue(String),
}

/// What a limit bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// How many run at once.
    Running(usize),
    /// How many start: `burst` at once, and `tasks` more in every `per`.
    Rate {
        /// How many.
        tasks: u32,
        /// In which time.
        per: Duration,
        /// How many more after a rest.
        burst: u32,
    },
}

/// The ledgers' times are whole milliseconds.
const ROUNDING: Duration = Duration::from_millis(1);

/// Fractions of a start that sums of many may be wrong by.
const TOLERANCE: f64 = 1e-6;

impl Scope {
    /// With which others the task shares starts in the end; none, if the limit is not for it.
    fn of<'t>(&self, task: &'t FinalTask) -> Option<&'t str> {
        match self {
            Self::Kind(kind) => (task.kind == *kind).then_some(task.kind.as_str()),
            Self::Keys(begin) => task.concurrency_key.as_deref().filter(|key| key.starts_with(begin)),
            // A cancelled one may have come to another queue since its last start.
            Self::Queue(queue) => (task.queue == *queue && task.state != "cancelled").then_some(task.queue.as_str()),
        }
    }

    /// With which others a run of the task shares places; none, if the limit is not for it.
    pub(super) fn of_run<'t>(&self, task: &'t FinalTask, ran: &'t Ran) -> Option<&'t str> {
        match self {
            // Between its runs a task may come to another queue.
            Self::Queue(queue) => ran.queue.as_deref().filter(|told| told == queue),
            Self::Kind(_) | Self::Keys(_) => self.of(task),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scope {
            Scope::Kind(kind) => write!(f, "kind/{kind}")?,
            Scope::Keys(begin) => write!(f, "key/{begin}*")?,
            Scope::Queue(queue) => write!(f, "queue/{queue}")?,
        }
        match self.bound {
            Bound::Running(_) => f.write_str(" at once"),
            Bound::Rate { per, .. } => write!(f, " in {} s", per.as_secs_f64()),
        }
    }
}

/// Was no limit exceeded?
pub(super) fn check(evidence: &Evidence, runs: &Runs<'_>, freezes: &Freezes, verdict: &mut Verdict) {
    let all = held(&evidence.tasks, runs);
    for limit in &evidence.limits {
        let ran = by_scope(all.iter(), |held| limit.scope.of_run(held.task, held.ran));
        let mut usage = Usage { runs: ran.values().map(Vec::len).sum(), ..Usage::default() };
        let all_used: Vec<Usage> = match limit.bound {
            Bound::Running(allowed) => {
                ran.iter().map(|(name, held)| check_running((name, allowed), held, freezes, verdict)).collect()
            }
            Bound::Rate { tasks: rate, per, burst } => {
                let tasks = by_scope(evidence.tasks.iter(), |task| limit.scope.of(task));
                tasks.iter().map(|(name, tasks)| check_rate((name, rate, per, burst), tasks, verdict)).collect()
            }
        };
        for used in all_used {
            (usage.most, usage.allowed) = (usage.most.max(used.most), used.allowed);
        }
        verdict.counts.limits.insert(limit.to_string(), usage);
    }
}

/// Those that a limit is for, each with those that it shares with.
fn by_scope<'t, T>(
    all: impl Iterator<Item = &'t T>,
    of: impl Fn(&'t T) -> Option<&'t str>,
) -> BTreeMap<&'t str, Vec<&'t T>> {
    let mut scopes: BTreeMap<&str, Vec<&T>> = BTreeMap::new();
    for one in all {
        if let Some(name) = of(one) {
            scopes.entry(name).or_default().push(one);
        }
    }
    scopes
}

/// A run in its place.
struct Held<'r> {
    task: &'r FinalTask,
    ran: &'r Ran,
    /// Until when it is surely in its place, unless its process stood still; none for one that goes on.
    until: Option<Duration>,
    /// Its task was its own until its end, whatever its process went through.
    kept: bool,
}

/// The runs of tasks, in the order of their starts.
fn held<'r>(tasks: &'r [FinalTask], runs: &'r Runs<'_>) -> Vec<Held<'r>> {
    let mut all = Vec::new();
    for task in tasks {
        let ran = runs.get(task.id.as_str()).map_or(&[][..], Vec::as_slice);
        for (at, run) in ran.iter().enumerate() {
            let kept = task.is_completed_by(&run.run);
            // A transactional run is over with its commit, and says so a moment later.
            let until = match kept && task.guarantee == Guarantee::Transactional {
                true => Some(run.began),
                // Of one without any end the next start of its task tells that it was given up.
                false => run.over().or_else(|| ran.get(at + 1).map(|next| next.began)),
            };
            all.push(Held { task, ran: run, until, kept });
        }
    }
    all.sort_by_key(|held| held.ran.began);
    all
}

impl Held<'_> {
    /// Whether it may have lost its place by then, since its process stood still: it did not complete its task, and was
    /// stopped soon after it went on, if ever.
    fn may_have_lost_it(&self, at: Duration, freezes: &Freezes) -> bool {
        let stood_still = |(frozen, thawed): &(Duration, Option<Duration>)| {
            let stopped_soon = match (thawed, self.ran.over()) {
                (Some(thawed), Some(over)) => over.saturating_sub(*thawed) <= AFTER_THAW,
                (Some(_), None) => false,
                (None, _) => self.ran.ended.is_none(),
            };
            *frozen <= at && stopped_soon
        };
        !self.kept && freezes.get(&self.ran.process).into_iter().flatten().any(stood_still)
    }
}

/// Whenever one started, no more than allowed were in their places.
fn check_running(
    (name, allowed): (&str, usize),
    held: &[&Held<'_>],
    freezes: &Freezes,
    verdict: &mut Verdict,
) -> Usage {
    let mut going: Vec<&Held<'_>> = Vec::new();
    let mut most = 0;
    for starting in held {
        let now = starting.ran.began;
        going.retain(|held| held.until.is_none_or(|until| until > now));
        going.push(starting);
        let in_place: Vec<&Ran> =
            going.iter().filter(|held| !held.may_have_lost_it(now, freezes)).map(|held| held.ran).collect();
        most = most.max(in_place.len());
        if in_place.len() > allowed {
            let told = format!("{} at once, and {allowed} are allowed: {in_place:?}", in_place.len());
            verdict.blame(Broken::OverLimit, name, told);
        }
    }
    Usage { most, allowed, ..Usage::default() }
}

/// In no time were more granted than the rate lets and the burst adds, as far as the ledger tells: of each task the last.
fn check_rate(
    (name, rate, per, burst): (&str, u32, Duration, u32),
    tasks: &[&FinalTask],
    verdict: &mut Verdict,
) -> Usage {
    let mut granted: Vec<Duration> = tasks.iter().filter_map(|task| task.started_at).collect();
    granted.sort_unstable();
    let first = granted.first().copied().unwrap_or_default();
    let refill = |time: Duration| time.as_secs_f64() / per.as_secs_f64() * f64::from(rate);
    // A full bucket, from which each start takes one.
    let mut level = f64::from(burst);
    let (mut most, mut from, mut before) = (0, 0, first);
    for (index, at) in granted.iter().enumerate() {
        level = (level + refill(at.saturating_sub(before))).min(f64::from(burst)) - 1.0;
        before = *at;
        if level < -refill(ROUNDING) - TOLERANCE {
            let told = format!("{rate} in {per:?} are allowed, and {burst} at once, and at {at:?} there were more");
            verdict.blame(Broken::OverLimit, name, told);
            level = 0.0;
        }
        while granted[from] + per < *at {
            from += 1;
        }
        most = most.max(index + 1 - from);
    }
    Usage { most, allowed: rate as usize + burst as usize, ..Usage::default() }
}
