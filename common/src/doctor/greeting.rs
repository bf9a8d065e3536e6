//! The broker's version, from the first frame that it sends: the AMQP library keeps that to itself.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::broker::Address;

/// Longer than any greeting.
const GREETING_BYTES_MAX: usize = 16 * 1024;

/// Asks for the greeting over plain TCP. `None` when there is no answer in time, or it names no version.
pub(super) async fn version(address: &Address, limit: Duration) -> Option<String> {
    let greeting = timeout(limit, greeting(address)).await.ok()?.ok()?;
    version_in(&greeting)
}

async fn greeting(address: &Address) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((address.host(), address.port())).await?;
    stream.write_all(b"AMQP\0\0\x09\x01").await?;
    let mut head = [0; 7];
    stream.read_exact(&mut head).await?;
    let [_, _, _, size @ ..] = head;
    let mut frame = vec![0; (u32::from_be_bytes(size) as usize).min(GREETING_BYTES_MAX)];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

/// The server's properties are a table of (short string, type, value); `version` is a long string (`S`).
fn version_in(greeting: &[u8]) -> Option<String> {
    const KEY: &[u8] = b"\x07versionS";
    let at = greeting.windows(KEY.len()).position(|bytes| bytes == KEY)? + KEY.len();
    let (size, rest) = greeting.get(at..)?.split_at_checked(4)?;
    let size = u32::from_be_bytes(size.try_into().ok()?) as usize;
    std::str::from_utf8(rest.get(..size)?).ok().map(str::to_owned)
}

/// Major and minor number.
pub(super) fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_found_and_broken_greetings_are_none() {
        let greeting = b"\0\x0a\0\x0a\0\x09\0\0\0\x30\x07productS\0\0\0\x08RabbitMQ\x07versionS\0\0\0\x063.10.8!";
        assert_eq!(version_in(greeting).as_deref(), Some("3.10.8"));
        for end in 0..greeting.len() - 1 {
            assert_eq!(version_in(&greeting[..end]), None);
        }
        assert_eq!(version_in(b"\x07versionS\xff\xff\xff\xffx"), None);
    }

    #[test]
    fn versions_are_compared_by_numbers() {
        assert_eq!(numbers("3.10.8"), Some((3, 10)));
        assert_eq!(numbers("4.1.0-rc.1"), Some((4, 1)));
        assert_eq!(numbers("four"), None);
    }
}
