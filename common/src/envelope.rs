//! The message that carries a task: the body is the args as JSON, everything else is in the AMQP properties.
//!
//! A message may also carry a *bundle*: several tasks of one kind, as a JSON array of which each element is one of them.

use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::broker::guard::{WITHHELD_HEADER, Withheld};
use crate::ledger::Belief;
use crate::task::{Fence, Json, Kind, LedgerId, TaskId};

/// The version of the layout for one task, in the header [`VERSION_HEADER`].
pub const VERSION: i32 = 1;
/// The version of the layout for a bundle.
pub const BUNDLE_VERSION: i32 = 2;
/// The header with the layout's version.
pub const VERSION_HEADER: &str = "tasklane-version";
/// The header with the fence under which the message was published.
pub const FENCE_HEADER: &str = "tasklane-fence";
/// The header with the id of the ledger that has the tasks.
pub const LEDGER_HEADER: &str = "tasklane-ledger";
/// The header with the W3C trace context.
pub const TRACEPARENT_HEADER: &str = "traceparent";

const CONTENT_TYPE: &str = "application/json";
const PERSISTENT: u8 = 2;

/// A task as it travels through the broker.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    /// The task, as `message_id`.
    pub id: TaskId,
    /// The work, as `type`.
    pub kind: Kind,
    /// The handler's input, as the body.
    pub args: Json,
    /// The row's fence when the message was published, never below zero: an edit or a move since then voids it. Earlier
    /// releases wrote none.
    pub fence: Option<Fence>,
    /// W3C trace context of the submission.
    pub traceparent: Option<String>,
    /// The queue to which a notice goes when the task has ended.
    pub reply_to: Option<String>,
    /// The ledger that has the task. Earlier releases wrote none.
    pub ledger: Option<LedgerId>,
}

/// Why a message is not a task.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// The headers were not let through to this process.
    #[error("its headers are withheld: {}", .0.as_str())]
    Headers(Withheld),
    /// The version header is missing or not a number.
    #[error("no {VERSION_HEADER} header: not a message of Tasklane")]
    NoVersion,
    /// The layout is newer than this build.
    #[error("version {0} of the message layout is not known here")]
    UnknownVersion(i64),
    /// The `message_id` is missing or no UUID.
    #[error("message_id is not a task id")]
    BadId,
    /// The `type` is missing or not a kind.
    #[error("type is not a kind")]
    BadKind,
    /// The body is not JSON, or not that of a bundle.
    #[error("the body is not JSON, or no bundle of tasks")]
    BadArgs,
}

impl EnvelopeError {
    /// A short stable word for the reason header and metrics.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Headers(withheld) => withheld.as_str(),
            Self::NoVersion => "foreign_message",
            Self::UnknownVersion(_) => "unknown_version",
            Self::BadId => "bad_message_id",
            Self::BadKind => "bad_type",
            Self::BadArgs => "bad_body",
        }
    }
}

impl Envelope {
    /// What it says of its task, for the ledger to compare.
    #[must_use]
    pub fn belief(&self) -> Belief {
        Belief { kind: self.kind.clone(), published: self.fence, args: self.args.digest() }
    }

    /// The AMQP properties; the body is [`Envelope::args`] as it is.
    #[must_use]
    pub fn properties(&self) -> AMQPProperties {
        let mut headers = FieldTable::default();
        headers.insert(VERSION_HEADER.into(), AMQPValue::LongInt(VERSION));
        if let Some(fence) = self.fence {
            headers.insert(FENCE_HEADER.into(), AMQPValue::LongLongInt(fence.0));
        }
        if let Some(traceparent) = &self.traceparent {
            headers.insert(TRACEPARENT_HEADER.into(), AMQPValue::LongString(traceparent.as_str().into()));
        }
        let properties = properties_of(self.id, &self.kind, self.ledger, headers);
        match &self.reply_to {
            Some(queue) => properties.with_reply_to(queue.as_str().into()),
            None => properties,
        }
    }

    /// Reads a message back.
    ///
    /// # Errors
    /// [`EnvelopeError`] when it is not a task of a known layout.
    pub fn decode(properties: &AMQPProperties, body: &[u8]) -> Result<Self, EnvelopeError> {
        match version(properties)? {
            version if version == i64::from(VERSION) => {}
            version => return Err(EnvelopeError::UnknownVersion(version)),
        }
        let headers = properties.headers().as_ref().map(FieldTable::inner).ok_or(EnvelopeError::NoVersion)?;
        let id = text(properties.message_id()).and_then(|id| id.parse().ok()).ok_or(EnvelopeError::BadId)?;
        let kind = kind(properties)?;
        let args = std::str::from_utf8(body)
            .ok()
            .and_then(|body| Json::parse(body.to_owned()).ok())
            .ok_or(EnvelopeError::BadArgs)?;
        let traceparent = headers.get(TRACEPARENT_HEADER).and_then(|value| match value {
            AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok().map(str::to_owned),
            _ => None,
        });
        let fence = headers.get(FENCE_HEADER).and_then(integer).map(Fence).filter(|fence| fence.0 >= 0);
        let reply_to = text(properties.reply_to()).map(str::to_owned);
        Ok(Self { id, kind, args, fence, traceparent, reply_to, ledger: ledger_of(properties) })
    }
}

/// What a message carries.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// One task.
    Single(Envelope),
    /// Several tasks of one kind; at least one.
    Bundle(Vec<Envelope>),
}

/// A task in the body of a bundle.
#[derive(Serialize, Deserialize)]
struct Part {
    id: TaskId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fence: Option<Fence>,
    args: Json,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reply_to: Option<String>,
}

impl Message {
    /// The properties and the body of a bundle. All are of the kind and the ledger of the first, whose id is the message's.
    ///
    /// # Errors
    /// When there is no task, or one has no JSON form.
    pub fn bundle(envelopes: Vec<Envelope>) -> Result<(AMQPProperties, Vec<u8>), serde_json::Error> {
        let first = envelopes.first().ok_or_else(|| serde::ser::Error::custom("a bundle without a task"))?;
        let mut headers = FieldTable::default();
        headers.insert(VERSION_HEADER.into(), AMQPValue::LongInt(BUNDLE_VERSION));
        let properties = properties_of(first.id, &first.kind, first.ledger, headers);
        let parts: Vec<Part> = envelopes
            .into_iter()
            .map(|Envelope { id, fence, args, traceparent, reply_to, .. }| Part {
                id,
                fence,
                args,
                traceparent,
                reply_to,
            })
            .collect();
        Ok((properties, serde_json::to_vec(&parts)?))
    }

    /// Reads a message back.
    ///
    /// # Errors
    /// [`EnvelopeError`] when it is neither a task nor a bundle of a known layout.
    pub fn decode(properties: &AMQPProperties, body: &[u8]) -> Result<Self, EnvelopeError> {
        if version(properties)? != i64::from(BUNDLE_VERSION) {
            return Envelope::decode(properties, body).map(Self::Single);
        }
        let kind = kind(properties)?;
        let parts: Vec<Part> = serde_json::from_slice(body).map_err(|_| EnvelopeError::BadArgs)?;
        if parts.is_empty() {
            return Err(EnvelopeError::BadArgs);
        }
        let ledger = ledger_of(properties);
        let envelope = |Part { id, fence, args, traceparent, reply_to }| Envelope {
            id,
            kind: kind.clone(),
            args,
            fence: fence.filter(|fence| fence.0 >= 0),
            traceparent,
            reply_to,
            ledger,
        };
        Ok(Self::Bundle(parts.into_iter().map(envelope).collect()))
    }
}

/// The ledger that a message says it belongs to, whatever else is in it.
#[must_use]
pub fn ledger_of(properties: &AMQPProperties) -> Option<LedgerId> {
    match properties.headers().as_ref()?.inner().get(LEDGER_HEADER)? {
        AMQPValue::LongString(id) => Uuid::try_parse_ascii(id.as_bytes()).ok().map(LedgerId),
        _ => None,
    }
}

fn properties_of(id: TaskId, kind: &Kind, ledger: Option<LedgerId>, mut headers: FieldTable) -> AMQPProperties {
    if let Some(ledger) = ledger {
        headers.insert(LEDGER_HEADER.into(), AMQPValue::LongString(ledger.to_string().into()));
    }
    AMQPProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type(CONTENT_TYPE.into())
        .with_message_id(id.to_string().into())
        .with_type(kind.as_str().into())
        .with_headers(headers)
}

fn version(properties: &AMQPProperties) -> Result<i64, EnvelopeError> {
    let headers = properties.headers().as_ref().map(FieldTable::inner).ok_or(EnvelopeError::NoVersion)?;
    headers.get(VERSION_HEADER).and_then(integer).ok_or_else(|| {
        let withheld = headers.get(WITHHELD_HEADER).and_then(|reason| match reason {
            AMQPValue::LongString(reason) => Withheld::parse(reason.as_bytes()),
            _ => None,
        });
        withheld.map_or(EnvelopeError::NoVersion, EnvelopeError::Headers)
    })
}

fn kind(properties: &AMQPProperties) -> Result<Kind, EnvelopeError> {
    text(properties.kind()).and_then(|kind| Kind::parse(kind).ok()).ok_or(EnvelopeError::BadKind)
}

fn text(field: &Option<ShortString>) -> Option<&str> {
    field.as_ref().map(ShortString::as_str)
}

/// Any of AMQP's integer types, since other clients choose their own when they pass a message on.
fn integer(value: &AMQPValue) -> Option<i64> {
    match *value {
        AMQPValue::ShortShortInt(number) => Some(number.into()),
        AMQPValue::ShortShortUInt(number) => Some(number.into()),
        AMQPValue::ShortInt(number) => Some(number.into()),
        AMQPValue::ShortUInt(number) => Some(number.into()),
        AMQPValue::LongInt(number) => Some(number.into()),
        AMQPValue::LongUInt(number) => Some(number.into()),
        AMQPValue::LongLongInt(number) => Some(number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn envelope() -> Envelope {
        Envelope {
            id: TaskId::new(),
            kind: Kind::parse("report.build").unwrap(),
            args: Json::parse(r#"{"n": 1}"#.to_owned()).unwrap(),
            fence: Some(Fence(7)),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
            reply_to: Some("amq.gen-x".to_owned()),
            ledger: Some(LedgerId(Uuid::now_v7())),
        }
    }

    #[test]
    fn what_is_sent_is_what_arrives() {
        let sent = envelope();
        assert_eq!(Envelope::decode(&sent.properties(), sent.args.as_str().as_bytes()), Ok(sent));
        let earlier = Envelope { fence: None, ledger: None, ..envelope() };
        assert_eq!(Envelope::decode(&earlier.properties(), earlier.args.as_str().as_bytes()), Ok(earlier));
    }

    #[test]
    fn foreign_messages_are_named() {
        let sent = envelope();
        let decode =
            |properties: AMQPProperties, body: &[u8]| Envelope::decode(&properties, body).unwrap_err().reason();
        assert_eq!(decode(AMQPProperties::default(), b"{}"), "foreign_message");
        assert_eq!(decode(sent.properties().with_message_id("x".into()), b"{}"), "bad_message_id");
        assert_eq!(decode(sent.properties().with_type("no kind".into()), b"{}"), "bad_type");
        assert_eq!(decode(sent.properties(), b"{"), "bad_body");
        assert_eq!(decode(sent.properties(), b"\xff"), "bad_body");
    }

    #[test]
    fn a_bundle_that_is_sent_is_the_one_that_arrives() {
        let ledger = envelope().ledger;
        let sent: Vec<Envelope> = (0..3).map(|_| Envelope { id: TaskId::new(), ledger, ..envelope() }).collect();
        let (properties, body) = Message::bundle(sent.clone()).unwrap();
        assert_eq!(Message::decode(&properties, &body), Ok(Message::Bundle(sent.clone())));
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), sent[0].id.to_string());
        for odd in [&b"[]"[..], b"{}", b"[1]", b"[{\"id\": 3}]"] {
            assert_eq!(Message::decode(&properties, odd), Err(EnvelopeError::BadArgs));
        }
        assert!(Message::bundle(Vec::new()).is_err());
        let single = envelope();
        assert_eq!(
            Message::decode(&single.properties(), b"{}"),
            Envelope::decode(&single.properties(), b"{}").map(Message::Single)
        );
    }

    proptest! {
        /// No body makes the decoder panic, and only JSON passes.
        #[test]
        fn any_body_is_survived(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let json = serde_json::from_slice::<serde_json::Value>(&body).is_ok();
            prop_assert_eq!(Envelope::decode(&envelope().properties(), &body).is_ok(), json);
        }
    }
}
