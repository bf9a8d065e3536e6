//! What programs and services answer, within bounds.

use std::collections::VecDeque;

use tasklane_common::task::{Json, check_readable};

/// Output that may become a result: kept whole, up to what a result may have.
#[derive(Debug)]
pub(super) struct Whole {
    bytes: Vec<u8>,
    max: usize,
}

/// The end of an endless output.
#[derive(Debug)]
pub(super) struct Tail {
    bytes: VecDeque<u8>,
    max: usize,
}

/// There is more output than a result may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooMuch {
    max: usize,
}

impl Whole {
    pub(super) fn new(max: usize) -> Self {
        Self { bytes: Vec::new(), max }
    }

    pub(super) fn push(&mut self, chunk: &[u8]) -> Result<(), TooMuch> {
        if self.bytes.len() + chunk.len() > self.max {
            return Err(TooMuch { max: self.max });
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    /// JSON if it is JSON that every reader can read, nothing if it is blank, and else the text as a string: what one reader
    /// chokes on would spoil every page with it.
    pub(super) fn into_result(self) -> Result<Json, serde_json::Error> {
        let text = String::from_utf8(self.bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        match text.trim() {
            "" => Ok(Json::null()),
            trimmed if check_readable(trimmed).is_ok() => Json::parse(trimmed.to_owned()),
            _ => Json::of(&text),
        }
    }
}

impl Tail {
    pub(super) fn new(max: usize) -> Self {
        Self { bytes: VecDeque::new(), max }
    }

    pub(super) fn push(&mut self, chunk: &[u8]) {
        let chunk = &chunk[chunk.len().saturating_sub(self.max)..];
        let excess = (self.bytes.len() + chunk.len()).saturating_sub(self.max);
        self.bytes.drain(..excess);
        self.bytes.extend(chunk);
    }

    /// The end as text, without the rest of a character that was cut.
    pub(super) fn text(&mut self) -> String {
        let bytes = self.bytes.make_contiguous();
        let cut = bytes.iter().take(3).take_while(|&&byte| byte & 0b1100_0000 == 0b1000_0000).count();
        String::from_utf8_lossy(&bytes[cut..]).trim().to_owned()
    }
}

impl std::fmt::Display for TooMuch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "answered more than the {} bytes that a result may have: store it elsewhere and answer its address",
            self.max
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(output: &[u8]) -> String {
        let mut whole = Whole::new(100);
        whole.push(output).unwrap();
        whole.into_result().unwrap().as_str().to_owned()
    }

    #[test]
    fn a_result_is_json_or_a_string_or_null() {
        assert_eq!(result(b" {\"a\": 1}\n"), "{\"a\": 1}");
        assert_eq!(result(b"plain\n"), "\"plain\\n\"");
        assert_eq!(result(b"1 2"), "\"1 2\"");
        assert_eq!(result(b""), "null");
        assert_eq!(result(b"\n"), "null");
        assert_eq!(result(b"\xff"), "\"\u{fffd}\"");
    }

    #[test]
    fn json_that_not_every_reader_can_read_is_a_string() {
        assert_eq!(result(b"1e999"), "\"1e999\"");
        assert_eq!(result(br#"{"a": "\ud800"}"#), r#""{\"a\": \"\\ud800\"}""#);
        let mut whole = Whole::new(1_000_000);
        whole.push("[".repeat(500_000).as_bytes()).unwrap();
        whole.push("]".repeat(500_000).as_bytes()).unwrap();
        let deep = whole.into_result().unwrap();
        assert!(deep.as_str().starts_with("\"[[["), "{:.9}", deep.as_str());
        assert!(check_readable(deep.as_str()).is_ok());
    }

    #[test]
    fn a_result_has_a_bound() {
        let mut whole = Whole::new(8);
        assert_eq!(whole.push(b"12345678"), Ok(()));
        let error = whole.push(b"9").unwrap_err();
        assert_eq!(error, TooMuch { max: 8 });
        assert!(error.to_string().starts_with("answered more than the 8 bytes that a result may have"));
    }

    #[test]
    fn a_tail_keeps_the_end() {
        let mut tail = Tail::new(6);
        for chunk in ["one ", "two", " three"] {
            tail.push(chunk.as_bytes());
        }
        assert_eq!(tail.text(), "three");
        tail.push("xüüü".as_bytes());
        assert_eq!(tail.text(), "üüü");
        tail.push("€€€x".as_bytes());
        assert_eq!(tail.text(), "€x", "the rest of a cut character is left out");
        tail.push(b"far longer than the tail is");
        assert_eq!(tail.text(), "ail is");
    }
}
