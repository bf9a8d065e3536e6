//! Server-sent events, as they come: parts of any size in, whole events out.

/// The longest event; the producer's have a few hundred bytes.
const EVENT_BYTES_MAX: usize = 64 * 1024;

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// What it is.
    pub(crate) name: String,
    /// What it says.
    pub(crate) data: String,
}

/// Puts events together.
#[derive(Debug, Default)]
pub(crate) struct Events {
    line: Vec<u8>,
    name: String,
    data: String,
}

/// What came is no stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong;

impl Events {
    /// Takes what came, and answers the events that are whole by that.
    ///
    /// # Errors
    /// When an event has no end.
    pub(crate) fn feed(&mut self, part: &[u8]) -> Result<Vec<Event>, TooLong> {
        let mut whole = Vec::new();
        for byte in part {
            if *byte != b'\n' {
                self.line.push(*byte);
            } else {
                let line = std::mem::take(&mut self.line);
                whole.extend(self.line(String::from_utf8_lossy(&line).trim_end_matches('\r')));
            }
            if self.line.len() + self.data.len() > EVENT_BYTES_MAX {
                return Err(TooLong);
            }
        }
        Ok(whole)
    }

    fn line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let event = Event { name: std::mem::take(&mut self.name), data: std::mem::take(&mut self.data) };
            return Some(event).filter(|event| !event.data.is_empty());
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            "data" if self.data.is_empty() => value.clone_into(&mut self.data),
            "data" => self.data.extend(["\n", value]),
            // A comment, which only says that the connection lives, or a field that nobody needs here.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = ": here\n\nevent: started\ndata: {\"a\":1}\n\nevent: lost\r\ndata:{\"events\":2}\r\n\r\nevent: x\n\ndata: a\ndata: b\n\n";

    fn expected() -> Vec<Event> {
        [("started", "{\"a\":1}"), ("lost", "{\"events\":2}"), ("", "a\nb")]
            .map(|(name, data)| Event { name: name.to_owned(), data: data.to_owned() })
            .to_vec()
    }

    proptest! {
        /// However the stream is cut, the events are the same.
        #[test]
        fn events_are_put_together(cuts in proptest::collection::vec(0..TEXT.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let (mut events, mut whole, mut from) = (Events::default(), Vec::new(), 0);
            for to in cuts.into_iter().chain([TEXT.len()]) {
                whole.extend(events.feed(&TEXT.as_bytes()[from..to]).unwrap());
                from = to;
            }
            prop_assert_eq!(whole, expected());
        }
    }

    #[test]
    fn what_has_no_end_is_given_up() {
        let mut events = Events::default();
        assert_eq!(events.feed(&[b'x'; EVENT_BYTES_MAX]), Ok(Vec::new()));
        assert_eq!(events.feed(b"x"), Err(TooLong));
    }
}
