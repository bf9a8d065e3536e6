//! Cuts lines of JSON into chunks of bounded size, verbatim, so that a chunk's lines are the file's.

use std::io::{BufRead, Read};

/// The longest line: the largest args, and room for the other fields, as the API has it.
pub(crate) const LINE_BYTES_MAX: usize = 1024 * 1024 + 128 * 1024;
/// The most bytes of a chunk, unless one line alone is longer.
const CHUNK_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Some lines that follow each other.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// The number of its first line in the file, from 1.
    pub(crate) first_line: u64,
    /// How many lines it has, empty ones among them.
    pub(crate) lines: u64,
    /// How many of them are not empty.
    pub(crate) tasks: u32,
    /// The lines.
    pub(crate) text: Vec<u8>,
}

/// Why there are no further chunks.
#[derive(Debug)]
pub(crate) enum ReadFault {
    /// The input cannot be read.
    Io(std::io::Error),
    /// This line is longer than a task can be.
    LongLine(u64),
}

/// The chunks of an input.
#[derive(Debug)]
pub(crate) struct Chunks<R> {
    input: R,
    tasks_max: u32,
    bytes_max: usize,
    /// The number of the line read last.
    line: u64,
    /// A line that did not fit into the chunk before.
    left_over: Vec<u8>,
    ended: bool,
}

impl<R: BufRead> Chunks<R> {
    /// Chunks of at most so many tasks.
    pub(crate) fn new(input: R, tasks_max: u32) -> Self {
        Self { input, tasks_max, bytes_max: CHUNK_BYTES_MAX, line: 0, left_over: Vec::new(), ended: false }
    }

    /// Chunks of at most so many bytes, unless one line alone is longer.
    pub(crate) fn of_bytes(self, bytes_max: usize) -> Self {
        Self { bytes_max, ..self }
    }

    /// The next line with its end; an empty one when there is none.
    fn line(&mut self) -> Result<Vec<u8>, ReadFault> {
        if !self.left_over.is_empty() {
            return Ok(std::mem::take(&mut self.left_over));
        }
        let mut line = Vec::new();
        let limit = LINE_BYTES_MAX as u64 + 2;
        self.input.by_ref().take(limit).read_until(b'\n', &mut line).map_err(ReadFault::Io)?;
        self.line += u64::from(!line.is_empty());
        let content = line.strip_suffix(b"\n").unwrap_or(&line);
        if content.len() > LINE_BYTES_MAX { Err(ReadFault::LongLine(self.line)) } else { Ok(line) }
    }

    fn chunk(&mut self) -> Result<Option<Chunk>, ReadFault> {
        let mut chunk = Chunk { first_line: 0, lines: 0, tasks: 0, text: Vec::new() };
        while chunk.tasks < self.tasks_max {
            let line = self.line()?;
            if line.is_empty() {
                self.ended = true;
                break;
            }
            let empty = line.trim_ascii().is_empty();
            if chunk.tasks == 0 && empty {
                continue;
            }
            if chunk.tasks > 0 && chunk.text.len() + line.len() > self.bytes_max {
                self.left_over = line;
                break;
            }
            if chunk.tasks == 0 {
                chunk.first_line = self.line;
            }
            chunk.lines += 1;
            chunk.tasks += u32::from(!empty);
            chunk.text.extend_from_slice(&line);
        }
        Ok((chunk.tasks > 0).then_some(chunk))
    }
}

impl<R: BufRead> Iterator for Chunks<R> {
    type Item = Result<Chunk, ReadFault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let chunk = self.chunk().transpose();
        self.ended |= !matches!(chunk, Some(Ok(_)));
        chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunks(text: &[u8], tasks_max: u32, bytes_max: usize) -> Vec<Chunk> {
        Chunks { bytes_max, ..Chunks::new(text, tasks_max) }.collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn lines_keep_their_numbers() {
        let cut = chunks(b"\n\na\n\nb\nc\n  \n\nd", 2, 100);
        let seen: Vec<_> =
            cut.iter().map(|chunk| (chunk.first_line, chunk.lines, chunk.tasks, &chunk.text[..])).collect();
        assert_eq!(seen, [(3, 3, 2, &b"a\n\nb\n"[..]), (6, 4, 2, b"c\n  \n\nd")]);
        assert!(chunks(b"\n \n", 2, 100).is_empty());
    }

    #[test]
    fn a_line_too_long_is_not_read_to_its_end() {
        let long = [b"a\n".to_vec(), vec![b'x'; LINE_BYTES_MAX + 1]].concat();
        let mut cut = Chunks::new(&long[..], 1);
        assert!(matches!(cut.next(), Some(Ok(_))));
        assert!(matches!(cut.next(), Some(Err(ReadFault::LongLine(2)))));
        assert!(cut.next().is_none());
        let endless = std::io::BufReader::new(std::io::repeat(b'x'));
        assert!(matches!(Chunks::new(endless, 1).next(), Some(Err(ReadFault::LongLine(1)))));
        let fits = [vec![b'x'; LINE_BYTES_MAX], b"\n".to_vec()].concat();
        assert!(matches!(Chunks::new(&fits[..], 1).next(), Some(Ok(_))));
    }

    proptest! {
        /// Nothing is lost, doubled or numbered wrong, and both bounds hold.
        #[test]
        fn chunks_are_the_file(lines in proptest::collection::vec("[ a-c]{0,6}", 0..40), tasks_max in 1u32..5, bytes_max in 1usize..30) {
            let text = lines.join("\n");
            let mut seen = Vec::new();
            for chunk in chunks(text.as_bytes(), tasks_max, bytes_max) {
                prop_assert!(chunk.tasks <= tasks_max && (chunk.text.len() <= bytes_max || chunk.lines == 1));
                let part = String::from_utf8(chunk.text).unwrap();
                prop_assert_eq!(part.lines().count() as u64, chunk.lines);
                let numbered = part.lines().zip(chunk.first_line..).map(|(line, number)| (number, line.to_owned()));
                seen.extend(numbered.filter(|(_, line)| !line.trim().is_empty()));
            }
            let all = lines.iter().cloned().zip(1..).map(|(line, number)| (number, line));
            prop_assert_eq!(seen, all.filter(|(_, line)| !line.trim().is_empty()).collect::<Vec<_>>());
        }
    }
}
