//! Finds AMQP methods in a stream of bytes, so that the wire can be cut exactly before or behind one.

/// The kind of a frame that holds a method.
const METHOD_FRAME: u8 = 1;

/// A method's class and number.
const METHOD_BYTES: usize = 4;

/// What a client says before the first frame: "AMQP" and the version.
const GREETING: &[u8] = b"AMQP";
const GREETING_BYTES: usize = 8;

/// A method of AMQP 0-9-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    class: u16,
    number: u16,
}

impl Method {
    /// A message on its way to an exchange.
    pub const PUBLISH: Self = Self::basic(40);
    /// A message on its way to a consumer.
    pub const DELIVER: Self = Self::basic(60);
    /// To the server a consumer's ack, to the client a publisher's confirm.
    pub const ACK: Self = Self::basic(80);

    const fn basic(number: u16) -> Self {
        Self { class: 60, number }
    }
}

/// On which side of a method the wire is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The receiver does not get the method.
    Before,
    /// The receiver gets the method (without the content that may follow it), and nothing more.
    Behind,
}

/// A cut that waits for its method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) side: Side,
    pub(super) method: Method,
}

/// Follows the frames of one direction of one connection. What is no AMQP it takes for frames too: harmless unless a
/// cut is armed.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// The beginning of the present frame, as far as it is needed.
    head: Vec<u8>,
    /// How many bytes of the present frame are still to come, once its head is known.
    left: usize,
    /// The wire is to be cut at the end of the present frame.
    cut_at_end: bool,
}

impl Frames {
    /// Follows these bytes, and tells how many of them may pass if the cut is made in them.
    pub(super) fn cut_in(&mut self, bytes: &[u8], cut: Option<Cut>) -> Option<usize> {
        let mut at = 0;
        let mut frame_began_at = 0;
        while at < bytes.len() {
            if self.left > 0 {
                let step = self.left.min(bytes.len() - at);
                self.left -= step;
                at += step;
                if self.left == 0 && std::mem::take(&mut self.cut_at_end) {
                    return Some(at);
                }
                continue;
            }
            if self.head.is_empty() {
                frame_began_at = at;
            }
            self.head.push(bytes[at]);
            at += 1;
            let Some(method) = self.read_head() else { continue };
            match cut.filter(|cut| cut.method == method).map(|cut| cut.side) {
                // Its first bytes may have passed already: a piece of a frame is no method.
                Some(Side::Before) => return Some(frame_began_at),
                Some(Side::Behind) => self.cut_at_end = true,
                None => {}
            }
        }
        None
    }

    /// The frame's method, once the head is complete and if it is a method's.
    fn read_head(&mut self) -> Option<Method> {
        if self.head[0] == GREETING[0] {
            if self.head.len() == GREETING_BYTES {
                self.head.clear();
            }
            return None;
        }
        let [kind, _, _, a, b, c, d, rest @ ..] = self.head.as_slice() else { return None };
        // One more: every frame has an end mark.
        let size = u32::from_be_bytes([*a, *b, *c, *d]) as usize + 1;
        if *kind != METHOD_FRAME {
            self.left = size;
            self.head.clear();
            return None;
        }
        let [class_high, class_low, number_high, number_low] = *rest else { return None };
        let class = u16::from_be_bytes([class_high, class_low]);
        let number = u16::from_be_bytes([number_high, number_low]);
        self.left = size.saturating_sub(METHOD_BYTES);
        self.head.clear();
        Some(Method { class, number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A greeting, a heartbeat, a publication with header and body (in which an ack seems to be), and an ack.
    fn conversation() -> (Vec<u8>, usize, usize) {
        let frame = |kind: u8, payload: &[u8]| {
            let size = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
            [&[kind, 0, 1], size.as_slice(), payload, &[0xce]].concat()
        };
        let mut bytes = b"AMQP\0\0\x09\x01".to_vec();
        bytes.extend(frame(8, &[]));
        bytes.extend(frame(METHOD_FRAME, &[0, 60, 0, 40, 1, 2, 3]));
        bytes.extend(frame(2, &[0; 20]));
        bytes.extend(frame(3, &frame(METHOD_FRAME, &[0, 60, 0, 80])));
        let began = bytes.len();
        bytes.extend(frame(METHOD_FRAME, &[0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 7, 0]));
        let ended = bytes.len();
        bytes.extend(frame(8, &[]));
        (bytes, began, ended)
    }

    #[test]
    fn a_method_is_found_however_the_bytes_are_cut_into_pieces() {
        let (bytes, began, ended) = conversation();
        for (side, expected) in [(Side::Before, began), (Side::Behind, ended)] {
            for piece in [1, 3, 11, 64, bytes.len()] {
                let (mut frames, mut passed, mut cut_at) = (Frames::default(), 0, None);
                for chunk in bytes.chunks(piece) {
                    if let Some(at) = frames.cut_in(chunk, Some(Cut { side, method: Method::ACK })) {
                        cut_at = Some(passed + at);
                        break;
                    }
                    passed += chunk.len();
                }
                let cut_at = cut_at.expect("the ack is there");
                // In small pieces some of its head has passed before it is known what it is.
                let early = if side == Side::Before { 10 } else { 0 };
                assert!((expected..=expected + early).contains(&cut_at), "{side:?}, {piece}: {cut_at}, not {expected}");
                assert!(cut_at < ended || side == Side::Behind);
            }
        }
    }

    #[test]
    fn nothing_is_cut_unasked() {
        let (bytes, ..) = conversation();
        assert_eq!(Frames::default().cut_in(&bytes, None), None);
        let deliver = Some(Cut { side: Side::Before, method: Method::DELIVER });
        assert_eq!(Frames::default().cut_in(&bytes, deliver), None);
    }
}
