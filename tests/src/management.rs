//! The few calls of RabbitMQ's management API that the harness needs. Its statistics lag by seconds, so depths are
//! asked over AMQP instead ([`crate::vhost::Vhost::depth`]).

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use url::Url;

/// A client of one node's management API.
#[derive(Clone, Debug)]
pub struct Management {
    base: Url,
    user: String,
    password: String,
    client: reqwest::Client,
}

impl Management {
    /// The API at `base`, `http://host:port`.
    pub fn new(base: &str, user: &str, password: &str) -> Result<Self> {
        Ok(Self {
            base: base.parse().with_context(|| format!("the management URL {base:?}"))?,
            user: user.to_owned(),
            password: password.to_owned(),
            client: crate::http::connecting_client()?,
        })
    }

    /// The address of the API.
    pub fn url(&self) -> &Url {
        &self.base
    }

    /// Creates a vhost in which the user may do everything. A vhost that exists stays as it is.
    pub async fn create_vhost(&self, vhost: &str) -> Result<()> {
        self.put(&["vhosts", vhost], &json!({})).await?;
        let everything = json!({"configure": ".*", "write": ".*", "read": ".*"});
        self.put(&["permissions", vhost, &self.user], &everything).await
    }

    /// Deletes a vhost with all its queues and connections. One that is gone already is fine.
    pub async fn delete_vhost(&self, vhost: &str) -> Result<()> {
        let status = self.call(Method::DELETE, &["vhosts", vhost], None).await?.0;
        ensure!(status.is_success() || status == StatusCode::NOT_FOUND, "deleting vhost {vhost}: {status}");
        Ok(())
    }

    /// Imports definitions (queues, exchanges, policies, …) into one vhost.
    pub async fn import(&self, vhost: &str, definitions: &Value) -> Result<()> {
        let (status, answer) = self.call(Method::POST, &["definitions", vhost], Some(definitions)).await?;
        ensure!(status.is_success(), "importing definitions into {vhost}: {status} {answer}");
        Ok(())
    }

    /// Closes every connection to a vhost, as an operator does. One that is gone already is fine.
    pub async fn close_connections(&self, vhost: &str) -> Result<()> {
        let connections = self.get(&["vhosts", vhost, "connections"]).await?;
        for name in connections.as_array().into_iter().flatten().filter_map(|connection| connection["name"].as_str()) {
            let status = self.call(Method::DELETE, &["connections", name], None).await?.0;
            ensure!(status.is_success() || status == StatusCode::NOT_FOUND, "closing connection {name}: {status}");
        }
        Ok(())
    }

    /// GET of `/api/<path…>`.
    pub async fn get(&self, path: &[&str]) -> Result<Value> {
        let (status, answer) = self.call(Method::GET, path, None).await?;
        ensure!(status.is_success(), "GET {path:?}: {status} {answer}");
        Ok(answer)
    }

    /// PUT to `/api/<path…>`.
    pub async fn put(&self, path: &[&str], body: &Value) -> Result<()> {
        let (status, answer) = self.call(Method::PUT, path, Some(body)).await?;
        ensure!(status.is_success(), "PUT {path:?}: {status} {answer}");
        Ok(())
    }

    async fn call(&self, method: Method, path: &[&str], body: Option<&Value>) -> Result<(StatusCode, Value)> {
        let mut url = self.base.clone();
        url.path_segments_mut()
            .map_err(|()| anyhow::anyhow!("{} cannot have a path", self.base))?
            .pop_if_empty()
            .push("api")
            .extend(path);
        let mut request = self.client.request(method, url).basic_auth(&self.user, Some(&self.password));
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.context("calling the management API")?;
        let status = answer.status();
        let bytes = answer.bytes().await?;
        Ok((status, serde_json::from_slice(&bytes).unwrap_or(Value::Null)))
    }
}
