//! An answer that does not end by itself.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::{Call, Client, Silence, silence, whole};
use crate::failure::{Exit, Failure};
use crate::sse::{Event, Events};

/// After so long without a sign of life the producer counts as gone; it gives one every 15 seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A stream of events, until a time if there is one.
#[derive(Debug)]
pub(crate) struct Stream<'c> {
    client: &'c Client,
    response: reqwest::Response,
    events: Events,
    whole: VecDeque<Event>,
    until: Option<Instant>,
}

impl Client {
    /// Opens a stream of events.
    ///
    /// # Errors
    /// What the API refused and why, or that no producer answers.
    pub(crate) async fn stream(&self, call: Call, until: Option<Instant>) -> Result<Stream<'_>, Failure> {
        let limit = Instant::now() + call.time;
        let sent = timeout_at(limit, self.http.request(call.method.clone(), self.url(&call)).send()).await;
        let response = match sent {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(self.silent(&silence(error), 1)),
            Err(_) => return Err(self.silent(&Silence::Late(call.time), 1)),
        };
        if response.status().is_success() {
            return Ok(Stream { client: self, response, events: Events::default(), whole: VecDeque::new(), until });
        }
        let answer = timeout_at(limit, whole(response)).await.unwrap_or(Err(Silence::Late(call.time)));
        match self.judge(answer, 1) {
            Err(failure) => Err(failure),
            Ok(_) => Err(Failure::new(Exit::Refused, "the answer is no stream of events")),
        }
    }
}

impl Stream<'_> {
    /// The next event; `None` when the time is over.
    ///
    /// # Errors
    /// When the stream ends before that.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            // The time counts also where events never cease.
            if self.until.is_some_and(|until| Instant::now() >= until) {
                return Ok(None);
            }
            if let Some(event) = self.whole.pop_front() {
                return Ok(Some(event));
            }
            let silent_at = Instant::now() + SILENCE_MAX;
            let until = self.until.map_or(silent_at, |until| until.min(silent_at));
            let part = match timeout_at(until, self.response.chunk()).await {
                Ok(Ok(Some(part))) => part,
                Ok(Ok(None)) => return Err(self.ended("ended the stream: it stops, or something between cut it")),
                Ok(Err(error)) => return Err(self.client.silent(&silence(error), 1)),
                Err(_) if until < silent_at => return Ok(None),
                Err(_) => return Err(self.ended("gave no sign of life for 60 s")),
            };
            let events = self.events.feed(&part).map_err(|_| {
                Failure::new(Exit::Refused, "the answer is no stream of events")
                    .hint("is --url the address of a Tasklane producer?")
            })?;
            self.whole.extend(events);
        }
    }

    fn ended(&self, how: &str) -> Failure {
        Failure::new(Exit::Unreachable, format!("the producer at {} {how}", self.client.address()))
    }
}
