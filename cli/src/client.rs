//! The HTTP side: every request has a time limit, and one that may be repeated is repeated a few times.

mod stream;

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Method, redirect, retry};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout};
use url::Url;

use crate::api::Problem;
use crate::failure::{Exit, Failure};
use crate::output::note;
use crate::text::{brief, cut};

/// How long a request may take when nobody waits for the end of a task.
const TIME_MAX: Duration = Duration::from_secs(30);
/// How long a connection may take to come about.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How often a request is sent at most.
const ATTEMPTS_MAX: u32 = 8;
/// After this time a request is not sent again.
const REPEAT_TIME_MAX: Duration = Duration::from_secs(60);
/// The pause before the first repetition when the answer does not say; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause, whatever `Retry-After` says.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// The shortest pause that is told.
const NOTED_PAUSE: Duration = Duration::from_secs(1);
/// The largest answer: a page of a hundred tasks with the largest args and results.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// A producer's API.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    /// Who makes changes.
    by: Option<String>,
    /// Whether there was an answer yet: a producer that was there is worth some patience when it goes away.
    answered: AtomicBool,
}

/// A request.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    method: Method,
    path: Vec<String>,
    query: Vec<(&'static str, String)>,
    body: Option<(&'static str, Vec<u8>)>,
    key: Option<String>,
    repeatable: bool,
    time: Duration,
}

/// An answer of any status.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The status code.
    pub(crate) status: u16,
    /// The body.
    pub(crate) text: String,
    headers: HeaderMap,
}

/// Why there is no answer.
#[derive(Debug)]
enum Silence {
    /// Nothing was sent.
    NoConnection(String),
    /// Something was sent, and then the connection broke, or what came was no answer.
    Broken(String),
    /// The time was over.
    Late(Duration),
}

impl Call {
    /// A `GET` of the path made of these parts.
    pub(crate) fn get<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::GET, path)
    }

    /// A `POST` that does the same when it comes twice.
    pub(crate) fn post<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::POST, path)
    }

    /// A `PATCH`.
    pub(crate) fn patch<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::PATCH, path)
    }

    /// A `PUT`, which does the same when it comes twice.
    pub(crate) fn put<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::PUT, path)
    }

    /// A `DELETE`; if the answer to the first was lost, the second says that there is no such thing.
    pub(crate) fn delete<const N: usize>(path: [&str; N]) -> Self {
        Self::new(Method::DELETE, path)
    }

    fn new<const N: usize>(method: Method, path: [&str; N]) -> Self {
        Self {
            method,
            path: path.map(str::to_owned).to_vec(),
            query: Vec::new(),
            body: None,
            key: None,
            repeatable: true,
            time: TIME_MAX,
        }
    }

    /// Adds a query parameter.
    pub(crate) fn query(mut self, name: &'static str, value: impl ToString) -> Self {
        self.query.push((name, value.to_string()));
        self
    }

    /// Adds a query parameter, if there is one.
    pub(crate) fn optional(self, name: &'static str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.query(name, value),
            None => self,
        }
    }

    /// Sends this as JSON.
    ///
    /// # Errors
    /// When it has no JSON form, which nothing here lacks.
    pub(crate) fn json(self, body: &impl Serialize) -> Result<Self, Failure> {
        let body = serde_json::to_vec(body).map_err(|error| Failure::usage(error.to_string()))?;
        Ok(self.body("application/json", body))
    }

    /// Sends this.
    pub(crate) fn body(mut self, content_type: &'static str, body: Vec<u8>) -> Self {
        self.body = Some((content_type, body));
        self
    }

    /// Sends it under an idempotency key.
    pub(crate) fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sends it once, since twice is not the same.
    pub(crate) fn once(self) -> Self {
        Self { repeatable: false, ..self }
    }

    /// Waits so long for the answer, beside what an answer takes anyway.
    pub(crate) fn waiting(self, time: Duration) -> Self {
        Self { time: TIME_MAX + time, ..self }
    }
}

impl Silence {
    /// Whether the request may have come to a producer, and done its work.
    const fn may_have_been_heard(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Late(_))
    }
}

impl Answer {
    /// The body, read.
    ///
    /// # Errors
    /// When it is not what the API answers.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_str(&self.text).map_err(|error| {
            Failure::new(Exit::Refused, format!("the answer is not as this program knows it: {error}"))
                .hint("is --url the address of a Tasklane producer, and of no older or newer version?")
        })
    }

    /// Whether it says that nothing new was recorded.
    pub(crate) fn is_replayed(&self) -> bool {
        self.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
    }

    fn retry_after(&self) -> Option<Duration> {
        self.headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)
    }
}

impl Client {
    /// The API at an address, for somebody.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub(crate) fn new(base: &Url, by: Option<String>) -> Result<Self, Failure> {
        // Whoever came first has chosen; an error says just that.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .user_agent(concat!("tasklane/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .retry(retry::never())
            .connect_timeout(CONNECT_TIME_MAX);
        let http = match base.scheme() {
            "https" => http.build(),
            // The system's certificates are many, or missing; nothing needs them here.
            _ => http.tls_certs_only([]).build(),
        };
        let http = http.map_err(|error| Failure::usage(format!("cannot set up HTTP: {}", root_cause(&error))))?;
        Ok(Self { http, base: base.clone(), by, answered: AtomicBool::new(false) })
    }

    /// The address, without user and password.
    pub(crate) fn address(&self) -> String {
        let mut shown = self.base.clone();
        // Refused for addresses that cannot have them.
        let _ = shown.set_username("");
        let _ = shown.set_password(None);
        shown.as_str().trim_end_matches('/').to_owned()
    }

    /// A successful answer.
    ///
    /// # Errors
    /// What the API refused and why, or that no producer answers.
    pub(crate) async fn call(&self, call: Call) -> Result<Answer, Failure> {
        let begin = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        let mut unknown = false;
        loop {
            let outcome = self.once(&call).await;
            // What the next attempt is answered says nothing of what became of this one.
            unknown |= match &outcome {
                Ok(answer) => answer.status >= 500,
                Err(silence) => silence.may_have_been_heard(),
            };
            let wait = match &outcome {
                Ok(answer) if is_passing(answer.status) => Some(answer.retry_after().unwrap_or(pause)),
                Ok(_) => None,
                Err(Silence::NoConnection(_)) => self.answered.load(Ordering::Relaxed).then_some(pause),
                Err(Silence::Broken(_) | Silence::Late(_)) => Some(pause),
            };
            let wait = wait.filter(|_| call.repeatable && attempt < ATTEMPTS_MAX).map(|wait| wait.min(PAUSE_MAX));
            match wait.filter(|wait| begin.elapsed() + *wait < REPEAT_TIME_MAX) {
                Some(wait) => {
                    note_wait(&self.judge(outcome, 1), wait);
                    sleep(wait).await;
                }
                None => {
                    let known =
                        |failure: Failure| Failure { outcome_unknown: failure.outcome_unknown | unknown, ..failure };
                    return self.judge(outcome, attempt).map_err(known);
                }
            }
            pause *= 2;
            attempt += 1;
        }
    }

    /// Whatever answer comes to a `GET`.
    ///
    /// # Errors
    /// When none comes.
    pub(crate) async fn look<const N: usize>(&self, path: [&str; N]) -> Result<Answer, Failure> {
        self.once(&Call::get(path)).await.map_err(|silence| self.silent(&silence, 1))
    }

    async fn once(&self, call: &Call) -> Result<Answer, Silence> {
        let answer = timeout(call.time, self.exchange(call)).await.unwrap_or(Err(Silence::Late(call.time)));
        self.answered.fetch_or(answer.is_ok(), Ordering::Relaxed);
        answer
    }

    async fn exchange(&self, call: &Call) -> Result<Answer, Silence> {
        let mut request = self.http.request(call.method.clone(), self.url(call));
        if let Some((content_type, body)) = &call.body {
            request = request.header(CONTENT_TYPE, *content_type).body(body.clone());
        }
        if let Some(by) = self.by.as_deref().filter(|_| call.method != Method::GET) {
            // As bytes: names are not only ASCII.
            request = request.header("tasklane-actor", by.as_bytes());
        }
        if let Some(key) = &call.key {
            request = request.header("idempotency-key", key);
        }
        whole(request.send().await.map_err(silence)?).await
    }

    fn url(&self, call: &Call) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(&call.path);
        }
        if !call.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&call.query);
        }
        url
    }

    fn judge(&self, outcome: Result<Answer, Silence>, attempts: u32) -> Result<Answer, Failure> {
        let answer = outcome.map_err(|silence| self.silent(&silence, attempts))?;
        match answer.status {
            200..300 => Ok(answer),
            300..400 => {
                let to = answer.headers.get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or("elsewhere");
                let message = format!("{} redirects to {to}, and redirects are not followed", self.address());
                Err(Failure::new(Exit::Refused, message).hint("give the right address with --url or TASKLANE_URL"))
            }
            _ => Err(refused(&answer, attempts)),
        }
    }

    fn silent(&self, silence: &Silence, attempts: u32) -> Failure {
        let what = match silence {
            Silence::NoConnection(why) => format!("cannot reach a producer at {}: {why}", self.address()),
            Silence::Broken(why) => format!("the producer at {} did not answer: {why}", self.address()),
            Silence::Late(time) => {
                format!("the producer at {} did not answer within {} s", self.address(), time.as_secs())
            }
        };
        let failure = Failure::new(Exit::Unreachable, format!("{what}{}", after(attempts)));
        let failure = Failure { outcome_unknown: silence.may_have_been_heard(), ..failure };
        match silence {
            Silence::NoConnection(_) => failure.hint("is it running there? --url or TASKLANE_URL says where it is"),
            Silence::Broken(_) | Silence::Late(_) => failure,
        }
    }
}

async fn whole(mut response: reqwest::Response) -> Result<Answer, Silence> {
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await.map_err(silence)? {
        body.extend_from_slice(&part);
        if body.len() > ANSWER_BYTES_MAX {
            return Err(Silence::Broken(format!("the answer is larger than {ANSWER_BYTES_MAX} bytes")));
        }
    }
    let text = String::from_utf8(body).map_err(|_| Silence::Broken("the answer is not text".to_owned()))?;
    Ok(Answer { status: response.status().as_u16(), headers: response.headers().clone(), text })
}

/// Whether the same request may be answered otherwise in a moment.
const fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 502 | 503 | 504)
}

fn silence(error: reqwest::Error) -> Silence {
    if error.is_connect() { Silence::NoConnection(root_cause(&error)) } else { Silence::Broken(root_cause(&error)) }
}

/// The innermost error says what happened, the outer ones that something did.
fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Says on standard error why nothing happens for a while, if for long enough to wonder.
fn note_wait(outcome: &Result<Answer, Failure>, wait: Duration) {
    if let Err(failure) = outcome
        && wait >= NOTED_PAUSE
    {
        note(&format!("{}: trying again in {}", failure.message, brief(wait)));
    }
}

fn after(attempts: u32) -> String {
    if attempts > 1 { format!(" ({attempts} attempts)") } else { String::new() }
}

/// What an answer that is no success says.
fn refused(answer: &Answer, attempts: u32) -> Failure {
    let status = answer.status;
    let problem = serde_json::from_str::<Problem>(&answer.text).ok().filter(|problem| !problem.code.is_empty());
    let Some(problem) = problem else {
        let exit = if is_passing(status) || status >= 500 { Exit::Unreachable } else { Exit::Refused };
        let begin = cut(answer.text.trim(), 200);
        let message = format!("status {status}, but not from Tasklane's API{}: {begin}", after(attempts));
        return Failure { outcome_unknown: status >= 500, ..Failure::new(exit, message) }
            .hint("is --url the address of a Tasklane producer?");
    };
    let exit = match status {
        // Another path than this program knows is no missing task.
        404 if problem.code == "unknown_path" => Exit::Refused,
        404 => Exit::NotFound,
        408 | 429 | 500.. => Exit::Unreachable,
        _ => Exit::Refused,
    };
    let detail = if problem.detail.is_empty() { &problem.title } else { &problem.detail };
    let mut failure = Failure::new(exit, format!("{detail}{}", after(attempts)));
    failure.outcome_unknown = status >= 500;
    if problem.code == "unknown_path" {
        failure =
            failure.hint("the producer does not know this call: it is of another version, or --url has a wrong path");
    }
    for error in problem.errors {
        failure = failure.hint(if error.path.is_empty() {
            error.message
        } else {
            format!("{}: {}", error.path, error.message)
        });
    }
    match problem.instance {
        // In the producer's log it stands beside what happened.
        Some(instance) if status >= 500 => failure.hint(format!("request {instance}")),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(base: &str) -> Client {
        Client::new(&Url::parse(base).unwrap(), None).unwrap()
    }

    fn answer(status: u16, text: &str) -> Answer {
        Answer { status, text: text.to_owned(), headers: HeaderMap::new() }
    }

    #[test]
    fn paths_are_escaped_below_the_address() {
        let call = Call::get(["v1", "tasks"]).query("tag", "a b:c&d").optional("kind", None::<String>);
        let at = |base: &str| client(base).url(&call).to_string();
        assert_eq!(at("http://h:1"), "http://h:1/v1/tasks?tag=a+b%3Ac%26d");
        assert_eq!(at("http://h:1/below/"), "http://h:1/below/v1/tasks?tag=a+b%3Ac%26d");
        assert_eq!(client("http://h/").url(&Call::get(["v1", "a/b"])).path(), "/v1/a%2Fb");
    }

    #[test]
    fn the_password_is_not_told() {
        assert_eq!(client("http://me:secret@h:1/").address(), "http://h:1");
    }

    #[test]
    fn problems_become_exit_codes_and_lines() {
        let body = r#"{"type":"urn:x","title":"Unprocessable Entity","status":422,"detail":"2 fields do not fit","code":"invalid_task",
            "errors":[{"path":"kind","message":"is bad"},{"path":"","message":"all is bad"}],"instance":"i"}"#;
        let failure = refused(&answer(422, body), 1);
        assert_eq!((failure.exit, failure.message.as_str()), (Exit::Refused, "2 fields do not fit"));
        assert_eq!(failure.details, ["kind: is bad", "all is bad"]);
        let coded = |status, code: &str| {
            let body = format!(r#"{{"detail":"d","code":"{code}","instance":"i"}}"#);
            let failure = refused(&answer(status, &body), 3);
            (failure.exit, failure.outcome_unknown, failure.message)
        };
        assert_eq!(coded(404, "unknown_task").0, Exit::NotFound);
        assert_eq!(coded(404, "unknown_path").0, Exit::Refused);
        assert_eq!(coded(409, "not_retryable").0, Exit::Refused);
        assert_eq!(coded(503, "overloaded"), (Exit::Unreachable, true, "d (3 attempts)".to_owned()));
        assert_eq!(coded(500, "internal").0, Exit::Unreachable);
        for (status, exit) in [(404, Exit::Refused), (502, Exit::Unreachable), (500, Exit::Unreachable)] {
            let failure = refused(&answer(status, "<html>"), 1);
            assert_eq!((failure.exit, failure.message.contains("<html>")), (exit, true), "{status}");
        }
    }
}
