//! The message that carries a task: the body is the args as JSON, everything else is in the AMQP properties.

use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::task::{Fence, Json, Kind, TaskId};

/// The version of this layout, in the header [`VERSION_HEADER`].
pub const VERSION: i32 = 1;
/// The header with the layout's version.
pub const VERSION_HEADER: &str = "tasklane-version";
/// The header with the fence under which the message was published.
pub const FENCE_HEADER: &str = "tasklane-fence";
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
    /// The row's fence when the message was published: an edit or a move since then voids it. Earlier releases wrote none.
    pub fence: Option<Fence>,
    /// W3C trace context of the submission.
    pub traceparent: Option<String>,
    /// The queue to which a notice goes when the task has ended.
    pub reply_to: Option<String>,
}

/// Why a message is not a task.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
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
    /// The body is not JSON.
    #[error("the body is not JSON")]
    BadArgs,
}

impl EnvelopeError {
    /// A short stable word for the reason header and metrics.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoVersion => "foreign_message",
            Self::UnknownVersion(_) => "unknown_version",
            Self::BadId => "bad_message_id",
            Self::BadKind => "bad_type",
            Self::BadArgs => "bad_body",
        }
    }
}

impl Envelope {
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
        let properties = AMQPProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type(CONTENT_TYPE.into())
            .with_message_id(self.id.to_string().into())
            .with_type(self.kind.as_str().into())
            .with_headers(headers);
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
        let headers = properties.headers().as_ref().map(FieldTable::inner).ok_or(EnvelopeError::NoVersion)?;
        match headers.get(VERSION_HEADER).and_then(integer) {
            Some(version) if version == i64::from(VERSION) => {}
            Some(version) => return Err(EnvelopeError::UnknownVersion(version)),
            None => return Err(EnvelopeError::NoVersion),
        }
        let id = text(properties.message_id()).and_then(|id| id.parse().ok()).ok_or(EnvelopeError::BadId)?;
        let kind = text(properties.kind()).and_then(|kind| Kind::parse(kind).ok()).ok_or(EnvelopeError::BadKind)?;
        let args = std::str::from_utf8(body)
            .ok()
            .and_then(|body| Json::parse(body.to_owned()).ok())
            .ok_or(EnvelopeError::BadArgs)?;
        let traceparent = headers.get(TRACEPARENT_HEADER).and_then(|value| match value {
            AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok().map(str::to_owned),
            _ => None,
        });
        let fence = headers.get(FENCE_HEADER).and_then(integer).map(Fence);
        Ok(Self { id, kind, args, fence, traceparent, reply_to: text(properties.reply_to()).map(str::to_owned) })
    }
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
        }
    }

    #[test]
    fn what_is_sent_is_what_arrives() {
        let sent = envelope();
        assert_eq!(Envelope::decode(&sent.properties(), sent.args.as_str().as_bytes()), Ok(sent));
        let earlier = Envelope { fence: None, ..envelope() };
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

    proptest! {
        /// No body makes the decoder panic, and only JSON passes.
        #[test]
        fn any_body_is_survived(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let json = serde_json::from_slice::<serde_json::Value>(&body).is_ok();
            prop_assert_eq!(Envelope::decode(&envelope().properties(), &body).is_ok(), json);
        }
    }
}
