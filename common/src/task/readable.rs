//! JSON that is passed through as text, but only text that every reader can read.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// Reads all of the JSON and keeps nothing.
///
/// Passing JSON through checks its grammar only; this also refuses numbers beyond all types, halves of surrogate
/// pairs, and nesting so deep that a parser would refuse it.
///
/// # Errors
/// The parser's words.
pub fn check_readable(text: &str) -> Result<(), String> {
    serde_json::from_str::<Readable>(text).map(|_| ()).map_err(|error| format!("cannot be read: {error}"))
}

struct Readable;

impl<'de> Deserialize<'de> for Readable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Readable {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_no_reader_could_read_is_refused() {
        assert!(check_readable(r#"{"a":[1,-2.5e3,"x\n",null,true,{}]}"#).is_ok());
        for bad in [r#""\ud800""#, "1e999", &"[".repeat(100_000), &format!("{}{}", "[".repeat(200), "]".repeat(200))] {
            assert!(check_readable(bad).is_err(), "{:.20}", bad);
        }
    }

    proptest! {
        /// What passes is what the handler's parser takes.
        #[test]
        fn agrees_with_the_parser_of_handlers(text in r#"[\[\]{}":,0-9eE.\-\\u a-f]{0,40}"#) {
            prop_assert_eq!(check_readable(&text).is_ok(), serde_json::from_str::<serde_json::Value>(&text).is_ok());
        }
    }
}
