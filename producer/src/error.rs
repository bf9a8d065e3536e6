//! Everything that a request can fail with, as the client sees it: RFC 9457 `application/problem+json`.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tasklane_common::ledger::{Holder, LedgerError};
use tasklane_common::state::State;
use tasklane_common::task::{QueueName, TaskId, truncate};
use tasklane_common::web::hosts::Refusal;
use utoipa::ToSchema;

/// How many faults one answer names; a client that sends 10,000 bad tasks learns from the first hundred.
pub const ERRORS_MAX: usize = 100;
/// How many queues may be paused: every worker hears of each.
pub const PAUSED_MAX: usize = 1_000;
/// The longest path of a fault.
const PATH_BYTES_MAX: usize = 256;
/// The longest message of a fault.
const MESSAGE_BYTES_MAX: usize = 512;

/// The media type of [`Problem`].
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Why a request was not answered as asked. The variants' order is that of a request's way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// More requests are under way than this process takes.
    #[error("too many requests are under way here")]
    Overloaded,
    /// It comes from where nothing may come from.
    #[error("{0}")]
    Refused(Refusal),
    /// No route has this path.
    #[error("no such path; GET /openapi.json lists what there is")]
    UnknownPath,
    /// The path knows other methods only.
    #[error("this path does not know this method; the Allow header lists those it knows")]
    UnknownMethod,
    /// The path is no text.
    #[error("the path must be UTF-8 behind its percent signs")]
    InvalidPath,
    /// The body is compressed.
    #[error("the body must be sent as it is, without a Content-Encoding")]
    ContentEncoding,
    /// The body is of another media type.
    #[error("the Content-Type must be {expected}")]
    MediaType {
        /// What would be right.
        expected: &'static str,
    },
    /// The body, or one of its lines, is over its limit.
    #[error("{what} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The limit.
        limit_bytes: usize,
    },
    /// The body did not arrive in time.
    #[error("the body did not arrive in time")]
    SlowBody,
    /// The connection failed within the body.
    #[error("the body ended early")]
    BrokenBody,
    /// The body is not JSON.
    #[error("the body is not JSON: {0}")]
    InvalidJson(String),
    /// A header does not fit.
    #[error("a header does not fit")]
    InvalidHeader(FieldError),
    /// Query parameters do not fit.
    #[error("{}", count_of(.0, "query parameter"))]
    InvalidQuery(Vec<FieldError>),
    /// The submission breaks rules; nothing was recorded.
    #[error("{}, and nothing was recorded", count_of(.0, "field"))]
    InvalidTask(Vec<FieldError>),
    /// The request to cancel breaks rules; nothing was cancelled.
    #[error("{}, and nothing was cancelled", count_of(.0, "field"))]
    InvalidCancellation(Vec<FieldError>),
    /// The request to purge breaks rules; nothing was purged.
    #[error("{}, and nothing was purged", count_of(.0, "field"))]
    InvalidPurge(Vec<FieldError>),
    /// The request to move breaks rules; nothing was moved.
    #[error("{}, and nothing was moved", count_of(.0, "field"))]
    InvalidMove(Vec<FieldError>),
    /// The request to retry breaks rules; nothing was retried.
    #[error("{}, and nothing was retried", count_of(.0, "field"))]
    InvalidRetry(Vec<FieldError>),
    /// The edit breaks rules; nothing was changed.
    #[error("{}, and nothing was changed", count_of(.0, "field"))]
    InvalidEdit(Vec<FieldError>),
    /// The schedule breaks rules; nothing was changed.
    #[error("{}, and nothing was changed", count_of(.0, "field"))]
    InvalidSchedule(Vec<FieldError>),
    /// The idempotency key belongs to another request.
    #[error("this Idempotency-Key was used before, with another body; nothing was recorded")]
    KeyReused,
    /// Tasks of a batch, by index, have a unique key that another task holds; nothing was recorded.
    #[error("other tasks hold {} of the unique keys, and nothing was recorded", .0.len())]
    UniqueKeysTaken(Vec<(usize, Holder)>),
    /// Another task holds the unique key; nothing was recorded, or started again.
    #[error("task {} holds this unique key and is {}, and nothing was changed", .0.id, .0.state)]
    UniqueKeyTaken(Holder),
    /// The ledger has no such task.
    #[error("there is no task {0}")]
    UnknownTask(String),
    /// The ledger has no such group.
    #[error("there is no group {0}")]
    UnknownGroup(String),
    /// Nobody has heard of the queue.
    #[error("there is no queue {0}: no task waits in it, no worker consumes it")]
    UnknownQueue(String),
    /// The ledger has no such schedule.
    #[error("there is no schedule {0}")]
    UnknownSchedule(String),
    /// The ledger takes no more schedules.
    #[error("there are {} schedules already, and no more are taken", tasklane_common::schedule::SCHEDULES_MAX)]
    TooManySchedules,
    /// The ledger has no such limit.
    #[error("there is no limit {0}")]
    UnknownLimit(String),
    /// The ledger takes no more limits.
    #[error("there are {} limits already, and no more are taken", tasklane_common::limit::LIMITS_MAX)]
    TooManyLimits,
    /// The ledger takes no more pauses.
    #[error("{PAUSED_MAX} queues are paused already, and no more can be")]
    TooManyPaused,
    /// The limit breaks rules; nothing was changed.
    #[error("{}, and nothing was changed", count_of(.0, "field"))]
    InvalidLimit(Vec<FieldError>),
    /// So many tasks wait that no more are taken; nothing was recorded.
    #[error("queue {queue} takes no more than {most} waiting tasks, and nothing was recorded")]
    QueueFull {
        /// The queue.
        queue: QueueName,
        /// How many may wait.
        most: u32,
        /// When there may be room, as the queue drains now.
        wait: Duration,
    },
    /// Only failures can be run again, and only what waits for its time be started before.
    #[error("the task is {0}; only one that has failed, or waits for its time, can be started")]
    NotRetryable(State),
    /// What has completed or was discarded cannot be undone.
    #[error("the task is {0}; only a task that has not ended can be cancelled")]
    NotCancellable(State),
    /// What runs or has ended is as it was given.
    #[error("the task is {0}; only a task that waits for its start can be edited")]
    NotEditable(State),
    /// More clients wait for tasks than this process holds.
    #[error("too many clients wait for tasks here; submit without wait_ms, or ask again later")]
    TooManyWaiting,
    /// More clients listen to events than this process serves.
    #[error("{} clients listen to events here, and no more are taken", tasklane_common::events::feed::LISTENERS_MAX)]
    TooManyListeners,
    /// The whole request took too long.
    #[error("the request took too long")]
    Timeout,
    /// The ledger is not there: nothing can be recorded or looked up.
    #[error("the ledger is unavailable; try again, with the same Idempotency-Key if the request had one")]
    LedgerUnavailable,
    /// A person must look after the ledger; the log says why.
    #[error("the ledger's file is damaged, or was deleted or replaced: nothing is taken until somebody has mended it")]
    LedgerBroken,
    /// A fault of ours. The text is for the log, never for the client.
    #[error("an internal error; the log has more under this request's id")]
    Internal(String),
}

/// A place in the request, and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// Where: a path such as `tasks[17].kind`, a line such as `line 4321: kind`, or the name of a parameter or header.
    pub path: String,
    /// What is wrong there, and what would be right.
    pub message: String,
}

/// An error's body, RFC 9457.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// `urn:tasklane:problem:<code>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status code in words.
    pub title: &'static str,
    /// The status code.
    pub status: u16,
    /// What happened, for a person.
    pub detail: String,
    /// What happened, for a program: stable.
    pub code: &'static str,
    /// The faults, where fields, parameters or headers are at fault; at most 100.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// The task that is in the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    /// Its state when that was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_state: Option<State>,
    /// The request's id, as in the `X-Request-Id` header and in the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
}

/// What only the log may know of an answer; travels in the response's extensions.
#[derive(Debug, Clone)]
pub(crate) struct Cause(pub(crate) String);

impl FieldError {
    /// A fault at a place. Both may hold what the client sent, which can be long, and are cut.
    pub fn new(path: impl AsRef<str>, message: impl AsRef<str>) -> Self {
        Self { path: truncate(path.as_ref(), PATH_BYTES_MAX), message: truncate(message.as_ref(), MESSAGE_BYTES_MAX) }
    }
}

impl ApiError {
    /// The status code, and the code for programs.
    #[must_use]
    pub const fn codes(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Refused(refusal) => refusal.codes(),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
            Self::UnknownPath => (StatusCode::NOT_FOUND, "unknown_path"),
            Self::UnknownMethod => (StatusCode::METHOD_NOT_ALLOWED, "unknown_method"),
            Self::InvalidPath => (StatusCode::BAD_REQUEST, "invalid_path"),
            Self::ContentEncoding => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_content_encoding"),
            Self::MediaType { .. } => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Self::SlowBody => (StatusCode::REQUEST_TIMEOUT, "slow_body"),
            Self::BrokenBody => (StatusCode::BAD_REQUEST, "broken_body"),
            Self::InvalidJson(_) => (StatusCode::BAD_REQUEST, "invalid_json"),
            Self::InvalidHeader(_) => (StatusCode::BAD_REQUEST, "invalid_header"),
            Self::InvalidQuery(_) => (StatusCode::BAD_REQUEST, "invalid_query"),
            Self::InvalidTask(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_task"),
            Self::InvalidCancellation(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_cancellation"),
            Self::InvalidPurge(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_purge"),
            Self::InvalidMove(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_move"),
            Self::InvalidRetry(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_retry"),
            Self::InvalidEdit(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_edit"),
            Self::InvalidSchedule(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_schedule"),
            Self::KeyReused => (StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused"),
            Self::UniqueKeysTaken(_) | Self::UniqueKeyTaken(_) => (StatusCode::CONFLICT, "unique_key_taken"),
            Self::UnknownTask(_) => (StatusCode::NOT_FOUND, "unknown_task"),
            Self::UnknownGroup(_) => (StatusCode::NOT_FOUND, "unknown_group"),
            Self::UnknownQueue(_) => (StatusCode::NOT_FOUND, "unknown_queue"),
            Self::UnknownSchedule(_) => (StatusCode::NOT_FOUND, "unknown_schedule"),
            Self::UnknownLimit(_) => (StatusCode::NOT_FOUND, "unknown_limit"),
            Self::TooManyLimits => (StatusCode::CONFLICT, "too_many_limits"),
            Self::TooManyPaused => (StatusCode::CONFLICT, "too_many_paused"),
            Self::InvalidLimit(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_limit"),
            Self::QueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, "queue_full"),
            Self::TooManySchedules => (StatusCode::CONFLICT, "too_many_schedules"),
            Self::NotRetryable(_) => (StatusCode::CONFLICT, "not_retryable"),
            Self::NotEditable(_) => (StatusCode::CONFLICT, "not_editable"),
            Self::NotCancellable(_) => (StatusCode::CONFLICT, "not_cancellable"),
            Self::TooManyWaiting => (StatusCode::SERVICE_UNAVAILABLE, "too_many_waiting"),
            Self::TooManyListeners => (StatusCode::SERVICE_UNAVAILABLE, "too_many_listeners"),
            Self::Timeout => (StatusCode::SERVICE_UNAVAILABLE, "timeout"),
            Self::LedgerUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "ledger_unavailable"),
            Self::LedgerBroken => (StatusCode::SERVICE_UNAVAILABLE, "ledger_broken"),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        }
    }

    /// The answer's body, without the request's id.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let (status, code) = self.codes();
        let mut errors = match self {
            Self::InvalidTask(errors)
            | Self::InvalidCancellation(errors)
            | Self::InvalidPurge(errors)
            | Self::InvalidMove(errors)
            | Self::InvalidRetry(errors)
            | Self::InvalidEdit(errors)
            | Self::InvalidSchedule(errors)
            | Self::InvalidLimit(errors)
            | Self::InvalidQuery(errors) => errors.clone(),
            Self::InvalidHeader(error) => vec![error.clone()],
            Self::UniqueKeysTaken(conflicts) => conflicts.iter().take(ERRORS_MAX).map(taken).collect(),
            Self::UniqueKeyTaken(_) => vec![FieldError::new("unique_key", "is held by the task that task_id names")],
            _ => Vec::new(),
        };
        errors.truncate(ERRORS_MAX);
        let holder = if let Self::UniqueKeyTaken(holder) = self { Some(holder) } else { None };
        Problem {
            kind: format!("urn:tasklane:problem:{code}"),
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: self.to_string(),
            code,
            errors,
            task_id: holder.map(|holder| holder.id),
            task_state: holder.map(|holder| holder.state),
            instance: None,
        }
    }
}

fn taken((index, holder): &(usize, Holder)) -> FieldError {
    let Holder { id, state } = holder;
    FieldError::new(format!("tasks[{index}].unique_key"), format!("is held by task {id}, which is {state}"))
}

fn count_of(errors: &[FieldError], what: &str) -> String {
    match errors {
        [_] => format!("1 {what} does not fit"),
        more if more.len() >= ERRORS_MAX => format!("{ERRORS_MAX} {what}s or more do not fit; the first are named"),
        more => format!("{} {what}s do not fit", more.len()),
    }
}

impl From<LedgerError> for ApiError {
    fn from(error: LedgerError) -> Self {
        match error {
            error if error.is_retryable() => Self::LedgerUnavailable,
            error if error.is_broken() => Self::LedgerBroken,
            error => Self::Internal(error.to_string()),
        }
    }
}

/// The body stays empty here: [`crate::observe`], the outermost layer, writes it together with the request's id.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let problem = self.problem();
        let (status, _) = self.codes();
        let mut response = status.into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if matches!(self, Self::ContentEncoding) {
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        if let Self::QueueFull { wait, .. } = &self {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs_f64().ceil().max(1.0) as u64));
        }
        // What is left of the body would be taken for the next request.
        if matches!(self, Self::SlowBody | Self::BrokenBody) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(problem);
        if let Self::Internal(cause) = self {
            response.extensions_mut().insert(Cause(cause));
        }
        response
    }
}
