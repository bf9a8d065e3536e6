//! What all answers under way hold in memory has a bound: a client that reads slowly, or not at all, keeps its answer here.

use std::sync::Arc;

use axum::body::HttpBody;
use axum::response::Response;
use tokio::sync::Semaphore;

use super::body::holding;

/// What all answers under way may hold together.
const TOGETHER_KIB_MAX: u32 = 128 * 1024;
/// Smaller answers are not counted: the number of connections bounds them.
const COUNTED_BYTES_MIN: u64 = 64 * 1024;

/// The room for answers in this process's memory; clones share it.
#[derive(Debug, Clone)]
pub struct Answers {
    room: Arc<Semaphore>,
    most_kib: u32,
}

impl Default for Answers {
    fn default() -> Self {
        Self::new(TOGETHER_KIB_MAX)
    }
}

impl Answers {
    fn new(most_kib: u32) -> Self {
        Self { room: Arc::new(Semaphore::new(most_kib as usize)), most_kib }
    }

    /// Counts an answer until it is sent; `None` when there is no room for it now. One that is larger than all the room goes alone.
    #[must_use]
    pub fn hold(&self, answer: Response) -> Option<Response> {
        let Some(bytes) = answer.body().size_hint().exact().filter(|bytes| *bytes >= COUNTED_BYTES_MIN) else {
            return Some(answer);
        };
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX).min(self.most_kib);
        let held = Arc::clone(&self.room).try_acquire_many_owned(kib).ok()?;
        Some(answer.map(|body| holding(body, held)))
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[tokio::test]
    async fn what_has_no_room_is_refused_until_another_answer_is_gone() {
        let answers = Answers::new(300);
        let of = |kib: usize| answers.hold(Response::new(Body::from(vec![1; kib * 1024])));
        let first = of(200).unwrap();
        assert!(of(200).is_none());
        assert!(of(63).is_some(), "small ones are not counted");
        assert_eq!(axum::body::to_bytes(first.into_body(), usize::MAX).await.unwrap().len(), 200 * 1024);
        let alone = of(5000).unwrap();
        assert_eq!(alone.body().size_hint().exact(), Some(5000 * 1024));
        assert!(of(100).is_none());
        drop(alone);
        assert!(of(100).is_some());
    }
}
