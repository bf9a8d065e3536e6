//! A client that costs next to nothing: the load must not take the processor from what is measured.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long one answer may take.
const LIMIT: Duration = Duration::from_secs(60);
/// The longest head of an answer.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// One kept-alive connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    /// Connects.
    pub async fn open(addr: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: Vec::new() })
    }

    /// Posts JSON; answers the status.
    pub async fn post(&mut self, path: &str, body: &[u8]) -> Result<u16> {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let mut request = head.into_bytes();
        request.extend_from_slice(body);
        timeout(LIMIT, self.exchange(&request)).await.context("no answer in time")?
    }

    async fn exchange(&mut self, request: &[u8]) -> Result<u16> {
        self.stream.write_all(request).await?;
        self.read.clear();
        let head = loop {
            if let Some(end) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            ensure!(self.read.len() < HEAD_BYTES_MAX, "the answer's head has no end");
            self.more().await?;
        };
        let text = std::str::from_utf8(self.read.get(..head).unwrap_or_default())?;
        let status = text.get(9..12).context("the answer has no status")?.parse()?;
        let length =
            text.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned));
        let length: usize = length.context("the answer has no length")?.trim().parse()?;
        while self.read.len() < head + length {
            self.more().await?;
        }
        Ok(status)
    }

    async fn more(&mut self) -> Result<()> {
        if self.stream.read_buf(&mut self.read).await? == 0 {
            bail!("the connection was closed");
        }
        Ok(())
    }
}
