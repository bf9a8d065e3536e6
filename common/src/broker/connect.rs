//! The way to the broker: name resolution, TCP, TLS, and the [`Guard`] between the socket and the AMQP library.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::{Runtime, Tokio};
use futures::Stream;
use futures::io::{AsyncRead, AsyncWrite};
use lapin::tcp::{AsyncTcpStream, OwnedTLSConfig};
use lapin::{Connection, ConnectionProperties};
use tokio::net::lookup_host;
use tokio::time::timeout;

use super::BrokerError;
use super::address::Address;
use super::generations::connected;
use super::guard::Guard;
use crate::task::LedgerId;

/// How many bytes are read from the socket at once.
const READ_BYTES: usize = 32 * 1024;
/// How long one of several addresses of a host may take before the next is tried.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_secs(4);

/// The property of a connection that names its process's ledger.
pub const LEDGER_PROPERTY: &str = "tasklane_ledger";

/// The socket's side of a connection: plain or TLS.
type Socket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// Tokio, with sockets that are guarded.
#[derive(Debug, Clone)]
pub(super) struct Guarded(Tokio);

/// A connection through which only passes what the AMQP library can take.
pub(super) struct GuardedStream {
    socket: Socket,
    guard: Guard,
    /// What has passed, from `read` on.
    passed: Vec<u8>,
    read: usize,
    input: Box<[u8]>,
}

impl GuardedStream {
    fn new(socket: Socket, frame_bytes_max: usize) -> Self {
        let input = vec![0; READ_BYTES].into_boxed_slice();
        Self { socket, guard: Guard::new(frame_bytes_max), passed: Vec::new(), read: 0, input }
    }
}

impl AsyncRead for GuardedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        while this.read == this.passed.len() {
            this.passed.clear();
            this.read = 0;
            let count = ready!(Pin::new(&mut this.socket).poll_read(cx, &mut this.input))?;
            if count == 0 {
                return Poll::Ready(Ok(0));
            }
            this.guard.feed(&this.input[..count], &mut this.passed)?;
        }
        let rest = &this.passed[this.read..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        this.read += count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for GuardedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, buffers)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx)
    }
}

impl Executor for Guarded {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        future: F,
    ) -> async_rs::util::Task<Self::Task<T>> {
        self.0.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(
        &self,
        work: F,
    ) -> async_rs::util::Task<Self::Task<T>> {
        self.0.spawn_blocking(work)
    }
}

impl Reactor for Guarded {
    type TcpStream = GuardedStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: io::Read + io::Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, time: Duration) -> Self::Sleep {
        self.0.sleep(time)
    }

    fn interval(&self, time: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(time)
    }

    fn tcp_connect_addr(&self, addr: SocketAddr) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(addr);
        async move { Ok(GuardedStream::new(AsyncTcpStream::Plain(connecting.await?), READ_BYTES)) }
    }
}

impl RuntimeKit for Guarded {}

/// Connects under a name that the management UI shows. Each side takes a peer that is silent for two heartbeats for dead.
///
/// # Errors
/// When the broker is not there, refuses, or does not answer in time.
pub async fn connect(address: &Address, name: &str, heartbeat: Duration) -> Result<Connection, BrokerError> {
    connect_with(address, ConnectionProperties::default().with_connection_name(name.into()), heartbeat).await
}

/// [`connect`], and says which ledger the process has: by that a doctor tells whether all have the same.
///
/// # Errors
/// As [`connect`].
pub async fn connect_for(
    ledger: LedgerId,
    address: &Address,
    name: &str,
    heartbeat: Duration,
) -> Result<Connection, BrokerError> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let properties = properties.with_client_property(LEDGER_PROPERTY.into(), ledger.to_string().into());
    connect_with(address, properties, heartbeat).await
}

async fn connect_with(
    address: &Address,
    properties: ConnectionProperties,
    heartbeat: Duration,
) -> Result<Connection, BrokerError> {
    let (uri, frame_bytes_max) = address.asking_for(heartbeat);
    let way = address.clone();
    let runtime = Runtime::new(Guarded(Tokio::current()));
    let connecting = Connection::connector(
        uri,
        runtime,
        async move |_, _| {
            let socket = open(&way).await?;
            Ok(AsyncTcpStream::Plain(GuardedStream::new(socket, frame_bytes_max)))
        },
        properties,
    );
    match timeout(address.patience(), connecting).await {
        Ok(Ok(connection)) => {
            connected(address);
            Ok(connection)
        }
        Ok(Err(error)) => Err(BrokerError::connecting(address, error)),
        Err(_) => Err(BrokerError::Timeout("connect")),
    }
}

/// The socket: of the addresses that the host has, the first that answers.
async fn open(address: &Address) -> io::Result<Socket> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for addr in lookup_host((address.host(), address.port())).await? {
        match timeout(NEXT_ADDRESS_AFTER, Tokio::current().tcp_connect_addr(addr)).await {
            Ok(Ok(stream)) => return secure(address, AsyncTcpStream::Plain(stream)).await,
            Ok(Err(error)) => failure = error,
            Err(_) => failure = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failure)
}

async fn secure(address: &Address, socket: Socket) -> io::Result<Socket> {
    if !address.is_tls() {
        return Ok(socket);
    }
    let (cert_chain, identity) = (address.authorities()?, address.identity()?);
    socket.into_tls(address.host(), OwnedTLSConfig { identity, cert_chain }.as_ref()).await
}
