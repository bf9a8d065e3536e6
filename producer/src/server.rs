//! The listener: connections bounded in number and patience, and closed one by one when the producer stops.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::Layer;

use crate::caller::Peer;

/// How many connections there may be; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 16_384;
/// How long the head of a request may take, and an idle connection stays: above the 60 s of common load balancers,
/// or one would send a request into a connection that closes at that moment.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// The pause after a failed accept, most often for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stopping`, then lets requests under way finish within `grace`; tells whether all did.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    stopping: &CancellationToken,
    grace: Duration,
) -> bool {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = GracefulShutdown::new();
    let over = CancellationToken::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    while let Some((stream, peer, place)) = next(&listener, &room, stopping).await {
        let service = TowerToHyperService::new(Extension(Peer(peer)).layer(router.clone()));
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        let over = over.clone();
        tokio::spawn(async move {
            tokio::select! {
                // An error here is the client's connection; whatever is ours was answered and logged.
                _ = connection => {}
                () = over.cancelled() => {}
            }
            drop(place);
        });
    }
    drop(listener);
    let all_finished = timeout(grace, connections.shutdown()).await.is_ok();
    over.cancel();
    all_finished
}

async fn next(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
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
    room: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(room).acquire_owned().await.ok()?;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Without it an answer can wait 40 ms for the client's ack; with an error it merely is slower.
                let _ = stream.set_nodelay(true);
                return Some((stream, peer, place));
            }
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether a connection ended before it was taken.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::Notify;

    use super::*;

    /// Asks for `/`, and stops the server once the request has arrived there.
    async fn stop_in_mid_request(grace: Duration, finishes: bool) -> (bool, String) {
        let (arrived, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (arrived_there, go_on_there) = (Arc::clone(&arrived), Arc::clone(&go_on));
        let router = Router::new().route(
            "/",
            get(async move || {
                arrived_there.notify_one();
                go_on_there.notified().await;
                "finished"
            }),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let stopping = CancellationToken::new();
        let stop = stopping.clone();
        let server = tokio::spawn(async move { serve(listener, router, &stop, grace).await });
        client.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").await.unwrap();
        arrived.notified().await;
        stopping.cancel();
        if finishes {
            go_on.notify_one();
        }
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        (server.await.unwrap(), answer)
    }

    #[tokio::test]
    async fn a_request_under_way_is_finished() {
        let (all_finished, answer) = stop_in_mid_request(Duration::from_secs(60), true).await;
        assert!(all_finished && answer.starts_with("HTTP/1.1 200") && answer.ends_with("finished"), "{answer}");
    }

    #[tokio::test]
    async fn the_grace_has_an_end() {
        let (all_finished, answer) = stop_in_mid_request(Duration::from_millis(50), false).await;
        assert!(!all_finished && answer.is_empty(), "{answer}");
    }
}
