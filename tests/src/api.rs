//! A client of Tasklane's HTTP API, written against the contract and sharing no code with the producer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Body, Client, RequestBuilder};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::metrics::Metrics;
use crate::wait::eventually;

/// The states after which a task no longer changes by itself.
const FINAL_STATES: [&str; 3] = ["completed", "cancelled", "discarded"];

/// The most tasks one page of the list has.
const PAGE: &str = "1000";

/// One producer's API.
#[derive(Clone, Debug)]
pub struct Api {
    base: String,
    client: Client,
}

/// A task as the API shows it.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the contract")]
pub struct Task {
    pub id: String,
    pub kind: String,
    pub queue: String,
    pub state: String,
    pub args: Value,
    pub tags: BTreeMap<String, String>,
    pub priority: Value,
    pub attempt: u32,
    pub max_attempts: u32,
    pub fence: u64,
    pub result: Value,
    pub result_expired: bool,
    pub errors: Vec<TaskError>,
    pub reason: Option<String>,
    pub created_at: Timestamp,
    pub run_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub worker_id: Option<String>,
    pub timeout_ms: Option<u64>,
    pub result_ttl_ms: Option<u64>,
    pub unique_key: Option<String>,
    pub group_id: Option<String>,
    pub concurrency_key: Option<String>,
    pub limited_by: Option<String>,
    pub retried_from: Option<String>,
}

impl Task {
    /// Will the task no longer change by itself?
    pub fn is_final(&self) -> bool {
        FINAL_STATES.contains(&self.state.as_str())
    }
}

/// One failed attempt of a task.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the contract")]
pub struct TaskError {
    pub attempt: u32,
    pub at: Timestamp,
    pub message: String,
    pub kind: String,
}

/// What a batch answers for each of its tasks.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the contract")]
pub struct Accepted {
    pub id: String,
    pub state: String,
}

/// Any answer, good or bad, undecoded.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value, if it is there and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as text, whatever it is.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("the body is not JSON: {}", self.text()))
    }

    /// The body of an error, which must say what it is: problem+json with this very status.
    pub fn problem(&self) -> Result<Value> {
        let problem = self.json()?;
        let content_type = self.header("content-type").unwrap_or_default();
        ensure!(content_type.starts_with("application/problem+json"), "{content_type:?} instead of problem+json");
        ensure!(problem["status"] == self.status, "status {} says {problem}", self.status);
        ensure!(problem["title"].is_string(), "a problem without a title: {problem}");
        Ok(problem)
    }

    /// The body of an answer that must have one of these status codes.
    pub fn expect<T: DeserializeOwned>(&self, statuses: &[u16]) -> Result<T> {
        ensure!(statuses.contains(&self.status), "{} instead of {statuses:?}: {}", self.status, self.text());
        serde_json::from_slice(&self.body).with_context(|| format!("an unexpected body: {}", self.text()))
    }
}

impl Api {
    /// The API at an address.
    pub fn new(addr: SocketAddr) -> Result<Self> {
        Ok(Self { base: format!("http://{addr}"), client: crate::http::client()? })
    }

    /// The full URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Submits one task, `{"kind": …, "args": …, …}`.
    pub async fn submit(&self, task: &Value) -> Result<Task> {
        self.raw_post("/v1/tasks", task).await?.expect(&[202])
    }

    /// Submits one task and waits up to `wait_ms` for its end: the task, and whether it has ended.
    pub async fn submit_and_wait(&self, task: &Value, wait_ms: u64) -> Result<(Task, bool)> {
        let answer = self.raw_post(&format!("/v1/tasks?wait_ms={wait_ms}"), task).await?;
        Ok((answer.expect(&[200, 202])?, answer.status == 200))
    }

    /// Submits one task under an idempotency key, and answers whatever comes.
    pub async fn submit_once(&self, key: &str, task: &Value) -> Result<Answer> {
        self.send(self.client.post(self.url("/v1/tasks")).header("idempotency-key", key).json(task)).await
    }

    /// Submits a batch as one JSON document.
    pub async fn submit_batch(&self, tasks: &[Value]) -> Result<Vec<Accepted>> {
        let answer = self.raw_post("/v1/tasks/batch", &json!({"tasks": tasks})).await?;
        Ok(answer.expect::<Batch>(&[202])?.tasks)
    }

    /// Submits a batch as lines of JSON.
    pub async fn submit_lines(&self, tasks: &[Value]) -> Result<Vec<Accepted>> {
        let lines: String = tasks.iter().map(|task| format!("{task}\n")).collect();
        let answer = self.raw_body("/v1/tasks/batch", "application/x-ndjson", lines).await?;
        Ok(answer.expect::<Batch>(&[202])?.tasks)
    }

    /// The task as it is now.
    pub async fn get(&self, id: &str) -> Result<Task> {
        self.raw_get(&format!("/v1/tasks/{id}")).await?.expect(&[200])
    }

    /// The task once it has ended, or after `wait_ms` as it is then.
    pub async fn get_wait(&self, id: &str, wait_ms: u64) -> Result<Task> {
        self.raw_get(&format!("/v1/tasks/{id}?wait_ms={wait_ms}")).await?.expect(&[200, 202])
    }

    /// The task once it is in a state.
    pub async fn in_state(&self, id: &str, state: &str, limit: Duration) -> Result<Task> {
        eventually(limit, &format!("task {id} to be {state}"), async || {
            let task = self.get(id).await?;
            if task.state == state {
                return Ok(Some(task));
            }
            ensure!(!task.is_final(), "it is {}: {task:?}", task.state);
            Ok(None)
        })
        .await
    }

    /// All tasks of a list, page after page, newest first. `query` holds filters (`state`, `kind`, …).
    pub async fn list_all(&self, query: &[(&str, &str)]) -> Result<Vec<Task>> {
        let mut tasks = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut request = self.client.get(self.url("/v1/tasks")).query(query).query(&[("limit", PAGE)]);
            if let Some(cursor) = &cursor {
                request = request.query(&[("cursor", cursor)]);
            }
            let page: Page = self.send(request).await?.expect(&[200])?;
            tasks.extend(page.tasks);
            match page.next_cursor {
                Some(next) => cursor = Some(next),
                None => return Ok(tasks),
            }
        }
    }

    /// Waits until no task is under way any more and `count` have ended (in whichever way); answers all there are.
    pub async fn all_ended(&self, count: usize, limit: Duration) -> Result<Vec<Task>> {
        eventually(limit, &format!("{count} tasks to end"), async || {
            let states = self.under_way().await?;
            ensure!(states.is_empty(), "under way: {states:?}");
            let tasks = self.list_all(&[]).await?;
            let ended = tasks.iter().filter(|task| task.is_final()).count();
            ensure!(ended >= count, "{ended} of them have ended");
            Ok(Some(tasks))
        })
        .await
    }

    /// How many tasks are in each state that is not final, over all queues; states without tasks are left out.
    pub async fn under_way(&self) -> Result<BTreeMap<String, u64>> {
        let mut sums = BTreeMap::new();
        for queue in self.queues().await? {
            let counts = queue["counts"].as_object().with_context(|| format!("a queue without counts: {queue}"))?;
            let counts = counts.iter().map(|(state, count)| (state, count.as_u64().unwrap_or_default()));
            for (state, count) in counts.filter(|(state, count)| *count > 0 && !FINAL_STATES.contains(&state.as_str()))
            {
                *sums.entry(state.clone()).or_default() += count;
            }
        }
        Ok(sums)
    }

    /// `GET /v1/queues`.
    pub async fn queues(&self) -> Result<Vec<Value>> {
        self.items("queues").await
    }

    /// `GET /v1/workers`.
    pub async fn workers(&self) -> Result<Vec<Value>> {
        self.items("workers").await
    }

    /// The metrics at this moment.
    pub async fn metrics(&self) -> Result<Metrics> {
        let answer = self.raw_get("/metrics").await?;
        ensure!(answer.status == 200, "metrics: {}", answer.status);
        Ok(Metrics::parse(&answer.text()))
    }

    /// GET, whatever comes.
    pub async fn raw_get(&self, path: &str) -> Result<Answer> {
        self.send(self.client.get(self.url(path))).await
    }

    /// POST of JSON, whatever comes.
    pub async fn raw_post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send(self.client.post(self.url(path)).json(body)).await
    }

    /// PUT of JSON, whatever comes.
    pub async fn raw_put(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send(self.client.put(self.url(path)).json(body)).await
    }

    /// PATCH of JSON, whatever comes.
    pub async fn raw_patch(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send(self.client.patch(self.url(path)).json(body)).await
    }

    /// DELETE, whatever comes.
    pub async fn raw_delete(&self, path: &str) -> Result<Answer> {
        self.send(self.client.delete(self.url(path))).await
    }

    /// POST of anything, whatever comes.
    pub async fn raw_body(&self, path: &str, content_type: &str, body: impl Into<Body>) -> Result<Answer> {
        self.send(self.client.post(self.url(path)).header(CONTENT_TYPE, content_type).body(body)).await
    }

    /// Sends a request made with [`Api::client`], whatever comes.
    pub async fn send(&self, request: RequestBuilder) -> Result<Answer> {
        let answer = request.send().await.context("calling the HTTP API")?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Ok(Answer { status, headers, body: answer.bytes().await?.to_vec() })
    }

    /// The HTTP client behind it, for requests of any other form.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A list under its own name, or the bare list.
    async fn items(&self, name: &str) -> Result<Vec<Value>> {
        let mut answer: Value = self.raw_get(&format!("/v1/{name}")).await?.expect(&[200])?;
        let items = if answer.is_array() { answer } else { answer[name].take() };
        serde_json::from_value(items).with_context(|| format!("{name} is not a list"))
    }
}

#[derive(Deserialize)]
struct Batch {
    tasks: Vec<Accepted>,
}

#[derive(Deserialize)]
struct Page {
    tasks: Vec<Task>,
    next_cursor: Option<String>,
}
