//! Reading what a request holds, so that a fault comes with its place.

use std::fmt;
use std::marker::PhantomData;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, header};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::error::Category;
use tasklane_common::task::TaskId;
use url::form_urlencoded;

use crate::error::{ApiError, ERRORS_MAX, FieldError};

/// Why a text is not the JSON that was expected.
#[derive(Debug, PartialEq, Eq)]
pub enum JsonFault {
    /// It is not JSON at all.
    Syntax(String),
    /// It is JSON of another shape, here.
    Shape(FieldError),
}

impl From<JsonFault> for ApiError {
    fn from(fault: JsonFault) -> Self {
        match fault {
            JsonFault::Syntax(message) => Self::InvalidJson(message),
            JsonFault::Shape(error) => Self::InvalidTask(vec![error]),
        }
    }
}

/// Reads one JSON object, and nothing after it.
///
/// # Errors
/// [`JsonFault`] with the place of the first fault.
pub fn object<'de, T: Deserialize<'de>>(text: &'de [u8]) -> Result<T, JsonFault> {
    if text.trim_ascii().is_empty() {
        return Err(JsonFault::Syntax("it is empty".to_owned()));
    }
    // Left to itself, serde would take an array for a struct, field by field.
    if text.trim_ascii_start().first() != Some(&b'{') {
        serde_json::from_slice::<IgnoredAny>(text).map_err(|error| JsonFault::Syntax(error.to_string()))?;
        return Err(JsonFault::Shape(FieldError::new("", "must be a JSON object")));
    }
    // The place of a fault is followed only when there is one: it costs as much again as reading.
    serde_json::from_slice(text).or_else(|_| object_or_place(text))
}

fn object_or_place<'de, T: Deserialize<'de>>(text: &'de [u8]) -> Result<T, JsonFault> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let fault = error.into_inner();
        match fault.classify() {
            Category::Data => {
                JsonFault::Shape(FieldError::new(if path == "." { "" } else { &path }, without_position(&fault)))
            }
            Category::Syntax | Category::Eof | Category::Io => JsonFault::Syntax(fault.to_string()),
        }
    });
    // Text that is not JSON at all is told before text of the wrong shape.
    if let Err(JsonFault::Shape(_)) = value {
        serde_json::from_slice::<IgnoredAny>(text).map_err(|error| JsonFault::Syntax(error.to_string()))?;
    }
    let value = value?;
    deserializer.end().map_err(|error| JsonFault::Syntax(error.to_string()))?;
    Ok(value)
}

/// The message alone: the path says where.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Reads an object that is part of another, or null. Left to itself, serde would take an array for it, field by field.
pub(crate) fn part<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    struct Part<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Part<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }
    deserializer.deserialize_any(Part(PhantomData))
}

/// The media type of the body, without parameters, in lower case.
#[must_use]
pub fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Asks for a JSON body. Browsers send nothing of that type to a foreign site without asking it first.
///
/// # Errors
/// [`ApiError::MediaType`] when it is none.
pub fn expect_json(headers: &HeaderMap) -> Result<(), ApiError> {
    if media_type(headers) == "application/json" {
        return Ok(());
    }
    Err(ApiError::MediaType { expected: "application/json" })
}

/// The value of a header that must be there once at most, and be text.
///
/// # Errors
/// [`ApiError::InvalidHeader`] when it comes twice or is not ASCII.
pub fn single_header<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, ApiError> {
    let fault = |message: &str| ApiError::InvalidHeader(FieldError::new(name.as_str(), message));
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(fault("must be given once"));
    }
    value.to_str().map(Some).map_err(|_| fault("must be visible ASCII"))
}

/// The task id in a path. A text that is no id is the id of no task.
///
/// # Errors
/// [`ApiError::UnknownTask`].
pub fn task_id(text: &str) -> Result<TaskId, ApiError> {
    text.parse().map_err(|_| ApiError::UnknownTask(no_id(text, "a task's id is a UUID")))
}

/// The text in place of an id, with what would be one.
pub(crate) fn no_id(text: &str, rule: &str) -> String {
    format!("{}: {rule}", tasklane_common::task::truncate(text, 64))
}

/// What a path names, without its percent signs.
#[derive(Debug)]
pub(crate) struct Path<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let named = axum::extract::Path::from_request_parts(parts, state).await;
        named.map(|axum::extract::Path(named)| Self(named)).map_err(|_| ApiError::InvalidPath)
    }
}

/// Query parameters, each known and given once, with the faults found so far.
#[derive(Debug, Default)]
pub struct Params {
    values: Vec<(String, String)>,
    faults: Vec<FieldError>,
}

impl Params {
    /// Splits a query string. Some of the known names may come several times.
    #[must_use]
    pub fn parse(query: Option<&str>, known: &[&str], several: &[&str]) -> Self {
        let mut params = Self::default();
        for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            if !known.contains(&name.as_ref()) {
                let one_of = if known.is_empty() { "none is".to_owned() } else { known.join(", ") };
                params
                    .fault(&tasklane_common::task::truncate(&name, 64), format!("is not known here; known: {one_of}"));
            } else if !several.contains(&name.as_ref()) && params.values.iter().any(|(given, _)| *given == name) {
                params.fault(&name, "must be given once");
            } else {
                params.values.push((name.into_owned(), value.into_owned()));
            }
        }
        params
    }

    /// One parameter, read by `read`; a fault is kept for [`Params::finish`].
    pub fn read<T>(&mut self, name: &str, read: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let (_, value) = self.values.iter().find(|(given, _)| given == name)?;
        match read(value) {
            Ok(value) => Some(value),
            Err(message) => {
                self.fault(name, message);
                None
            }
        }
    }

    /// A parameter that may come several times, at most `most`.
    pub fn read_all<T>(&mut self, name: &str, most: usize, read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let values: Vec<_> =
            self.values.iter().filter(|(given, _)| given == name).map(|(_, value)| read(value)).collect();
        if values.len() > most {
            self.fault(name, format!("must be given {most} times at most"));
        }
        let mut kept = Vec::new();
        for value in values {
            match value {
                Ok(value) => kept.push(value),
                Err(message) => self.fault(name, message),
            }
        }
        kept
    }

    /// One parameter that is an integer within bounds.
    pub fn integer(&mut self, name: &str, min: u32, max: u32) -> Option<u32> {
        self.read(name, |value| match value.parse() {
            Ok(number) if (min..=max).contains(&number) => Ok(number),
            _ => Err(format!("must be an integer from {min} to {max}")),
        })
    }

    /// Tells all faults.
    ///
    /// # Errors
    /// [`ApiError::InvalidQuery`] when there are any.
    pub fn finish(self) -> Result<(), ApiError> {
        if self.faults.is_empty() { Ok(()) } else { Err(ApiError::InvalidQuery(self.faults)) }
    }

    /// Notes a fault, unless there are more already than one answer names.
    fn fault(&mut self, name: &str, message: impl AsRef<str>) {
        if self.faults.len() < ERRORS_MAX {
            self.faults.push(FieldError::new(name, message));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::value::RawValue;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        inner: Vec<Inner>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        number: i32,
    }

    fn shape(text: &str) -> (String, String) {
        match object::<Outer>(text.as_bytes()) {
            Err(JsonFault::Shape(error)) => (error.path, error.message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn faults_of_shape_have_a_path() {
        assert_eq!(shape(r#"{"inner":[{"number":1},{"number":"x"}]}"#).0, "inner[1].number");
        assert_eq!(shape(r#"{"inner":[{"amount":1}]}"#).0, "inner[0].amount");
        assert_eq!(shape("[[]]"), (String::new(), "must be a JSON object".to_owned()));
    }

    #[test]
    fn what_is_not_json_is_told_first() {
        for text in ["", "{", "nope", r#"{"inner":3} trailing"#, r#"{"inner":3,}"#] {
            assert!(matches!(object::<Outer>(text.as_bytes()), Err(JsonFault::Syntax(_))), "{text}");
        }
    }

    #[test]
    fn raw_values_survive_the_path() {
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow)]
            part: &'a RawValue,
        }
        let raw: Raw<'_> = object(br#"{"part": {"a" : [1, 2]}}"#).unwrap();
        assert_eq!(raw.part.get(), r#"{"a" : [1, 2]}"#);
    }

    #[test]
    fn query_faults_are_all_named() {
        let mut params = Params::parse(Some("limit=x&limit=2&color=red"), &["limit"], &[]);
        assert_eq!(params.integer("limit", 1, 10), None);
        let Err(ApiError::InvalidQuery(faults)) = params.finish() else { panic!("no faults") };
        let paths: Vec<_> = faults.iter().map(|fault| fault.path.as_str()).collect();
        assert_eq!(paths, ["limit", "color", "limit"]);
    }
}
