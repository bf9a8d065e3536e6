//! What does the work: the [`Handler`] trait, what a handler is told, and what it answers.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tasklane_common::backoff::Retry;
use tasklane_common::task::{ERROR_BYTES_MAX, ErrorKind, Fence, Guarantee, Json, Kind, QueueName, TaskId, truncate};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::transaction::Transaction;

/// The code for one kind of task.
///
/// ```
/// use serde::Deserialize;
/// use tasklane_worker::{Handler, HandlerError, Outcome, TaskContext};
///
/// #[derive(Deserialize)]
/// struct Greeting {
///     name: String,
/// }
///
/// struct Greet;
///
/// impl Handler for Greet {
///     const KIND: &'static str = "greet";
///     type Args = Greeting;
///
///     async fn handle(&self, args: Greeting, _cx: &TaskContext) -> Result<Outcome, HandlerError> {
///         Outcome::complete(format!("Hello, {}!", args.name))
///     }
/// }
/// ```
///
/// The future is stopped at an `await` when its time is over, its task is cancelled, or the worker loses its lease.
/// Code that blocks the thread cannot be stopped: should the lease be lost meanwhile, the whole process exits, so give
/// long computations to threads that watch [`TaskContext::cancellation`].
pub trait Handler: Send + Sync + 'static {
    /// The kind it handles: the stable name that submitters use, never a Rust type's name.
    const KIND: &'static str;
    /// The input, read from the task's `args`; what does not fit discards the task.
    type Args: DeserializeOwned + Send;

    /// How its tasks are to be treated. Defaults to [`Options::default`].
    fn options(&self) -> Options {
        Options::default()
    }

    /// Does the work.
    ///
    /// # Errors
    /// [`HandlerError`] says whether another attempt may help; any other error taken with `?` means that one may.
    fn handle(&self, args: Self::Args, cx: &TaskContext) -> impl Future<Output = Result<Outcome, HandlerError>> + Send;
}

/// How a handler's tasks are to be treated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// A queue that the worker must consume for this kind, besides its configured ones. Defaults to none.
    pub queue: Option<QueueName>,
    /// How long one run may take at most; a submission may ask for less. Defaults to the worker's `task_timeout_ms`.
    pub timeout: Option<Duration>,
    /// How failed attempts are followed by others. Defaults to the worker's `backoff`, without a limit to the age.
    pub retry: Retry,
    /// Sorts of failure after which no other attempt is made, whatever the handler says. Defaults to none.
    /// Args that do not fit are final anyway, and a crash of the worker is no failure of the handler's.
    pub discard_errors: Vec<ErrorKind>,
    /// What a crash in mid-run means. Defaults to [`Guarantee::AtLeastOnce`].
    pub guarantee: Guarantee,
}

/// What a handler knows about its task and this run.
#[derive(Debug, Clone)]
pub struct TaskContext {
    /// The task; with the fence, the key for effects outside: a store that remembers the highest fence it has seen
    /// for an id can refuse a run that has lost its lease.
    pub id: TaskId,
    /// The kind.
    pub kind: Kind,
    /// The queue from which it came.
    pub queue: QueueName,
    /// This attempt, counted from 1.
    pub attempt: i32,
    /// How many there may be.
    pub max_attempts: i32,
    /// Rises with every run of this task.
    pub fence: Fence,
    /// When the run's time is over.
    pub deadline: Instant,
    /// Is cancelled when the run shall stop; soon afterwards the future is dropped.
    pub cancellation: CancellationToken,
    /// W3C trace context of the submission.
    pub traceparent: Option<String>,
    /// How many bytes of JSON a result may have; a larger one discards the task.
    pub result_bytes_max: usize,
    pub(crate) transaction: Transaction,
}

/// How a run ended well.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Done, with this result.
    Complete(Json),
    /// Done, and recorded together with the handler's own writes: the answer of
    /// [`TaskContext::complete_in_postgres`] and [`TaskContext::complete_in_sqlite`].
    Committed(Committed),
    /// Not yet: try again after this time; costs no attempt.
    Snooze(Duration),
    /// Not any more, and for this reason.
    Cancel(String),
}

/// Says that a task is completed already; only a committed transaction makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed(pub(crate) ());

impl Outcome {
    /// Done, with a result that is written as JSON.
    ///
    /// # Errors
    /// A final error when the result has no JSON form.
    pub fn complete(result: impl Serialize) -> Result<Self, HandlerError> {
        Self::json(&result).map(Self::Complete)
    }

    pub(crate) fn json(result: &impl Serialize) -> Result<Json, HandlerError> {
        Json::of(result).map_err(|error| HandlerError::discard(format!("the result has no JSON form: {error}")))
    }

    /// Done, without a result.
    #[must_use]
    pub fn done() -> Self {
        Self::Complete(Json::null())
    }
}

/// How a run failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerError {
    pub(crate) message: String,
    pub(crate) remedy: Remedy,
    pub(crate) kind: ErrorKind,
}

/// What may help against a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Another attempt, unless the task must not start twice: this one may have taken effect.
    Unknown,
    /// Another attempt, after this time or the backoff's.
    Retry(Option<Duration>),
    /// Nothing.
    Discard,
    /// Another worker, or this one later; there was no attempt.
    GiveBack,
}

impl HandlerError {
    /// Another attempt may help.
    pub fn retry(message: impl Into<String>) -> Self {
        Self::new(message.into(), Remedy::Retry(None))
    }

    /// Another attempt may help, but not before `delay`.
    pub fn retry_after(message: impl Into<String>, delay: Duration) -> Self {
        Self::new(message.into(), Remedy::Retry(Some(delay)))
    }

    /// No other attempt will help: the task is discarded.
    pub fn discard(message: impl Into<String>) -> Self {
        Self::new(message.into(), Remedy::Discard)
    }

    /// Whether the attempt took effect is not known, as when a request was sent and nobody answered. Another attempt
    /// follows, but none for [`Guarantee::AtMostOnce`]: its task is discarded as `interrupted`.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(message.into(), Remedy::Unknown)
    }

    /// Nothing was begun, for want of something that is not the task's: it is given back and costs no attempt.
    pub(crate) fn not_started(message: impl Into<String>) -> Self {
        Self::new(message.into(), Remedy::GiveBack)
    }

    fn new(message: String, remedy: Remedy) -> Self {
        Self { message: truncate(&message, ERROR_BYTES_MAX), remedy, kind: ErrorKind::Error }
    }

    /// The args do not fit the handler's type; another attempt would find the same.
    pub(crate) fn args(message: &str) -> Self {
        Self { kind: ErrorKind::Args, ..Self::discard(message) }
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

// HandlerError itself is no std::error::Error, so that `?` can turn every other error into one that may be retried: also
// what only becomes one, such as `anyhow::Error` and text.
impl<'e, E: Into<Box<dyn std::error::Error + 'e>>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        let error = error.into();
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            message.push_str(": ");
            message.push_str(&cause.to_string());
            source = cause.source();
        }
        Self::retry(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    /// Every sort of error that a handler meets.
    #[test]
    fn any_error_may_be_taken_with_a_question_mark() {
        let told = |answer: Result<(), HandlerError>| answer.unwrap_err();
        let with_anyhow = || {
            Err::<(), _>(anyhow::anyhow!("no disk")).context("writing the report")?;
            Ok(())
        };
        assert_eq!(told(with_anyhow()), HandlerError::retry("writing the report: no disk"));
        let with_std = || Ok("x".parse::<u8>().map(drop)?);
        assert_eq!(told(with_std()), HandlerError::retry("invalid digit found in string"));
        let with_text = || {
            Err::<(), _>("no text")?;
            Ok(())
        };
        assert_eq!(told(with_text()), HandlerError::retry("no text"));
        let with_itself = || {
            Err::<(), _>(HandlerError::discard("never"))?;
            Ok(())
        };
        assert_eq!(told(with_itself()), HandlerError::discard("never"));
        // Neither `Send` nor `'static`.
        let lock = std::sync::Mutex::new(1);
        let with_borrowed = || {
            *lock.lock()? += 1;
            Ok(())
        };
        assert_eq!(with_borrowed(), Ok::<(), HandlerError>(()));
    }
}
