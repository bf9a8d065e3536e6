//! The listener: connections bounded in number and patience, and closed one by one when the program stops.
//!
//! When all places are taken, the connection that has been idle for longest makes room: clients that only keep
//! connections open keep nobody out.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::{Extension, Router};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tower::{Layer, ServiceExt};

use super::connection::{Connection, Socket, UNREAD_MAX};
use crate::seldom::Seldom;

/// From so many bytes on no more of a request's head is read; one that has not ended in what came with them, 64 KiB in all at
/// most, is answered with 431.
const HEAD_BYTES: usize = 32 * 1024;
/// The pause after a failed accept, most often for want of file descriptors, and before another look for room.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often connections are looked at.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// A silent client is asked by the kernel whether it is there after this time, and then this often, so many times: one that
/// has vanished without a word is gone within 40 s.
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(20);
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(5);
const KEEP_ALIVE_RETRIES: u32 = 4;

/// The other end of a request's connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// The connections there are, by numbers of their own.
#[derive(Debug, Default)]
struct Connections {
    there: Mutex<(u64, HashMap<u64, Arc<Connection>>)>,
}

impl Connections {
    fn there(&self) -> MutexGuard<'_, (u64, HashMap<u64, Arc<Connection>>)> {
        self.there.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, connection: Arc<Connection>) -> u64 {
        let (last, there) = &mut *self.there();
        *last += 1;
        there.insert(*last, connection);
        *last
    }

    fn remove(&self, id: u64) {
        self.there().1.remove(&id);
    }

    /// Ends the one that has been idle for longest.
    fn make_room(&self) {
        let (_, there) = &*self.there();
        let idle = there.values().filter(|connection| !connection.end.is_cancelled());
        if let Some((_, longest)) =
            idle.filter_map(|one| Some((one.idle_since()?, one))).min_by_key(|(since, _)| *since)
        {
            longest.end.cancel();
        }
    }

    async fn end_overdue(self: Arc<Self>) {
        let mut period = interval(LOOK_PERIOD);
        loop {
            let now = period.tick().await;
            self.there().1.values().filter(|connection| connection.is_overdue(now)).for_each(|one| one.end.cancel());
        }
    }
}

/// Serves at most so many connections until `stopping`, then lets requests under way finish within `grace`; tells whether all did.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections_max: usize,
    stopping: &CancellationToken,
    grace: Duration,
) -> bool {
    let room = Arc::new(Semaphore::new(connections_max));
    let connections = Arc::new(Connections::default());
    let graceful = GracefulShutdown::new();
    let over = CancellationToken::new();
    let _overdue = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&connections).end_overdue()));
    let mut http = http1::Builder::new();
    http.max_buf_size(HEAD_BYTES).header_read_timeout(None);
    while let Some((stream, peer, place)) = next(&listener, (&room, &connections), stopping).await {
        let connection = Connection::new();
        let id = connections.add(Arc::clone(&connection));
        let router = Extension(Peer(peer)).layer(router.clone());
        let service = service_fn({
            let connection = Arc::clone(&connection);
            move |request: hyper::Request<Incoming>| {
                let request: Request = request.map(Body::new);
                let under_way = connection.begin(request.body());
                let answer = router.clone().oneshot(request.map(|body| under_way.asked(body)));
                async move { answer.await.map(|answer| answer.map(|body| under_way.answered(body))) }
            }
        });
        let socket = TokioIo::new(Socket::new(stream, Arc::clone(&connection)));
        let served = graceful.watch(http.serve_connection(socket, service));
        let (over, connections) = (over.clone(), Arc::clone(&connections));
        tokio::spawn(async move {
            tokio::select! {
                // An error here is the client's connection; whatever is ours was answered and logged.
                _ = served => {}
                () = connection.end.cancelled() => {}
                () = over.cancelled() => {}
            }
            connections.remove(id);
            drop(place);
        });
    }
    drop(listener);
    let all_finished = timeout(grace, graceful.shutdown()).await.is_ok();
    over.cancel();
    all_finished
}

async fn next(
    listener: &TcpListener,
    room: (&Arc<Semaphore>, &Connections),
    stopping: &CancellationToken,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    tokio::select! {
        biased;
        () = stopping.cancelled() => None,
        accepted = accept(listener, room) => accepted,
    }
}

/// Does not end on an error: one failed accept says nothing about the next.
async fn accept(
    listener: &TcpListener,
    (room, connections): (&Arc<Semaphore>, &Connections),
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    static FAILED: Seldom = Seldom::once_in(Duration::from_secs(60));
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                set_options(&stream);
                return Some((stream, peer, place(room, connections).await?));
            }
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                if let Some(left_out) = FAILED.admit() {
                    tracing::error!(%error, left_out, "cannot accept connections");
                }
                // Most often for want of a descriptor.
                connections.make_room();
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A place, which somebody idle has to leave when there is none.
async fn place(room: &Arc<Semaphore>, connections: &Connections) -> Option<OwnedSemaphorePermit> {
    loop {
        if room.available_permits() == 0 {
            connections.make_room();
        }
        if let Ok(place) = timeout(ACCEPT_PAUSE, Arc::clone(room).acquire_owned()).await {
            return place.ok();
        }
    }
}

/// With an error the connection merely is slower, or its end is noticed later.
fn set_options(stream: &TcpStream) {
    // Without it an answer can wait 40 ms for the client's ack.
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let keep_alive = TcpKeepalive::new()
        .with_time(KEEP_ALIVE_AFTER)
        .with_interval(KEEP_ALIVE_PERIOD)
        .with_retries(KEEP_ALIVE_RETRIES);
    let _ = socket.set_tcp_keepalive(&keep_alive);
    let _ = socket.set_tcp_user_timeout(Some(UNREAD_MAX));
}

/// Whether a connection ended before it was taken.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

#[cfg(test)]
mod tests;
