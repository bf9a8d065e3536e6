//! The query of a list: filters, limit and cursor.

use tasklane_common::task::{KIND_BYTES_MAX, QUEUE_BYTES_MAX};
use tasklane_producer::error::{ApiError, ERRORS_MAX};
use tasklane_producer::listing::{self, LIMIT_MAX};

/// The longest answer to a query that does not fit, as text.
const FAULTS_BYTES_MAX: usize = 64 * 1024;

/// Reads a query. What is accepted keeps the limits, and its cursor leads back to where it came from; what is refused
/// is refused in few words.
pub fn cursor(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match listing::query(Some(text)) {
        Ok(query) => {
            assert!((1..=LIMIT_MAX).contains(&query.limit), "{query:?}");
            assert!(query.kind.is_none_or(|kind| kind.as_str().len() <= KIND_BYTES_MAX));
            assert!(query.queue.is_none_or(|queue| queue.as_str().len() <= QUEUE_BYTES_MAX));
            assert!(query.tags.iter().all(|(key, _)| !key.is_empty() && !key.contains(':')));
            if let Some(before) = query.before {
                let again = listing::query(Some(&format!("cursor={}", listing::cursor(before))));
                assert_eq!(again.ok().and_then(|query| query.before), Some(before));
            }
        }
        Err(ApiError::InvalidQuery(faults)) => {
            assert!((1..=ERRORS_MAX).contains(&faults.len()), "{} faults", faults.len());
            let bytes: usize = faults.iter().map(|fault| fault.path.len() + fault.message.len()).sum();
            assert!(bytes <= FAULTS_BYTES_MAX, "{bytes} bytes of faults");
        }
        Err(error) => assert!(error.codes().0.is_client_error(), "the client is at fault, not we: {error:?}"),
    }
}

/// A request's path and query have 64 KiB at most.
pub(super) fn large() -> Vec<Vec<u8>> {
    let parts = ["a&", "kind=&", "limit=9&", "tag=%00:%ff&", "%"];
    let long = "x".repeat(65_000);
    parts
        .map(|part| part.repeat(65_000 / part.len()))
        .into_iter()
        .chain(["kind=", "tag=k:", "cursor=1", "limit=", ""].map(|name| format!("{name}{long}")))
        .map(String::into_bytes)
        .collect()
}
