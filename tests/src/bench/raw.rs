//! What the broker alone does: one message a task, confirmed publishes and acked deliveries of a durable quorum queue.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use tokio::time::Instant;

use super::percentile;
use crate::vhost::Vhost;
use crate::wait::within;

const QUEUE: &str = "bench.raw";
/// How long one measurement may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How many publications wait for their confirms.
const UNCONFIRMED_MAX: usize = 1_000;
/// How many deliveries are unacked, and how many one ack covers.
const PREFETCH: u16 = 1_000;
const ACKED_AT_ONCE: usize = 64;

/// Two connections, one for each direction, and an empty queue.
#[derive(Debug)]
pub struct Raw {
    publisher: Channel,
    consumer: Channel,
    _connections: [Connection; 2],
}

impl Raw {
    /// On a vhost of its own.
    pub async fn on(vhost: &Vhost) -> Result<Self> {
        let connect = async || {
            within(LIMIT, "connecting", Connection::connect(&vhost.url(), ConnectionProperties::default()))
                .await?
                .context("connecting")
        };
        let connections = [connect().await?, connect().await?];
        let publisher = connections[0].create_channel().await?;
        publisher.confirm_select(ConfirmSelectOptions::default()).await?;
        let consumer = connections[1].create_channel().await?;
        consumer.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        consumer.queue_declare(QUEUE.into(), durable, arguments).await?;
        Ok(Self { publisher, consumer, _connections: connections })
    }

    /// Messages a second, published and consumed at once.
    pub async fn both(&self, messages: usize, body: &[u8]) -> Result<f64> {
        let mut consumer = self.consume("both").await?;
        let begun = Instant::now();
        let both = async { tokio::try_join!(self.publish(messages, body), self.take(&mut consumer, messages)) };
        within(LIMIT, "raw messages", both).await??;
        let rate = messages as f64 / begun.elapsed().as_secs_f64();
        self.consumer.basic_cancel("both".into(), Default::default()).await?;
        Ok(rate)
    }

    /// Messages a second, consumed out of a backlog.
    pub async fn drain(&self, messages: usize, body: &[u8]) -> Result<f64> {
        within(LIMIT, "a raw backlog", self.publish(messages, body)).await??;
        let begun = Instant::now();
        let mut consumer = self.consume("drain").await?;
        within(LIMIT, "draining", self.take(&mut consumer, messages)).await??;
        let rate = messages as f64 / begun.elapsed().as_secs_f64();
        self.consumer.basic_cancel("drain".into(), Default::default()).await?;
        Ok(rate)
    }

    /// The median of the times from publish to delivery, one after the other, in milliseconds.
    pub async fn latency(&self, messages: usize, body: &[u8]) -> Result<f64> {
        let mut consumer = self.consume("latency").await?;
        let mut times = Vec::with_capacity(messages);
        for _ in 0..messages {
            let begun = Instant::now();
            let published = self.send(body).await?;
            within(LIMIT, "a raw message", self.take(&mut consumer, 1)).await??;
            times.push(begun.elapsed());
            published.await?;
        }
        self.consumer.basic_cancel("latency".into(), Default::default()).await?;
        times.sort_unstable();
        Ok(percentile(&times, 0.5))
    }

    async fn consume(&self, tag: &str) -> Result<Consumer> {
        let options = BasicConsumeOptions::default();
        Ok(self.consumer.basic_consume(QUEUE.into(), tag.into(), options, FieldTable::default()).await?)
    }

    async fn send(&self, body: &[u8]) -> Result<impl Future<Output = Result<()>> + use<>> {
        let durable = BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions::default();
        let confirm = self.publisher.basic_publish("".into(), QUEUE.into(), options, body, durable).await?;
        Ok(async move {
            ensure!(confirm.await?.is_ack(), "the broker refused a message");
            Ok(())
        })
    }

    async fn publish(&self, messages: usize, body: &[u8]) -> Result<()> {
        let mut unconfirmed = VecDeque::with_capacity(UNCONFIRMED_MAX);
        for _ in 0..messages {
            if unconfirmed.len() >= UNCONFIRMED_MAX
                && let Some(oldest) = unconfirmed.pop_front()
            {
                oldest.await?;
            }
            unconfirmed.push_back(self.send(body).await?);
        }
        for confirm in unconfirmed {
            confirm.await?;
        }
        Ok(())
    }

    async fn take(&self, consumer: &mut Consumer, messages: usize) -> Result<()> {
        for taken in 1..=messages {
            let delivery = consumer.next().await.context("the consumer has ended")??;
            if taken % ACKED_AT_ONCE == 0 || taken == messages {
                delivery.ack(BasicAckOptions { multiple: true }).await?;
            }
        }
        Ok(())
    }
}
