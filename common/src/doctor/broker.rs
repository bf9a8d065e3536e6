//! The broker: whether it lets us in, is new enough, and has what we declare.

use std::net::IpAddr;

use lapin::{Connection, ExchangeKind};
use secrecy::ExposeSecret;
use tokio::time::timeout;

use super::greeting::{self, numbers};
use super::policies::{self, Management};
use super::probe::{self, Answer};
use super::{Finding, LOOK_LIMIT, Role, Subject};
use crate::broker::{self, Address, BrokerError, HEARTBEAT};
use crate::task::Lane;
use crate::topology::{CONTROL_EXCHANGE, DEAD_EXCHANGE, DEAD_QUEUE, EVENTS_EXCHANGE, TASKS_EXCHANGE, broker_queue};

/// The oldest release with all that is used.
const VERSION_MIN: (u32, u32) = (3, 10);
/// Releases before this one get no fixes from the community any more.
const VERSION_SUPPORTED: (u32, u32) = (4, 0);

pub(super) async fn look(subject: &Subject) -> Vec<Finding> {
    let address = &subject.common.amqp_url;
    let mut findings = transport(address);
    let connected = timeout(LOOK_LIMIT, broker::connect(address, "tasklane doctor", HEARTBEAT)).await;
    let connection = match connected.unwrap_or(Err(BrokerError::Ended("no answer within 5 s"))) {
        Ok(connection) => connection,
        Err(error) => {
            findings.push(no_connection(address, &error));
            return findings;
        }
    };
    findings.push(Finding::ok("broker.connection", format!("{address} lets us in")));
    let management = Management::new(address, subject.common.management_url.as_ref());
    let version = find_version(address, &management).await;
    findings.push(judge_version(version.as_deref()));
    match timeout(LOOK_LIMIT, topology(&connection, subject)).await {
        Ok(seen) => {
            findings.extend(seen);
            findings.extend(timeout(LOOK_LIMIT, unserved(subject)).await.unwrap_or_default());
        }
        Err(_) => findings.push(Finding::fail(
            "broker.topology",
            "the broker stopped answering: it took more than 5 s",
            "have all queues a leader (rabbitmq-queues quorum_status)? Is an alarm raised?",
        )),
    }
    // What was asked is answered; the process ends soon.
    let _ = timeout(LOOK_LIMIT / 5, connection.close(200, "done".into())).await;
    findings.extend(look_at_policies(management, subject, version.as_deref()).await);
    findings
}

async fn look_at_policies(
    management: Result<Management, String>,
    subject: &Subject,
    version: Option<&str>,
) -> Vec<Finding> {
    let management = match management {
        Ok(management) => management,
        Err(error) => return vec![policies::unreachable("broker.policies".to_owned(), "management_url", &error)],
    };
    // One look instead of one for each queue: an API that is away is away for all of them.
    if let Err(error) = management.version().await {
        return vec![policies::unreachable("broker.policies".to_owned(), management.place(), &error)];
    }
    let major = policies::major(version);
    let looking = async {
        let mut findings = Vec::new();
        for lane in subject.queues.iter().flat_map(Lane::all_of) {
            findings.extend(management.look(&broker_queue(&lane), major, &subject.role).await);
        }
        findings
    };
    timeout(LOOK_LIMIT, looking).await.unwrap_or_else(|_| {
        vec![policies::unreachable("broker.policies".to_owned(), management.place(), "no answer within 5 s")]
    })
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|addr| addr.is_loopback())
}

fn transport(address: &Address) -> Vec<Finding> {
    let near = is_loopback(address.host());
    let mut findings = vec![if address.is_tls() {
        Finding::ok("broker.transport", "TLS")
    } else if near {
        Finding::ok("broker.transport", "plain, on this machine only")
    } else {
        Finding::warn(
            "broker.transport",
            format!("password and tasks go to {} unencrypted", address.host()),
            "amqps://, unless the network between is yours alone",
        )
    }];
    if !near && address.user() == "guest" && address.password().expose_secret() == "guest" {
        findings.push(Finding::warn(
            "broker.credentials",
            "the user that every RabbitMQ begins with, from another machine",
            "a user of its own, with permissions on tasklane.* (rabbitmq/README.md)",
        ));
    }
    findings
}

fn no_connection(address: &Address, error: &BrokerError) -> Finding {
    let check = "broker.connection";
    match error {
        BrokerError::Denied { what, error, .. } => {
            Finding::fail(check, format!("{address}: {error}"), format!("{what}?"))
        }
        BrokerError::Connect { error, .. } => {
            let advice = if address.is_tls() {
                "is the broker up, and is this its TLS port? An authority of your own is named by ?cacertfile="
            } else {
                "is the broker up, and is this its AMQP port?"
            };
            Finding::fail(check, format!("{address}: {error}"), advice)
        }
        error => Finding::fail(check, format!("{address}: {error}"), "is this the AMQP port of a RabbitMQ?"),
    }
}

async fn find_version(address: &Address, management: &Result<Management, String>) -> Option<String> {
    if !address.is_tls()
        && let Some(version) = greeting::version(address, LOOK_LIMIT).await
    {
        return Some(version);
    }
    management.as_ref().ok()?.version().await.ok()?
}

fn judge_version(version: Option<&str>) -> Finding {
    let check = "broker.version";
    let Some((version, numbers)) = version.and_then(|version| Some((version, numbers(version)?))) else {
        return Finding::unseen(check, "the broker does not say", "it must be 3.10 or newer");
    };
    let message = format!("RabbitMQ {version}");
    if numbers < VERSION_MIN {
        return Finding::fail(check, message, "3.10 or newer is needed");
    }
    if numbers < VERSION_SUPPORTED {
        let advice = "it works, and gets no more fixes from RabbitMQ's community: plan for 4.x (rabbitmq/README.md)";
        return Finding::warn(check, message, advice);
    }
    Finding::ok(check, message)
}

/// Exchanges, queues, and the rights to use them.
async fn topology(connection: &Connection, subject: &Subject) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut rights = Rights::default();
    let (topic, fanout) = (ExchangeKind::Topic, ExchangeKind::Fanout);
    for (name, kind) in [
        (TASKS_EXCHANGE, topic.clone()),
        (DEAD_EXCHANGE, fanout.clone()),
        (CONTROL_EXCHANGE, fanout),
        (EVENTS_EXCHANGE, topic),
    ] {
        let answer = probe::exchange(connection, name, kind.clone()).await;
        rights.note(&format!("configure exchange {name}"), &answer);
        let ours = format!("durable, {}", if kind == ExchangeKind::Topic { "topic" } else { "fanout" });
        findings.extend(declared(format!("broker.exchange {name}"), &ours, &answer));
    }
    let lanes = subject.queues.iter().flat_map(Lane::all_of);
    for name in lanes.map(|lane| broker_queue(&lane)).chain([DEAD_QUEUE.to_owned()]) {
        let answer = probe::queue(connection, &name).await;
        rights.note(&format!("configure queue {name}"), &answer);
        findings.extend(declared(format!("broker.queue {name}"), "a durable quorum queue", &answer));
        let exchange = if name == DEAD_QUEUE { DEAD_EXCHANGE } else { TASKS_EXCHANGE };
        let bind = probe::bind(connection, &name, exchange).await;
        rights.note(&format!("write queue {name} and read exchange {exchange}"), &bind);
        if matches!(subject.role, Role::Worker { .. }) && name != DEAD_QUEUE {
            rights.note(&format!("read queue {name}"), &probe::consume(connection, &name).await);
        }
    }
    for (exchange, other) in [(TASKS_EXCHANGE, DEAD_EXCHANGE), (DEAD_EXCHANGE, TASKS_EXCHANGE)] {
        let answer = probe::publish(connection, exchange, other).await;
        rights.note(&format!("write exchange {exchange}"), &answer);
    }
    findings.push(rights.finding());
    if matches!(subject.role, Role::Worker { .. }) && probe::notify(connection).await == Answer::Refused {
        findings.push(Finding::warn(
            "broker.notices",
            "the user may not write to the default exchange: waiting clients (wait_ms) are not told at once",
            "allow write to amq\\.default as well",
        ));
    }
    findings
}

/// The queues of a worker whose members are down, on connections of their own, since each of these ends one.
async fn unserved(subject: &Subject) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut connection: Option<Connection> = None;
    let lanes: Vec<Lane> = match subject.role {
        Role::Worker { .. } => subject.queues.iter().flat_map(Lane::all_of).collect(),
        Role::Producer => Vec::new(),
    };
    for lane in lanes {
        let on = match connection.take().filter(|connection| connection.status().connected()) {
            Some(connection) => connection,
            None => match broker::connect(&subject.common.amqp_url, "tasklane doctor", HEARTBEAT).await {
                Ok(connection) => connection,
                Err(_) => return findings,
            },
        };
        if let Answer::Unclear(said) = probe::serve(&on, &broker_queue(&lane)).await {
            findings.push(Finding::fail(
                format!("broker.members {}", broker_queue(&lane)),
                format!("it cannot be consumed: {said}"),
                "are its members up (rabbitmq-queues quorum_status)? Workers go on with their other queues, and try again",
            ));
        }
        connection = Some(on);
    }
    if let Some(connection) = connection {
        // The process ends soon, and its connections with it.
        let _ = timeout(LOOK_LIMIT / 5, connection.close(200, "done".into())).await;
    }
    findings
}

fn declared(check: String, ours: &str, answer: &Answer) -> Option<Finding> {
    match answer {
        Answer::Yes => Some(Finding::ok(check, ours)),
        Answer::Missing => Some(Finding::ok(check, "not there yet: the first start declares it")),
        // Told with the rights.
        Answer::Refused => None,
        Answer::Differs(said) => Some(Finding::fail(
            check,
            format!("there, and not {ours}: {said}"),
            "somebody else declared it: delete it when it is empty, and the next start declares it rightly",
        )),
        Answer::Unclear(said) => Some(Finding::unseen(check, said, "see the broker's log")),
    }
}

/// Collects what is not allowed.
#[derive(Debug, Default)]
struct Rights {
    missing: Vec<String>,
}

impl Rights {
    fn note(&mut self, right: &str, answer: &Answer) {
        if *answer == Answer::Refused {
            self.missing.push(right.to_owned());
        }
    }

    fn finding(self) -> Finding {
        if self.missing.is_empty() {
            return Finding::ok("broker.permissions", "all that is needed");
        }
        Finding::fail(
            "broker.permissions",
            format!("the user may not {}", self.missing.join("; ")),
            "rabbitmqctl set_permissions -p VHOST USER '^tasklane\\..*' '^(tasklane\\..*|amq\\.default)$' '^tasklane\\..*'",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn versions_are_judged() {
        let verdict = |version| judge_version(Some(version)).verdict;
        assert_eq!(verdict("3.9.29"), Verdict::Fail);
        assert_eq!(verdict("3.10.8"), Verdict::Warn);
        assert_eq!(verdict("3.12.1"), Verdict::Warn);
        assert_eq!(verdict("4.0.5"), Verdict::Ok);
        assert_eq!(verdict("4.3.0-beta.1"), Verdict::Ok);
        assert_eq!(judge_version(None).verdict, Verdict::Warn);
    }

    #[test]
    fn plain_connections_and_default_users_are_for_this_machine_alone() {
        let verdicts = |url: &str| -> Vec<Verdict> {
            transport(&url.parse().unwrap()).into_iter().map(|finding| finding.verdict).collect()
        };
        assert_eq!(verdicts("amqp://guest:guest@127.0.0.1/%2f"), [Verdict::Ok]);
        assert_eq!(verdicts("amqp://guest:guest@localhost/%2f"), [Verdict::Ok]);
        assert_eq!(verdicts("amqp://guest:guest@broker.example/%2f"), [Verdict::Warn, Verdict::Warn]);
        assert_eq!(verdicts("amqps://guest:guest@broker.example/%2f"), [Verdict::Ok, Verdict::Warn]);
        assert_eq!(verdicts("amqps://me:secret@broker.example/%2f"), [Verdict::Ok]);
    }
}
