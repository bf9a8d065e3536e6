//! Stands before the ledger: once it was seen to be away, requests fail at once instead of waiting for it in turn.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tasklane_common::ledger::{LedgerError, SharedLedger, complain};
use tokio::time::Instant;

use crate::error::ApiError;

/// How long requests fail at once before one of them may try the ledger again.
const PROBE_PERIOD: Duration = Duration::from_secs(1);

/// A ledger, and whether it was there when last asked.
#[derive(Debug)]
pub struct Gate {
    ledger: SharedLedger,
    began: Instant,
    /// 0 while the ledger answers, else when it may be tried again, in milliseconds since `began`.
    probe_at_ms: AtomicU64,
    /// Whether the log says that the ledger is away.
    told: AtomicBool,
}

impl Gate {
    /// An open gate.
    #[must_use]
    pub fn new(ledger: SharedLedger) -> Self {
        Self { ledger, began: Instant::now(), probe_at_ms: AtomicU64::new(0), told: AtomicBool::new(false) }
    }

    /// The ledger itself. Its answers are to be awaited through [`Gate::ask`].
    #[must_use]
    pub fn ledger(&self) -> &SharedLedger {
        &self.ledger
    }

    /// Awaits an answer of the ledger, unless it is known to be away.
    ///
    /// # Errors
    /// [`ApiError::LedgerUnavailable`], or [`ApiError::Internal`] for what no repetition mends.
    pub async fn ask<T>(&self, answer: impl Future<Output = Result<T, LedgerError>>) -> Result<T, ApiError> {
        if !self.lets_through() {
            return Err(ApiError::LedgerUnavailable);
        }
        let answer = answer.await;
        self.note(answer.as_ref().err());
        Ok(answer?)
    }

    /// Awaits the answer of a read, unless the ledger is known to be away. A read may be late because of what it reads: that
    /// alone closes nothing, unless the ledger does not answer a ping either.
    ///
    /// # Errors
    /// As [`Gate::ask`].
    pub async fn look<T>(&self, answer: impl Future<Output = Result<T, LedgerError>>) -> Result<T, ApiError> {
        if !self.lets_through() {
            return Err(ApiError::LedgerUnavailable);
        }
        let answer = answer.await;
        match &answer {
            Err(error) if error.is_retryable() => self.note(self.ledger.ping().await.err().as_ref()),
            answered => self.note(answered.as_ref().err()),
        }
        Ok(answer?)
    }

    /// While the ledger is away, one caller in each period goes through to try it.
    fn lets_through(&self) -> bool {
        let probe_at_ms = self.probe_at_ms.load(Ordering::Relaxed);
        if probe_at_ms == 0 {
            return true;
        }
        // Of two callers that come at the same time, one wins the exchange and the other fails at once.
        self.now_ms() >= probe_at_ms
            && self
                .probe_at_ms
                .compare_exchange(probe_at_ms, self.next_probe_ms(), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    fn note(&self, error: Option<&LedgerError>) {
        match error {
            Some(error) if error.is_retryable() => {
                if self.probe_at_ms.swap(self.next_probe_ms(), Ordering::Relaxed) == 0 {
                    let told = complain(error, "the ledger is away: requests are refused until it answers");
                    self.told.fetch_or(told, Ordering::Relaxed);
                }
            }
            // Any other answer, good or bad, is one.
            _ => {
                if self.probe_at_ms.load(Ordering::Relaxed) != 0
                    && self.probe_at_ms.swap(0, Ordering::Relaxed) != 0
                    && self.told.swap(false, Ordering::Relaxed)
                {
                    tracing::info!("the ledger is back");
                }
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn next_probe_ms(&self) -> u64 {
        self.now_ms().saturating_add(PROBE_PERIOD.as_millis() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answers(gate: &Gate, answer: Result<(), LedgerError>) -> bool {
        gate.ask(async { answer }).await.is_ok()
    }

    #[tokio::test]
    async fn one_caller_in_a_period_tries_a_ledger_that_is_away() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/gate.db", folder.path().display());
        let gate = Gate::new(tasklane_common::ledger::open(&url).await.unwrap());
        tokio::time::pause();

        assert!(!answers(&gate, Err(LedgerError::Unavailable("gone".to_owned()))).await);
        assert!(!answers(&gate, Ok(())).await, "fails at once, unasked");
        tokio::time::advance(PROBE_PERIOD).await;
        let asked = AtomicU64::new(0);
        let probe = || async {
            asked.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok(())
        };
        let (first, second) = tokio::join!(gate.ask(probe()), gate.ask(probe()));
        assert!(first.is_ok() && second.is_err());
        assert_eq!(asked.into_inner(), 1, "the others were not let through");
        assert!(answers(&gate, Ok(())).await, "open again");
    }

    #[tokio::test]
    async fn a_late_read_closes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/gate.db", folder.path().display());
        let gate = Gate::new(tasklane_common::ledger::open(&url).await.unwrap());
        let late = gate.look(async { Err::<(), _>(LedgerError::Unavailable("late".to_owned())) }).await;
        assert!(matches!(late, Err(ApiError::LedgerUnavailable)));
        assert!(answers(&gate, Ok(())).await);
    }

    #[tokio::test]
    async fn a_fault_that_no_repetition_mends_leaves_the_gate_open() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/gate.db", folder.path().display());
        let gate = Gate::new(tasklane_common::ledger::open(&url).await.unwrap());
        let corrupt = gate.ask(async { Err::<(), _>(LedgerError::Corrupt("row".to_owned())) }).await;
        assert!(matches!(corrupt, Err(ApiError::Internal(_))));
        assert!(answers(&gate, Ok(())).await);
    }
}
