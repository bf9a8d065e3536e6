//! Many submissions in one body: all or nothing, and every bad one named. Pure.

use std::collections::HashSet;
use std::fmt;
use std::ops::ControlFlow;

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;
use tasklane_common::task::{NewTask, OnConflict};
use tasklane_common::template::TaskTemplate;

use crate::args::ARGS_BYTES_MAX;
use crate::error::{ApiError, ERRORS_MAX, FieldError};
use crate::extract::{self, JsonFault};
use crate::grouping;
use crate::idempotency::Fingerprint;
use crate::request::{Circumstances, Rules, SubmitTask};

/// The most tasks in one batch.
pub const TASKS_MAX: usize = 10_000;
/// The longest line of NDJSON, and the longest task of a document: the largest args and room for the other fields.
pub const LINE_BYTES_MAX: usize = ARGS_BYTES_MAX + 128 * 1024;

/// The tasks of a batch, and its faults, as they come in.
#[derive(Debug)]
pub struct Batch {
    rules: Rules,
    now: Timestamp,
    traceparent: Option<String>,
    fingerprint: Option<Fingerprint>,
    then: Option<TaskTemplate>,
    tasks: Vec<NewTask>,
    unique_keys: HashSet<String>,
    faults: Vec<FieldError>,
    seen: usize,
}

/// What is left of a faultless batch.
#[derive(Debug)]
pub struct Collected {
    /// The tasks, in the batch's order.
    pub tasks: Vec<NewTask>,
    /// What follows when all of them have ended.
    pub then: Option<TaskTemplate>,
    /// What tells a repetition from a reuse, of a repeatable batch.
    pub fingerprint: Option<Fingerprint>,
}

impl Batch {
    /// An empty one; `repeatable` when the request has an idempotency key.
    #[must_use]
    pub fn new(rules: &Rules, circumstances: Circumstances<'_>, repeatable: bool) -> Self {
        Self {
            rules: rules.clone(),
            now: circumstances.now,
            traceparent: circumstances.traceparent.map(str::to_owned),
            fingerprint: repeatable.then(Fingerprint::of_batch),
            then: None,
            tasks: Vec::new(),
            unique_keys: HashSet::new(),
            faults: Vec::new(),
            seen: 0,
        }
    }

    /// Takes a whole `{"tasks": […], "then": …}`.
    ///
    /// # Errors
    /// When it is not that; what is wrong with single tasks is told by [`Batch::finish`].
    pub fn add_document(&mut self, text: &[u8]) -> Result<(), ApiError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Document<'d> {
            #[serde(borrow)]
            tasks: Items<'d>,
            #[serde(borrow)]
            then: Option<&'d RawValue>,
        }
        let Document { tasks: Items { first, count }, then } = extract::object(text)?;
        if count > TASKS_MAX {
            self.faults.push(FieldError::new("tasks", format!("must be at most {TASKS_MAX}, but are {count}")));
            return Ok(());
        }
        if let Some(then) = then {
            self.read_then(then.get().as_bytes());
        }
        for (index, item) in first.into_iter().enumerate() {
            if item.get().len() > LINE_BYTES_MAX {
                self.refuse_long(format!("tasks[{index}]"));
                continue;
            }
            self.add(item.get().as_bytes(), |path| join(&format!("tasks[{index}]"), ".", path));
        }
        Ok(())
    }

    /// Reads what follows, before any of the tasks.
    fn read_then(&mut self, text: &[u8]) {
        if text.len() > LINE_BYTES_MAX {
            return self.refuse_long("then");
        }
        match extract::object(text) {
            Ok(asked) => self.add_then(asked),
            Err(fault) => {
                let faults = faults_of(fault).into_iter();
                self.faults.extend(faults.map(|fault| FieldError { path: join("then", ".", &fault.path), ..fault }));
            }
        }
    }

    /// Takes what follows.
    fn add_then(&mut self, asked: SubmitTask) {
        if let Some(fingerprint) = &mut self.fingerprint {
            fingerprint.add_then(&asked);
        }
        self.then = grouping::then(asked, &self.rules, &mut self.faults);
    }

    /// Takes one line of NDJSON.
    fn add_line(&mut self, number: usize, text: &[u8]) {
        if self.seen == TASKS_MAX {
            self.faults.push(FieldError::new(format!("line {number}"), format!("is one more than {TASKS_MAX} tasks")));
            return;
        }
        self.add(text, |path| join(&format!("line {number}"), ": ", path));
    }

    /// Notes that a line, or a task of a document, has no end within the limit.
    fn refuse_long(&mut self, place: impl AsRef<str>) {
        self.faults.push(FieldError::new(place, format!("is longer than {LINE_BYTES_MAX} bytes")));
    }

    /// Whether reading on would change nothing.
    fn is_decided(&self) -> bool {
        self.faults.len() >= ERRORS_MAX || (self.seen == TASKS_MAX && !self.faults.is_empty())
    }

    /// All tasks.
    ///
    /// # Errors
    /// [`ApiError::InvalidTask`] when any is bad, or there is none.
    pub fn finish(mut self) -> Result<Collected, ApiError> {
        if self.seen == 0 && self.faults.is_empty() {
            self.faults.push(FieldError::new("tasks", "must be at least one"));
        }
        if self.faults.is_empty() {
            return Ok(Collected { tasks: self.tasks, then: self.then, fingerprint: self.fingerprint });
        }
        self.faults.truncate(ERRORS_MAX);
        Err(ApiError::InvalidTask(self.faults))
    }

    fn add(&mut self, text: &[u8], place: impl Fn(&str) -> String) {
        self.seen += 1;
        if self.faults.len() >= ERRORS_MAX {
            return;
        }
        let circumstances = Circumstances { now: self.now, traceparent: self.traceparent.as_deref() };
        let checked = extract::object::<SubmitTask>(text).map_err(faults_of).and_then(|task| {
            if let Some(fingerprint) = &mut self.fingerprint {
                fingerprint.add(&task);
            }
            let task = task.validate(&self.rules, circumstances)?;
            check_unique(&task, self.fingerprint.is_some(), self.then.is_some(), &mut self.unique_keys)?;
            Ok(task)
        });
        match checked {
            Ok(task) if self.faults.is_empty() => self.tasks.push(task),
            // Nothing will be recorded any more: only faults are of interest.
            Ok(_) => self.tasks = Vec::new(),
            Err(faults) => {
                self.faults.extend(faults.into_iter().map(|fault| FieldError { path: place(&fault.path), ..fault }));
            }
        }
    }
}

/// What makes a unique key ambiguous within a batch.
fn check_unique(
    task: &NewTask,
    repeatable: bool,
    grouped: bool,
    keys: &mut HashSet<String>,
) -> Result<(), Vec<FieldError>> {
    let Some(unique) = &task.unique else { return Ok(()) };
    // Which tasks the first request recorded is known by their keys: those that were left out have none.
    if repeatable && unique.on_conflict == OnConflict::ReturnExisting {
        let rule = "must not be return_existing in a batch with an Idempotency-Key";
        return Err(vec![FieldError::new("on_conflict", rule)]);
    }
    // The other task may have ended long ago, or be part of another group.
    if grouped && unique.on_conflict == OnConflict::ReturnExisting {
        let rule = "must not be return_existing in a batch with then: a group is made of new tasks";
        return Err(vec![FieldError::new("on_conflict", rule)]);
    }
    if keys.insert(unique.key.clone()) {
        Ok(())
    } else {
        Err(vec![FieldError::new("unique_key", "must not be that of another task of the batch")])
    }
}

fn faults_of(fault: JsonFault) -> Vec<FieldError> {
    match fault {
        // The parser knows this line alone; which one it is of the body is said by the path.
        JsonFault::Syntax(message) => {
            let message = message.replace(" at line 1 column ", " at column ");
            vec![FieldError::new("", format!("is not JSON: {message}"))]
        }
        JsonFault::Shape(error) => vec![error],
    }
}

fn join(place: &str, separator: &str, path: &str) -> String {
    if path.is_empty() { place.to_owned() } else { format!("{place}{separator}{path}") }
}

/// The items of a list: as many as may be, uncopied, and how many there were.
struct Items<'d> {
    first: Vec<&'d RawValue>,
    count: usize,
}

impl<'de: 'd, 'd> Deserialize<'de> for Items<'d> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Take;
        impl<'de> Visitor<'de> for Take {
            type Value = Items<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of tasks")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut first = Vec::new();
                while first.len() < TASKS_MAX {
                    match list.next_element()? {
                        Some(item) => first.push(item),
                        None => return Ok(Items { count: first.len(), first }),
                    }
                }
                let mut count = first.len();
                while list.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Items { first, count })
            }
        }
        deserializer.deserialize_seq(Take)
    }
}

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    begun: Vec<u8>,
    number: usize,
}

impl Lines {
    /// Takes the next part of the stream, and gives every line that ends in it to `batch`. Breaks when reading on
    /// would change nothing.
    pub fn feed(&mut self, part: &[u8], batch: &mut Batch) -> ControlFlow<()> {
        let mut rest = part;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(end);
            rest = &after[1..];
            if self.begun.is_empty() {
                self.give(line, batch);
            } else {
                let mut whole = std::mem::take(&mut self.begun);
                whole.extend_from_slice(line);
                self.give(&whole, batch);
            }
            if batch.is_decided() {
                return ControlFlow::Break(());
            }
        }
        self.begun.extend_from_slice(rest);
        if self.begun.len() > LINE_BYTES_MAX {
            batch.refuse_long(format!("line {}", self.number + 1));
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// Gives the last line, which need not end.
    pub fn finish(mut self, batch: &mut Batch) {
        let last = std::mem::take(&mut self.begun);
        self.give(&last, batch);
    }

    /// Empty lines are passed over, but counted.
    fn give(&mut self, line: &[u8], batch: &mut Batch) {
        self.number += 1;
        // Of the whole line, spaces and all: the answer must not hang on where the network cut the stream.
        if line.len() > LINE_BYTES_MAX {
            return batch.refuse_long(format!("line {}", self.number));
        }
        // Given with its spaces: some that end here are none to JSON, and would be refused in a body of one task.
        if !line.trim_ascii().is_empty() {
            batch.add_line(self.number, line);
        }
    }
}

#[cfg(test)]
mod tests;
