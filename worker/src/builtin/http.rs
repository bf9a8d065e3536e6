//! `[[http]]`: an HTTP service that handles one kind. Args are POSTed, the response's body is the result.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode, redirect, retry};
use secrecy::{ExposeSecret, SecretString};
use tasklane_common::config::{ConfigError, HttpTable};
use tasklane_common::task::{Guarantee, Json};
use url::Url;

use super::output::Whole;
use crate::handler::{HandlerError, Options, Outcome, TaskContext};
use crate::registry::DynHandler;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Many servers close an idle connection after 5 s, and a request that is sent on it at that moment gets no answer.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// A service may put an attempt off for so long at most.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// How much of an error's body is told.
const ERROR_BODY_BYTES: usize = 1024;
/// How long an error's body is waited for: the status alone decides.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// Headers that settings cannot change: the contract's, and those that frame the message.
const RESERVED: [&str; 9] = [
    "accept-encoding",
    "idempotency-key",
    "tasklane-task-id",
    "tasklane-attempt",
    "tasklane-fence",
    "traceparent",
    "content-length",
    "transfer-encoding",
    "connection",
];

/// POSTs every task of a kind to a service.
#[derive(Debug)]
pub struct HttpHandler {
    /// Goes on using connections on which an answer came.
    client: Client,
    /// Makes a connection for each request.
    fresh: Client,
    /// When an answer last left a connection that may be used again.
    answered: Mutex<Option<Instant>>,
    url: Url,
    headers: HeaderMap,
    options: Options,
    /// Statuses that are final besides those that always are.
    discard: Vec<u16>,
}

impl HttpHandler {
    /// Checks the table.
    ///
    /// # Errors
    /// When the URL, a header or the timeout cannot work. The message never holds what may be secret.
    pub fn new(table: &HttpTable) -> Result<Self, ConfigError> {
        let fault = |message: String| ConfigError::setting("http", format!("kind {}: {message}", table.kind));
        let url = Url::parse(&table.url).map_err(|error| fault(format!("url: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(fault(format!("url must begin with http:// or https://, not {}:", url.scheme())));
        }
        let options = Options {
            queue: table.queue.clone(),
            timeout: super::timeout("http", &table.kind, table.timeout_ms)?,
            retry: table.retry.clone(),
            discard_errors: table.discard_errors.clone(),
            guarantee: super::guarantee("http", &table.kind, table.guarantee)?,
        };
        Ok(Self {
            client: client(&url, true).map_err(|error| fault(HandlerError::from(error).to_string()))?,
            fresh: client(&url, false).map_err(|error| fault(HandlerError::from(error).to_string()))?,
            answered: Mutex::default(),
            headers: configured_headers(&table.headers).map_err(fault)?,
            url,
            options,
            discard: table.discard_statuses.clone(),
        })
    }

    async fn post(&self, args: Json, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let response = self.send(&args, &self.headers(cx)?).await.map_err(network)?;
        if response.status().is_success() {
            complete(response, cx.result_bytes_max).await
        } else {
            Err(refused(response, &self.discard).await)
        }
    }

    /// Sends the request until an answer begins.
    ///
    /// A server may close a connection that was idle in the moment in which the next request goes out on it. That says nothing
    /// of the service, so the request is sent once more on a connection of its own, within the same attempt; and where it must
    /// not come twice, a connection is never used again.
    async fn send(&self, args: &Json, headers: &HeaderMap) -> reqwest::Result<Response> {
        let send = |client: &Client| {
            client.post(self.url.clone()).headers(headers.clone()).body(args.as_str().to_owned()).send()
        };
        if self.options.guarantee == Guarantee::AtMostOnce {
            return send(&self.fresh).await;
        }
        let may_be_used_again = self.last_answer().is_some_and(|at| at.elapsed() < IDLE_TIMEOUT);
        let answer = match send(&self.client).await {
            Err(error) if may_be_used_again && error.is_request() && !error.is_connect() && !error.is_timeout() => {
                send(&self.fresh).await
            }
            answer => answer,
        };
        if answer.is_ok() {
            *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        answer
    }

    fn last_answer(&self) -> Option<Instant> {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn headers(&self, cx: &TaskContext) -> Result<HeaderMap, HandlerError> {
        let mut headers = HeaderMap::with_capacity(8 + self.headers.len());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.extend(self.headers.clone());
        let id = HeaderValue::try_from(cx.id.to_string())?;
        headers.insert("idempotency-key", id.clone());
        headers.insert("tasklane-task-id", id);
        headers.insert("tasklane-attempt", HeaderValue::from(cx.attempt));
        headers.insert("tasklane-fence", HeaderValue::from(cx.fence.0));
        if let Some(traceparent) = cx.traceparent.as_deref().and_then(|text| HeaderValue::from_str(text).ok()) {
            headers.insert("traceparent", traceparent);
        }
        Ok(headers)
    }
}

#[async_trait]
impl DynHandler for HttpHandler {
    fn options(&self) -> Options {
        self.options.clone()
    }

    async fn handle_json(&self, args: Json, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        tokio::select! {
            answer = self.post(args, cx) => answer,
            () = cx.cancellation.cancelled() => Err(HandlerError::unknown("the request was stopped")),
        }
    }
}

/// A client for one service: no redirects, no proxies from the environment, no repetition of its own.
fn client(url: &Url, use_again: bool) -> reqwest::Result<Client> {
    // Whoever came first has chosen; an error says just that.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder()
        .user_agent(concat!("tasklane-worker/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(if use_again { usize::MAX } else { 0 });
    match url.scheme() {
        "https" => client.build(),
        // The system's certificates are many, or missing; nothing needs them here.
        _ => client.tls_certs_only([]).build(),
    }
}

fn configured_headers(configured: &BTreeMap<String, SecretString>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in configured {
        let parsed: HeaderName = name.parse().map_err(|_| format!("headers: {name:?} is no header name"))?;
        if RESERVED.contains(&parsed.as_str()) {
            return Err(format!("headers: {name} is set by Tasklane and cannot be configured"));
        }
        let mut value = HeaderValue::from_str(value.expose_secret())
            .map_err(|_| format!("headers: the value of {name} is no header value"))?;
        value.set_sensitive(true);
        headers.insert(parsed, value);
    }
    Ok(headers)
}

async fn complete(mut response: Response, bytes_max: usize) -> Result<Outcome, HandlerError> {
    if let Some(encoding) = encoding(&response) {
        // Another attempt would do the same once more, and be answered in the same way.
        return Err(HandlerError::discard(format!(
            "the service answered {} with Content-Encoding: {encoding}, and was asked for identity: let it answer without",
            response.status()
        )));
    }
    let mut body = Whole::new(bytes_max);
    while let Some(chunk) = response.chunk().await.map_err(network)? {
        body.push(&chunk).map_err(|too_much| HandlerError::discard(format!("the service {too_much}")))?;
    }
    Ok(Outcome::Complete(body.into_result()?))
}

/// How the body is encoded, where it is.
fn encoding(response: &Response) -> Option<String> {
    let encoding = response.headers().get(CONTENT_ENCODING)?;
    (!encoding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity"))
        .then(|| String::from_utf8_lossy(encoding.as_bytes()).into_owned())
}

/// What an answer other than 2xx means.
async fn refused(response: Response, discard: &[u16]) -> HandlerError {
    let status = response.status();
    let delay =
        response.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?, Timestamp::now()));
    let mut message = format!("the service answered {status}");
    let body = match encoding(&response) {
        Some(_) => String::new(),
        None => beginning(response).await,
    };
    if !body.is_empty() {
        message.push_str(": ");
        message.push_str(&body);
    }
    let passing = status.is_server_error()
        || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS);
    // What stands before the service tells that it had no answer from there.
    let unanswered = matches!(status, StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT);
    match (passing && !discard.contains(&status.as_u16()), delay) {
        (true, None) if unanswered => HandlerError::unknown(message),
        (true, Some(delay)) => HandlerError::retry_after(message, delay),
        (true, None) => HandlerError::retry(message),
        (false, _) => HandlerError::discard(message),
    }
}

/// The first part of a body, as far as it comes in time.
async fn beginning(mut response: Response) -> String {
    let mut body = Vec::new();
    let read = async {
        while body.len() < ERROR_BODY_BYTES {
            let Ok(Some(chunk)) = response.chunk().await else { break };
            body.extend_from_slice(&chunk[..chunk.len().min(ERROR_BODY_BYTES - body.len())]);
        }
    };
    let _ = tokio::time::timeout(ERROR_BODY_TIMEOUT, read).await;
    String::from_utf8_lossy(&body).trim().to_owned()
}

/// Seconds, or a date. What is past or no time at all leaves the delay to the backoff.
fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let delay = match value.trim().parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = rfc2822::DateTimeParser::new().parse_timestamp(value.trim()).ok()?;
            Duration::try_from(date.duration_since(now)).ok()?
        }
    };
    (!delay.is_zero()).then_some(delay.min(RETRY_AFTER_MAX))
}

/// A network error's whole story, without the URL: it may hold a password.
///
/// Without a connection nothing was sent. After that the service may have got the request, whatever broke then.
fn network(error: reqwest::Error) -> HandlerError {
    let was_not_sent = error.is_connect() || error.is_builder();
    let is_scarce = io_error(&error).is_some_and(super::is_scarcity);
    let error = HandlerError::from(error.without_url());
    match (was_not_sent, is_scarce) {
        (true, true) => HandlerError::not_started(error.message),
        (true, false) => error,
        (false, _) => HandlerError::unknown(error.message),
    }
}

/// What the system said, if it was the system.
fn io_error<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e io::Error> {
    std::iter::successors(Some(error), |error| error.source()).find_map(|error| error.downcast_ref())
}

#[cfg(test)]
mod tests;
