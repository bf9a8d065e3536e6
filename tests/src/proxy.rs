//! A TCP proxy between two programs: the wire that a test can cut, stall, slow down and count.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::frames::{Cut, Frames};
pub use self::frames::{Method, Side};
use crate::port::free_port;
use crate::wait::within;

mod frames;

/// How long opening and closing the proxy's port may take.
const PORT_LIMIT: Duration = Duration::from_secs(10);

/// How many ports a new proxy tries.
const PORT_TRIES: u32 = 5;

/// The most bytes a delayed direction holds back; then it stops reading.
const HELD_BYTES: usize = 1 << 20;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the program that connected to the proxy, to the program behind it.
    ToServer,
    /// From the program behind the proxy, to the one that connected.
    ToClient,
}

/// A proxy; it cuts everything and closes its port when dropped.
///
/// All orders hold for the present connections and for those to come, until [`Proxy::resume`].
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    wire: Arc<Wire>,
    acceptor: JoinHandle<()>,
}

/// What both sides of the proxy share.
#[derive(Debug)]
struct Wire {
    /// The rules in force; pumps wake up when they change.
    rules: watch::Sender<Rules>,
    /// What has happened so far.
    seen: watch::Sender<Seen>,
    /// Cancelled to cut the present connections, and replaced for those to come.
    cut: Mutex<CancellationToken>,
    /// The cut that waits for its AMQP method.
    armed: Mutex<Option<(Direction, Cut)>>,
    /// Where new connections lead.
    server: Mutex<SocketAddr>,
}

/// What the wire does now.
#[derive(Clone, Debug, Default)]
struct Rules {
    refuse: bool,
    to_server: Flow,
    to_client: Flow,
}

/// What one direction does now.
#[derive(Clone, Debug, Default)]
struct Flow {
    stalled: bool,
    ended: bool,
    delay: Duration,
}

/// What has happened so far.
#[derive(Clone, Debug, Default)]
struct Seen {
    listening: bool,
    open: usize,
    accepted: u64,
    /// How many cuts at a method have been made.
    cuts: u64,
    to_server: Passed,
    to_client: Passed,
}

/// Bytes that went one way.
#[derive(Clone, Debug, Default)]
struct Passed {
    bytes: u64,
    /// The count at which everything is cut.
    cut_at: Option<u64>,
}

impl Rules {
    fn flow(&mut self, direction: Direction) -> &mut Flow {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

impl Seen {
    fn passed(&mut self, direction: Direction) -> &mut Passed {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

impl Proxy {
    /// Opens a port on 127.0.0.1 that leads to `server`, which need not be there yet.
    pub async fn to(server: SocketAddr) -> Result<Self> {
        let wire = Arc::new(Wire {
            rules: watch::Sender::new(Rules::default()),
            seen: watch::Sender::new(Seen::default()),
            cut: Mutex::new(CancellationToken::new()),
            armed: Mutex::new(None),
            server: Mutex::new(server),
        });
        let (addr, listener) = listen().await?;
        let acceptor = tokio::spawn(accept(addr, listener, Arc::clone(&wire)));
        let proxy = Self { addr, wire, acceptor };
        proxy.listening(true).await?;
        Ok(proxy)
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Stops forwarding one way. The connections stay open, as when a cable has been pulled.
    pub fn stall(&self, direction: Direction) {
        self.wire.rules.send_modify(|rules| rules.flow(direction).stalled = true);
    }

    /// Stops forwarding both ways.
    pub fn stall_all(&self) {
        self.stall(Direction::ToServer);
        self.stall(Direction::ToClient);
    }

    /// Lets every byte of one direction arrive later by `delay`.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.wire.rules.send_modify(|rules| rules.flow(direction).delay = delay);
    }

    /// Ends one direction (a FIN to the receiver), while the other goes on. What is sent that way is thrown away.
    pub fn half_close(&self, direction: Direction) {
        self.wire.rules.send_modify(|rules| rules.flow(direction).ended = true);
    }

    /// Forwards `bytes` more one way, counted over all connections, and then cuts all of them.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        self.wire.seen.send_modify(|seen| {
            let passed = seen.passed(direction);
            passed.cut_at = Some(passed.bytes + bytes);
        });
    }

    /// Cuts everything, once, right before or behind the next such AMQP method that comes along one way.
    pub fn cut_at(&self, direction: Direction, side: Side, method: Method) {
        *lock(&self.wire.armed) = Some((direction, Cut { side, method }));
    }

    /// How many cuts of [`Proxy::cut_at`] have been made so far.
    pub fn cuts(&self) -> u64 {
        self.wire.seen.borrow().cuts
    }

    /// Waits until `count` cuts of [`Proxy::cut_at`] have been made.
    pub async fn cut_made(&self, count: u64, limit: Duration) -> Result<()> {
        self.wire.until(limit, &format!("cut number {count}"), |seen| seen.cuts >= count).await
    }

    /// Leads connections to come to another server, as a load balancer does; present ones stay.
    pub fn lead_to(&self, server: SocketAddr) {
        *lock(&self.wire.server) = server;
    }

    /// Resets all present connections (RST both ways). New ones are accepted.
    pub fn cut_all(&self) {
        self.wire.cut_all();
    }

    /// Closes the port: new connections are refused. Present ones stay.
    pub async fn refuse(&self) -> Result<()> {
        self.wire.rules.send_modify(|rules| rules.refuse = true);
        self.listening(false).await
    }

    /// Takes all orders back: the port is open, bytes flow, nothing will be cut.
    pub async fn resume(&self) -> Result<()> {
        self.wire.rules.send_replace(Rules::default());
        self.wire.seen.send_modify(|seen| {
            seen.to_server.cut_at = None;
            seen.to_client.cut_at = None;
        });
        self.listening(true).await
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.wire.seen.borrow().open
    }

    /// How many connections have been accepted so far.
    pub fn accepted(&self) -> u64 {
        self.wire.seen.borrow().accepted
    }

    /// How many bytes have been forwarded one way so far.
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.wire.seen.borrow().clone().passed(direction).bytes
    }

    /// Waits until `bytes` more have been forwarded one way than at `since` (a former [`Proxy::bytes`]).
    pub async fn passed(&self, direction: Direction, since: u64, bytes: u64, limit: Duration) -> Result<()> {
        let what = format!("{bytes} more bytes to go {direction:?}");
        self.wire.until(limit, &what, |seen| seen.passed(direction).bytes >= since + bytes).await
    }

    /// Waits until `count` connections have been accepted.
    pub async fn connected(&self, count: u64, limit: Duration) -> Result<()> {
        self.wire.until(limit, &format!("{count} connections"), |seen| seen.accepted >= count).await
    }

    async fn listening(&self, wanted: bool) -> Result<()> {
        self.wire.until(PORT_LIMIT, "the proxy's port", |seen| seen.listening == wanted).await
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.wire.cut_all();
    }
}

impl Wire {
    fn cut_all(&self) {
        let mut token = lock(&self.cut);
        token.cancel();
        *token = CancellationToken::new();
    }

    /// How many of these bytes may pass before an armed cut; then the cut is armed no more.
    fn cut_in(&self, direction: Direction, frames: &mut Frames, bytes: &[u8]) -> Option<usize> {
        let mut armed = lock(&self.armed);
        let cut = armed.as_ref().filter(|(way, _)| *way == direction).map(|(_, cut)| *cut);
        let at = frames.cut_in(bytes, cut)?;
        *armed = None;
        Some(at)
    }

    async fn until(&self, limit: Duration, what: &str, mut holds: impl FnMut(&mut Seen) -> bool) -> Result<()> {
        let mut seen = self.seen.subscribe();
        within(limit, what, seen.wait_for(|seen| holds(&mut seen.clone()))).await?.context("the proxy is closed")?;
        Ok(())
    }

    /// How many of `wanted` bytes may pass now; and whether everything is to be cut after them.
    fn admit(&self, direction: Direction, wanted: usize) -> (usize, bool) {
        let mut seen = self.seen.borrow().clone();
        let passed = seen.passed(direction);
        let Some(cut_at) = passed.cut_at else { return (wanted, false) };
        let left = usize::try_from(cut_at.saturating_sub(passed.bytes)).unwrap_or(usize::MAX);
        (wanted.min(left), wanted >= left)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a free port. Somebody else may take it in the moment between the look and the bind: then another one.
async fn listen() -> Result<(SocketAddr, TcpListener)> {
    let mut tries = 0;
    loop {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        match TcpListener::bind(addr).await {
            Ok(listener) => return Ok((addr, listener)),
            Err(error) if tries == PORT_TRIES => return Err(error).context("opening the proxy's port"),
            Err(_) => tries += 1,
        }
    }
}

/// Keeps the port open as long as the rules say so, and a task running for every connection.
async fn accept(addr: SocketAddr, listener: TcpListener, wire: Arc<Wire>) {
    let mut rules = wire.rules.subscribe();
    let mut first = Some(listener);
    loop {
        if rules.wait_for(|rules| !rules.refuse).await.is_err() {
            return;
        }
        let listener = match first.take() {
            Some(listener) => listener,
            // Who waits for the port to open tells that it did not.
            None => match TcpListener::bind(addr).await {
                Ok(listener) => listener,
                Err(_) => return,
            },
        };
        wire.seen.send_modify(|seen| seen.listening = true);
        loop {
            tokio::select! {
                client = listener.accept() => {
                    if let Ok((client, _)) = client {
                        tokio::spawn(carry(client, Arc::clone(&wire)));
                    }
                }
                refused = rules.wait_for(|rules| rules.refuse) => {
                    if refused.is_err() {
                        return;
                    }
                    break;
                }
            }
        }
        drop(listener);
        wire.seen.send_modify(|seen| seen.listening = false);
    }
}

/// One connection, from its start to its end or cut.
async fn carry(client: TcpStream, wire: Arc<Wire>) {
    let cut = lock(&wire.cut).clone();
    let server = *lock(&wire.server);
    wire.seen.send_modify(|seen| {
        seen.accepted += 1;
        seen.open += 1;
    });
    if let Ok(server) = TcpStream::connect(server).await {
        let (from_client, mut to_client) = client.into_split();
        let (from_server, mut to_server) = server.into_split();
        let there = Pump::new(Direction::ToServer, &wire).run(from_client, &mut to_server);
        let back = Pump::new(Direction::ToClient, &wire).run(from_server, &mut to_client);
        let carried = tokio::select! {
            ended = async { tokio::try_join!(there, back) } => ended.is_ok(),
            () = cut.cancelled() => false,
        };
        if !carried {
            for end in [to_client, to_server] {
                // Closing then is a reset; it can fail only for what is closed already.
                let _ = end.as_ref().set_zero_linger();
                // Dropping it would send a FIN before.
                end.forget();
            }
        }
    }
    wire.seen.send_modify(|seen| seen.open -= 1);
}

/// One direction of one connection.
struct Pump<'w> {
    direction: Direction,
    wire: &'w Wire,
    held: VecDeque<(Instant, Vec<u8>)>,
    held_bytes: usize,
    frames: Frames,
}

impl<'w> Pump<'w> {
    fn new(direction: Direction, wire: &'w Wire) -> Self {
        Self { direction, wire, held: VecDeque::new(), held_bytes: 0, frames: Frames::default() }
    }

    /// Carries bytes until the sender has ended and all of them are delivered.
    async fn run(mut self, mut from: OwnedReadHalf, to: &mut OwnedWriteHalf) -> io::Result<()> {
        let mut rules = self.wire.rules.subscribe();
        let mut buffer = vec![0; 64 << 10];
        let mut open = true;
        let mut shut = false;
        loop {
            let flow = rules.borrow_and_update().clone().flow(self.direction).clone();
            if (flow.ended || (!open && self.held.is_empty())) && !shut {
                shut = true;
                self.held.clear();
                self.held_bytes = 0;
                to.shutdown().await?;
            }
            if !open && shut {
                return Ok(());
            }
            let due = self.held.front().map(|(due, _)| *due);
            tokio::select! {
                changed = rules.changed() => changed.map_err(|_| io::Error::other("the proxy is gone"))?,
                count = from.read(&mut buffer), if open && !flow.stalled && self.held_bytes < HELD_BYTES => {
                    let count = count?;
                    open = count > 0;
                    if open && !shut {
                        self.hold(&buffer[..count], flow.delay);
                    }
                }
                () = at(due), if !flow.stalled => self.forward(to).await?,
            }
        }
    }

    fn hold(&mut self, bytes: &[u8], delay: Duration) {
        self.held.push_back((Instant::now() + delay, bytes.to_vec()));
        self.held_bytes += bytes.len();
    }

    async fn forward(&mut self, to: &mut OwnedWriteHalf) -> io::Result<()> {
        let Some((_, bytes)) = self.held.pop_front() else { return Ok(()) };
        self.held_bytes -= bytes.len();
        let (mut admitted, mut cut) = self.wire.admit(self.direction, bytes.len());
        let at_method = self.wire.cut_in(self.direction, &mut self.frames, &bytes[..admitted]);
        if let Some(at) = at_method {
            (admitted, cut) = (at, true);
        }
        to.write_all(&bytes[..admitted]).await?;
        self.wire.seen.send_modify(|seen| {
            seen.passed(self.direction).bytes += admitted as u64;
            seen.cuts += u64::from(at_method.is_some());
        });
        if cut {
            self.wire.cut_all();
        }
        Ok(())
    }
}

/// Waits for a moment, or for ever when there is none.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A client and a server with a proxy between them.
    async fn wired() -> Result<(Proxy, TcpStream, TcpStream)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let proxy = Proxy::to(listener.local_addr()?).await?;
        let client = TcpStream::connect(proxy.addr()).await?;
        let (server, _) = within(LIMIT, "the connection", listener.accept()).await??;
        Ok((proxy, client, server))
    }

    async fn receive(stream: &mut TcpStream, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        within(LIMIT, "bytes", stream.read_exact(&mut bytes)).await??;
        Ok(bytes)
    }

    /// Does the stream say nothing for a while?
    async fn is_silent(stream: &mut TcpStream) -> bool {
        tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await.is_err()
    }

    async fn is_reset(stream: &mut TcpStream) -> Result<bool> {
        let read = within(LIMIT, "the end of the connection", stream.read(&mut [0; 64])).await?;
        Ok(read.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset))
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_are_counted() -> Result<()> {
        let (proxy, mut client, mut server) = wired().await?;
        client.write_all(b"hello").await?;
        assert_eq!(receive(&mut server, 5).await?, b"hello");
        server.write_all(b"hi").await?;
        assert_eq!(receive(&mut client, 2).await?, b"hi");
        proxy.passed(Direction::ToServer, 0, 5, LIMIT).await?;
        proxy.passed(Direction::ToClient, 0, 2, LIMIT).await?;
        assert_eq!((proxy.open(), proxy.accepted()), (1, 1));
        Ok(())
    }

    #[tokio::test]
    async fn a_close_reaches_the_other_end_after_every_byte() -> Result<()> {
        let (_proxy, mut client, mut server) = wired().await?;
        let sent = vec![7; 5 << 20];
        let expected = sent.len();
        let sender = tokio::spawn(async move {
            client.write_all(&sent).await?;
            client.shutdown().await
        });
        let mut received = Vec::new();
        within(LIMIT, "all bytes", server.read_to_end(&mut received)).await??;
        sender.await??;
        assert_eq!(received.len(), expected);
        Ok(())
    }

    #[tokio::test]
    async fn a_stalled_direction_is_silent_until_resumed() -> Result<()> {
        let (proxy, mut client, mut server) = wired().await?;
        proxy.stall(Direction::ToServer);
        client.write_all(b"late").await?;
        assert!(is_silent(&mut server).await);
        server.write_all(b"!").await?;
        assert_eq!(receive(&mut client, 1).await?, b"!");
        proxy.resume().await?;
        assert_eq!(receive(&mut server, 4).await?, b"late");
        Ok(())
    }

    #[tokio::test]
    async fn delayed_bytes_come_late_and_in_order() -> Result<()> {
        let (proxy, mut client, mut server) = wired().await?;
        proxy.delay(Direction::ToServer, Duration::from_millis(150));
        let sent = Instant::now();
        client.write_all(b"one ").await?;
        client.write_all(b"two").await?;
        assert_eq!(receive(&mut server, 7).await?, b"one two");
        assert!(sent.elapsed() >= Duration::from_millis(150));
        Ok(())
    }

    #[tokio::test]
    async fn cut_all_resets_both_ends_and_lets_new_connections_in() -> Result<()> {
        let (proxy, mut client, mut server) = wired().await?;
        client.write_all(b"x").await?;
        receive(&mut server, 1).await?;
        proxy.cut_all();
        assert!(is_reset(&mut client).await?);
        assert!(is_reset(&mut server).await?);
        TcpStream::connect(proxy.addr()).await?;
        proxy.connected(2, LIMIT).await
    }

    #[tokio::test]
    async fn cut_after_lets_exactly_so_many_bytes_pass() -> Result<()> {
        let (proxy, mut client, mut server) = wired().await?;
        client.write_all(b"abc").await?;
        receive(&mut server, 3).await?;
        proxy.cut_after(Direction::ToServer, 4);
        client.write_all(b"defghij").await?;
        let mut received = Vec::new();
        let end = within(LIMIT, "the cut", server.read_to_end(&mut received)).await?;
        assert!(end.is_err());
        assert!(b"defg".starts_with(&received), "{received:?}");
        assert_eq!(proxy.bytes(Direction::ToServer), 7);
        Ok(())
    }

    #[tokio::test]
    async fn a_half_closed_connection_still_answers() -> Result<()> {
        let (proxy, mut client, mut server) = wired().await?;
        proxy.half_close(Direction::ToServer);
        assert_eq!(within(LIMIT, "the FIN", server.read(&mut [0; 1])).await??, 0);
        server.write_all(b"bye").await?;
        assert_eq!(receive(&mut client, 3).await?, b"bye");
        Ok(())
    }

    #[tokio::test]
    async fn a_closed_port_refuses_and_opens_again() -> Result<()> {
        let (proxy, mut client, mut server) = wired().await?;
        proxy.refuse().await?;
        let refused = TcpStream::connect(proxy.addr()).await.expect_err("the port is closed");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        client.write_all(b"still").await?;
        assert_eq!(receive(&mut server, 5).await?, b"still");
        proxy.resume().await?;
        TcpStream::connect(proxy.addr()).await?;
        Ok(())
    }

    #[tokio::test]
    async fn dropping_the_proxy_cuts_everything() -> Result<()> {
        let (proxy, mut client, _server) = wired().await?;
        proxy.connected(1, LIMIT).await?;
        drop(proxy);
        assert!(is_reset(&mut client).await?);
        Ok(())
    }
}
