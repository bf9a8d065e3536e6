//! Makes a request repeatable: the client's key, and a fingerprint that tells a repetition from a reuse.

use std::collections::BTreeMap;

use axum::http::{HeaderMap, HeaderName};
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tasklane_common::ledger::Idempotency;
use tasklane_common::task::{Json, Priority, TaskId};

use crate::error::{ApiError, FieldError};
use crate::request::SubmitTask;
use crate::{canonical, extract};

/// The request header with the client's key.
pub const KEY_HEADER: HeaderName = HeaderName::from_static("idempotency-key");
/// The response header that says that nothing new was recorded.
pub const REPLAYED_HEADER: HeaderName = HeaderName::from_static("idempotent-replayed");
/// The longest key.
pub const KEY_BYTES_MAX: usize = 255;

/// The key of a request, if it has one.
///
/// # Errors
/// [`ApiError::InvalidHeader`] when it is given twice, empty, too long, or not of visible ASCII.
pub fn key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(key) = extract::single_header(headers, &KEY_HEADER)? else { return Ok(None) };
    if key.is_empty() || key.len() > KEY_BYTES_MAX || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        let rule = format!("must be 1 to {KEY_BYTES_MAX} characters of visible ASCII");
        return Err(ApiError::InvalidHeader(FieldError::new(KEY_HEADER.as_str(), rule)));
    }
    Ok(Some(key.to_owned()))
}

/// SHA-256 over what a request asks for, the same for all ways to write the same JSON.
///
/// It covers what the client said and not what defaults made of it, so that a repetition is recognised after the
/// producer's settings changed. Nothing that makes another task may be missing: a request is taken apart without `..`,
/// so that a new field is not forgotten. What is not given adds nothing, so that requests without it keep the fingerprint
/// that an earlier release gave them.
#[derive(Debug, Clone)]
pub struct Fingerprint(Sha256);

impl Fingerprint {
    /// Of one task.
    #[must_use]
    pub fn of_task(task: &SubmitTask) -> Self {
        let mut fingerprint = Self(Sha256::new_with_prefix(b"tasklane task 1"));
        fingerprint.add(task);
        fingerprint
    }

    /// Of a retry with other args.
    #[must_use]
    pub fn of_retry(id: TaskId, args: &Json) -> Self {
        let mut fingerprint = Self(Sha256::new_with_prefix(b"tasklane retry 1"));
        fingerprint.text(&id.to_string());
        fingerprint.json(args.as_str());
        fingerprint
    }

    /// Of a batch, whose tasks follow by [`Fingerprint::add`]; JSON and NDJSON give the same.
    #[must_use]
    pub fn of_batch() -> Self {
        Self(Sha256::new_with_prefix(b"tasklane batch 1"))
    }

    /// Adds one task.
    pub fn add(&mut self, task: &SubmitTask) {
        let SubmitTask {
            kind,
            args,
            queue,
            max_attempts,
            timeout_ms,
            result_ttl_ms,
            delay_ms,
            run_at,
            priority,
            tags,
            concurrency_key,
            unique_key,
            unique_for_ms,
            on_conflict,
        } = task;
        self.text(kind.as_deref().unwrap_or_default());
        self.text(queue.as_deref().unwrap_or_default());
        for number in [max_attempts, timeout_ms, delay_ms] {
            self.text(&number.map(|number| number.to_string()).unwrap_or_default());
        }
        let time = run_at
            .as_ref()
            .map(|text| text.parse::<Timestamp>().map_or_else(|_| text.clone(), |time| time.to_string()));
        self.text(&time.unwrap_or_default());
        self.text(&tags.as_ref().map(BTreeMap::len).unwrap_or_default().to_string());
        for (key, value) in tags.iter().flatten() {
            self.text(key);
            self.text(value);
        }
        if let Some(key) = unique_key {
            let window = unique_for_ms.map(|ms| ms.to_string()).unwrap_or_default();
            for text in ["unique", key, &window, on_conflict.as_deref().unwrap_or_default()] {
                self.text(text);
            }
        }
        // What every task has is as good as left out.
        let priority = priority.as_deref().filter(|name| Priority::from_name(name) != Some(Priority::default()));
        self.optional("result_ttl", result_ttl_ms.map(|ms| ms.to_string()).as_deref());
        self.optional("priority", priority);
        self.optional("concurrency_key", concurrency_key.as_deref());
        match args {
            None => self.text(""),
            Some(raw) => self.json(raw.get()),
        }
    }

    /// Adds what follows the batch's tasks: only where there is such a thing, so that other batches keep their fingerprints.
    pub fn add_then(&mut self, then: &SubmitTask) {
        // No kind has a colon.
        self.text("then:");
        self.add(then);
    }

    /// The digest, together with the key.
    #[must_use]
    pub fn under(self, key: String) -> Idempotency {
        Idempotency { key, fingerprint: self.0.finalize().into() }
    }

    /// With its length, so that no two sequences of texts are the same bytes.
    fn text(&mut self, text: &str) {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
    }

    /// A field under its name, if it was given. The name is no form in which args begin.
    fn optional(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.text(name);
            self.text(value);
        }
    }

    /// In canonical form: clients in some languages write keys in another order each time.
    fn json(&mut self, json: &str) {
        let mut canonical = self.clone();
        if canonical::pieces(json, &mut |piece| canonical.text(piece)) {
            *self = canonical;
        } else {
            // Validation refuses such args; the fingerprint need only be one.
            self.text(json);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(text: &str) -> [u8; 32] {
        let task = extract::object::<SubmitTask>(text.as_bytes()).unwrap();
        Fingerprint::of_task(&task).under(String::new()).fingerprint
    }

    #[test]
    fn another_way_to_write_the_same_is_the_same() {
        let one = r#"{"kind":"a","args":{"x":1,"y":[1,{"b":"ü","a":null}]},"tags":{"k":"v"}}"#;
        let other = r#" { "tags":{"k":"v"}, "args" : {"y":[1,{"a":null,"b":"\u00fc"}], "x": 1}, "kind":"a" } "#;
        assert_eq!(digest(one), digest(other));
    }

    #[test]
    fn every_field_counts() {
        let all = [
            r#"{"kind":"a"}"#,
            r#"{"kind":"b"}"#,
            r#"{"kind":"a","args":null}"#,
            r#"{"kind":"a","args":""}"#,
            r#"{"kind":"a","args":{}}"#,
            r#"{"kind":"a","args":[]}"#,
            r#"{"kind":"a","args":"null"}"#,
            r#"{"kind":"a","queue":"q"}"#,
            r#"{"kind":"a","max_attempts":2}"#,
            r#"{"kind":"a","timeout_ms":2}"#,
            r#"{"kind":"a","delay_ms":2}"#,
            r#"{"kind":"a","result_ttl_ms":2}"#,
            r#"{"kind":"a","result_ttl_ms":3}"#,
            r#"{"kind":"a","run_at":"2100-01-01T00:00:00Z"}"#,
            r#"{"kind":"a","tags":{"k":"v"}}"#,
            r#"{"kind":"a","tags":{"k":"w"}}"#,
        ];
        let digests: std::collections::BTreeSet<_> = all.iter().map(|text| digest(text)).collect();
        assert_eq!(digests.len(), all.len());
    }

    #[test]
    fn keys_are_visible_ascii() {
        let read = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(KEY_HEADER, axum::http::HeaderValue::from_bytes(value).unwrap());
            key(&headers)
        };
        assert_eq!(read(b"order-7").unwrap().as_deref(), Some("order-7"));
        for bad in [&b""[..], b"a b", "ü".as_bytes(), &[b'x'; 256]] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// Moving a border between neighbouring fields changes the fingerprint.
        #[test]
        fn borders_count(text in "[a-z]{2,12}", cut in 1usize..11) {
            let cut = cut.min(text.len() - 1);
            let moved = format!(r#"{{"kind":"a","tags":{{"{}":"{}"}}}}"#, &text[..cut], &text[cut..]);
            let whole = format!(r#"{{"kind":"a","tags":{{"{text}":""}}}}"#);
            prop_assert_ne!(digest(&moved), digest(&whole));
        }
    }
}
