//! `/v1/schedules`: made, replaced, looked at, deleted.

use std::collections::BTreeMap;

use insta::assert_snapshot;
use jiff::Timestamp;
use serde_json::{Value, json};
use tasklane_common::ledger::{Fired, Firing};
use tasklane_common::schedule::{Overlap, ScheduleName};

use crate::support::{Answer, Api, json};

const PATH: &str = "/v1/schedules/reports.nightly";

fn nightly() -> Value {
    json!({
        "cron": "30 2 * * *", "timezone": "Europe/Berlin", "catch_up": "all",
        "task": {"kind": "email.report", "args": {"to": ["all"]}, "tags": {"team": "a"}, "timeout_ms": 1000}
    })
}

fn with_fields(body: &Value, fields: &Value) -> Value {
    let mut body = body.clone();
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn with(changes: Value) -> String {
    with_fields(&nightly(), &changes).to_string()
}

fn faults(answer: &Answer) -> BTreeMap<String, String> {
    assert_eq!(answer.status, 422, "{answer:?}");
    let errors = answer.json()["errors"].as_array().unwrap().clone();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    errors.iter().map(|error| (text(&error["path"]), text(&error["message"]))).collect()
}

#[tokio::test]
async fn a_schedule_is_made_looked_at_and_deleted() {
    let api = Api::start().await;
    assert_snapshot!("schedule_unknown", api.get(PATH).await.shown());
    let made = api.put(PATH, nightly().to_string()).await;
    assert_snapshot!("schedule_made", made.shown());
    let runs: Vec<Timestamp> = serde_json::from_value(made.json()["next_runs"].clone()).unwrap();
    let berlin = jiff::tz::TimeZone::get("Europe/Berlin").unwrap();
    assert!(runs.is_sorted() && runs[0] > Timestamp::now());
    assert!(runs.iter().all(|run| run.to_zoned(berlin.clone()).time() == jiff::civil::time(2, 30, 0, 0)
        || run.to_zoned(berlin.clone()).time() == jiff::civil::time(3, 0, 0, 0)));
    assert_eq!(api.get(PATH).await.json(), made.json());
    let deleted = api.delete(PATH).await;
    assert_eq!((deleted.status, deleted.text.as_str()), (204, ""));
    assert_eq!(api.delete(PATH).await.status, 404);
    assert_eq!(api.get("/v1/schedules/no%20name").await.status, 404);
}

#[tokio::test]
async fn the_same_definition_changes_nothing_and_another_replaces() {
    let api = Api::start().await;
    let made = api.put(PATH, nightly().to_string()).await;
    let again = api.put(PATH, nightly().to_string()).await;
    assert_eq!((again.status, again.json()), (200, made.json()));
    let replaced = api.put(PATH, with(json!({"overlap": "skip", "jitter_ms": 60_000}))).await;
    assert_snapshot!("schedule_replaced", replaced.shown());
    assert_eq!(replaced.json()["next_runs"], made.json()["next_runs"]);
    let paused = api.put(PATH, with(json!({"paused": true}))).await.json();
    assert_eq!((&paused["paused"], &paused["next_runs"]), (&json!(true), &json!([])));
    let resumed = api.put(PATH, with(json!({"paused": false}))).await.json();
    assert_eq!(
        (&resumed["next_runs"], &resumed["created_at"]),
        (&made.json()["next_runs"], &made.json()["created_at"])
    );
}

/// A deployment that puts its schedules each time does not resume what a person has paused, whatever else it changes.
#[tokio::test]
async fn a_pause_outlasts_a_put_that_does_not_speak_of_it() {
    let api = Api::start().await;
    assert_eq!(api.put(PATH, nightly().to_string()).await.json()["paused"], false);
    let pause = json(&format!("{PATH}/pause")).header("tasklane-actor", "anna").body("".into()).unwrap();
    let paused = api.send(pause).await.json();
    assert_eq!((&paused["paused"], &paused["paused_by"]), (&json!(true), &json!("anna")));
    for body in [nightly().to_string(), with(json!({"paused": null}))] {
        let same = api.put(PATH, body).await;
        assert_eq!((same.status, same.json()), (200, paused.clone()), "nothing has changed");
    }
    for (field, value) in [("cron", "0 5 * * *"), ("timezone", "UTC"), ("catch_up", "none"), ("overlap", "skip")] {
        let shown = api.put(PATH, with(json!({field: value}))).await.json();
        let expected = json!({field: value, "paused": true, "paused_by": "anna", "paused_at": paused["paused_at"], "next_runs": []});
        assert_eq!(with_fields(&shown, &expected), shown);
    }
    let resumed = api.put(PATH, with(json!({"paused": false}))).await.json();
    let of_pause = |shown: &Value| [&shown["paused"], &shown["paused_at"], &shown["paused_by"]].map(Clone::clone);
    assert_eq!(of_pause(&resumed), [json!(false), Value::Null, Value::Null]);
    assert_eq!(of_pause(&api.put(PATH, nightly().to_string()).await.json()), of_pause(&resumed));
    let made = api.put("/v1/schedules/made-paused", with(json!({"paused": true}))).await.json();
    assert_eq!(api.put("/v1/schedules/made-paused", nightly().to_string()).await.json(), made);
}

/// Ticks that nobody fires, here since nobody is there to do it, are counted when the timetable changes or it is paused.
#[tokio::test]
async fn what_was_due_is_fired_or_counted_when_the_timetable_changes() {
    let api = Api::start().await;
    let name = ScheduleName::parse("reports.nightly").unwrap();
    let ledger = api.app.gate.ledger();
    let (seconds, other) = (with(json!({"cron": "* * * * * *"})), with(json!({"cron": "*/2 * * * * *"})));
    let made = async |body: &String| {
        api.put(PATH, body.clone()).await;
        ledger.schedule(name.clone()).await.unwrap().1.unwrap().next_at.unwrap()
    };
    let behind = async |by: i64| {
        let first = made(&seconds).await;
        while Timestamp::now().as_second() < first.as_second() + by {
            tokio::task::yield_now().await;
        }
        first.as_second()
    };
    let missed = |shown: &Value| shown["ticks"]["missed"].as_i64().unwrap();
    let second = |time: &Value| time.as_str().unwrap().parse::<Timestamp>().unwrap().as_second();

    let first = behind(1).await;
    let shown = api.put(PATH, other.clone()).await.json();
    let next = ledger.schedule(name.clone()).await.unwrap().1.unwrap().next_at.unwrap().as_second();
    // The new one begins with an even second, and the one before that may have been the last of the old one.
    let counted = missed(&shown);
    assert!((next - first - 1..=next - first).contains(&counted), "{counted} from {first} to before {next}");

    api.put(PATH, with(json!({"cron": "@daily"}))).await;
    let before = missed(&api.get(PATH).await.json());
    let first = behind(1).await;
    let paused = api.post(&format!("{PATH}/pause"), "").await.json();
    let until = second(&paused["updated_at"]);
    let counted = missed(&paused) - before;
    assert!((until - first..=until - first + 1).contains(&counted), "{counted} from {first} to {until}");
    let resumed = api.post(&format!("{PATH}/resume"), "").await.json();
    assert_eq!(missed(&resumed), missed(&paused), "ticks in the pause are none");
}

/// Whoever fires schedules is given the time to fire what is due, as it was defined.
#[tokio::test]
async fn a_tick_that_is_due_is_fired_before_its_timetable_goes() {
    let api = Api::start().await;
    api.put(PATH, with(json!({"cron": "* * * * * *"}))).await;
    let name = ScheduleName::parse("reports.nightly").unwrap();
    let ledger = api.app.gate.ledger();
    let read = ledger.schedule(name.clone()).await.unwrap().1.unwrap();
    let tick = read.next_at.unwrap();
    while Timestamp::now() < tick {
        tokio::task::yield_now().await;
    }
    let firing = async {
        // What comes late is fired all the same.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let far = Timestamp::now() + std::time::Duration::from_secs(3600);
        let tasks = vec![(tick, read.definition.task_at(&name, tick))];
        let (revision, overlap) = (read.revision, Overlap::Allow);
        ledger.fire(Firing { name: name.clone(), revision, tick, next: far, tasks, missed: 0, overlap }).await.unwrap()
    };
    let (fired, shown) = tokio::join!(firing, api.put(PATH, with(json!({"cron": "@daily"}))));
    assert_eq!(fired, Fired::Recorded(1));
    assert_eq!(shown.json()["ticks"], json!({"fired": 1, "skipped": 0, "missed": 0}));
}

/// While expression and zone stay the schedule stays where it stands, even behind; else it begins with the next tick.
#[tokio::test]
async fn only_another_timetable_moves_the_next_tick() {
    let api = Api::start().await;
    api.put(PATH, with(json!({"cron": "* * * * * *"}))).await;
    let name = ScheduleName::parse("reports.nightly").unwrap();
    let ledger = api.app.gate.ledger();
    let stands = async || ledger.schedule(name.clone()).await.unwrap().1.unwrap().next_at;
    let (first, behind) = (stands().await.unwrap(), async || stands().await.unwrap() < Timestamp::now());
    while !behind().await {
        tokio::task::yield_now().await;
    }
    api.put(PATH, with(json!({"cron": "* * * * * *", "catch_up": "none"}))).await;
    assert_eq!(stands().await, Some(first));
    let shown = api.get(PATH).await.json();
    let runs: Vec<Timestamp> = serde_json::from_value(shown["next_runs"].clone()).unwrap();
    assert!(runs[0] > first && runs.len() == 5, "what is missed is no run to come: {runs:?}");
    api.put(PATH, with(json!({"cron": "*/1 * * * * *"}))).await;
    assert!(stands().await > Some(first));
}

#[tokio::test]
async fn what_has_fired_is_shown() {
    let api = Api::start().await;
    api.put(PATH, nightly().to_string()).await;
    let name = ScheduleName::parse("reports.nightly").unwrap();
    let schedule = api.app.gate.ledger().schedule(name.clone()).await.unwrap().1.unwrap();
    let tick = schedule.next_at.unwrap();
    let task = schedule.definition.task_at(&name, tick);
    let id = task.id;
    let next = schedule.definition.timetable().unwrap().next_after(tick).unwrap();
    let (revision, overlap) = (schedule.revision, Overlap::Allow);
    let firing = Firing { name, revision, tick, next, tasks: vec![(tick, task)], missed: 2, overlap };
    assert_eq!(api.app.gate.ledger().fire(firing).await.unwrap(), Fired::Recorded(1));
    let shown = api.get(PATH).await;
    assert_snapshot!("schedule_fired", shown.shown());
    assert_eq!(shown.json()["last_task_id"], json!(id));
    assert_eq!(shown.json()["last_tick"], format!("{tick:.3}"));
    let listed = api.get("/v1/tasks?tag=schedule:reports.nightly").await.json();
    assert_eq!(listed["tasks"][0]["tags"], json!({"team": "a", "schedule": "reports.nightly", "tick": tick}));
    assert_eq!(listed["tasks"][0]["queue"], "emails", "routes hold for schedules, too");
}

#[tokio::test]
async fn schedules_are_listed_in_pages() {
    let api = Api::start().await;
    for name in ["c", "a", "b"] {
        let made = api.put(&format!("/v1/schedules/{name}"), with(json!({"cron": "@daily"}))).await;
        assert_eq!(made.status, 201, "{made:?}");
    }
    let first = api.get("/v1/schedules?limit=2").await.json();
    let cursor = first["next_cursor"].as_str().unwrap();
    let rest = api.get(&format!("/v1/schedules?limit=2&cursor={cursor}")).await.json();
    let all = first["schedules"].as_array().unwrap().iter().chain(rest["schedules"].as_array().unwrap());
    assert_eq!(all.map(|schedule| schedule["name"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(rest["next_cursor"], Value::Null);
    assert_snapshot!("schedules_bad_query", api.get("/v1/schedules?limit=0&cursor=x&state=a").await.shown());
}

#[tokio::test]
async fn every_fault_of_a_schedule_is_named() {
    let api = Api::start().await;
    let bad = json!({
        "cron": "61 * * * *", "timezone": "Berlin", "catch_up_max": 0, "jitter_ms": -1,
        "task": {"kind": "a b", "delay_ms": 1, "run_at": "2030-01-31T08:00:00Z", "tags": {"tick": "x", "schedule": "y"},
                 "max_attempts": 0, "queue": "A"}
    });
    assert_snapshot!("schedule_bad", api.put(PATH, bad.to_string()).await.shown());
    let paths = async |body: String| faults(&api.put(PATH, body).await).into_keys().collect::<Vec<_>>();
    assert_eq!(paths("{}".to_owned()).await, ["cron", "task"]);
    assert_eq!(paths(with(json!({"catch_up": "some"}))).await, ["catch_up"]);
    assert_eq!(paths(with(json!({"overlap": "kill"}))).await, ["overlap"]);
    assert_eq!(paths(with(json!({"every": "day"}))).await, ["every"]);
    assert_eq!(paths(with(json!({"task": {"kind": "a", "colour": "red"}}))).await, ["task.colour"]);
    assert_eq!(paths(with(json!({"task": {"args": 1}}))).await, ["task.kind"]);
    assert_eq!(paths(with(json!({"task": {"kind": "a", "args": "x".repeat(70_000)}}))).await, ["task.args"]);
    let tags: BTreeMap<_, _> = (0..31).map(|n| (n.to_string(), "x")).collect();
    assert_eq!(paths(with(json!({"task": {"kind": "a", "tags": tags}}))).await, ["task.tags"]);
    for (cron, words) in [
        ("0 0 30 2 *", "never fires"),
        ("* * *", "five fields"),
        ("", "five fields"),
        ("* * * * * MON#9", "day of week"),
    ] {
        let told = faults(&api.put(PATH, with(json!({"cron": cron}))).await);
        assert!(told["cron"].contains(words), "{cron}: {told:?}");
    }
    let unnamed = api.put("/v1/schedules/no%20name", nightly().to_string()).await;
    assert_eq!(faults(&unnamed).into_keys().collect::<Vec<_>>(), ["name"]);
    assert_eq!(api.put(PATH, "nope").await.status, 400);
    assert_eq!(api.put(PATH, with(json!({"task": {"kind": "a", "args": "x".repeat(200_000)}}))).await.status, 413);
    assert_eq!(api.post(PATH, "{}").await.status, 405);
    assert_eq!(api.get(PATH).await.status, 404, "nothing was made");
}

#[tokio::test]
async fn a_schedule_is_paused_and_resumed() {
    let api = Api::start().await;
    let (pause, resume) = (format!("{PATH}/pause"), format!("{PATH}/resume"));
    assert_snapshot!("schedule_pause_unknown", api.post(&pause, "").await.shown());
    assert_eq!(api.post(&resume, "").await.status, 404);
    assert_eq!(api.post("/v1/schedules/no%20name/pause", "").await.status, 404);
    assert_eq!(api.get(PATH).await.status, 404, "nothing was made");
    let made = api.put(PATH, nightly().to_string()).await.json();
    let paused = api.post(&pause, "").await;
    assert_snapshot!("schedule_paused", paused.shown());
    assert_eq!(api.post(&pause, "").await.json(), paused.json(), "idempotent");
    assert_eq!(api.get(PATH).await.json(), paused.json());
    let resumed = api.post(&resume, "").await.json();
    let expected = json!({"updated_at": resumed["updated_at"]});
    assert_eq!(resumed, with_fields(&made, &expected), "all else stays");
    assert_eq!(api.post(&resume, "").await.json(), resumed, "idempotent");
    assert_eq!(api.get(&pause).await.status, 405);
}

/// However the calls of two meet, the definition that was put last stays, and the last pause with it.
#[tokio::test]
async fn a_pause_takes_back_nothing_that_was_put() {
    let api = Api::start().await;
    api.put(PATH, with(json!({"paused": true}))).await;
    let putting = async {
        for jitter_ms in 1..=40 {
            let put = api.put(PATH, with(json!({"jitter_ms": jitter_ms, "paused": true}))).await;
            assert_eq!((put.status, &put.json()["jitter_ms"]), (200, &json!(jitter_ms)));
            assert_eq!(api.get(PATH).await.json()["jitter_ms"], jitter_ms, "nobody else changes it");
        }
    };
    let pausing = async {
        for _ in 0..20 {
            for (call, paused) in [("resume", false), ("pause", true)] {
                let answer = api.post(&format!("{PATH}/{call}"), "").await;
                assert_eq!((answer.status, &answer.json()["paused"]), (200, &json!(paused)));
            }
        }
    };
    tokio::join!(putting, pausing);
    let left = api.get(PATH).await.json();
    assert_eq!((&left["jitter_ms"], &left["paused"]), (&json!(40), &json!(true)));
}

/// Both of two that make the same schedule at once are answered, and there is one.
#[tokio::test]
async fn two_that_make_the_same_schedule_agree() {
    let api = Api::start().await;
    let bodies = [with(json!({"jitter_ms": 1})), with(json!({"jitter_ms": 2}))];
    let answers = tokio::join!(api.put(PATH, bodies[0].clone()), api.put(PATH, bodies[1].clone()));
    let mut statuses = [answers.0.status, answers.1.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 201]);
    let last = if answers.0.status == 200 { answers.0 } else { answers.1 };
    assert_eq!(api.get(PATH).await.json(), last.json());
}
