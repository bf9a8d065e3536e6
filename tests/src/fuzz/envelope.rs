//! Messages of the broker: the properties as they are on the wire, and the body after them.

use std::io::Cursor;

use lapin::protocol::basic::{AMQPProperties, gen_properties, parse_properties};
use tasklane_common::envelope::{Envelope, EnvelopeError, Message};
use tasklane_common::task::{Json, KIND_BYTES_MAX, Kind, TaskId};

/// The broker's `frame_max`, which holds all properties of a message.
const FRAME_BYTES_MAX: usize = 128 * 1024;
/// How deep the headers are nested here. The parser is that of the AMQP library and recurses without a limit: what fills
/// a frame, 26,000 deep, overflows its stack.
const NESTING_MAX: usize = 100;
/// The longest input taken for properties, so that no mutation nests them too deep either.
const PARSED_BYTES_MAX: usize = 4096;
/// What one list around another takes.
const NESTING_BYTES: usize = 5;

/// Decodes a message, and the input as the body of a good message. What is decoded is the same after it was sent on.
pub fn envelope(input: &[u8]) {
    if input.len() <= PARSED_BYTES_MAX
        && let Ok((body, properties)) = parse_properties(input)
    {
        check(Message::decode(&properties, body));
    }
    let Ok(kind) = Kind::parse("report.build") else { return };
    let good = Envelope { id: TaskId::new(), kind, args: Json::null(), fence: None, traceparent: None, reply_to: None };
    let decoded = Message::decode(&good.properties(), input);
    assert_eq!(decoded.is_ok(), serde_json::from_slice::<&serde_json::value::RawValue>(input).is_ok(), "{decoded:?}");
    check(decoded);
    if let Ok((properties, _)) = Message::bundle(vec![good]) {
        check(Message::decode(&properties, input));
    }
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

/// Lists within lists in the headers, and bodies deep and at their limit.
pub(super) fn large() -> Vec<Vec<u8>> {
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth)).into_bytes();
    vec![nested(16), nested(NESTING_MAX), deep(127), deep(100_000), vec![b'9'; 1024 * 1024]]
}

/// Properties that are nothing but a header of lists within lists.
fn nested(depth: usize) -> Vec<u8> {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
    let list = |inner: usize| [b"A", length(inner * NESTING_BYTES).as_slice()].concat();
    let table: Vec<u8> = b"\x01a".iter().copied().chain((0..depth).rev().flat_map(list)).collect();
    [&[0b0010_0000, 0][..], &length(table.len()), &table].concat()
}
