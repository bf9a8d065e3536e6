//! The names of everything that Tasklane has in the broker. `rabbitmq/definitions.json` declares the same.

use std::fmt::Display;

use uuid::Uuid;

use crate::task::{Kind, Lane, Priority, QueueName};

/// The durable topic exchange that every task passes; operators may bind queues of their own to it.
pub const TASKS_EXCHANGE: &str = "tasklane.tasks";
/// The durable fanout exchange that dead letters pass.
pub const DEAD_EXCHANGE: &str = "tasklane.dead";
/// The durable fanout exchange for words to all workers; each has a queue of its own there.
pub const CONTROL_EXCHANGE: &str = "tasklane.control";
/// The durable topic exchange that events pass while somebody looks; operators may bind queues of their own to it.
pub const EVENTS_EXCHANGE: &str = "tasklane.events";
/// The durable queue that holds dead letters until a person looks at them.
pub const DEAD_QUEUE: &str = "tasklane.dead";
/// What the names of all task queues begin with.
pub const QUEUE_PREFIX: &str = "tasklane.q.";
/// The header of a dead letter that says why it is one.
pub const REASON_HEADER: &str = "tasklane-reason";

/// The broker's name of a lane's queue: `tasklane.q.<queue>`, `tasklane.q.<queue>.high`, `tasklane.q.<queue>.low`.
///
/// No queue has a dot in its name, so none has the name of another's lane.
#[must_use]
pub fn broker_queue(lane: &Lane) -> String {
    format!("{QUEUE_PREFIX}{lane}")
}

/// The queue in which one life of a worker, or a producer, hears words to all: `tasklane.control.<who>`.
#[must_use]
pub fn control_queue(who: impl Display) -> String {
    format!("{CONTROL_EXCHANGE}.{who}")
}

/// The queue from which a producer with listeners reads events: `tasklane.events.<uuid>`.
#[must_use]
pub fn events_queue(who: Uuid) -> String {
    format!("{EVENTS_EXCHANGE}.{who}")
}

/// What the names of the queues begin with in which producers hear of ends of tasks.
const REPLY_PREFIX: &str = "tasklane.reply.";

/// The queue in which a producer hears of ends of tasks that its clients wait for: `tasklane.reply.<uuid>`. A name of ours, not
/// the broker's `amq.gen-…`, so that permissions can be limited to `tasklane.*`.
#[must_use]
pub fn reply_queue(who: Uuid) -> String {
    format!("{REPLY_PREFIX}{who}")
}

/// Whether a message may have it for its `reply_to`: whoever can publish must not have workers write into any other queue.
#[must_use]
pub fn is_reply_queue(name: &str) -> bool {
    name.strip_prefix(REPLY_PREFIX).is_some_and(|who| Uuid::try_parse(who).is_ok())
}

/// The key under which an event is published: `<event>.<queue>.<kind>`.
#[must_use]
pub fn event_key(event: &str, queue: &QueueName, kind: &Kind) -> String {
    format!("{event}.{queue}.{kind}")
}

/// The key under which a task is published: `<queue>.<kind>`, `<queue>!high.<kind>`, `<queue>!low.<kind>`.
#[must_use]
pub fn routing_key(lane: &Lane, kind: &Kind) -> String {
    format!("{}.{kind}", first_word(lane))
}

/// The key by which a lane's queue is bound: `<queue>.#`, `<queue>!high.#`, `<queue>!low.#`.
#[must_use]
pub fn binding_key(lane: &Lane) -> String {
    format!("{}.#", first_word(lane))
}

/// What routing keys of a lane begin with. The lanes of one queue must differ in the first word: `<queue>.#` would match
/// any longer key. A queue's name has no exclamation mark.
fn first_word(lane: &Lane) -> String {
    match lane.priority {
        Priority::Normal => lane.queue.to_string(),
        other => format!("{}!{}", lane.queue, other.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::QueueName;
    use serde_json::{Value, json};

    #[test]
    fn only_reply_queues_are_replied_to() {
        assert!(is_reply_queue(&reply_queue(Uuid::now_v7())));
        for other in ["", "tasklane.reply.", "tasklane.reply.x", "tasklane.q.default", "amq.gen-x", "victim"] {
            assert!(!is_reply_queue(other), "{other}");
        }
    }

    /// What an operator imports and what the programs declare must be the same: a broker refuses a second declaration
    /// that differs from the first.
    #[test]
    fn the_definitions_declare_what_the_programs_declare() {
        let definitions: Value = serde_json::from_str(include_str!("../../rabbitmq/definitions.json")).unwrap();
        let named = |list: &str, name: &str| {
            let all = definitions[list].as_array().unwrap();
            all.iter().find(|entry| entry["name"] == name).cloned().unwrap_or_else(|| panic!("{list} lacks {name}"))
        };
        for (exchange, kind) in [
            (TASKS_EXCHANGE, "topic"),
            (DEAD_EXCHANGE, "fanout"),
            (CONTROL_EXCHANGE, "fanout"),
            (EVENTS_EXCHANGE, "topic"),
        ] {
            let declared = named("exchanges", exchange);
            assert_eq!((&declared["type"], &declared["durable"]), (&json!(kind), &json!(true)), "{exchange}");
        }
        let default = QueueName::default();
        for queue in Lane::all_of(&default).map(|lane| broker_queue(&lane)).chain([DEAD_QUEUE.to_owned()]) {
            let declared = named("queues", &queue);
            assert_eq!(declared["arguments"], json!({ "x-queue-type": "quorum" }), "{queue}");
            assert_eq!(declared["durable"], true, "{queue}");
        }
        let bound = |exchange: &str, queue: &str, key: &str| {
            definitions["bindings"].as_array().unwrap().iter().any(|binding| {
                binding["source"] == exchange && binding["destination"] == queue && binding["routing_key"] == key
            })
        };
        for lane in Lane::all_of(&default) {
            assert!(bound(TASKS_EXCHANGE, &broker_queue(&lane), &binding_key(&lane)), "{lane}");
        }
        assert!(bound(DEAD_EXCHANGE, DEAD_QUEUE, ""));
        let policed = definitions["policies"].as_array().unwrap().iter().any(|policy| {
            policy["pattern"].as_str().is_some_and(|pattern| pattern.contains(r"tasklane\.q\."))
                && policy["definition"]["dead-letter-exchange"] == DEAD_EXCHANGE
        });
        assert!(policed, "task queues need the policy with the dead-letter exchange");
    }

    /// What a topic exchange does with a key and a binding that ends in `.#`.
    fn matches(binding: &str, key: &str) -> bool {
        key.split('.').next() == binding.strip_suffix(".#")
    }

    #[test]
    fn a_task_goes_to_one_lane_of_one_queue() {
        let names = ["default", "default-high", "high", "low"].map(|name| QueueName::parse(name).unwrap());
        let lanes: Vec<Lane> = names.iter().flat_map(Lane::all_of).collect();
        let kind = Kind::parse("high.report.low").unwrap();
        for lane in &lanes {
            let key = routing_key(lane, &kind);
            let takers: Vec<_> = lanes.iter().filter(|other| matches(&binding_key(other), &key)).collect();
            assert_eq!(takers, [lane], "{key}");
        }
        let queues: std::collections::BTreeSet<_> = lanes.iter().map(broker_queue).collect();
        assert_eq!(queues.len(), lanes.len());
    }
}
