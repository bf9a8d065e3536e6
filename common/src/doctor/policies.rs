//! What only the management API tells: the policies that are in force on a queue.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Map, Value};
use url::Url;

use super::greeting::numbers;
use super::{Finding, LOOK_LIMIT, Role};
use crate::broker::Address;

/// Each message that is given back costs one delivery: healthy tasks must not get to the limit.
const DELIVERY_LIMIT_MIN: i64 = 100;
/// The limit of a quorum queue for which none is set, from 4.0 on.
const DELIVERY_LIMIT_OF_4: i64 = 20;

/// A client of the management API.
pub(super) struct Management {
    client: reqwest::Client,
    base: Url,
    user: String,
    password: String,
    vhost: String,
}

/// Of a queue, as the API shows it.
#[derive(Debug, Default, Deserialize)]
struct Queue {
    #[serde(default)]
    policy: Option<String>,
    /// An empty list where nothing is in force; not there before the broker has counted the queue for the first time.
    effective_policy_definition: Option<Value>,
}

/// Of a connection, as the API shows it: other clients' properties may be anything.
#[derive(Debug, Deserialize)]
pub(super) struct Connected {
    #[serde(default)]
    pub(super) client_properties: Value,
    #[serde(default)]
    pub(super) peer_host: Value,
}

impl Management {
    /// The configured address, or the usual one beside the broker's, with the same credentials.
    pub(super) fn new(address: &Address, configured: Option<&SecretString>) -> Result<Self, String> {
        let mut base = match configured {
            Some(url) => Url::parse(url.expose_secret()).map_err(|error| error.to_string())?,
            None => usual(address).map_err(|error| error.to_string())?,
        };
        let (user, password) = if base.username().is_empty() {
            (address.user().to_owned(), address.password().expose_secret().to_owned())
        } else {
            (base.username().to_owned(), base.password().unwrap_or_default().to_owned())
        };
        // What is shown in messages has no password.
        let stripped = base.set_username("").and_then(|()| base.set_password(None));
        stripped.map_err(|()| "it must look like http://host:15672".to_owned())?;
        // Whoever came first has chosen; an error says just that.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .timeout(LOOK_LIMIT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { client, base, user, password, vhost: address.vhost().to_owned() })
    }

    /// Where it is, for people.
    pub(super) fn place(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// The broker's version.
    pub(super) async fn version(&self) -> Result<Option<String>, String> {
        let overview = self.get(&["overview"]).await?.ok_or("there is no such API")?;
        Ok(overview["rabbitmq_version"].as_str().map(str::to_owned))
    }

    /// The properties of the connections to the virtual host, as their clients give them.
    pub(super) async fn connections(&self) -> Result<Vec<Connected>, String> {
        let all = self.get(&["vhosts", &self.vhost, "connections"]).await?.ok_or("it does not show connections")?;
        serde_json::from_value(all).map_err(|error| error.to_string())
    }

    /// What is thought of the policies on a queue; `major` is the broker's version.
    pub(super) async fn look(&self, queue: &str, major: Option<u32>, role: &Role) -> Vec<Finding> {
        let check = format!("broker.policy {queue}");
        let answer = match self.get(&["queues", &self.vhost, queue]).await {
            Ok(Some(answer)) => answer,
            Ok(None) => return vec![Finding::unseen(check, "the queue is not there yet", "ask again after a start")],
            Err(error) => return vec![unreachable(check, self.place(), &error)],
        };
        let queue: Queue = serde_json::from_value(answer).unwrap_or_default();
        let Some(definition) = &queue.effective_policy_definition else {
            return vec![Finding::unseen(
                check,
                "the queue is so new that the broker has not counted it",
                "ask again in 10 s",
            )];
        };
        let none = Map::new();
        let definition = definition.as_object().unwrap_or(&none);
        let faults = faults(definition, major, role);
        if !faults.is_empty() {
            return faults.into_iter().map(|(message, advice)| Finding::warn(&check, message, advice)).collect();
        }
        let policy = queue.policy.filter(|name| !name.is_empty());
        let named = policy.map_or("no policy".to_owned(), |name| format!("policy {name}"));
        let timeout = if definition.contains_key("consumer-timeout") {
            ""
        } else {
            "; the node's own consumer_timeout (30 min unless rabbitmq.conf says otherwise) cannot be seen from here"
        };
        vec![Finding::ok(check, format!("{named}{timeout}"))]
    }

    /// `None` for what is not there.
    async fn get(&self, path: &[&str]) -> Result<Option<Value>, String> {
        let mut url = self.base.clone();
        url.path_segments_mut().map_err(|()| "it has no paths")?.pop_if_empty().push("api").extend(path);
        let request = self.client.get(url).basic_auth(&self.user, Some(&self.password));
        let answer = request.send().await.map_err(|error| told(&error.without_url()))?;
        match answer.status().as_u16() {
            200 => answer.json().await.map(Some).map_err(|error| told(&error.without_url())),
            404 => Ok(None),
            401 | 403 => Err("the user may not use it (it lacks the tag management)".to_owned()),
            status => Err(format!("it answers {status}")),
        }
    }
}

/// An error with its causes, which for reqwest say more than itself.
fn told(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer within 5 s".to_owned();
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

pub(super) fn unreachable(check: String, place: &str, error: &str) -> Finding {
    let advice = "enable rabbitmq_management and set TASKLANE_MANAGEMENT_URL, or see rabbitmqctl list_policies";
    Finding::unseen(check, format!("the management API at {place}: {error}"), advice)
}

fn usual(address: &Address) -> Result<Url, url::ParseError> {
    let host = address.host();
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    // Credentials that are given over TLS are not given without it.
    Url::parse(&if address.is_tls() { format!("https://{host}:15671") } else { format!("http://{host}:15672") })
}

/// What in a policy hurts, each with what to do.
fn faults(policy: &Map<String, Value>, major: Option<u32>, role: &Role) -> Vec<(String, &'static str)> {
    const IMPORT: &str = "import the policies of rabbitmq/definitions.json (rabbitmq/README.md)";
    let mut faults = Vec::new();
    let set = policy.get("delivery-limit").and_then(Value::as_i64);
    let limit = set.or((major >= Some(4)).then_some(DELIVERY_LIMIT_OF_4)).filter(|limit| *limit >= 0);
    if let Some(limit) = limit {
        if !policy.contains_key("dead-letter-exchange") {
            faults.push((
                format!("delivery-limit {limit} without dead-letter-exchange: what reaches it is dropped unseen"),
                IMPORT,
            ));
        }
        if limit < DELIVERY_LIMIT_MIN {
            faults.push((format!("delivery-limit {limit}: healthy tasks can reach it by being given back"), IMPORT));
        }
    }
    let bounded = ["max-length", "max-length-bytes"].into_iter().find(|key| policy.contains_key(*key));
    if let Some(key) = bounded
        && policy.get("overflow").and_then(Value::as_str) != Some("reject-publish")
    {
        faults.push((
            format!("{key} without overflow: reject-publish: a full queue drops its oldest tasks, which the ledger must find out"),
            "set overflow to reject-publish in the same policy",
        ));
    }
    if let Role::Worker { custody_after, .. } = role
        && let Some(timeout) = policy.get("consumer-timeout").and_then(Value::as_u64).map(Duration::from_millis)
        && timeout <= *custody_after
    {
        let (timeout, custody) = (timeout.as_millis(), custody_after.as_millis());
        faults.push((
            format!(
                "consumer-timeout {timeout} is not above custody_after_ms {custody}: long tasks lose their consumer"
            ),
            "raise the one, or lower the other",
        ));
    }
    for key in ["message-ttl", "expires"] {
        if let Some(value) = policy.get(key) {
            faults
                .push((format!("{key} {value}: the broker takes away what waits"), "time is the ledger's: remove it"));
        }
    }
    faults
}

/// Major number of a version.
pub(super) fn major(version: Option<&str>) -> Option<u32> {
    numbers(version?).map(|(major, _)| major)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const WORKER: Role = Role::Worker {
        concurrency: 1,
        lease_ttl: Duration::from_secs(15),
        lease_renew: Duration::from_secs(3),
        custody_after: Duration::from_secs(600),
        create_ledger: false,
    };

    fn said(policy: &Value, major: u32) -> Vec<String> {
        faults(policy.as_object().unwrap(), Some(major), &WORKER).into_iter().map(|(message, _)| message).collect()
    }

    #[test]
    fn the_policy_of_the_repository_is_fine_on_all_versions() {
        let definitions: Value = serde_json::from_str(include_str!("../../../rabbitmq/definitions.json")).unwrap();
        let policy = &definitions["policies"][0];
        assert_eq!(policy["name"], "tasklane-tasks");
        for major in [3, 4] {
            assert_eq!(said(&policy["definition"], major), [""; 0]);
        }
    }

    #[test]
    fn what_hurts_is_named() {
        let one = |policy: Value, words: &str| {
            let said = said(&policy, 3);
            assert!(said.len() == 1 && said[0].contains(words), "{policy}: {said:?}");
        };
        one(json!({"delivery-limit": 1000}), "without dead-letter-exchange");
        one(json!({"delivery-limit": 5, "dead-letter-exchange": "x"}), "healthy tasks");
        one(json!({"max-length": 5}), "reject-publish");
        one(json!({"max-length-bytes": 5, "overflow": "drop-head"}), "reject-publish");
        one(json!({"consumer-timeout": 600_000}), "custody_after_ms 600000");
        one(json!({"message-ttl": 1}), "message-ttl");
        assert_eq!(
            said(&json!({"consumer-timeout": 1_800_000, "max-length": 5, "overflow": "reject-publish"}), 3),
            [""; 0]
        );
        assert_eq!(said(&json!({}), 3), [""; 0]);
        // From 4.0 on there is a limit where none is set, unless it is set to none.
        assert_eq!(said(&json!({}), 4).len(), 2);
        assert_eq!(said(&json!({"delivery-limit": -1}), 4), [""; 0]);
    }
}
