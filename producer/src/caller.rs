//! Who makes a request, and the line that the log has for every call that changes something.

use std::fmt;
use std::net::SocketAddr;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, header};
use tasklane_common::ledger::{self, ACTOR_BYTES_MAX};
use tasklane_common::task::truncate;
use tasklane_common::web::listener::Peer;
use utoipa::openapi::path::{ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{OpenApi, Required};

use crate::error::{ApiError, FieldError};
use crate::observe::REQUEST_ID;

/// The header in which a client says who it acts for.
pub const ACTOR: HeaderName = HeaderName::from_static("tasklane-actor");
/// How much of a `User-Agent` is logged.
const AGENT_BYTES_MAX: usize = 128;

/// Who makes a request, as far as it can be told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Caller {
    /// What goes into the ledger.
    known: ledger::Caller,
    peer: Option<SocketAddr>,
    agent: Option<String>,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let text = |name| parts.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        Ok(Self {
            known: ledger::Caller { actor: actor(&parts.headers)?, request_id: text(&REQUEST_ID) },
            peer: parts.extensions.get().map(|Peer(peer)| *peer),
            agent: text(&header::USER_AGENT).map(|agent| truncate(&agent, AGENT_BYTES_MAX)),
        })
    }
}

/// Whom a request acts for, if it says so.
fn actor(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut given = headers.get_all(ACTOR).iter();
    let Some(value) = given.next() else { return Ok(None) };
    let fault = |message: String| ApiError::InvalidHeader(FieldError::new(ACTOR.as_str(), message));
    if given.next().is_some() {
        return Err(fault("must be given once".to_owned()));
    }
    let name = std::str::from_utf8(value.as_bytes()).unwrap_or_default().trim();
    if name.is_empty() || name.len() > ACTOR_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(fault(format!("must be 1 to {ACTOR_BYTES_MAX} bytes of UTF-8 without control characters")));
    }
    Ok(Some(name.to_owned()))
}

/// Adds [`ACTOR`] to every operation that changes something; submissions make something new.
pub(crate) fn document(document: &mut OpenApi) {
    let header = ParameterBuilder::new()
        .name("Tasklane-Actor")
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .schema(Some(
            ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(ACTOR_BYTES_MAX)),
        ))
        .description(Some(
            "Who makes the change, for the log and, of tasks and pauses, for the ledger; at most 128 bytes of UTF-8",
        ))
        .build();
    let changing = document.paths.paths.values_mut().flat_map(|path| {
        let operations = [&mut path.post, &mut path.put, &mut path.patch, &mut path.delete];
        operations.into_iter().flatten()
    });
    for operation in changing.filter(|operation| !operation.operation_id.as_deref().is_some_and(submits)) {
        operation.parameters.get_or_insert_default().push(header.clone().into());
    }
}

fn submits(operation: &str) -> bool {
    operation.starts_with("submit")
}

/// What a call does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Act {
    /// Its name, such as `cancel`.
    pub(crate) call: &'static str,
    /// The same as a reader wants it, such as `tasks were cancelled`.
    pub(crate) told: &'static str,
}

impl Caller {
    /// What the ledger keeps of the caller.
    pub(crate) fn known(&self) -> ledger::Caller {
        self.known.clone()
    }

    /// Begins to change something: a task, a queue, a schedule, a limit, or all that meets a filter.
    pub(crate) fn begins(&self, act: Act, of: impl fmt::Display) -> Deed {
        Deed { caller: self.clone(), act, of: of.to_string(), tasks: None, detail: None, end: End::Unknown }
    }
}

/// A change under way: one line in the log, however it ends, also when its client goes away in the middle of it.
#[derive(Debug)]
#[must_use]
pub(crate) struct Deed {
    caller: Caller,
    act: Act,
    of: String,
    tasks: Option<u64>,
    detail: Option<String>,
    end: End,
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Whether it was made in full, nobody knows: the ledger has not answered, or nobody waited for the answer.
    Unknown,
    Done,
    /// Nothing was changed.
    Nothing,
}

impl Deed {
    /// Counts tasks that were changed.
    pub(crate) fn count(&mut self, tasks: u64) {
        *self.tasks.get_or_insert(0) += tasks;
    }

    /// Says more of it, such as which fields were changed. Never what a handler is given.
    pub(crate) fn detail(&mut self, detail: impl fmt::Display) {
        self.detail = Some(detail.to_string());
    }

    /// All of it is done.
    pub(crate) fn done(mut self) {
        self.end = End::Done;
    }

    /// Nothing was to be changed, or may be: no line.
    pub(crate) fn nothing(mut self) {
        self.end = End::Nothing;
    }
}

impl Drop for Deed {
    fn drop(&mut self) {
        let Self { caller: Caller { known, peer, agent }, act, of, tasks, detail, end } = self;
        let told = match end {
            End::Nothing => return,
            End::Done => act.told,
            End::Unknown => "a change ended early, and may have been made in part",
        };
        tracing::info!(
            target: "tasklane_producer::changes",
            call = act.call,
            of,
            tasks,
            detail,
            by = known.actor,
            peer = peer.map(tracing::field::display),
            agent,
            request.id = known.request_id,
            "{told}",
        );
    }
}
