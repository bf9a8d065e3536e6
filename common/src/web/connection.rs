//! One connection: what it does at the moment, since when, and whether that takes too long.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::CancellationToken;

use super::body::holding;

/// How long an idle connection stays: above the 60 s of common load balancers, or one would send a request into a
/// connection that closes at that moment.
const IDLE_MAX: Duration = Duration::from_secs(75);
/// How long the head of a request may take from its first byte on.
const HEAD_MAX: Duration = Duration::from_secs(15);
/// How long a client may leave what it is sent unread, or unacknowledged.
pub(super) const UNREAD_MAX: Duration = Duration::from_secs(30);
/// How long an answer of known length may take: a client that reads a little now and then holds it as long.
const ANSWER_MAX: Duration = Duration::from_secs(150);
/// What is read of a request that was answered before its end, so that the client gets to reading the answer.
const DRAIN_BYTES_MAX: usize = 8 * 1024 * 1024;
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// One connection, as its task, its requests and the listener see it.
#[derive(Debug)]
pub(super) struct Connection {
    state: Mutex<State>,
    /// Ends it at once.
    pub(super) end: CancellationToken,
}

#[derive(Debug)]
struct State {
    doing: Doing,
    since: Instant,
    /// Since when the client takes nothing of what is there for it.
    blocked: Option<Instant>,
    /// Whether something of the last request's body may still come.
    unread: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Waiting for a request.
    Idle,
    /// Reading a head.
    Head,
    /// Working on a request, or sending an answer that has no end known beforehand.
    Busy,
    /// Sending an answer of known length.
    Answering,
}

impl Connection {
    pub(super) fn new() -> Arc<Self> {
        let state = State { doing: Doing::Idle, since: Instant::now(), blocked: None, unread: false };
        Arc::new(Self { state: Mutex::new(state), end: CancellationToken::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn does(&self, doing: Doing) {
        let mut state = self.state();
        (state.doing, state.since) = (doing, Instant::now());
    }

    /// Since when it does nothing for its client, if so: then it may go to make room.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        (matches!(state.doing, Doing::Idle | Doing::Head) && state.blocked.is_none()).then_some(state.since)
    }

    /// Whether its time is over.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        let state = self.state();
        let doing_for = now.saturating_duration_since(state.since);
        let too_long = match state.doing {
            Doing::Idle => doing_for >= IDLE_MAX,
            Doing::Head => doing_for >= HEAD_MAX,
            Doing::Busy => false,
            Doing::Answering => doing_for >= ANSWER_MAX,
        };
        too_long || state.blocked.is_some_and(|blocked| now.saturating_duration_since(blocked) >= UNREAD_MAX)
    }

    /// A request has come: it is under way until what is returned is dropped, with the answer's body.
    pub(super) fn begin(self: &Arc<Self>, request: &Body) -> UnderWay {
        self.does(Doing::Busy);
        self.state().unread = !request.is_end_stream();
        UnderWay(Arc::clone(self))
    }
}

/// A request under way.
#[derive(Debug)]
pub(super) struct UnderWay(Arc<Connection>);

impl UnderWay {
    /// The request's body, watched for its end.
    pub(super) fn asked(&self, body: Body) -> Body {
        if body.is_end_stream() { body } else { Body::new(Asked { body, connection: Arc::clone(&self.0) }) }
    }

    /// The answer's body; when it is dropped the request is over.
    pub(super) fn answered(self, body: Body) -> Body {
        if body.size_hint().exact().is_some() {
            self.0.does(Doing::Answering);
        }
        holding(body, self)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.does(Doing::Idle);
    }
}

struct Asked {
    body: Body,
    connection: Arc<Connection>,
}

impl HttpBody for Asked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.connection.state().unread = false;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The socket, which tells the connection what it reads and writes.
pub(super) struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
    drained_bytes: usize,
    drain_until: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, connection: Arc<Connection>) -> Self {
        Self { stream, connection, drained_bytes: 0, drain_until: None }
    }

    fn written<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let mut state = self.connection.state();
        state.blocked = if written.is_pending() { state.blocked.or_else(|| Some(Instant::now())) } else { None };
        written
    }

    /// Reads on until the client is done, within bounds: closing a socket with something unread in it resets the
    /// connection, and the client may lose the answer that it was sent.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let until = self.drain_until.get_or_insert_with(|| Box::pin(sleep(DRAIN_MAX)));
        let mut room = [0; 16 * 1024];
        while self.drained_bytes < DRAIN_BYTES_MAX && until.as_mut().poll(cx).is_pending() {
            let mut part = ReadBuf::new(&mut room);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part)) {
                Ok(()) if !part.filled().is_empty() => self.drained_bytes += part.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(())
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, part: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = part.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, part);
        if part.filled().len() > before {
            let mut state = self.connection.state();
            if state.doing == Doing::Idle {
                (state.doing, state.since) = (Doing::Head, Instant::now());
            }
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, part: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, part);
        self.written(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.drain_until.is_none() {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            if !self.connection.state().unread {
                return Poll::Ready(Ok(()));
            }
        }
        self.poll_drain(cx).map(Ok)
    }
}
