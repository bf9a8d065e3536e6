//! One page for people: what was done to the two ledgers, and what came of it.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use crate::history::{Broken, Verdict};
use crate::nemesis::fault::Fault;
use crate::nemesis::measure::Counted;

/// How many violations are told on the page; all are in the report's folder.
const TOLD: usize = 20;

/// The least speed after the faults, as a part of that before. Low, since the machine may have other work by then.
const SLOWEST: f64 = 0.2;

/// How much a process may grow over the double of what it was before.
const GROWTH_BYTES: u64 = 64 << 20;

/// All that a run has come to.
#[derive(Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// How long faults were injected.
    pub faulty: Duration,
    /// The whole run, from the first process to the last.
    pub took: Duration,
    /// How many nodes the broker had.
    pub nodes: usize,
    /// How often each fault was injected and healed, and how often it could not be injected.
    pub faults: BTreeMap<Fault, (usize, usize)>,
    /// Memory of the first broker node, before and after.
    pub broker_rss: (u64, u64),
    /// What came of each ledger.
    pub lanes: Vec<LaneReport>,
    /// Where histories and logs are.
    pub place: PathBuf,
}

/// What came of one ledger.
#[derive(Debug)]
pub struct LaneReport {
    /// Its name.
    pub name: String,
    /// The judgement.
    pub verdict: Verdict,
    /// What its workers have counted.
    pub counted: Counted,
    /// Tasks a second, before and after all faults, each measured some times, the slowest first.
    pub speed: (Vec<f64>, Vec<f64>),
    /// Memory of the largest producer, before and after.
    pub producer_rss: (u64, u64),
    /// Memory of the largest worker, before and after.
    pub worker_rss: (u64, u64),
    /// How long everything took to end once all was healed.
    pub settled_in: Duration,
}

impl LaneReport {
    /// What has not come back to what it was before.
    fn wear(&self) -> impl Iterator<Item = String> {
        let grown = |what: &str, (before, after): (u64, u64)| {
            (after > before * 2 + GROWTH_BYTES).then(|| format!("{what} has grown: {}", megabytes((before, after))))
        };
        let (before, after) = (median(&self.speed.0), median(&self.speed.1));
        let slow = (after < before * SLOWEST).then(|| format!("slow: {before:.0} tasks/s before, {after:.0} after"));
        [slow, grown("a producer", self.producer_rss), grown("a worker", self.worker_rss)].into_iter().flatten()
    }
}

impl Report {
    /// Is every promise kept?
    pub fn holds(&self) -> bool {
        self.broken().is_empty()
    }

    /// All that is not as promised, of all lanes.
    pub fn broken(&self) -> Vec<String> {
        let told = |lane: &LaneReport, what: &dyn fmt::Display| format!("{}: {what}", lane.name);
        let mut broken = Vec::new();
        for lane in &self.lanes {
            broken.extend(lane.verdict.violations.iter().map(|violation| told(lane, violation)));
            broken.extend(lane.wear().map(|wear| told(lane, &wear)));
        }
        broken
    }

    /// The names of the limits, the same for all lanes.
    fn limits(&self) -> impl Iterator<Item = &String> {
        self.lanes.first().into_iter().flat_map(|lane| lane.verdict.counts.limits.keys())
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, what: &str, cell: impl Fn(&LaneReport) -> String) -> fmt::Result {
        let mut row = format!("  {what:<28}");
        for lane in &self.lanes {
            let _ = write!(row, "{:>22}", cell(lane));
        }
        writeln!(f, "{row}")
    }

    fn rows(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let broken = |lane: &LaneReport, kind| lane.verdict.count(kind).to_string();
        self.row(f, "", |lane| lane.name.clone())?;
        self.row(f, "submitted", |lane| lane.verdict.counts.submitted.to_string())?;
        self.row(f, "unknown to the client", |lane| {
            let counts = &lane.verdict.counts;
            format!("{} there, {} not", counts.unknown_present, counts.unknown_absent)
        })?;
        self.row(f, "completed", |lane| lane.verdict.counts.completed.to_string())?;
        self.row(f, "  of them transactional", |lane| lane.verdict.counts.transactional.to_string())?;
        self.row(f, "discarded (interrupted)", |lane| lane.verdict.counts.interrupted.to_string())?;
        self.row(f, "cancelled", |lane| lane.verdict.counts.cancelled.to_string())?;
        self.row(f, "groups followed", |lane| lane.verdict.counts.followed.to_string())?;
        self.row(f, "moved, pauses", |lane| format!("{}, {}", lane.verdict.counts.moved, lane.verdict.counts.pauses))?;
        self.row(f, "edits: made, open, refused", |lane| {
            let counts = &lane.verdict.counts;
            format!("{}, {}, {}", counts.edits, counts.edits_unknown, counts.edits_refused)
        })?;
        for limit in self.limits() {
            let used = |lane: &LaneReport| lane.verdict.counts.limits.get(limit).copied().unwrap_or_default();
            self.row(f, &format!("limit {limit}"), |lane| format!("{} of {}", used(lane).most, used(lane).allowed))?;
        }
        self.row(f, "  runs under limits", |lane| {
            let limits = lane.verdict.counts.limits.values();
            limits.map(|used| used.runs.to_string()).collect::<Vec<_>>().join(", ")
        })?;
        self.row(f, "lost", |lane| broken(lane, Broken::Lost))?;
        self.row(f, "doubled", |lane| broken(lane, Broken::Doubled))?;
        self.row(f, "overlapping", |lane| broken(lane, Broken::Overlapping))?;
        self.row(f, "all violations", |lane| lane.verdict.violations.len().to_string())?;
        self.row(f, "handlers started", |lane| lane.verdict.counts.starts.to_string())?;
        self.row(f, "runs cut by a death", |lane| lane.verdict.counts.killed_runs.to_string())?;
        self.row(f, "runs dropped by the worker", |lane| lane.verdict.counts.dropped_runs.to_string())?;
        self.row(f, "results refused (fenced)", |lane| format!("{:.0} or more", lane.counted.fenced))?;
        self.row(f, "claims refused", |lane| format!("{:.0} or more", lane.counted.refused))?;
        self.row(f, "takeover p50, max", |lane| takeovers(&lane.verdict.counts.takeovers))?;
        self.row(f, "  with all absences", |lane| takeovers(&lane.verdict.counts.takeovers_in_all))?;
        self.row(f, "longest run after a thaw", |lane| {
            format!("{} ms", lane.verdict.counts.longest_after_thaw.as_millis())
        })?;
        self.row(f, "settled after the last fault", |lane| format!("{:.1} s", lane.settled_in.as_secs_f64()))?;
        self.row(f, "tasks/s before", |lane| range(&lane.speed.0))?;
        self.row(f, "tasks/s after", |lane| range(&lane.speed.1))?;
        self.row(f, "after / before", |lane| format!("{:.2}", median(&lane.speed.1) / median(&lane.speed.0)))?;
        self.row(f, "producer RSS before, after", |lane| megabytes(lane.producer_rss))?;
        self.row(f, "worker RSS before, after", |lane| megabytes(lane.worker_rss))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, faulty, took, nodes, faults, broker_rss, place, .. } = self;
        let injected: usize = faults.values().map(|(done, failed)| done + failed).sum();
        writeln!(
            f,
            "make prove: SEED={seed}, {} s of faults ({} s in all), {nodes} broker node(s)\n",
            faulty.as_secs(),
            took.as_secs()
        )?;
        self.rows(f)?;
        writeln!(f, "  {:<28}{:>22}", "broker RSS before, after", megabytes(*broker_rss))?;
        writeln!(f, "\n  {injected} faults")?;
        for (fault, (done, failed)) in faults {
            let failed = if *failed > 0 { format!(" ({failed} more did not work out)") } else { String::new() };
            writeln!(f, "  {done:>6}  {fault}{failed}")?;
        }
        writeln!(f)?;
        let broken = self.broken();
        for what in broken.iter().take(TOLD) {
            writeln!(f, "  {what}")?;
        }
        match broken.len() {
            0 => writeln!(f, "  verdict: every promise was kept"),
            count => writeln!(f, "  verdict: BROKEN {count} times; histories and logs are in {}", place.display()),
        }
    }
}

/// The middle one of sorted numbers, 0 where there are none.
pub fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn range(sorted: &[f64]) -> String {
    match sorted {
        [slowest, .., fastest] => format!("{slowest:.0} to {fastest:.0}"),
        _ => "not measured".to_owned(),
    }
}

fn takeovers(sorted: &[Duration]) -> String {
    match (sorted.get(sorted.len() / 2), sorted.last()) {
        (Some(median), Some(longest)) => format!("{:.1} s, {:.1} s", median.as_secs_f64(), longest.as_secs_f64()),
        _ => "none".to_owned(),
    }
}

fn megabytes((before, after): (u64, u64)) -> String {
    format!("{} MB, {} MB", before >> 20, after >> 20)
}
