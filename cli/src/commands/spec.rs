//! A task as the API takes it, from the command line.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::cli::TaskSpec;
use crate::failure::Failure;
use crate::input::{self, Pair};

/// What a submission and a schedule's task share. What is not given is left out, for the producer to decide.
#[derive(Debug, Serialize)]
pub(super) struct Spec<'s> {
    kind: &'s str,
    args: Box<RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<&'s str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result_ttl_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<&'s str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrency_key: Option<&'s str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tags: BTreeMap<&'s str, &'s str>,
}

/// Reads its args, and puts it together.
///
/// # Errors
/// When its args cannot be read, or a tag comes twice.
pub(super) fn spec(task: &TaskSpec) -> Result<Spec<'_>, Failure> {
    Ok(Spec {
        kind: &task.kind,
        args: match &task.args {
            Some(given) => input::args(given)?,
            None => input::object(&task.pairs)?,
        },
        queue: task.queue.as_deref(),
        max_attempts: task.max_attempts,
        timeout_ms: task.timeout.map(millis),
        result_ttl_ms: task.result_ttl.map(millis),
        priority: task.priority.as_deref(),
        concurrency_key: task.concurrency_key.as_deref(),
        tags: tags(&task.tags)?,
    })
}

fn tags(pairs: &[Pair]) -> Result<BTreeMap<&str, &str>, Failure> {
    let mut tags = BTreeMap::new();
    for Pair { key, value } in pairs {
        if tags.insert(key.as_str(), value.as_str()).is_some() {
            return Err(Failure::usage(format!("the tag {key} is given twice")));
        }
    }
    Ok(tags)
}

/// A duration as the API has it.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
