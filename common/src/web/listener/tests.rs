use axum::http::StatusCode;
use axum::routing::{get, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n";
/// A limit, no expectation.
const LIMIT: Duration = Duration::from_secs(60);

struct Served {
    addr: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<bool>,
}

impl Served {
    async fn begin(router: Router, connections_max: usize, grace: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let stopping = stop.clone();
        let server = tokio::spawn(async move { serve(listener, router, connections_max, &stopping, grace).await });
        Self { addr, stop, server }
    }

    async fn client(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }
}

async fn text_of(mut client: TcpStream) -> String {
    let mut text = Vec::new();
    // A connection that is cut ends with an error.
    let _ = client.read_to_end(&mut text).await;
    String::from_utf8(text).unwrap()
}

/// Asks for `/`, and stops the server once the request has arrived there.
async fn stop_in_mid_request(grace: Duration, finishes: bool) -> (bool, String) {
    let (arrived, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (arrived_there, go_on_there) = (Arc::clone(&arrived), Arc::clone(&go_on));
    let handler = async move || {
        arrived_there.notify_one();
        go_on_there.notified().await;
        "finished"
    };
    let served = Served::begin(Router::new().route("/", get(handler)), 10, grace).await;
    let mut client = served.client().await;
    client.write_all(GET).await.unwrap();
    arrived.notified().await;
    served.stop.cancel();
    if finishes {
        go_on.notify_one();
    }
    let answer = text_of(client).await;
    (served.server.await.unwrap(), answer)
}

#[tokio::test]
async fn a_request_under_way_is_finished() {
    let (all_finished, answer) = stop_in_mid_request(LIMIT, true).await;
    assert!(all_finished && answer.starts_with("HTTP/1.1 200") && answer.ends_with("finished"), "{answer}");
}

#[tokio::test]
async fn the_grace_has_an_end() {
    let (all_finished, answer) = stop_in_mid_request(Duration::from_millis(50), false).await;
    assert!(!all_finished && answer.is_empty(), "{answer}");
}

/// Those at work stay: the listener would end what its clients wait for.
#[tokio::test]
async fn idle_connections_make_room() {
    let (arrived, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (arrived_there, go_on_there) = (Arc::clone(&arrived), Arc::clone(&go_on));
    let slow = async move || {
        arrived_there.notify_one();
        go_on_there.notified().await;
        "slow"
    };
    let router = Router::new().route("/", get(async || "quick")).route("/slow", get(slow));
    let served = Served::begin(router, 2, Duration::from_millis(50)).await;
    let mut working = served.client().await;
    working.write_all(b"GET /slow HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").await.unwrap();
    arrived.notified().await;
    let mut idle = Vec::new();
    for _ in 0..20 {
        let mut client = served.client().await;
        client.write_all(b"GET / HT").await.unwrap();
        idle.push(client);
    }
    let mut client = served.client().await;
    client.write_all(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").await.unwrap();
    let answer = timeout(LIMIT, text_of(client)).await.unwrap();
    assert!(answer.ends_with("quick"), "{answer}");
    go_on.notify_one();
    assert!(timeout(LIMIT, text_of(working)).await.unwrap().ends_with("slow"));
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_end_is_given_up() {
    let served = Served::begin(Router::new(), 10, LIMIT).await;
    let (mut slow, silent) = (served.client().await, served.client().await);
    slow.write_all(b"GET / HTTP/1.1\r\nHost: he").await.unwrap();
    let began = Instant::now();
    assert_eq!(text_of(slow).await, "");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(text_of(silent).await, "");
    assert!(began.elapsed() >= Duration::from_secs(75), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_head_has_64_kib_at_most() {
    let served = Served::begin(Router::new().route("/", get(async || "read")), 10, LIMIT).await;
    for (bytes, status) in [(30 * 1024, "200"), (100 * 1024, "431")] {
        let mut client = served.client().await;
        let head =
            format!("GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\nx-long: {}\r\n\r\n", "x".repeat(bytes));
        // What is too long is not read to its end.
        let _ = client.write_all(head.as_bytes()).await;
        let mut answer = [0; 12];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), format!("HTTP/1.1 {status}"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_nothing_is_dropped_and_its_answer_with_it() {
    /// Says when it is dropped.
    struct Answer(mpsc::Sender<()>, Vec<u8>);
    impl Drop for Answer {
        fn drop(&mut self) {
            self.0.try_send(()).unwrap();
        }
    }
    impl AsRef<[u8]> for Answer {
        fn as_ref(&self) -> &[u8] {
            &self.1
        }
    }
    let (held, mut dropped) = mpsc::channel(1);
    let handler = async move || Body::from(axum::body::Bytes::from_owner(Answer(held.clone(), vec![0; 64 << 20])));
    let served = Served::begin(Router::new().route("/", get(handler)), 10, LIMIT).await;
    let mut client = served.client().await;
    client.write_all(GET).await.unwrap();
    assert_eq!(dropped.recv().await, Some(()));
    drop(client);
}

/// With something unread in it, a socket that is closed resets the connection, and the client loses the answer.
#[tokio::test]
async fn an_answer_before_the_end_of_the_body_arrives() {
    let refuse = async || (StatusCode::SERVICE_UNAVAILABLE, "not now");
    let served = Served::begin(Router::new().route("/", post(refuse)), 10, LIMIT).await;
    for _ in 0..20 {
        let mut client = served.client().await;
        client.write_all(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 4000000\r\n\r\n").await.unwrap();
        for _ in 0..40 {
            client.write_all(&[b'x'; 100_000]).await.unwrap();
        }
        let answer = text_of(client).await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("not now"), "{answer}");
    }
}

#[tokio::test]
async fn who_vanishes_without_a_word_is_noticed_within_a_minute() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let room = Arc::new(Semaphore::new(1));
    let (stream, ..) = accept(&listener, (&room, &Connections::default())).await.unwrap();
    let socket = SockRef::from(&stream);
    assert!(socket.keepalive().unwrap());
    let probes = socket.tcp_keepalive_interval().unwrap() * socket.tcp_keepalive_retries().unwrap();
    assert!(socket.tcp_keepalive_time().unwrap() + probes <= LIMIT, "{probes:?}");
    assert!(socket.tcp_user_timeout().unwrap().unwrap() <= LIMIT / 2);
}
