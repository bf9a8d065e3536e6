//! Questions to the broker that change nothing and whose refusals tell.
//!
//! RabbitMQ checks the right before the thing: a declaration with an argument that cannot be, or the removal of a binding
//! that is not there, is refused with 403 where the right lacks, and otherwise has no effect.

use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    ExchangeUnbindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ErrorKind, ExchangeKind};

use crate::broker::{BrokerError, within};

/// A key that no binding has.
const NO_KEY: &str = "tasklane.doctor.no-such-key";

/// What the broker answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// There, and as we would declare it; or allowed.
    Yes,
    /// Allowed, and not there.
    Missing,
    /// Not allowed.
    Refused,
    /// There, and not as we would declare it.
    Differs(String),
    /// Something else.
    Unclear(String),
}

/// Asks one question on a channel of its own, which a refusal closes.
async fn ask(connection: &Connection, question: impl AsyncFnOnce(&Channel) -> Result<(), BrokerError>) -> Answer {
    let channel = match within("channel.open", connection.create_channel()).await {
        Ok(channel) => channel,
        Err(error) => return Answer::Unclear(error.to_string()),
    };
    match question(&channel).await {
        Ok(()) => {
            // A channel that does not close goes with its connection.
            let _ = within("channel.close", channel.close(200, "done".into())).await;
            Answer::Yes
        }
        Err(BrokerError::Amqp(error)) => match error.kind() {
            ErrorKind::ProtocolError(said) => match said.get_id() {
                403 => Answer::Refused,
                404 => Answer::Missing,
                406 => Answer::Differs(said.get_message().to_string()),
                _ => Answer::Unclear(said.to_string()),
            },
            _ => Answer::Unclear(error.to_string()),
        },
        Err(error) => Answer::Unclear(error.to_string()),
    }
}

/// Whether an exchange is there as we would declare it, and may be declared.
pub(super) async fn exchange(connection: &Connection, name: &str, kind: ExchangeKind) -> Answer {
    let declare = async |passive, arguments: FieldTable| {
        let options = ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
        ask(connection, async |channel| {
            within("exchange.declare", channel.exchange_declare(name.into(), kind.clone(), options, arguments)).await
        })
        .await
    };
    match declare(true, FieldTable::default()).await {
        Answer::Yes => declare(false, FieldTable::default()).await,
        Answer::Missing => allowed(declare(false, one("alternate-exchange", AMQPValue::LongInt(0))).await),
        other => other,
    }
}

/// Whether a queue is there as we would declare it, a durable quorum queue, and may be declared.
pub(super) async fn queue(connection: &Connection, name: &str) -> Answer {
    let declare = async |passive, mut arguments: FieldTable| {
        let options = QueueDeclareOptions { durable: true, passive, ..QueueDeclareOptions::default() };
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        ask(connection, async |channel| {
            within("queue.declare", channel.queue_declare(name.into(), options, arguments)).await.map(drop)
        })
        .await
    };
    match declare(true, FieldTable::default()).await {
        Answer::Yes => declare(false, FieldTable::default()).await,
        Answer::Missing => allowed(declare(false, one("x-max-length", AMQPValue::LongInt(-1))).await),
        other => other,
    }
}

/// Whether a queue may be consumed. The broker gives nothing: it refuses the priority, which is no number.
pub(super) async fn consume(connection: &Connection, queue: &str) -> Answer {
    let answer = ask(connection, async |channel| {
        within("basic.qos", channel.basic_qos(1, BasicQosOptions::default())).await?;
        let arguments = one("x-priority", AMQPValue::LongString("none".into()));
        let options = BasicConsumeOptions::default();
        within("basic.consume", channel.basic_consume(queue.into(), "".into(), options, arguments)).await.map(drop)
    })
    .await;
    allowed(answer)
}

/// Whether a queue that may be consumed is served: its members are up. The consumer has no credit, so it is handed nothing.
/// Where the members are down the broker closes the whole connection.
pub(super) async fn serve(connection: &Connection, queue: &str) -> Answer {
    ask(connection, async |channel| {
        within("basic.qos", channel.basic_qos(1, BasicQosOptions::default())).await?;
        let mut credit = one("credit", AMQPValue::LongLongInt(0));
        credit.insert("drain".into(), AMQPValue::Boolean(false));
        let arguments = one("x-credit", AMQPValue::FieldTable(credit));
        let options = BasicConsumeOptions::default();
        within("basic.consume", channel.basic_consume(queue.into(), "".into(), options, arguments)).await.map(drop)
    })
    .await
}

/// Whether a queue may be bound to an exchange: write to the one, read from the other.
pub(super) async fn bind(connection: &Connection, queue: &str, exchange: &str) -> Answer {
    ask(connection, async |channel| {
        let unbound = channel.queue_unbind(queue.into(), exchange.into(), NO_KEY.into(), FieldTable::default());
        within("queue.unbind", unbound).await
    })
    .await
}

/// Whether an exchange may be published to, as far as another may be read.
pub(super) async fn publish(connection: &Connection, exchange: &str, other: &str) -> Answer {
    ask(connection, async |channel| {
        let (options, none) = (ExchangeUnbindOptions::default(), FieldTable::default());
        let unbound = channel.exchange_unbind(exchange.into(), other.into(), NO_KEY.into(), options, none);
        within("exchange.unbind", unbound).await
    })
    .await
}

/// Whether the default exchange may be published to, which leads notices to the producers; to a queue that is nowhere.
pub(super) async fn notify(connection: &Connection) -> Answer {
    ask(connection, async |channel| {
        within("confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let options = BasicPublishOptions::default();
        let published = channel.basic_publish("".into(), NO_KEY.into(), options, &[], BasicProperties::default());
        within("publisher confirm", within("basic.publish", published).await?).await.map(drop)
    })
    .await
}

/// The refusal of a senseless argument says that the right is there.
fn allowed(answer: Answer) -> Answer {
    if let Answer::Differs(_) = answer { Answer::Missing } else { answer }
}

fn one(key: &str, value: AMQPValue) -> FieldTable {
    let mut table = FieldTable::default();
    table.insert(key.into(), value);
    table
}
