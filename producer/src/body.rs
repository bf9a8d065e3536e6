//! Takes bodies in: bounded in size, in time, and in what all of them together hold in memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::http::{HeaderMap, header};
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::ApiError;

/// How long a whole body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the next part of a body may take.
const PART_TIMEOUT: Duration = Duration::from_secs(10);
/// What all bodies under way may hold together.
const TOGETHER_KIB_MAX: u32 = 128 * 1024;
/// How much of a refused body is read all the same, so that the client gets to reading the answer.
const DISCARD_BYTES_MAX: usize = 8 * 1024 * 1024;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);

/// The room for bodies in this process's memory; clones share it.
#[derive(Debug, Clone)]
pub struct Room(Arc<Semaphore>);

/// A body under way. What it takes of the [`Room`] is given back when it is dropped.
#[derive(Debug)]
pub struct Reader {
    parts: BodyDataStream,
    what: &'static str,
    limit_bytes: usize,
    taken_bytes: usize,
    expects_continue: bool,
    deadline: Instant,
    room: Arc<Semaphore>,
    held: OwnedSemaphorePermit,
}

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TOGETHER_KIB_MAX as usize)))
    }
}

impl Room {
    /// Begins to read a body of at most `limit_bytes`.
    ///
    /// # Errors
    /// [`ApiError::ContentEncoding`], or [`ApiError::TooLarge`] when its length is announced and over the limit.
    pub async fn reader(
        &self,
        headers: &HeaderMap,
        body: Body,
        what: &'static str,
        limit_bytes: usize,
    ) -> Result<Reader, ApiError> {
        // What is compressed would be bounded in its small form only.
        if headers.get_all(header::CONTENT_ENCODING).iter().any(|encoding| encoding != "identity") {
            return Err(ApiError::ContentEncoding);
        }
        let held = Arc::clone(&self.0).try_acquire_many_owned(0).map_err(|_| ApiError::Overloaded)?;
        let mut reader = Reader {
            parts: body.into_data_stream(),
            what,
            limit_bytes,
            taken_bytes: 0,
            expects_continue: headers.contains_key(header::EXPECT),
            deadline: Instant::now() + BODY_TIMEOUT,
            room: Arc::clone(&self.0),
            held,
        };
        let announced =
            headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        match announced {
            Some(length) if length > limit_bytes => Err(reader.too_large().await),
            _ => Ok(reader),
        }
    }
}

impl Reader {
    /// The next part, `None` at the end.
    ///
    /// # Errors
    /// When the body is too large, too slow or broken, or this process has no room for it.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        let deadline = self.deadline.min(Instant::now() + PART_TIMEOUT);
        let part = match timeout_at(deadline, self.parts.next()).await {
            Err(_) => return Err(ApiError::SlowBody),
            Ok(Some(Err(_))) => return Err(ApiError::BrokenBody),
            Ok(Some(Ok(part))) => part,
            Ok(None) => return Ok(None),
        };
        self.taken_bytes = self.taken_bytes.saturating_add(part.len());
        if self.taken_bytes > self.limit_bytes {
            return Err(self.too_large().await);
        }
        self.hold(self.taken_bytes)?;
        Ok(Some(part))
    }

    /// All of it.
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub async fn whole(&mut self) -> Result<Vec<u8>, ApiError> {
        let mut whole = Vec::new();
        while let Some(part) = self.next().await? {
            whole.extend_from_slice(&part);
        }
        Ok(whole)
    }

    /// Reads on for a while without keeping anything: a client that still sends would not see the answer.
    pub async fn discard(&mut self) {
        let parts = &mut self.parts;
        let read = async {
            let mut discarded = 0;
            while let Some(Ok(part)) = parts.next().await {
                discarded += part.len();
                if discarded > DISCARD_BYTES_MAX {
                    break;
                }
            }
        };
        // Whether it came to the end or not, the answer is the same.
        let _ = timeout(DISCARD_TIMEOUT, read).await;
    }

    async fn too_large(&mut self) -> ApiError {
        // A client that asked before sending has not begun, and reading would invite it to.
        if !self.expects_continue {
            self.discard().await;
        }
        ApiError::TooLarge { what: self.what, limit_bytes: self.limit_bytes }
    }

    fn hold(&mut self, bytes: usize) -> Result<(), ApiError> {
        let missing = bytes.div_ceil(1024).saturating_sub(self.held.num_permits());
        if missing > 0 {
            let missing = u32::try_from(missing).unwrap_or(u32::MAX);
            let more = Arc::clone(&self.room).try_acquire_many_owned(missing).map_err(|_| ApiError::Overloaded)?;
            self.held.merge(more);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(room: &Room, body: Body, limit_bytes: usize) -> Result<Vec<u8>, ApiError> {
        room.reader(&HeaderMap::new(), body, "the body", limit_bytes).await?.whole().await
    }

    #[tokio::test]
    async fn a_body_of_the_limit_passes_and_one_byte_more_does_not() {
        let room = Room::default();
        assert_eq!(read(&room, Body::from(vec![1; 3000]), 3000).await.unwrap().len(), 3000);
        assert!(matches!(read(&room, Body::from(vec![1; 3001]), 3000).await, Err(ApiError::TooLarge { .. })));
        assert_eq!(room.0.available_permits(), TOGETHER_KIB_MAX as usize, "all room is given back");
    }

    #[tokio::test]
    async fn all_bodies_together_have_a_limit() {
        let room = Room(Arc::new(Semaphore::new(2)));
        let mut first = room.reader(&HeaderMap::new(), Body::from(vec![1; 1500]), "the body", 9000).await.unwrap();
        assert_eq!(first.whole().await.unwrap().len(), 1500);
        assert!(matches!(read(&room, Body::from("x"), 9000).await, Err(ApiError::Overloaded)));
        drop(first);
        assert!(read(&room, Body::from("x"), 9000).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_is_given_up() {
        let stalled = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
        assert!(matches!(read(&Room::default(), stalled, 9000).await, Err(ApiError::SlowBody)));
    }
}
