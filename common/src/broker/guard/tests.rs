use lapin::protocol::basic::{AMQPProperties, gen_properties, parse_properties};
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use proptest::prelude::*;

use super::*;

const FRAME_BYTES_MAX: usize = 32 * 1024;
const BODY: &[u8] = b"\x03\0\x01\0\0\0\x02hi\xCE";

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, 1][..], &length32(payload), payload, &[FRAME_END]].concat()
}

/// A content header of class basic for a body of two bytes.
fn header(properties: &[u8]) -> Vec<u8> {
    frame(HEADER, &[&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2][..], properties].concat())
}

fn written(properties: &AMQPProperties) -> Vec<u8> {
    gen_properties(properties)(Vec::new().into()).unwrap().into_inner().0
}

/// What passes of these bytes; however they are cut, the same.
fn passed(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let whole = {
        let mut output = Vec::new();
        Guard::new(FRAME_BYTES_MAX).feed(bytes, &mut output).map(|()| output)
    };
    for size in [1, 3, 11, 1000] {
        let (mut guard, mut output) = (Guard::new(FRAME_BYTES_MAX), Vec::new());
        let fed = bytes.chunks(size).try_for_each(|piece| guard.feed(piece, &mut output));
        match &whole {
            Ok(whole) => assert!(fed.is_ok() && output == *whole, "in pieces of {size}"),
            Err(error) => assert_eq!(fed.unwrap_err().to_string(), error.to_string(), "in pieces of {size}"),
        }
    }
    whole
}

/// The properties that pass, as the library reads them, between a method before and the body behind.
fn properties_passed(properties: &[u8]) -> AMQPProperties {
    let before = frame(METHOD, &[0, 20, 0, 11, 0, 0, 0, 0]);
    let output = passed(&[&before[..], &header(properties), BODY].concat()).unwrap();
    let inner = output.strip_prefix(&before[..]).and_then(|rest| rest.strip_suffix(BODY)).expect("both pass unchanged");
    let payload = &inner[HEAD_BYTES..inner.len() - 1];
    assert_eq!(inner, frame(HEADER, payload), "the size is right");
    let (rest, properties) = parse_properties(&payload[CONTENT_BYTES..]).unwrap();
    assert_eq!(rest, b"");
    properties
}

fn reason_in(properties: &AMQPProperties) -> Option<Withheld> {
    match properties.headers().as_ref()?.inner().get(WITHHELD_HEADER)? {
        AMQPValue::LongString(word) => Withheld::parse(word.as_bytes()),
        _ => None,
    }
}

/// A table with one value: so many lists within each other, written without recursion.
fn nested(depth: usize) -> Vec<u8> {
    let lists =
        (0..depth).rev().flat_map(|inner| [b"A", &u32::try_from(inner * 5).unwrap().to_be_bytes()[..]].concat());
    let entry: Vec<u8> = b"\x01x".iter().copied().chain(lists).collect();
    [&length32(&entry)[..], &entry].concat()
}

fn with_everything() -> AMQPProperties {
    let mut inner = FieldTable::default();
    inner.insert("count".into(), AMQPValue::LongLongInt(3));
    let mut death = FieldArray::default();
    death.push(AMQPValue::FieldTable(inner));
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("x-death", AMQPValue::FieldArray(death)),
        ("t", AMQPValue::Boolean(true)),
        ("b", AMQPValue::ShortShortInt(-1)),
        ("B", AMQPValue::ShortShortUInt(1)),
        ("s", AMQPValue::ShortInt(-1)),
        ("u", AMQPValue::ShortUInt(1)),
        ("I", AMQPValue::LongInt(-1)),
        ("i", AMQPValue::LongUInt(1)),
        ("f", AMQPValue::Float(1.0)),
        ("d", AMQPValue::Double(1.0)),
        ("T", AMQPValue::Timestamp(1)),
        ("S", AMQPValue::LongString("\u{e4}".into())),
        ("V", AMQPValue::Void),
    ] {
        headers.insert(name.into(), value);
    }
    AMQPProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("identity".into())
        .with_headers(headers)
        .with_delivery_mode(2)
        .with_priority(1)
        .with_correlation_id("c".into())
        .with_reply_to("r".into())
        .with_expiration("1".into())
        .with_message_id("m".into())
        .with_timestamp(1)
        .with_type("kind".into())
        .with_user_id("u".into())
        .with_app_id("a".into())
        .with_cluster_id("c".into())
}

#[test]
fn what_is_well_formed_passes_unchanged() {
    for properties in [AMQPProperties::default(), with_everything()] {
        assert_eq!(properties_passed(&written(&properties)), properties);
    }
    let heartbeat = frame(8, b"");
    assert_eq!(passed(&heartbeat).unwrap(), heartbeat);
}

#[test]
fn headers_are_withheld_when_they_are_too_deep_and_the_rest_of_the_properties_passes() {
    let with = |depth| [&[0b0010_0000, 0b1000_0000][..], &nested(depth), b"\x02id"].concat();
    let deepest = properties_passed(&with(NESTING_MAX - 1));
    assert_eq!(reason_in(&deepest), None);
    assert!(deepest.headers().as_ref().unwrap().inner().contains_key("x"));
    for depth in [NESTING_MAX, 2_000, 6_000] {
        let properties = properties_passed(&with(depth));
        assert_eq!(reason_in(&properties), Some(Withheld::TooDeep), "{depth}");
        assert_eq!(properties.message_id().as_ref().map(|id| id.as_str()), Some("id"), "{depth}");
    }
}

#[test]
fn headers_larger_than_a_frame_are_withheld() {
    for depth in [7_000, 26_000] {
        let properties = [&[0b0010_0000, 0][..], &nested(depth)].concat();
        assert_eq!(reason_in(&properties_passed(&properties)), Some(Withheld::TooLarge), "{depth}");
    }
}

#[test]
fn properties_that_the_library_cannot_read_are_withheld() {
    let headers = |table: &[u8]| [&[0b0010_0000, 0][..], &length32(table), table].concat();
    for (odd, what) in [
        (vec![0b1000_0000, 0, 1, 0xff], "a content type that is no text"),
        (headers(b"\x01\xffV"), "a name that is no text"),
        (headers(b"\x01aQ"), "an unknown type"),
        (headers(b"\x01aS\0\0\0\x09short"), "a string that is cut off"),
        (headers(b"\x01aA\0\0\0\x02I\0"), "a value that leaves its list"),
        (headers(b"\x05a"), "a name that leaves its table"),
        (vec![0, 0b10], "a flag that nothing has"),
        (vec![0, 0, 0], "more than there should be"),
        (vec![0], "less than there should be"),
    ] {
        assert!(!parse_properties(&odd[..]).is_ok_and(|(rest, _)| rest.is_empty()) || odd == [0, 0b10], "{what}");
        assert_eq!(reason_in(&properties_passed(&odd)), Some(Withheld::Malformed), "{what}");
    }
}

#[test]
fn names_that_others_have_chosen_are_made_text() {
    let deliver = |key: &[u8]| {
        frame(METHOD, &[&[0, 60, 0, 60, 3][..], b"tag", &[0; 9], b"\x02ex", &[length8(key)], key].concat())
    };
    assert_eq!(passed(&deliver(b"default.\xff\xfe")).unwrap(), deliver(b"default.??"));
    let text = deliver("default.\u{e4}".as_bytes());
    assert_eq!(passed(&text).unwrap(), text);
    let close = |said: &[u8]| frame(METHOD, &[&[0, 20, 0, 40, 1, 0x94, length8(said)][..], said, &[0; 4]].concat());
    assert_eq!(passed(&close(b"no \xe4")).unwrap(), close(b"no ?"));
}

#[test]
fn a_peer_that_keeps_to_nothing_is_left() {
    let said = |bytes: &[u8]| passed(bytes).unwrap_err().to_string();
    let tune = frame(METHOD, &[0, 10, 0, 30, 0, 0, 0, 0, 0x20, 0, 0, 0]);
    let body = |bytes: usize| frame(3, &vec![b'x'; bytes]);
    passed(&[&tune[..], &body(8192 - FRAME_EXTRA)].concat()).unwrap();
    assert!(said(&[&tune[..], &body(8192 - FRAME_EXTRA + 1)].concat()).contains("8193 bytes, where at most 8192"));
    assert!(said(b"HTTP/1.1 400 Bad Request\r\n\r\n").contains("no RabbitMQ"));
    assert!(said(b"\x01\0\0\0\0\0\x01\0\0").contains("without an end"));
    let greeting = frame(METHOD, &[&[0, 10, 0, 10, 0, 9][..], &nested(100)].concat());
    assert!(said(&greeting).contains("headers_too_deep"));
}

proptest! {
    /// Whatever passes of any bytes can be read by the library, and how they are cut makes no difference.
    #[test]
    fn what_passes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
        properties_passed(&bytes);
        let _ = passed(&bytes);
    }
}
