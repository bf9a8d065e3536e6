//! A log of text has one line for each event, and nothing in it that a terminal would obey, whoever wrote the words.

use std::io::{self, Write};

/// Writes what the formatter gives, one event at a time, with everything unsafe written out, such as `\n` and `\u{1b}`.
pub(super) struct Lines<W>(pub(super) W);

impl<W: Write> Write for Lines<W> {
    /// Takes all, or nothing: the formatter gives a whole event at once.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.0.write_all(line(&String::from_utf8_lossy(event)).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The event on one line.
fn line(event: &str) -> String {
    let (text, end) = event.strip_suffix('\n').map_or((event, ""), |text| (text, "\n"));
    let mut line = String::with_capacity(event.len() + 16);
    let mut rest = text;
    while let Some(char) = rest.chars().next() {
        let length = if char == '\u{1b}' { color(rest) } else { 0 };
        if length > 0 {
            line.push_str(&rest[..length]);
            rest = &rest[length..];
            continue;
        }
        match char {
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            char if is_unsafe(char) => line.extend(char.escape_unicode()),
            char => line.push(char),
        }
        rest = &rest[char.len_utf8()..];
    }
    line + end
}

/// How long the change of colour is that this text begins with; the formatter makes some, and they do no harm.
fn color(text: &str) -> usize {
    let Some(code) = text.strip_prefix("\u{1b}[") else { return 0 };
    match code.find(|char: char| !matches!(char, '0'..='9' | ';')) {
        Some(at) if code[at..].starts_with('m') => at + 3,
        _ => 0,
    }
}

/// Whether a terminal would obey the character, or show the text around it in another order.
fn is_unsafe(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_its_words_are() {
        let log = Log::default();
        let writer = log.clone();
        let layer = tracing_subscriber::fmt().with_ansi(false).with_writer(move || Lines(writer.clone())).finish();
        tracing::subscriber::with_default(layer, || {
            let error = "one\ntwo\r\u{1b}[2J\u{1b}]0;title\u{7}\u{9b}\u{202e}";
            tracing::warn!(error, display = %error, "a message of\nits own: {error}");
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!((text.lines().count(), text.ends_with('\n')), (1, true), "{text:?}");
        assert!(!text.trim_end_matches('\n').contains(is_unsafe), "{text:?}");
        assert!(text.contains("one\\ntwo"), "{text:?}");
    }

    #[test]
    fn colours_stay_and_nothing_else_does() {
        assert_eq!(
            line("\u{1b}[32m INFO\u{1b}[0m a\u{1b}[2Jb\u{1b}\n"),
            "\u{1b}[32m INFO\u{1b}[0m a\\u{1b}[2Jb\\u{1b}\n"
        );
        assert_eq!(line("ü\tx"), "ü\\tx");
    }
}
