//! The other processes on the broker: whether they have the same ledger.

use std::collections::BTreeSet;

use super::policies::{Connected, Management, unreachable};
use super::{Finding, Subject};
use crate::broker::LEDGER_PROPERTY;
use crate::task::LedgerId;

const CHECK: &str = "broker.ledgers";
/// How many processes are named.
const NAMED_MAX: usize = 5;

/// Of this ledger, or of none that is there yet.
pub(super) async fn look(subject: &Subject, own: Option<LedgerId>) -> Finding {
    let management = Management::new(&subject.common.amqp_url, subject.common.management_url.as_ref());
    let management = match management {
        Ok(management) => management,
        Err(error) => return unreachable(CHECK.to_owned(), "management_url", &error),
    };
    match management.connections().await {
        Ok(connections) => judge(&connections, own),
        Err(error) => unreachable(CHECK.to_owned(), management.place(), &error),
    }
}

fn judge(connections: &[Connected], own: Option<LedgerId>) -> Finding {
    let own = own.map(|id| id.to_string());
    let told = connections.iter().filter_map(|connection| {
        let property = |key| connection.client_properties.get(key).and_then(|value| value.as_str());
        Some((property(LEDGER_PROPERTY)?, property("connection_name").unwrap_or("?"), connection))
    });
    let (same, others): (Vec<_>, Vec<_>) = told.partition(|(ledger, ..)| own.as_deref() == Some(*ledger));
    if others.is_empty() {
        return Finding::ok(CHECK, format!("{} connections of this ledger's processes, none of another's", same.len()));
    }
    let ledgers: BTreeSet<_> = others.iter().map(|(ledger, ..)| *ledger).collect();
    let named = others.iter().take(NAMED_MAX).map(|(ledger, name, connection)| {
        format!("{name} from {} has {ledger}", connection.peer_host.as_str().unwrap_or("?"))
    });
    let named = named.collect::<Vec<_>>().join("; ");
    let (count, own) = (others.len(), own.as_deref().unwrap_or("not there yet"));
    Finding::warn(
        CHECK,
        format!("this ledger is {own}, and {count} connections are of {} others: {named}", ledgers.len()),
        "is ledger_url the same everywhere? Ledgers that belong apart need a virtual host each",
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use uuid::Uuid;

    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn processes_of_another_ledger_are_named() {
        let (own, other) = (LedgerId(Uuid::now_v7()), LedgerId(Uuid::now_v7()));
        let of =
            |ledger: LedgerId| json!({"connection_name": "tasklane worker 7", LEDGER_PROPERTY: ledger.to_string()});
        let judged = |properties: &[Value], own| {
            let connected = |client_properties: &Value| Connected {
                client_properties: client_properties.clone(),
                peer_host: json!("10.0.0.7"),
            };
            judge(&properties.iter().map(connected).collect::<Vec<_>>(), own)
        };
        let strangers = [json!([]), json!({"connection_name": 7}), json!({LEDGER_PROPERTY: 7}), Value::Null];
        assert_eq!(judged(&strangers, Some(own)).verdict, Verdict::Ok);
        assert_eq!(judged(&[of(own)], Some(own)).verdict, Verdict::Ok);
        let warned = judged(&[of(own), of(other)], Some(own));
        assert_eq!(warned.verdict, Verdict::Warn);
        assert!(
            warned.message.contains("1 connections are of 1 others: tasklane worker 7 from 10.0.0.7"),
            "{warned:?}"
        );
        assert_eq!(judged(&[of(other)], None).verdict, Verdict::Warn);
    }
}
