//! AMQP byte by byte: publishes what no library would write.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::vhost::Vhost;
use crate::wait::within;

/// How long the broker may take for one answer.
const LIMIT: Duration = Duration::from_secs(20);
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const FRAME_END: u8 = 0xCE;
/// The broker's largest frame.
const FRAME_MAX: u32 = 131_072;

/// A connection with one channel, on which publications are confirmed.
#[derive(Debug)]
pub struct Wire(BufReader<TcpStream>);

impl Wire {
    /// Connects to a vhost.
    pub async fn to(vhost: &Vhost) -> Result<Self> {
        let node = vhost.node();
        let mut wire = Self(BufReader::new(TcpStream::connect(node.amqp).await?));
        wire.0.write_all(b"AMQP\0\0\x09\x01").await?;
        wire.answer((10, 10)).await?;
        let login = format!("\0{}\0{}", node.user, node.password);
        let start_ok = [&[0; 4][..], &short("PLAIN"), &long(login.as_bytes()), &short("en_US")].concat();
        wire.method(0, (10, 11), &start_ok).await?;
        wire.answer((10, 30)).await?;
        wire.method(0, (10, 31), &[&[0, 1][..], &FRAME_MAX.to_be_bytes(), &[0, 0]].concat()).await?;
        wire.method(0, (10, 40), &[&short(vhost.name())[..], &[0, 0]].concat()).await?;
        wire.answer((10, 41)).await?;
        wire.method(1, (20, 10), &[0]).await?;
        wire.answer((20, 11)).await?;
        wire.method(1, (85, 10), &[0]).await?;
        wire.answer((85, 11)).await?;
        Ok(wire)
    }

    /// Publishes a message with these properties, flags first, and waits until the broker has confirmed it.
    pub async fn publish(&mut self, exchange: &str, key: &[u8], properties: &[u8], body: &[u8]) -> Result<()> {
        let key = [&[u8::try_from(key.len())?][..], key].concat();
        self.method(1, (60, 40), &[&[0, 0][..], &short(exchange), &key, &[0]].concat()).await?;
        let content = [&[0, 60, 0, 0][..], &(body.len() as u64).to_be_bytes(), properties].concat();
        self.frame(HEADER, 1, &content).await?;
        self.frame(BODY, 1, body).await?;
        self.answer((60, 80)).await
    }

    async fn method(&mut self, channel: u16, (class, method): (u16, u16), arguments: &[u8]) -> Result<()> {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        self.frame(METHOD, channel, &payload).await
    }

    async fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) -> Result<()> {
        let size = u32::try_from(payload.len())?.to_be_bytes();
        let frame = [&[kind][..], &channel.to_be_bytes(), &size, payload, &[FRAME_END]].concat();
        Ok(self.0.write_all(&frame).await?)
    }

    /// Waits for a method, and for nothing else.
    async fn answer(&mut self, expected: (u16, u16)) -> Result<()> {
        let mut head = [0; 7];
        within(LIMIT, "the broker's answer", self.0.read_exact(&mut head)).await??;
        let [_, _, _, size @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes(size) as usize + 1];
        self.0.read_exact(&mut payload).await?;
        let [a, b, c, d, arguments @ ..] = &payload[..] else { return Err(anyhow::anyhow!("too short an answer")) };
        let method = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
        let said = String::from_utf8_lossy(arguments);
        ensure!(method == expected, "the broker answered {method:?} instead of {expected:?}: {said}");
        Ok(())
    }
}

/// The properties of a message that has headers and nothing else: `table` is what stands behind their length.
pub fn headers(table: &[u8]) -> Vec<u8> {
    [&[0b0010_0000, 0][..], &long(table)].concat()
}

/// A table with one value: so many lists within each other.
pub fn nested(depth: usize) -> Result<Vec<u8>> {
    let mut table = b"\x01x".to_vec();
    for inner in (0..depth).rev() {
        table.push(b'A');
        table.extend(u32::try_from(inner * 5).context("too deep")?.to_be_bytes());
    }
    Ok(table)
}

fn short(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
    [&[length][..], text.as_bytes()].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], bytes].concat()
}
