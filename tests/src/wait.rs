//! Waiting, always with a limit, always saying for what.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// The first pause between two attempts of [`eventually`]; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);

/// The longest pause between two attempts of [`eventually`].
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Asks again and again until the answer is `Some`, for at most `limit`.
///
/// An attempt that fails counts as "not yet": a process that is just starting refuses connections, and a broker
/// that is going down closes them. The last failure is part of the error when the time is over.
pub async fn eventually<T>(
    limit: Duration,
    what: &str,
    mut attempt: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut pause = FIRST_PAUSE;
    let mut last = None;
    loop {
        match timeout_at(deadline, attempt()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => last = None,
            Ok(Err(error)) => last = Some(error),
            Err(_) => return Err(over(limit, what, last.or(Some(anyhow!("the last attempt hung"))))),
        }
        if Instant::now() + pause >= deadline {
            return Err(over(limit, what, last));
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Waits for one future, for at most `limit`.
pub async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> Result<T> {
    timeout(limit, future).await.with_context(|| format!("waited {limit:?} for {what}"))
}

fn over(limit: Duration, what: &str, last: Option<anyhow::Error>) -> anyhow::Error {
    let waited = format!("waited {limit:?} for {what}");
    match last {
        Some(error) => error.context(waited),
        None => anyhow!("{waited}; it did not come"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_value_comes_through_after_failed_attempts() -> Result<()> {
        let mut tries = 0;
        let value = eventually(Duration::from_secs(1), "the third try", async || {
            tries += 1;
            match tries {
                1 => Err(anyhow!("refused")),
                2 => Ok(None),
                _ => Ok(Some(tries)),
            }
        })
        .await?;
        assert_eq!(value, 3);
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn the_error_says_what_was_waited_for_and_why_it_failed() {
        let waited = eventually::<()>(Duration::from_secs(1), "a miracle", async || Err(anyhow!("no such thing")));
        let error = waited.await.expect_err("it cannot come");
        let text = format!("{error:#}");
        assert!(text.contains("a miracle") && text.contains("no such thing"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_hangs_is_cut_off() {
        let waited = eventually::<()>(Duration::from_secs(1), "silence", async || std::future::pending().await);
        let error = waited.await.expect_err("it cannot come");
        assert!(format!("{error:#}").contains("hung"));
    }
}
