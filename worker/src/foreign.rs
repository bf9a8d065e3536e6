//! Messages of another ledger: they go behind all others of their queue, where the workers of that ledger find them.
//!
//! Whether such a task may run nobody here can say, and the ledger has no row to put it back by. The message rests here for a
//! while, longer each time, so that two workers do not toss it to and fro; it takes no place meanwhile.

use std::time::Duration;

use lapin::types::{AMQPValue, FieldTable};
use tasklane_common::seldom::Seldom;
use tasklane_common::task::LedgerId;
use tokio::time::sleep;

use crate::delivery::Delivery;
use crate::life::Life;

/// How often a message was handed back.
const TIMES_HEADER: &str = "tasklane-handed-back";
/// What the broker adds when it delivers.
const OF_THE_BROKER: [&str; 2] = ["x-delivery-count", "x-acquired-count"];
/// How long a message rests, more or less, before it is handed back for the first time.
const REST_FIRST: Duration = Duration::from_millis(500);
/// A consumer that rests on all its messages for longer looks stuck to the lookout.
const REST_MAX: Duration = Duration::from_secs(4);

/// Each is one of many.
static TOLD: Seldom = Seldom::once_in(Duration::from_secs(60));

/// Hands back a message of another ledger.
pub(crate) async fn hand_back(life: &Life, delivery: Delivery, body: Vec<u8>, ledger: LedgerId) {
    metrics::counter!("tasklane_claims_refused_total", "reason" => "other_ledger").increment(1);
    if let Some(left_out) = TOLD.admit() {
        let (queue, theirs) = (&delivery.lane, ledger);
        tracing::warn!(
            %queue, ledger = %theirs, left_out,
            "a message belongs to another ledger than {}: is `ledger_url` the producer's? Handed back", life.ledger.place()
        );
    }
    let given = delivery.properties.headers().clone().unwrap_or_default();
    let times = times(&given);
    tokio::select! {
        () = sleep(rest(times).mul_f64(0.5 + rand::random::<f64>())) => {}
        () = life.draining.cancelled() => {}
    }
    delivery.go_last(&body, once_more(&given, times)).await;
}

fn times(headers: &FieldTable) -> u32 {
    match headers.inner().get(TIMES_HEADER) {
        Some(AMQPValue::LongUInt(times)) => *times,
        _ => 0,
    }
}

fn once_more(headers: &FieldTable, times: u32) -> FieldTable {
    let mut counted = FieldTable::default();
    for (key, value) in headers.inner().iter().filter(|(key, _)| !OF_THE_BROKER.contains(&key.as_str())) {
        counted.insert(key.clone(), value.clone());
    }
    counted.insert(TIMES_HEADER.into(), AMQPValue::LongUInt(times.saturating_add(1)));
    counted
}

fn rest(times: u32) -> Duration {
    REST_FIRST.saturating_mul(2_u32.saturating_pow(times)).min(REST_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_rests_longer_each_time_and_keeps_its_headers() {
        assert_eq!(
            [0, 1, 2, 3, 9, u32::MAX].map(|times| rest(times).as_millis()),
            [500, 1_000, 2_000, 4_000, 4_000, 4_000]
        );
        let mut headers = FieldTable::default();
        headers.insert("tasklane-version".into(), AMQPValue::LongInt(1));
        headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(7));
        let second = once_more(&once_more(&headers, times(&headers)), 1);
        assert_eq!(times(&second), 2);
        let keys: Vec<_> = second.inner().keys().map(|key| key.as_str()).collect();
        assert_eq!(keys, ["tasklane-handed-back", "tasklane-version"]);
    }
}
