//! Text for people: without control characters, and durations as one says them.

use std::borrow::Cow;
use std::fmt::Write;
use std::time::Duration;

use jiff::Timestamp;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Whether a terminal would obey the character, or show the text around it in another order.
fn is_unsafe(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The text with everything that a terminal would obey written out, such as `\n` and `\u{1b}`.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for char in text.chars() {
        match char {
            char if !is_unsafe(char) => shown.push(char),
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            char => shown.extend(char.escape_unicode()),
        }
    }
    Cow::Owned(shown)
}

/// The same JSON on one line, and harmless to terminals: raw line ends stand between tokens only, and what else is
/// unsafe stands in strings only, where an escape means the same.
pub(crate) fn json_line(json: &str) -> Cow<'_, str> {
    let json = json.trim();
    if !json.contains(is_unsafe) {
        return Cow::Borrowed(json);
    }
    let mut line = String::with_capacity(json.len() + 16);
    for char in json.chars() {
        match char {
            '\n' | '\r' | '\t' => line.push(' '),
            char if is_unsafe(char) => {
                // Writing into a String does not fail.
                let _ = write!(line, "\\u{:04x}", u32::from(char));
            }
            char => line.push(char),
        }
    }
    Cow::Owned(line)
}

/// At most so many characters, the last one an ellipsis where something was cut.
pub(crate) fn cut(text: &str, chars_max: usize) -> Cow<'_, str> {
    match text.char_indices().nth(chars_max) {
        None => Cow::Borrowed(text),
        Some(_) => {
            let end = text.char_indices().nth(chars_max.saturating_sub(1)).map_or(0, |(at, _)| at);
            Cow::Owned(format!("{}…", &text[..end]))
        }
    }
}

/// The text in at most so many columns of a terminal, where some characters take two; the last one an ellipsis where something
/// was cut.
pub(crate) fn fit(text: &str, width: usize) -> Cow<'_, str> {
    if text.width() <= width {
        return Cow::Borrowed(text);
    }
    let (mut cut, mut used) = (String::new(), 0);
    for char in text.chars() {
        used += char.width().unwrap_or(0);
        if used + 1 > width {
            break;
        }
        cut.push(char);
    }
    cut.push('…');
    Cow::Owned(cut)
}

/// The words of a text on lines of at most so many columns, where each fits.
pub(crate) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() || line.width() + 1 + word.width() <= width => {
                if !line.is_empty() {
                    line.push(' ');
                }
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A duration in its two greatest units: `250ms`, `3.2s`, `5m12s`, `2h5m`, `3d4h`.
pub(crate) fn brief(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..10 => format!("{}.{}s", seconds, duration.subsec_millis() / 100),
        10..60 => format!("{seconds}s"),
        60..3_600 => format!("{minutes}m{}s", seconds % 60),
        3_600..86_400 => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

/// [`brief`] of so many milliseconds; less than none is none.
pub(crate) fn brief_ms(ms: i64) -> String {
    brief(Duration::from_millis(ms.max(0).unsigned_abs()))
}

/// How long ago, or in how long; clocks that differ a little make nothing negative.
pub(crate) fn relative(time: Timestamp, now: Timestamp) -> String {
    let ms = now.as_millisecond().saturating_sub(time.as_millisecond());
    if ms >= 0 { format!("{} ago", brief_ms(ms)) } else { format!("in {}", brief_ms(ms.saturating_neg())) }
}

/// A number with its thousands apart: `1 234 567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// `1 task`, `2 tasks`.
pub(crate) fn count(number: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(number), if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_have_two_units() {
        let brief = |ms| brief_ms(ms);
        for (ms, text) in
            [(-5, "0ms"), (999, "999ms"), (3_290, "3.2s"), (59_999, "59s"), (312_000, "5m12s"), (7_500_000, "2h5m")]
        {
            assert_eq!(brief(ms), text);
        }
        assert_eq!(brief(273_600_000), "3d4h");
        assert_eq!(grouped(1_234_567), "1 234 567");
        assert_eq!((count(1, "task"), count(0, "task")), ("1 task".to_owned(), "0 tasks".to_owned()));
        assert_eq!((cut("abc", 3).as_ref(), cut("äbcd", 3).as_ref()), ("abc", "äb…"));
    }

    #[test]
    fn texts_are_cut_and_wrapped_by_what_a_terminal_shows() {
        assert_eq!((fit("abc", 3).as_ref(), fit("abcd", 3).as_ref(), fit("日本語", 4).as_ref()), ("abc", "ab…", "日…"));
        assert_eq!(wrapped("a bb ccc dddd", 5), ["a bb", "ccc", "dddd"]);
        assert_eq!(wrapped("01a20751-1f82 is", 5), ["01a20751-1f82", "is"], "what is copied stays whole");
    }

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        assert_eq!(visible("a\u{1b}[2Jb\n\u{9b}\u{202e}"), "a\\u{1b}[2Jb\\n\\u{9b}\\u{202e}");
        assert_eq!(json_line("{\n\"a\u{9b}\u{7f}\": 1}\n"), r#"{ "a\u009b\u007f": 1}"#);
    }

    proptest! {
        /// Nothing unsafe is left, and JSON stays the value that it was.
        #[test]
        fn any_text_becomes_harmless(text in any::<String>(), more in "[\u{0}-\u{a0}\u{2028}-\u{202e}]{0,20}") {
            let text = format!("{text}{more}");
            prop_assert!(!visible(&text).contains(is_unsafe));
            let value = serde_json::json!({text.as_str(): [text.as_str(), 1]});
            let line = json_line(&serde_json::to_string_pretty(&value).unwrap()).into_owned();
            prop_assert!(!line.contains(is_unsafe));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
        }
    }
}
