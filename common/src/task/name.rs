//! Names of kinds and queues, checked once.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{KIND_BYTES_MAX, QUEUE_BYTES_MAX};

/// Why a name was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The name has no characters.
    #[error("must not be empty")]
    Empty,
    /// The name is over its limit.
    #[error("must be at most {max} bytes long, but has {actual}")]
    TooLong {
        /// The limit in bytes.
        max: usize,
        /// The name's length in bytes.
        actual: usize,
    },
    /// The name holds a character that its grammar lacks.
    #[error("must match {grammar}")]
    Grammar {
        /// The grammar as a regular expression.
        grammar: &'static str,
    },
}

/// Names the work: a stable string that the submitter and the handler agree on, such as `report.build`.
///
/// Dot-separated words of `A-Z a-z 0-9 _ -`, at most 128 bytes: it is part of a routing key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, max_length = 128, pattern = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", examples("report.build"))]
pub struct Kind(Arc<str>);

/// Names a queue, such as `default`: at most 64 bytes of `a-z 0-9 _ -`.
///
/// It has no dots, since `<queue>.#` must match the routing keys of one queue only.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, max_length = 64, pattern = r"^[a-z0-9_-]+$", examples("default"))]
pub struct QueueName(Arc<str>);

impl Kind {
    /// Checks a name against the grammar of kinds.
    ///
    /// # Errors
    /// [`NameError`] says which rule the name breaks.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        check_length(name, KIND_BYTES_MAX)?;
        let word = |word: &str| {
            !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
        };
        if !name.split('.').all(word) {
            return Err(NameError::Grammar { grammar: r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*" });
        }
        Ok(Self(name.into()))
    }
}

impl QueueName {
    /// Checks a name against the grammar of queue names.
    ///
    /// # Errors
    /// [`NameError`] says which rule the name breaks.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        check_length(name, QUEUE_BYTES_MAX)?;
        if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-')) {
            return Err(NameError::Grammar { grammar: "[a-z0-9_-]+" });
        }
        Ok(Self(name.into()))
    }
}

impl Default for QueueName {
    fn default() -> Self {
        Self("default".into())
    }
}

fn check_length(name: &str, max: usize) -> Result<(), NameError> {
    match name.len() {
        0 => Err(NameError::Empty),
        actual if actual > max => Err(NameError::TooLong { max, actual }),
        _ => Ok(()),
    }
}

/// What every checked name gives: its text, its display, its conversions and its parser.
macro_rules! name_conversions {
    ($($name:ident),*) => {$(
        impl $name {
            /// The name's text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(name: String) -> Result<Self, NameError> {
                Self::parse(&name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::parse(name)
            }
        }
    )*};
}

name_conversions!(Kind, QueueName);
