//! A private RabbitMQ cluster.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::broker::{Broker, Identity};
use crate::wait::eventually;

/// How long started nodes may take to find each other.
const FORM_LIMIT: Duration = Duration::from_secs(60);

/// Some nodes on this machine that form one cluster.
#[derive(Debug)]
pub struct Cluster {
    /// The nodes; each can be stopped, killed and frozen like a single one.
    pub nodes: Vec<Broker>,
}

impl Cluster {
    /// Starts `size` nodes and waits until each has found all the others.
    pub async fn private(size: usize) -> Result<Self> {
        let mut identities = (0..size).map(|_| Identity::fresh()).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = identities.iter().map(|identity| identity.name.clone()).collect();
        let cookie = identities.first().context("a cluster has at least one node")?.cookie.clone();
        for identity in &mut identities {
            identity.peers.clone_from(&names);
            identity.cookie.clone_from(&cookie);
        }
        // One after the other: the first founds the cluster, each of the others joins it. Started all at once, they
        // wait for each other's locks, and it takes longer.
        let mut nodes = Vec::new();
        for identity in identities {
            nodes.push(Broker::with_identity(identity).await?);
        }
        let cluster = Self { nodes };
        cluster.complete(FORM_LIMIT).await?;
        Ok(cluster)
    }

    /// Waits until the running nodes see as many members as there are running nodes.
    async fn complete(&self, limit: Duration) -> Result<()> {
        let running: Vec<&Broker> = self.nodes.iter().filter(|node| node.process().is_ok()).collect();
        let what = format!("{} nodes to see each other", running.len());
        eventually(limit, &what, async || {
            for broker in &running {
                let nodes = broker.node().management.get(&["nodes"]).await?;
                let up = nodes.as_array().into_iter().flatten().filter(|node| node["running"] == true).count();
                if up != running.len() {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
        .await
    }
}
