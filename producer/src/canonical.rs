//! JSON in its canonical form: two texts have the same one if they differ in white space, in escapes or in the order of
//! keys, and in nothing else. Numbers stay as written, since `1.0`, `1` and `1e0` are not the same to every reader, and a key
//! that comes twice comes twice.

use std::borrow::Cow;

/// Deeper nesting is refused before anybody asks for the canonical form.
const DEPTH_MAX: usize = 128;

/// Gives the pieces of the canonical form to `write`, in an order that tells every value from every other.
///
/// Returns `false`, and the pieces are of no use, when the text is not JSON or is nested too deeply.
#[must_use]
pub(crate) fn pieces(json: &str, write: &mut impl FnMut(&str)) -> bool {
    let mut scanner = Scanner { text: json, at: 0 };
    let Some(value) = scanner.value(DEPTH_MAX) else { return false };
    scanner.skip_space();
    value.pieces(write);
    scanner.at == json.len()
}

/// A value, with its number uninterpreted.
enum Value<'t> {
    /// A number, `true`, `false` or `null`.
    Plain(&'t str),
    String(Cow<'t, str>),
    Array(Vec<Self>),
    Object(Vec<(Cow<'t, str>, Self)>),
}

impl Value<'_> {
    fn pieces(self, write: &mut impl FnMut(&str)) {
        match self {
            Self::Plain(text) => write(text),
            Self::String(text) => write(&format!("\"{text}")),
            Self::Array(items) => {
                write(&format!("[{}", items.len()));
                items.into_iter().for_each(|item| item.pieces(write));
            }
            Self::Object(mut entries) => {
                write(&format!("{{{}", entries.len()));
                // Stable: of entries with the same key the order counts, since readers differ in which one they take.
                entries.sort_by(|(one, _), (other, _)| one.cmp(other));
                for (key, item) in entries {
                    write(&key);
                    item.pieces(write);
                }
            }
        }
    }
}

struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scanner<'t> {
    fn value(&mut self, depth: usize) -> Option<Value<'t>> {
        self.skip_space();
        match self.peek()? {
            b'"' => self.string().map(Value::String),
            b'[' => {
                let depth = depth.checked_sub(1)?;
                self.items(b']', |scanner| scanner.value(depth)).map(Value::Array)
            }
            b'{' => {
                let depth = depth.checked_sub(1)?;
                self.items(b'}', |scanner| scanner.entry(depth)).map(Value::Object)
            }
            _ => self.plain().map(Value::Plain),
        }
    }

    /// What stands between brackets, with commas between.
    fn items<T>(&mut self, end: u8, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.at += 1;
        let mut items = Vec::new();
        self.skip_space();
        if self.peek()? == end {
            self.at += 1;
            return Some(items);
        }
        loop {
            items.push(item(self)?);
            self.skip_space();
            let next = self.peek()?;
            self.at += 1;
            match next {
                b',' => {}
                next if next == end => return Some(items),
                _ => return None,
            }
        }
    }

    fn entry(&mut self, depth: usize) -> Option<(Cow<'t, str>, Value<'t>)> {
        self.skip_space();
        let key = self.string()?;
        self.skip_space();
        if self.peek()? != b':' {
            return None;
        }
        self.at += 1;
        Some((key, self.value(depth)?))
    }

    fn string(&mut self) -> Option<Cow<'t, str>> {
        let begin = self.at;
        if self.peek()? != b'"' {
            return None;
        }
        self.at += 1;
        let mut escapes = false;
        loop {
            match self.peek()? {
                b'"' => break,
                b'\\' => {
                    escapes = true;
                    self.at += 2;
                }
                _ => self.at += 1,
            }
        }
        self.at += 1;
        let quoted = self.text.get(begin..self.at)?;
        match escapes {
            true => serde_json::from_str(quoted).ok().map(Cow::Owned),
            false => Some(Cow::Borrowed(&quoted[1..quoted.len() - 1])),
        }
    }

    fn plain(&mut self) -> Option<&'t str> {
        let rest = self.text.get(self.at..)?;
        let end = rest.bytes().position(|byte| !(byte.is_ascii_alphanumeric() || b"+-.".contains(&byte)));
        let text = &rest[..end.unwrap_or(rest.len())];
        self.at += text.len();
        Some(text).filter(|text| !text.is_empty())
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(|byte| b" \t\n\r".contains(&byte)) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(json: &str) -> Option<Vec<String>> {
        let mut all = Vec::new();
        pieces(json, &mut |piece: &str| all.push(piece.to_owned())).then_some(all)
    }

    #[test]
    fn writing_it_otherwise_changes_nothing() {
        let one = of(r#"{"x":1,"y":[1,{"b":"ü","a":null}],"z":{}}"#);
        assert!(one.is_some());
        assert_eq!(one, of(" {\"z\" : { } , \"y\":[ 1 ,{\"a\":null,\"b\":\"\\u00fc\"}],\n\"x\":\t1}\r\n"));
    }

    #[test]
    fn numbers_and_repeated_keys_count_as_they_were_written() {
        let all = [
            "1",
            "1.0",
            "1e0",
            "1E0",
            "10e-1",
            "-0",
            "0",
            "-0.0",
            "1e400",
            "1e401",
            "123456789012345678901234567890",
            "123456789012345678901234567891",
            "9007199254740993",
            "9007199254740992",
            r#""1""#,
            "true",
            r#""true""#,
            "null",
            "[]",
            "{}",
            "[1]",
            "[[1]]",
            "[[],1]",
            "[[1],[]]",
            r#"{"a":1}"#,
            r#"{"a":1,"a":2}"#,
            r#"{"a":2,"a":1}"#,
            r#"{"a":2}"#,
            r#"{"a":1,"a":1}"#,
            r#"["a",1]"#,
            r#""[1""#,
            r#""{1""#,
        ];
        for (index, one) in all.iter().enumerate() {
            for other in &all[index + 1..] {
                assert_ne!(of(one).unwrap(), of(other).unwrap(), "{one} and {other}");
            }
        }
        assert_eq!(of(r#"{"b":1,"a":1,"a":2}"#), of(r#"{"a":1,"b":1,"a":2}"#), "the order among equal keys is kept");
    }

    #[test]
    fn what_is_too_deep_is_refused() {
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(of(&deep(DEPTH_MAX)).is_some());
        assert!(of(&deep(DEPTH_MAX + 1)).is_none() && of(&deep(1_000_000)).is_none());
    }

    proptest! {
        /// No text makes the scanner panic, and all JSON has a canonical form.
        #[test]
        fn all_json_has_a_canonical_form(text in r#"[\[\]{}":,0-9eE.\-\\u a-f]{0,40}"#) {
            let pieces = of(&text);
            prop_assert!(pieces.is_some() || serde_json::from_str::<serde_json::Value>(&text).is_err(), "{}", text);
        }

        /// Whatever the order of the keys and the spaces between.
        #[test]
        fn order_and_spaces_do_not_count(entries in proptest::collection::btree_map("[a-c\"\\\\ü]{0,3}", 0..9u8, 0..6)) {
            let write = |entries: &mut dyn Iterator<Item = (&String, &u8)>, space: &str| {
                let quoted = |key| serde_json::to_string(key).unwrap();
                let all: Vec<_> = entries.map(|(key, value)| format!("{}{space}:{value}{space}", quoted(key))).collect();
                format!("{space}{{{space}{}}}", all.join(","))
            };
            let one = of(&write(&mut entries.iter(), ""));
            prop_assert!(one.is_some());
            prop_assert_eq!(one, of(&write(&mut entries.iter().rev(), " \n")));
        }
    }
}
