//! One `Idempotency-Key` is one request: what makes another task is another request, whichever route and field it is, and
//! a repetition is answered whatever holds by now.

use serde_json::{Value, json};
use tasklane_common::ledger::{Failure, Transition};
use tasklane_common::task::{ErrorKind, Json, TaskId};

use crate::support::Api;

const TASKS: &str = "/v1/tasks";
const BATCH: &str = "/v1/tasks/batch";

/// A task with all fields that a submission can have, and for each field another value.
const FIELDS: [(&str, &str, &str); 14] = [
    ("kind", r#""a""#, r#""b""#),
    ("args", r#"{"n":1}"#, r#"{"n":2}"#),
    ("queue", r#""q""#, r#""default""#),
    ("max_attempts", "2", "3"),
    ("timeout_ms", "2000", "3000"),
    ("result_ttl_ms", "2000", "3000"),
    ("delay_ms", "2000", "3000"),
    ("run_at", r#""2100-01-01T00:00:00Z""#, r#""2100-01-01T00:00:00.001Z""#),
    ("priority", r#""high""#, r#""low""#),
    ("tags", r#"{"k":"v"}"#, r#"{"k":"w"}"#),
    ("concurrency_key", r#""customer:7""#, r#""customer:8""#),
    ("unique_key", r#""u""#, r#""w""#),
    ("unique_for_ms", "2000", "3000"),
    ("on_conflict", r#""reject""#, r#""replace_waiting""#),
];

/// What `then` cannot have.
const NOT_LATER: [&str; 5] = ["delay_ms", "run_at", "unique_key", "unique_for_ms", "on_conflict"];

/// Args of which each is another input.
const ARGS: [&str; 16] = [
    "1",
    "1.0",
    "1e0",
    "-0",
    "0",
    "123456789012345678901234567890",
    "123456789012345678901234567891",
    "9007199254740993.0",
    "9007199254740992.0",
    "0.1",
    "0.10",
    r#"{"a":1,"a":2}"#,
    r#"{"a":2,"a":1}"#,
    r#"{"a":2}"#,
    r#"["1"]"#,
    "[1]",
];

/// The task with the value of `field` replaced, or left out.
fn task(field: &str, value: Option<&str>, without: &[&str]) -> String {
    let of = |(name, usual, _): &(&str, &str, &str)| {
        let value = if *name == field { value? } else { usual };
        Some(format!("{name:?}:{value}"))
    };
    // Two times would be refused.
    let clash = if field == "run_at" { "delay_ms" } else { "run_at" };
    let fields = FIELDS.iter().filter(|(name, ..)| *name != clash && !without.contains(name));
    format!("{{{}}}", fields.filter_map(of).collect::<Vec<_>>().join(","))
}

/// All ways to submit a task under a key.
fn ways(task: &str) -> [(&'static str, String); 3] {
    let line = task.to_owned();
    [(TASKS, task.to_owned()), (BATCH, format!(r#"{{"tasks":[{{"kind":"first"}},{task}]}}"#)), ("lines", line)]
}

async fn send(api: &Api, path: &str, key: &str, body: &str) -> (u16, Value, bool) {
    let answer = match path {
        "lines" => api.post_lines_once(key, body).await,
        path => api.post_once(path, key, body).await,
    };
    (answer.status, answer.json(), answer.headers.contains_key("idempotent-replayed"))
}

#[tokio::test]
async fn whatever_makes_another_task_makes_another_request() {
    let api = Api::start().await;
    for (way, (field, usual, other)) in FIELDS.iter().enumerate() {
        for (route, (path, first)) in ways(&task(field, Some(usual), &[])).into_iter().enumerate() {
            // A unique key is held by the task before.
            let unique = |text: &str| text.replace(r#""u""#, &format!(r#""u{way}{route}""#));
            let key = format!("{field}-{route}");
            let (status, made, _) = send(&api, path, &key, &unique(&first)).await;
            assert_eq!(status, 202, "{path} {field}: {made}");
            let (status, again, replayed) = send(&api, path, &key, &unique(&first)).await;
            assert!(status == 202 && replayed, "{path} {field}: {again}");
            for changed in [Some(*other), None] {
                if changed.is_none() && ["kind", "unique_key"].contains(field) {
                    continue;
                }
                let (_, body) = ways(&task(field, changed, &[])).into_iter().nth(route).unwrap();
                let (status, answer, _) = send(&api, path, &key, &unique(&body)).await;
                let said = format!("{path} {field} {changed:?}: {answer}");
                assert_eq!((status, &answer["code"]), (422, &json!("idempotency_key_reused")), "{said}");
            }
        }
    }
}

#[tokio::test]
async fn another_task_that_follows_is_another_batch() {
    let api = Api::start().await;
    let batch = |then: &str| format!(r#"{{"tasks":[{{"kind":"a"}}],"then":{then}}}"#);
    for (field, usual, other) in FIELDS.iter().filter(|(field, ..)| !NOT_LATER.contains(field)) {
        let first = batch(&task(field, Some(usual), &NOT_LATER));
        assert_eq!(api.post_once(BATCH, field, &first).await.status, 202, "{first}");
        let second = batch(&task(field, Some(other), &NOT_LATER));
        assert_eq!(api.post_once(BATCH, field, &second).await.json()["code"], "idempotency_key_reused", "{field}");
        assert!(api.post_once(BATCH, field, &first).await.headers.contains_key("idempotent-replayed"), "{field}");
    }
}

/// The table above has all fields that a submission can have.
#[tokio::test]
async fn no_field_is_forgotten() {
    let document = Api::start().await.get("/openapi.json").await.json();
    let mut known: Vec<_> = FIELDS.iter().map(|(field, ..)| (*field).to_owned()).collect();
    known.sort_unstable();
    let mut fields: Vec<_> =
        document["components"]["schemas"]["SubmitTask"]["properties"].as_object().unwrap().keys().cloned().collect();
    fields.sort_unstable();
    assert_eq!(fields, known, "a field of the API is not tried here, or tried in vain");
    let retry = document["components"]["schemas"]["RetryTask"]["properties"].as_object().unwrap();
    assert_eq!(retry.keys().collect::<Vec<_>>(), ["args"]);
}

#[tokio::test]
async fn args_count_as_they_were_written() {
    let api = Api::start().await;
    let failed = failed(&api).await;
    let retry = format!("/v1/tasks/{failed}/retry");
    for (index, args) in ARGS.iter().enumerate() {
        let bodies = |args: &str| {
            let task = format!(r#"{{"kind":"a","args":{args}}}"#);
            let then = format!(r#"{{"tasks":[{{"kind":"a"}}],"then":{task}}}"#);
            let [single, batch, lines] = ways(&task);
            [single, batch, lines, (BATCH, then), (retry.as_str(), format!(r#"{{"args":{args}}}"#))]
                .map(|(path, body)| (path.to_owned(), body))
        };
        for (route, (path, body)) in bodies(args).into_iter().enumerate() {
            let key = format!("{index}-{route}");
            let (status, made, _) = send(&api, &path, &key, &body).await;
            assert_eq!(status, 202, "{path} {args}: {made}");
            let (_, spaced) = bodies(&format!(" {args} ")).into_iter().nth(route).unwrap();
            assert!(send(&api, &path, &key, &spaced).await.2, "{path}: spaces do not count");
            for other in ARGS.iter().filter(|other| *other != args) {
                let (_, body) = bodies(other).into_iter().nth(route).unwrap();
                let (status, answer, _) = send(&api, &path, &key, &body).await;
                let said = format!("{path} {args} {other}: {answer}");
                assert_eq!((status, &answer["code"]), (422, &json!("idempotency_key_reused")), "{said}");
            }
        }
    }
}

/// What is as good as left out, and what is another way to write the same.
#[tokio::test]
async fn another_way_to_write_the_same_is_a_repetition() {
    let api = Api::start().await;
    let one = r#"{"kind":"a","args":{"x":1,"y":[{"b":"ü","a":2}]},"run_at":"2100-01-01T01:00:00+01:00"}"#;
    let same = r#"{ "run_at":"2100-01-01T00:00:00.000Z", "priority":"normal", "tags":{}, "queue":null,
        "args":{"y":[{"a":2,"b":"\u00fc"}],"x":1}, "kind":"a"}"#;
    let made = api.post_once(TASKS, "k", one).await.json();
    let again = api.post_once(TASKS, "k", same).await;
    assert!(again.headers.contains_key("idempotent-replayed"), "{}", again.text);
    assert_eq!(again.json()["id"], made["id"]);
}

/// The fingerprints of an earlier release, of requests whose fields it did not miss: they are kept for as long as tasks are.
#[tokio::test]
async fn requests_of_earlier_releases_are_recognised() {
    use sha2::{Digest, Sha256};
    let text = |hash: &mut Sha256, texts: &[&str]| {
        for text in texts {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
    };
    let mut hash = Sha256::new_with_prefix(b"tasklane task 1");
    text(&mut hash, &["a", "q", "2", "3", "", "", "1", "k", "v", "result_ttl", "5", "{2", "n", "1", "s", "\"ü"]);
    let body = r#"{"kind":"a","queue":"q","max_attempts":2,"timeout_ms":3,"tags":{"k":"v"},"result_ttl_ms":5,"args":{"s":"ü","n":1}}"#;
    let task = tasklane_producer::extract::object(body.as_bytes()).unwrap();
    let given = tasklane_producer::idempotency::Fingerprint::of_task(&task).under("k".to_owned());
    assert_eq!(given.fingerprint, <[u8; 32]>::from(hash.finalize()));
}

#[tokio::test]
async fn a_repetition_asks_nothing_of_limits() {
    let api = Api::start().await;
    let failed = failed(&api).await;
    let retry = format!("/v1/tasks/{failed}/retry");
    let sent = [
        (TASKS, "single", r#"{"kind":"a","queue":"small"}"#),
        (BATCH, "batch", r#"{"tasks":[{"kind":"a","queue":"small"},{"kind":"b","queue":"small"}]}"#),
        (BATCH, "group", r#"{"tasks":[{"kind":"a","queue":"small"}],"then":{"kind":"b"}}"#),
        ("lines", "lines", "{\"kind\":\"a\",\"queue\":\"small\"}\n{\"kind\":\"b\",\"queue\":\"small\"}"),
        (&retry, "retry", r#"{"args":7}"#),
    ];
    let mut made = Vec::new();
    for (path, key, body) in sent {
        let (status, answer, _) = send(&api, path, key, body).await;
        assert_eq!(status, 202, "{answer}");
        made.push(answer);
    }
    api.put("/v1/limits/queue/small", r#"{"max_queued":1}"#).await;
    for ((path, key, body), first) in sent.into_iter().zip(made) {
        let (status, refused, _) = send(&api, path, &format!("{key}-new"), body).await;
        assert_eq!((status, &refused["code"]), (429, &json!("queue_full")), "{path} {key}");
        let (status, again, replayed) = send(&api, path, key, body).await;
        assert!(status == 202 && replayed, "{path} {key}: {again}");
        for member in ["id", "tasks", "group"] {
            assert_eq!(again[member], first[member], "{path} {key}");
        }
        let (status, reused, _) = send(&api, path, key, &body.replace(r#""a""#, r#""c""#).replace('7', "8")).await;
        assert_eq!((status, &reused["code"]), (422, &json!("idempotency_key_reused")), "{path} {key}");
    }
}

/// The task whose work is done again may have moved on, or be gone.
#[tokio::test]
async fn a_repeated_retry_asks_nothing_of_the_other_task() {
    let api = Api::start().await;
    let failed = failed(&api).await;
    let retry = format!("/v1/tasks/{failed}/retry");
    let made = api.post_once(&retry, "k", r#"{"args":1}"#).await.json();
    let again = async || {
        let answer = api.post_once(&retry, "k", r#"{"args":1}"#).await;
        assert_eq!((answer.status, &answer.json()["id"]), (202, &made["id"]), "{}", answer.text);
        assert!(answer.headers.contains_key("idempotent-replayed"));
        assert_eq!(api.post_once(&retry, "k", r#"{"args":2}"#).await.status, 422);
    };
    assert_eq!(api.post(&retry, "").await.status, 202);
    again().await;
    assert_eq!(api.post_once(&retry, "other", r#"{"args":1}"#).await.status, 409);
    api.run(failed, Transition::Complete { result: Json::null() }).await;
    again().await;
    assert_eq!(api.post("/v1/tasks/purge", r#"{"state":"completed"}"#).await.json()["purged"], 1);
    again().await;
    assert_eq!(api.post_once(&retry, "other", r#"{"args":1}"#).await.status, 404);
}

async fn failed(api: &Api) -> TaskId {
    let id = api.submitted(r#"{"kind":"a","queue":"small"}"#).await;
    let error = Failure { message: "no paper".to_owned(), kind: ErrorKind::Error };
    api.run(id, Transition::Discard { reason: "exhausted".to_owned(), error }).await;
    id
}
