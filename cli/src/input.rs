//! What a person writes on a command line, read: durations, `key=value`, args, addresses. Pure but for reading files.

use std::fs::File;
use std::io::{BufRead, Read};
use std::path::Path;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo, Timestamp};
use serde::ser::{SerializeMap, Serializer};
use serde_json::value::RawValue;
use url::Url;
use uuid::Uuid;

use crate::api::Rate;
use crate::failure::Failure;

/// The largest args that the API takes, in bytes; more than that is not read.
const ARGS_BYTES_MAX: u64 = 1024 * 1024;
/// The longest idempotency key.
const KEY_BYTES_MAX: usize = 255;
/// The longest name of whoever makes changes.
const ACTOR_BYTES_MAX: usize = 128;
/// How much of standard input is read for ids: some millions of them.
const IDS_BYTES_MAX: u64 = 128 * 1024 * 1024;
/// The longest number of a line.
const RUN_LINE_BYTES_MAX: usize = 20;

/// One `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Before the first `=`.
    pub(crate) key: String,
    /// After it.
    pub(crate) value: String,
}

/// Reads `key=value`; the value may be empty and may hold further `=`.
pub(crate) fn pair(text: &str) -> Result<Pair, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok(Pair { key: key.to_owned(), value: value.to_owned() }),
        _ => Err("must be key=value".to_owned()),
    }
}

/// Reads a duration such as `30s`, `5m`, `1h 30m`, `2d`, `500ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let rule = || "must be a duration such as 500ms, 30s, 5m, 2h or 1d".to_owned();
    let span: Span = text.parse().map_err(|_| rule())?;
    let length = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| rule())?;
    Duration::try_from(length).map_err(|_| "must not be negative".to_owned())
}

/// Reads a time, or how long ago it was.
pub(crate) fn moment(text: &str) -> Result<Timestamp, String> {
    let ago = |ago: Duration| Timestamp::now().checked_sub(ago).ok();
    let read = text.parse().ok().or_else(|| duration(text).ok().and_then(ago));
    read.ok_or_else(|| "must be a time such as 2030-01-31T08:00:00Z, or how long ago, such as 2h".to_owned())
}

/// Reads the address of a producer; it may have a path, if a proxy puts it below one.
pub(crate) fn producer_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("must be a URL such as http://127.0.0.1:8080: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err("must begin with http:// or https:// and a host".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("must have neither ? nor #".to_owned());
    }
    Ok(url)
}

/// Reads the name of a queue where it becomes a part of a path.
pub(crate) fn path_name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if text.is_empty() || text.len() > 128 || text.starts_with('.') || !text.bytes().all(fits) {
        return Err("must be a name of A-Z a-z 0-9 _ - and dots".to_owned());
    }
    Ok(text.to_owned())
}

/// Reads the name of a limit where it becomes a part of a path; what it must be beyond that, the API says.
pub(crate) fn limit_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > KEY_BYTES_MAX || matches!(text, "." | "..") || text.contains(char::is_control) {
        return Err(format!("must be a name of 1 to {KEY_BYTES_MAX} bytes without control characters"));
    }
    Ok(text.to_owned())
}

/// Reads a rate such as `100/1s`; its burst is said apart.
pub(crate) fn rate(text: &str) -> Result<Rate, String> {
    let rule = || "must be tasks/duration such as 100/1s".to_owned();
    let (tasks, per) = text.split_once('/').ok_or_else(rule)?;
    let per_ms = duration(per).ok().and_then(|per| u64::try_from(per.as_millis()).ok()).ok_or_else(rule)?;
    Ok(Rate { tasks: tasks.trim().parse().map_err(|_| rule())?, per_ms, burst: 1 })
}

/// A task's id, or word that more of them come from standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IdArg {
    /// This one.
    Id(Uuid),
    /// `-`: one a line.
    Stdin,
}

/// Reads a task's id.
pub(crate) fn task_id(text: &str) -> Result<Uuid, String> {
    // Other forms of a UUID are read, too; it is its 36 characters that people copy.
    Uuid::try_parse(text.trim()).map_err(|_| "must be a task's id (UUID)".to_owned())
}

/// Reads a group's id.
pub(crate) fn group_id(text: &str) -> Result<Uuid, String> {
    Uuid::try_parse(text.trim()).map_err(|_| "must be a group's id (UUID)".to_owned())
}

/// Reads a task's id, or `-`.
pub(crate) fn id_arg(text: &str) -> Result<IdArg, String> {
    match text {
        "-" => Ok(IdArg::Stdin),
        id => task_id(id).map(IdArg::Id).map_err(|rule| format!("{rule}, or - for ids from standard input")),
    }
}

/// The ids of some arguments, and those of standard input in place of `-`.
///
/// # Errors
/// When standard input cannot be read, or has a line that is no id.
pub(crate) fn ids(args: &[IdArg]) -> Result<Vec<Uuid>, Failure> {
    let mut ids = Vec::with_capacity(args.len());
    for arg in args {
        match arg {
            IdArg::Id(id) => ids.push(*id),
            IdArg::Stdin => ids.extend(ids_from(std::io::stdin().lock())?),
        }
    }
    Ok(ids)
}

/// One a line; empty lines are passed over.
fn ids_from(input: impl BufRead) -> Result<Vec<Uuid>, Failure> {
    let mut ids = Vec::new();
    // A line that never ends is no id.
    for (number, line) in input.take(IDS_BYTES_MAX).lines().enumerate() {
        let line = line.map_err(|error| Failure::usage(format!("standard input cannot be read: {error}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let id = task_id(&line).map_err(|rule| {
            let shown = crate::text::cut(line.trim(), 40).into_owned();
            Failure::usage(format!("line {} of standard input, {shown}: {rule}", number + 1))
        })?;
        ids.push(id);
    }
    match ids.is_empty() {
        true => Err(Failure::usage("standard input has no ids")),
        false => Ok(ids),
    }
}

/// Reads the name of whoever makes changes.
pub(crate) fn actor(text: &str) -> Result<String, String> {
    let name = text.trim();
    if name.len() > ACTOR_BYTES_MAX || name.contains(char::is_control) {
        return Err(format!("must have at most {ACTOR_BYTES_MAX} bytes and no control characters"));
    }
    Ok(name.to_owned())
}

/// The user of this machine who has called the program, also through `sudo`.
pub(crate) fn user() -> Option<String> {
    let named =
        |variable| std::env::var(variable).ok().and_then(|name| actor(&name).ok()).filter(|name| !name.is_empty());
    ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(named)
}

/// Reads an idempotency key.
pub(crate) fn key(text: &str) -> Result<String, String> {
    visible_ascii(text, KEY_BYTES_MAX)
}

/// Reads the key of a whole run, which becomes a part of its requests' keys.
pub(crate) fn run_key(text: &str) -> Result<String, String> {
    visible_ascii(text, KEY_BYTES_MAX - 1 - RUN_LINE_BYTES_MAX)
}

fn visible_ascii(text: &str, bytes_max: usize) -> Result<String, String> {
    if text.is_empty() || text.len() > bytes_max || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("must be 1 to {bytes_max} characters of visible ASCII"));
    }
    Ok(text.to_owned())
}

/// A JSON object of pairs in their order: a value that is JSON is taken as such, any other as a string.
///
/// # Errors
/// When a key comes twice.
pub(crate) fn object(pairs: &[Pair]) -> Result<Box<RawValue>, Failure> {
    let mut text = Vec::new();
    let written = (|| {
        let mut serializer = serde_json::Serializer::new(&mut text);
        let mut map = serializer.serialize_map(Some(pairs.len()))?;
        for Pair { key, value } in pairs {
            match serde_json::from_str::<&RawValue>(value) {
                Ok(json) => map.serialize_entry(key, json)?,
                Err(_) => map.serialize_entry(key, value)?,
            }
        }
        SerializeMap::end(map)
    })();
    for (index, pair) in pairs.iter().enumerate() {
        if pairs[..index].iter().any(|earlier| earlier.key == pair.key) {
            return Err(Failure::usage(format!("{} is given twice", pair.key)));
        }
    }
    let text =
        written.map_err(|error| error.to_string()).and_then(|()| String::from_utf8(text).map_err(|_| String::new()));
    text.and_then(|text| RawValue::from_string(text).map_err(|error| error.to_string())).map_err(Failure::usage)
}

/// Reads `--args`: JSON itself, `@file`, or `-` for standard input.
///
/// # Errors
/// When it cannot be read, is too large, or is not JSON.
pub(crate) fn args(given: &str) -> Result<Box<RawValue>, Failure> {
    args_of("--args", given)
}

/// As [`args`], for a flag of another name.
///
/// # Errors
/// As [`args`].
pub(crate) fn args_of(flag: &str, given: &str) -> Result<Box<RawValue>, Failure> {
    let (text, place) = match given.strip_prefix('@') {
        Some(path) => (limited(open(Path::new(path))?, path)?, path),
        None if given == "-" => (limited(std::io::stdin(), "standard input")?, "standard input"),
        None => (given.to_owned(), flag),
    };
    RawValue::from_string(text).map_err(|error| {
        Failure::usage(format!("{place} is not JSON: {error}"))
            .hint("give JSON, @file, - for standard input, or key=value after the kind")
    })
}

/// Opens a file that the user named.
///
/// # Errors
/// When it cannot be opened.
pub(crate) fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))
}

fn limited(input: impl Read, place: &str) -> Result<String, Failure> {
    let mut text = String::new();
    // Room for spaces around the JSON that the API need not see.
    let read = input.take(2 * ARGS_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| Failure::usage(format!("cannot read {place}: {error}")))?;
    let trimmed = text.trim();
    if trimmed.len() as u64 > ARGS_BYTES_MAX {
        return Err(Failure::usage(format!("{place} is larger than the {ARGS_BYTES_MAX} bytes that args may have")));
    }
    Ok(trimmed.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(pairs: &[&str]) -> Result<String, String> {
        let pairs: Vec<_> = pairs.iter().map(|text| pair(text).unwrap()).collect();
        object(&pairs).map(|json| json.get().to_owned()).map_err(|failure| failure.message)
    }

    #[test]
    fn ids_come_one_a_line() {
        let id = "01a20751-1f82-705d-a198-4567bb46f288";
        let read = |text: &str| ids_from(text.as_bytes());
        assert_eq!(read(&format!("{id}\n\n  {id}\r\n")).unwrap().len(), 2);
        let bad = read(&format!("{id}\nqueued \u{1b}[2J\n")).unwrap_err();
        assert!(bad.message.starts_with("line 2 of standard input, queued"), "{}", bad.message);
        assert!(read("\n").is_err() && read("\u{0}").is_err() && ids_from(&b"\xff\n"[..]).is_err());
    }

    #[test]
    fn values_are_json_where_they_parse() {
        let json = of(&[
            "n=1",
            "b=true",
            "s=2026-11",
            "q=\"1\"",
            "l=[1, 2]",
            "e=",
            "x=a=b",
            "z=007",
            "big=12345678901234567890123",
        ]);
        let expected = r#"{"n":1,"b":true,"s":"2026-11","q":"1","l":[1, 2],"e":"","x":"a=b","z":"007","big":12345678901234567890123}"#;
        assert_eq!(json.unwrap(), expected);
        assert_eq!(of(&[]).unwrap(), "{}");
        assert_eq!(of(&["a=1", "a=2"]).unwrap_err(), "a is given twice");
        for bad in ["", "=", "=1", "word"] {
            assert!(pair(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_moment_is_a_time_or_how_long_ago_it_was() {
        let time = "2026-11-23T07:00:00Z";
        assert_eq!(moment(time).unwrap().to_string(), time);
        assert!(moment("2h").unwrap() < Timestamp::now());
        assert!(moment("yesterday").is_err());
    }

    #[test]
    fn durations_are_friendly() {
        for (text, ms) in [
            ("30s", 30_000),
            ("5m", 300_000),
            ("1h 30m", 5_400_000),
            ("2d", 172_800_000),
            ("500ms", 500),
            ("PT1S", 1000),
        ] {
            assert_eq!(duration(text).unwrap().as_millis(), ms, "{text}");
        }
        for bad in ["", "30", "-5s", "soon", "1y", "1mo", "5 potatoes"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn addresses_are_http() {
        assert!(producer_url("https://ops.example/tasklane").is_ok());
        for bad in ["127.0.0.1:8080", "localhost", "ftp://a", "http://a?b", "http://a#b", "http://"] {
            assert!(producer_url(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn path_names_cannot_climb() {
        assert!(path_name("reports-2_x").is_ok());
        for bad in ["", ".", "..", "a/b", "a b", "%2e", "ä"] {
            assert!(path_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn rates_are_read_as_they_are_said() {
        assert_eq!(rate("100/1s"), Ok(Rate { tasks: 100, per_ms: 1_000, burst: 1 }));
        assert_eq!(rate("5/1m").map(|rate| rate.per_ms), Ok(60_000));
        for bad in ["", "100", "100/", "/1s", "100/1s,10", "-1/1s", "1/2/3"] {
            assert!(rate(bad).is_err(), "{bad:?}");
        }
        assert!(limit_name("customer:a/b *").is_ok());
        assert!([".", "..", "", "a\n"].iter().all(|bad| limit_name(bad).is_err()));
    }

    proptest! {
        /// Whatever stands behind `=`, the object is JSON with that key, and a string says what was typed.
        #[test]
        fn any_pair_is_json(name in "[^=]{1,8}", value in any::<String>()) {
            let json = object(&[pair(&format!("{name}={value}")).unwrap()]).unwrap();
            let parsed: Result<serde_json::Value, _> = serde_json::from_str(json.get());
            if let Ok(parsed) = parsed && let Some(text) = parsed[&name].as_str() {
                prop_assert!(text == value || value.contains('"'));
            }
        }
    }
}
