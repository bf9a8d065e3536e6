//! The HTTP API as the examples use it. Any other HTTP client, in any language, does as well.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::{RequestBuilder, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tasklane_common::ledger::Worker;
use tasklane_common::task::{Task, TaskId};
use tokio::time::Instant;

/// Longer than any `wait_ms` of ours, so that a hung server becomes an error.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// The longest single wait; longer ones are made of several.
const WAIT_MAX: Duration = Duration::from_secs(20);
/// How many tasks go into one batch; the API takes up to 10,000.
const BATCH: usize = 500;

/// A producer, or a load balancer before several.
#[derive(Debug, Clone)]
pub struct Client {
    url: String,
    http: reqwest::Client,
}

impl Client {
    /// The producer at `TASKLANE_URL`, by default `http://127.0.0.1:8080`.
    ///
    /// # Errors
    /// When the HTTP client cannot be set up.
    pub fn from_env() -> Result<Self> {
        Self::at(std::env::var("TASKLANE_URL").as_deref().unwrap_or("http://127.0.0.1:8080"))
    }

    /// The producer at an address.
    ///
    /// # Errors
    /// When the HTTP client cannot be set up.
    pub fn at(url: &str) -> Result<Self> {
        // Refused only when there is a provider already, and any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().timeout(REQUEST_LIMIT).build().context("setting up the HTTP client")?;
        Ok(Self { url: url.trim_end_matches('/').to_owned(), http })
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Submits one task.
    ///
    /// # Errors
    /// When the producer does not accept it.
    pub async fn submit(&self, task: &Value) -> Result<Task> {
        self.send(self.http.post(format!("{}/v1/tasks", self.url)).json(task)).await
    }

    /// Submits many tasks, and answers their ids in order. Each batch is accepted as a whole.
    ///
    /// # Errors
    /// When the producer does not accept a batch; those before it stay accepted.
    pub async fn submit_all(&self, tasks: &[Value]) -> Result<Vec<TaskId>> {
        #[derive(Deserialize)]
        struct Accepted {
            id: TaskId,
        }
        #[derive(Deserialize)]
        struct Batch {
            tasks: Vec<Accepted>,
        }
        let mut ids = Vec::with_capacity(tasks.len());
        for batch in tasks.chunks(BATCH) {
            let request = self.http.post(format!("{}/v1/tasks/batch", self.url)).json(&json!({ "tasks": batch }));
            let batch: Batch = self.send(request).await?;
            ids.extend(batch.tasks.iter().map(|task| task.id));
        }
        Ok(ids)
    }

    /// The task when it has ended, well or badly.
    ///
    /// # Errors
    /// When it has not ended within `limit`.
    pub async fn ended(&self, id: TaskId, limit: Duration) -> Result<Task> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let task: Task = self.get(&format!("/v1/tasks/{id}?wait_ms={}", left.min(WAIT_MAX).as_millis())).await?;
            if task.state.is_final() {
                return Ok(task);
            }
            ensure!(Instant::now() < deadline, "task {id} is still {} after {limit:?}", task.state);
        }
    }

    /// All tasks of a kind, page after page.
    ///
    /// # Errors
    /// When the producer does not answer.
    pub async fn tasks_of(&self, kind: &str) -> Result<Vec<Task>> {
        #[derive(Deserialize)]
        struct Page {
            tasks: Vec<Task>,
            next_cursor: Option<String>,
        }
        let mut tasks = Vec::new();
        let mut cursor = String::new();
        loop {
            let page: Page = self.get(&format!("/v1/tasks?kind={kind}&limit=1000{cursor}")).await?;
            tasks.extend(page.tasks);
            match page.next_cursor {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return Ok(tasks),
            }
        }
    }

    /// The live workers.
    ///
    /// # Errors
    /// When the producer does not answer.
    pub async fn workers(&self) -> Result<Vec<Worker>> {
        #[derive(Deserialize)]
        struct Workers {
            workers: Vec<Worker>,
        }
        Ok(self.get::<Workers>("/v1/workers").await?.workers)
    }

    /// Whatever is under a path.
    ///
    /// # Errors
    /// When the producer does not answer, or not with 2xx.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.send(self.http.get(format!("{}{path}", self.url))).await
    }

    /// The status and text of an address that need not be the producer's, such as a health check.
    ///
    /// # Errors
    /// When nothing answers there.
    pub async fn probe(&self, url: &str) -> Result<(StatusCode, String)> {
        let answer = self.http.get(url).timeout(Duration::from_secs(2)).send().await?;
        Ok((answer.status(), answer.text().await?))
    }

    async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        let answer = request.send().await.with_context(|| format!("no producer answers at {}", self.url))?;
        let (status, url) = (answer.status(), answer.url().clone());
        let body = answer.text().await?;
        // An error's body is application/problem+json, and says which field is at fault.
        ensure!(status.is_success(), "{url} answered {status}: {body}");
        serde_json::from_str(&body).with_context(|| format!("{url} answered {body:.200}"))
    }
}

/// What a completed task answered.
///
/// # Errors
/// When it did not complete, or answered something else than a `T`.
pub fn result_of<T: DeserializeOwned>(task: &Task) -> Result<T> {
    let newest = task.errors.last().map_or("no error", |error| &error.message);
    let result = task.result.as_ref().with_context(|| format!("task {} is {}: {newest}", task.id, task.state))?;
    serde_json::from_str(result.as_str()).with_context(|| format!("task {} answered something else", task.id))
}
