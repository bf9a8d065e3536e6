//! What runs: whether the ledger and the workers agree on it.

use super::Finding;

/// Runs that are younger are not looked at: their workers may not have told of them yet.
pub(crate) const SETTLED_MS: i64 = 10_000;

/// What the ledger holds of one worker's runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunsOf {
    /// The worker's id.
    pub(crate) worker: String,
    /// How many runs it has told of with its last renewal; `None` where its lease has ended.
    pub(crate) told: Option<i64>,
    /// How many tasks run under it for longer than [`SETTLED_MS`].
    pub(crate) running: i64,
}

pub(super) fn judge(workers: &[RunsOf]) -> Finding {
    let check = "ledger.running";
    let gone: i64 = workers.iter().filter(|of| of.told.is_none()).map(|of| of.running).sum();
    if gone > 0 {
        let message = format!("{gone} tasks run under workers whose lease has ended");
        let advice =
            "any process that is up takes them over within a second: is one, and does its log say why it cannot?";
        return Finding::warn(check, message, advice);
    }
    if let Some(RunsOf { worker, told: Some(told), running }) =
        workers.iter().find(|of| of.told.is_some_and(|told| told < of.running))
    {
        let message = format!("worker {worker} runs {told} tasks, and the ledger has {running} running under it");
        let advice = "it gives back what it does not run after twice its lease; does its log say that outcomes cannot be recorded?";
        return Finding::warn(check, message, advice);
    }
    let running: i64 = workers.iter().map(|of| of.running).sum();
    Finding::ok(check, format!("{running} tasks have run for more than 10 s, and their workers know of them"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    fn of(told: Option<i64>, running: i64) -> RunsOf {
        RunsOf { worker: "w".to_owned(), told, running }
    }

    #[test]
    fn what_no_worker_runs_is_told() {
        assert_eq!(judge(&[]).verdict, Verdict::Ok);
        assert_eq!(judge(&[of(Some(3), 3), of(Some(8), 2)]).verdict, Verdict::Ok);
        let stray = judge(&[of(Some(8), 2), of(Some(1), 3)]);
        assert_eq!(stray.verdict, Verdict::Warn);
        assert!(stray.message.contains("runs 1 tasks, and the ledger has 3"), "{}", stray.message);
        let gone = judge(&[of(Some(1), 3), of(None, 5)]);
        assert!(gone.message.starts_with("5 tasks run under workers whose lease has ended"), "{}", gone.message);
    }
}
