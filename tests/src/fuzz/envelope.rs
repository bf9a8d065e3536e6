//! Messages of the broker: the properties as they are on the wire, and the body after them.

use std::io::Cursor;

use lapin::protocol::basic::{AMQPProperties, gen_properties, parse_properties};
use tasklane_common::broker::guard::Guard;
use tasklane_common::envelope::{Envelope, EnvelopeError, Message};
use tasklane_common::task::{Json, KIND_BYTES_MAX, Kind, TaskId};

/// The broker's `frame_max`, which holds all properties of a message.
const FRAME_BYTES_MAX: usize = 128 * 1024;
/// As much nesting as a frame has room for. The AMQP library's parser recurses without a limit, and would overflow its
/// stack: what keeps that from it is under test here.
const NESTING_MAX: usize = 26_000;
/// What one list around another takes.
const NESTING_BYTES: usize = 5;

/// Decodes a message, and the input as the body of a good message. What is decoded is the same after it was sent on.
pub fn envelope(input: &[u8]) {
    // The shortest part that is properties as a whole, and the rest as the body; or all of it, which must be readable too.
    let properties_bytes = parse_shallow(input).unwrap_or(input.len());
    let (properties, body) = input.split_at(properties_bytes);
    if let Some(properties) = through_the_guard(properties) {
        check(Message::decode(&properties, body));
    }
    let Ok(kind) = Kind::parse("report.build") else { return };
    let (args, ledger) = (Json::null(), None);
    let good = Envelope { id: TaskId::new(), kind, args, fence: None, traceparent: None, reply_to: None, ledger };
    let decoded = Message::decode(&good.properties(), input);
    assert_eq!(decoded.is_ok(), serde_json::from_slice::<&serde_json::value::RawValue>(input).is_ok(), "{decoded:?}");
    check(decoded);
    if let Ok((properties, _)) = Message::bundle(vec![good]) {
        check(Message::decode(&properties, input));
    }
}

/// How many bytes the properties at the beginning have, if they can be read without risk.
fn parse_shallow(input: &[u8]) -> Option<usize> {
    let is_shallow = input.iter().filter(|byte| matches!(byte, b'A' | b'F')).count() <= 100;
    let (rest, _) = parse_properties(is_shallow.then_some(input)?).ok()?;
    Some(input.len() - rest.len())
}

/// What the AMQP library makes of these properties behind the guard; `None` when they have no room in a frame at all.
fn through_the_guard(properties: &[u8]) -> Option<AMQPProperties> {
    const CONTENT: [u8; 12] = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const HEAD_BYTES: usize = 7;
    let size = u32::try_from(CONTENT.len() + properties.len()).ok()?;
    let frame = [&[2, 0, 1][..], &size.to_be_bytes(), &CONTENT, properties, &[0xCE]].concat();
    let (mut guard, mut passed) = (Guard::new(FRAME_BYTES_MAX), Vec::new());
    for piece in frame.chunks(1 + frame.len() / 3) {
        assert!(guard.feed(piece, &mut passed).is_ok(), "a content header of a good size is refused");
    }
    let payload = &passed[HEAD_BYTES..passed.len() - 1];
    assert_eq!(u32::from_be_bytes([passed[3], passed[4], passed[5], passed[6]]) as usize, payload.len());
    let read = parse_properties(&payload[CONTENT.len()..]);
    assert!(matches!(&read, Ok((rest, _)) if rest.is_empty()), "it cannot be read: {read:?}");
    read.ok().map(|(_, properties)| properties)
}

fn check(decoded: Result<Message, EnvelopeError>) {
    match decoded {
        Ok(Message::Single(envelope)) => check_way(&envelope),
        Ok(Message::Bundle(envelopes)) => {
            assert!(!envelopes.is_empty());
            let again =
                Message::bundle(envelopes.clone()).map(|(properties, body)| Message::decode(&properties, &body));
            assert!(matches!(again, Ok(Ok(Message::Bundle(same))) if same == envelopes), "a bundle changes on its way");
        }
        Err(error) => assert!(error.to_string().len() < 256 && error.reason().len() < 32, "{error}"),
    }
}

/// To the wire and back.
fn check_way(sent: &Envelope) {
    assert!(sent.kind.as_str().len() <= KIND_BYTES_MAX);
    let written = wire(&sent.properties());
    let longest = sent.traceparent.as_ref().map_or(0, String::len);
    assert!(written.is_some() || longest > FRAME_BYTES_MAX / 2, "it cannot be written: {sent:?}");
    let Some(written) = written else { return };
    let read = parse_properties(written.as_slice());
    assert!(matches!(&read, Ok((rest, _)) if rest.is_empty()), "it cannot be read: {read:?}");
    if let Ok((_, properties)) = read {
        assert_eq!(Envelope::decode(&properties, sent.args.as_str().as_bytes()).as_ref(), Ok(sent));
    }
}

/// `None` when they have no room in a frame.
fn wire(properties: &AMQPProperties) -> Option<Vec<u8>> {
    let mut frame = vec![0; FRAME_BYTES_MAX];
    let (_, end) = gen_properties(properties)(Cursor::new(frame.as_mut_slice()).into()).ok()?.into_inner();
    frame.truncate(usize::try_from(end).ok()?);
    Some(frame)
}

/// Lists within lists in the headers, deeper than a stack and larger than a frame, and bodies deep and at their limit.
pub(super) fn large() -> Vec<Vec<u8>> {
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth)).into_bytes();
    vec![
        nested(16),
        nested(100),
        nested(NESTING_MAX),
        nested(NESTING_MAX * 2),
        deep(127),
        deep(100_000),
        vec![b'9'; 1024 * 1024],
    ]
}

/// Properties that are nothing but a header of lists within lists.
fn nested(depth: usize) -> Vec<u8> {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
    let list = |inner: usize| [b"A", length(inner * NESTING_BYTES).as_slice()].concat();
    let table: Vec<u8> = b"\x01a".iter().copied().chain((0..depth).rev().flat_map(list)).collect();
    [&[0b0010_0000, 0][..], &length(table.len()), &table].concat()
}
