//! Keeps from the AMQP library's parser what it cannot take of other programs' messages.
//!
//! That parser recurses with each table or list within another and has no limit, so that a message of 10 kB ends the
//! process; and it gives up the whole connection over a name that is not UTF-8, a type that it does not know, or headers
//! longer than a frame may be, after which the broker delivers the same message again. Here the bytes pass before it sees
//! them: of such a message the headers are replaced, so that it can be buried like any other that is no task.

use std::io;

/// How deep the headers of a message may be nested. What RabbitMQ adds, `x-death`, has three levels.
pub const NESTING_MAX: usize = 32;
/// The header that stands in the place of headers that were withheld, with the reason.
pub const WITHHELD_HEADER: &str = "tasklane-withheld";

/// The largest frame before both sides have agreed on one, which is the largest that RabbitMQ offers by itself.
const GREETING_BYTES_MAX: usize = 128 * 1024;
/// Type, channel and size of a frame.
const HEAD_BYTES: usize = 7;
/// The smallest limit for frames that AMQP knows.
const FRAME_BYTES_MIN: usize = 4096;
/// A frame's bytes beside its payload: the head, and the end mark.
const FRAME_EXTRA: usize = HEAD_BYTES + 1;
const FRAME_END: u8 = 0xCE;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
/// Class, weight and body size, which come before the properties.
const CONTENT_BYTES: usize = 12;
/// The flag of the headers among the properties.
const HEADERS_FLAG: u16 = 1 << 13;

/// Why headers were withheld.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withheld {
    /// Nested deeper than [`NESTING_MAX`].
    TooDeep,
    /// Longer than a frame may be.
    TooLarge,
    /// Not what AMQP's grammar knows.
    Malformed,
}

impl Withheld {
    /// A short stable word, as in the reason of a dead letter.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TooDeep => "headers_too_deep",
            Self::TooLarge => "headers_too_large",
            Self::Malformed => "headers_malformed",
        }
    }

    /// Reads the word back.
    #[must_use]
    pub fn parse(word: &[u8]) -> Option<Self> {
        [Self::TooDeep, Self::TooLarge, Self::Malformed].into_iter().find(|reason| reason.as_str().as_bytes() == word)
    }
}

/// What a connection has received so far.
#[derive(Debug)]
pub struct Guard {
    /// The largest frame that was agreed on, or that this side asks for.
    frame_bytes_max: usize,
    agreed: bool,
    /// What must be seen whole before any of it passes on.
    held: Vec<u8>,
    next: Next,
}

/// What becomes of the next bytes.
#[derive(Debug, Clone, Copy)]
enum Next {
    /// They are held until the head of a frame is there.
    Head,
    /// They are held until the frame of so many bytes is there.
    Whole(usize),
    /// So many pass on.
    Pass(usize),
    /// So many are left out, but for the beginning of the content header that they are.
    Cut(usize),
}

impl Guard {
    /// For a connection that is about to ask for frames of this size.
    #[must_use]
    pub fn new(frame_bytes_max: usize) -> Self {
        Self {
            frame_bytes_max: frame_bytes_max.max(FRAME_BYTES_MIN),
            agreed: false,
            held: Vec::new(),
            next: Next::Head,
        }
    }

    /// Takes what has come, and appends what may pass on.
    ///
    /// # Errors
    /// When the peer does not keep to what was agreed on: it is no broker.
    pub fn feed(&mut self, mut input: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
        while !input.is_empty() {
            match self.next {
                Next::Head => {
                    self.hold(&mut input, HEAD_BYTES);
                    if let [kind, _, _, a, b, c, d] = self.held[..] {
                        self.begin(kind, u32::from_be_bytes([a, b, c, d]) as usize, output)?;
                    }
                }
                Next::Whole(bytes) => {
                    self.hold(&mut input, bytes);
                    if self.held.len() == bytes {
                        self.judge(output)?;
                        self.await_frame();
                    }
                }
                Next::Pass(left) => {
                    let passed = take(&mut input, left);
                    output.extend_from_slice(passed);
                    self.next = Next::Pass(left - passed.len());
                    if passed.len() == left {
                        self.await_frame();
                    }
                }
                Next::Cut(left) => {
                    let cut = take(&mut input, left);
                    self.hold(&mut &*cut, HEAD_BYTES + CONTENT_BYTES);
                    self.next = Next::Cut(left - cut.len());
                    if cut.len() == left {
                        output.extend(without_properties(&self.held, Withheld::TooLarge));
                        self.await_frame();
                    }
                }
            }
        }
        Ok(())
    }

    fn await_frame(&mut self) {
        self.held.clear();
        self.next = Next::Head;
    }

    /// Holds what comes until there are so many bytes.
    fn hold(&mut self, input: &mut &[u8], bytes: usize) {
        let missing = bytes.saturating_sub(self.held.len());
        self.held.extend_from_slice(take(input, missing));
    }

    /// Decides what to do with the frame whose head is held.
    fn begin(&mut self, kind: u8, size: usize, output: &mut Vec<u8>) -> io::Result<()> {
        let whole = size.saturating_add(FRAME_EXTRA);
        let greets = kind == METHOD && !self.agreed;
        let most = if greets { self.frame_bytes_max.max(GREETING_BYTES_MAX) } else { self.frame_bytes_max };
        self.next = match kind {
            METHOD | HEADER if whole <= most => Next::Whole(whole),
            HEADER => Next::Cut(whole - HEAD_BYTES),
            _ if whole > most => {
                return Err(violation(format!("a frame of {whole} bytes, where at most {most} were agreed on")));
            }
            _ => {
                output.append(&mut self.held);
                Next::Pass(whole - HEAD_BYTES)
            }
        };
        Ok(())
    }

    /// Passes on the method or content header that is held, as far as it may be.
    fn judge(&mut self, output: &mut Vec<u8>) -> io::Result<()> {
        let Some((&FRAME_END, [METHOD | HEADER, ..])) = self.held.split_last() else {
            return Err(violation("a frame without an end".to_owned()));
        };
        let payload = HEAD_BYTES..self.held.len() - 1;
        if self.held[0] == METHOD {
            let mut frame = std::mem::take(&mut self.held);
            self.look_at_method(&mut frame[payload])?;
            output.extend_from_slice(&frame);
            self.held = frame;
            return Ok(());
        }
        let Some(properties) = self.held[payload].get(CONTENT_BYTES..) else {
            return Err(violation("a content header that is too short".to_owned()));
        };
        match check_properties(properties) {
            Ok(()) => output.extend_from_slice(&self.held),
            Err(Fault { reason, headers: Some(headers) }) => {
                let start = HEAD_BYTES + CONTENT_BYTES;
                self.held.splice(start + headers.start..start + headers.end, table_of(reason));
                set_size(&mut self.held);
                output.extend_from_slice(&self.held);
            }
            Err(Fault { reason, headers: None }) => output.extend(without_properties(&self.held, reason)),
        }
        Ok(())
    }

    fn look_at_method(&mut self, method: &mut [u8]) -> io::Result<()> {
        let [a, b, c, d, arguments @ ..] = method else {
            return Err(violation("a method that is too short".to_owned()));
        };
        match (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])) {
            // connection.start: two bytes of version, then the server's properties.
            (10, 10) => {
                let table = arguments.get(2..).unwrap_or_default();
                let within_limits = Reader { bytes: table, at: 0 }.table();
                return within_limits.map_err(|reason| violation(format!("a greeting with {}", reason.as_str())));
            }
            // connection.tune: the number of channels, then the largest frame.
            (10, 30) => {
                if let Some(&[a, b, c, d]) = arguments.get(2..6) {
                    let offered = u32::from_be_bytes([a, b, c, d]) as usize;
                    if offered > 0 {
                        self.frame_bytes_max = self.frame_bytes_max.min(offered).max(FRAME_BYTES_MIN);
                    }
                    self.agreed = true;
                }
            }
            // connection.close, channel.close and basic.return: a code, then text and names.
            (10, 50) | (20, 40) => clean_strings(arguments, 2, 1),
            (60, 50) => clean_strings(arguments, 2, 3),
            // connection.blocked: the reason.
            (10, 60) => clean_strings(arguments, 0, 1),
            // basic.deliver: the consumer, the tag, a flag, exchange and routing key.
            (60, 60) => {
                let consumer = arguments.first().map_or(0, |length| usize::from(*length) + 1);
                clean_strings(arguments, 0, 1);
                clean_strings(arguments, consumer + 9, 2);
            }
            // basic.get-ok: the tag, a flag, exchange and routing key.
            (60, 71) => clean_strings(arguments, 9, 2),
            _ => {}
        }
        Ok(())
    }
}

fn take<'i>(input: &mut &'i [u8], most: usize) -> &'i [u8] {
    let (taken, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    taken
}

fn violation(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("this is no RabbitMQ: it sent {what}"))
}

/// Makes text of what is none, without a change of its length: names that other programs have chosen, which nobody here
/// reads.
fn clean_strings(arguments: &mut [u8], mut at: usize, count: usize) {
    for _ in 0..count {
        let Some(length) = arguments.get(at).map(|length| usize::from(*length)) else { return };
        let Some(text) = arguments.get_mut(at + 1..at + 1 + length) else { return };
        if std::str::from_utf8(text).is_err() {
            text.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
        }
        at += 1 + length;
    }
}

/// The same content header with nothing but the reason.
fn without_properties(frame: &[u8], reason: Withheld) -> Vec<u8> {
    let mut frame = frame[..HEAD_BYTES + CONTENT_BYTES].to_vec();
    frame.extend(HEADERS_FLAG.to_be_bytes());
    frame.extend(table_of(reason));
    frame.push(FRAME_END);
    set_size(&mut frame);
    frame
}

fn table_of(reason: Withheld) -> Vec<u8> {
    let (name, word) = (WITHHELD_HEADER.as_bytes(), reason.as_str().as_bytes());
    let entry = [&[length8(name)][..], name, b"S", &length32(word), word].concat();
    [&length32(&entry)[..], &entry].concat()
}

fn set_size(frame: &mut [u8]) {
    let size = u32::try_from(frame.len() - FRAME_EXTRA).unwrap_or(u32::MAX);
    frame[3..HEAD_BYTES].copy_from_slice(&size.to_be_bytes());
}

fn length8(bytes: &[u8]) -> u8 {
    u8::try_from(bytes.len()).unwrap_or(u8::MAX)
}

fn length32(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// What is wrong with properties; and where the headers are, if nothing else is wrong with the rest.
struct Fault {
    reason: Withheld,
    headers: Option<std::ops::Range<usize>>,
}

/// What the properties of a message are made of, one letter for each flag from the highest: short strings, the headers,
/// bytes, and a time.
const PROPERTIES: &[u8; 14] = b"ssFbbssssTssss";

fn check_properties(bytes: &[u8]) -> Result<(), Fault> {
    let malformed = |reason| Fault { reason, headers: None };
    let mut reader = Reader { bytes, at: 0 };
    let flags = u16::from_be_bytes(reader.array().map_err(malformed)?);
    if flags & 0b11 != 0 {
        return Err(malformed(Withheld::Malformed));
    }
    let mut too_deep = None;
    for (bit, part) in (2..16).rev().zip(PROPERTIES) {
        if flags & (1 << bit) == 0 {
            continue;
        }
        let start = reader.at;
        let read = match part {
            b's' => reader.short_string(),
            b'b' => reader.skip(1),
            b'T' => reader.skip(8),
            _ => reader.table(),
        };
        match read {
            Ok(()) => {}
            Err(Withheld::TooDeep) => {
                reader.at = start;
                let length = reader.length32().map_err(malformed)?;
                reader.skip(length).map_err(malformed)?;
                too_deep = Some(start..reader.at);
            }
            Err(reason) => return Err(malformed(reason)),
        }
    }
    if reader.at != bytes.len() {
        return Err(malformed(Withheld::Malformed));
    }
    too_deep.map_or(Ok(()), |headers| Err(Fault { reason: Withheld::TooDeep, headers: Some(headers) }))
}

/// Walks over AMQP's values without making anything of them.
struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
}

/// A table or a list that is being walked over, with its end.
#[derive(Clone, Copy)]
enum Level {
    Table(usize),
    List(usize),
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Withheld> {
        let bytes = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk()).ok_or(Withheld::Malformed)?;
        self.at += N;
        Ok(*bytes)
    }

    fn length32(&mut self) -> Result<usize, Withheld> {
        Ok(u32::from_be_bytes(self.array()?) as usize)
    }

    fn skip(&mut self, count: usize) -> Result<(), Withheld> {
        let to = self.at.checked_add(count).filter(|to| *to <= self.bytes.len()).ok_or(Withheld::Malformed)?;
        self.at = to;
        Ok(())
    }

    fn short_string(&mut self) -> Result<(), Withheld> {
        let [length] = self.array()?;
        let start = self.at;
        self.skip(length.into())?;
        std::str::from_utf8(&self.bytes[start..self.at]).map(drop).map_err(|_| Withheld::Malformed)
    }

    fn open(&mut self, level: fn(usize) -> Level, outer: usize) -> Result<Level, Withheld> {
        let length = self.length32()?;
        let end = self.at.checked_add(length).filter(|end| *end <= outer).ok_or(Withheld::Malformed)?;
        Ok(level(end))
    }

    /// Walks over a table and all that is in it. Levels are kept in a list of fixed length: nothing here recurses.
    fn table(&mut self) -> Result<(), Withheld> {
        let mut levels = [Level::List(0); NESTING_MAX];
        levels[0] = self.open(Level::Table, self.bytes.len())?;
        let mut depth = 1;
        while depth > 0 {
            let (end, is_table) = match levels[depth - 1] {
                Level::Table(end) => (end, true),
                Level::List(end) => (end, false),
            };
            if self.at == end {
                depth -= 1;
                continue;
            }
            if is_table {
                self.short_string()?;
            }
            let [kind] = self.array()?;
            let size = match kind {
                b'V' => 0,
                b't' | b'b' | b'B' => 1,
                b's' | b'U' | b'u' => 2,
                b'I' | b'i' | b'f' => 4,
                b'D' => 5,
                b'l' | b'L' | b'd' | b'T' => 8,
                b'S' | b'x' => self.length32()?,
                b'F' | b'A' => {
                    let level = self.open(if kind == b'F' { Level::Table } else { Level::List }, end)?;
                    *levels.get_mut(depth).ok_or(Withheld::TooDeep)? = level;
                    depth += 1;
                    continue;
                }
                _ => return Err(Withheld::Malformed),
            };
            self.skip(size)?;
            if self.at > end {
                return Err(Withheld::Malformed);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
