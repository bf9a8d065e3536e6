use proptest::prelude::*;
use tasklane_common::config::RouteTable;

use super::*;
use crate::extract;

fn rules() -> Rules {
    let queue = QueueName::parse("emails").unwrap();
    let emails = RouteTable { kind: "email.*".to_owned(), queue, result_ttl_ms: Some(7) };
    Rules { max_attempts: 20, routes: Routes::new(&[emails]).unwrap() }
}

fn now() -> Timestamp {
    clock::timestamp(1_900_000_000_000)
}

fn validate(text: &str) -> Result<NewTask, Vec<FieldError>> {
    let task: SubmitTask = extract::object(text.as_bytes()).unwrap();
    task.validate(&rules(), Circumstances { now: now(), traceparent: None })
}

fn paths(text: &str) -> Vec<String> {
    validate(text).unwrap_err().into_iter().map(|error| error.path).collect()
}

#[test]
fn the_shortest_submission_gets_the_defaults() {
    let task = validate(r#"{"kind":"report.build"}"#).unwrap();
    assert_eq!((task.args.as_str(), task.queue.as_str(), task.max_attempts), ("{}", "default", 20));
    assert_eq!((task.timeout, task.run_at, task.tags.len()), (None, None, 0));
}

#[test]
fn null_is_left_out_except_as_args() {
    let nulls = r#"{"kind":"a","args":null,"queue":null,"max_attempts":null,"timeout_ms":null,"delay_ms":null,"run_at":null,"priority":null,"tags":null}"#;
    assert_eq!(validate(nulls).unwrap().args.as_str(), "null");
}

#[test]
fn a_queue_goes_before_a_route() {
    assert_eq!(validate(r#"{"kind":"email.welcome"}"#).unwrap().queue.as_str(), "emails");
    assert_eq!(validate(r#"{"kind":"email.welcome","queue":"mine"}"#).unwrap().queue.as_str(), "mine");
}

#[test]
fn a_result_is_kept_as_the_submission_says_or_else_the_kinds_route() {
    let ttl = |text: &str| validate(text).unwrap().result_ttl.map(|ttl| ttl.as_millis());
    assert_eq!(ttl(r#"{"kind":"a"}"#), None);
    assert_eq!(ttl(r#"{"kind":"a","result_ttl_ms":31536000000}"#), Some(31_536_000_000));
    assert_eq!(ttl(r#"{"kind":"email.welcome"}"#), Some(7));
    assert_eq!(ttl(r#"{"kind":"email.welcome","queue":"mine"}"#), Some(7));
    assert_eq!(ttl(r#"{"kind":"email.welcome","result_ttl_ms":8}"#), Some(8));
    assert_eq!(paths(r#"{"kind":"a","result_ttl_ms":31536000001}"#), ["result_ttl_ms"]);
}

#[test]
fn every_fault_is_named() {
    let text = r#"{"kind":"no kind","queue":"A","max_attempts":0,"timeout_ms":0,"result_ttl_ms":0,"delay_ms":-1,"run_at":"soon","priority":"urgent","tags":{"a:b":"x","c":"\u0000"}}"#;
    let expected = "kind queue max_attempts timeout_ms result_ttl_ms run_at delay_ms run_at priority tags.a:b tags.c";
    assert_eq!(paths(text).join(" "), expected);
    assert_eq!(paths("{}"), ["kind"]);
}

#[test]
fn args_have_a_limit() {
    let text = |bytes: usize| format!(r#"{{"kind":"a","args":"{}"}}"#, "x".repeat(bytes));
    assert!(validate(&text(ARGS_BYTES_MAX - 2)).is_ok());
    assert_eq!(paths(&text(ARGS_BYTES_MAX - 1)), ["args"]);
}

#[test]
fn a_time_in_the_past_means_at_once() {
    assert_eq!(validate(r#"{"kind":"a","run_at":"1999-12-31T23:59:59Z"}"#).unwrap().run_at, None);
    assert_eq!(validate(r#"{"kind":"a","delay_ms":0}"#).unwrap().run_at, None);
    let later = validate(r#"{"kind":"a","run_at":"2100-01-01T01:00:00.1234567+01:00"}"#).unwrap().run_at;
    assert_eq!(later.unwrap().to_string(), "2100-01-01T00:00:00.123Z");
}

proptest! {
    /// Whatever is accepted is within every limit, and delays count from now.
    #[test]
    fn what_is_accepted_is_within_the_limits(
        kind in "[a-zA-Z._ -]{0,12}",
        queue in proptest::option::of("[a-zA-Z_-]{0,8}"),
        max_attempts in proptest::option::of(-5i64..2_000),
        timeout_ms in proptest::option::of(prop_oneof![-1i64..3, Just(TIMEOUT_MS_MAX), Just(TIMEOUT_MS_MAX + 1)]),
        delay_ms in proptest::option::of(prop_oneof![-1i64..3, Just(DELAY_MS_MAX), Just(DELAY_MS_MAX + 1)]),
        tags in proptest::option::of(proptest::collection::btree_map("[a-z:]{0,3}", ".{0,3}", 0..40)),
    ) {
        let kind = Some(kind);
        let task = SubmitTask { kind, queue, max_attempts, timeout_ms, delay_ms, tags, ..SubmitTask::default() };
        if let Ok(new) = task.clone().validate(&rules(), Circumstances { now: now(), traceparent: None }) {
            prop_assert_eq!(Some(new.kind.as_str()), task.kind.as_deref());
            prop_assert!((1..=MAX_ATTEMPTS_MAX).contains(&new.max_attempts));
            prop_assert!(new.timeout.is_none_or(|timeout| timeout.as_millis() <= 86_400_000 && !timeout.is_zero()));
            prop_assert!(new.tags.len() <= TAGS_MAX && new.tags.keys().all(|key| !key.contains(':')));
            let delay = new.run_at.map(|run_at| run_at.as_millisecond() - now().as_millisecond());
            prop_assert_eq!(delay, task.delay_ms.filter(|delay| *delay > 0));
        }
    }

    /// No text makes the parser panic; every refusal has a reason.
    #[test]
    fn any_text_is_survived(text in r#"\{("(kind|args|queue|tags|run_at|delay_ms)":("a"|1|null|\{\}|\[\]|-1e9),?){0,5}\}"#) {
        if let Ok(task) = extract::object::<SubmitTask>(text.as_bytes())
            && let Err(faults) = task.validate(&rules(), Circumstances { now: now(), traceparent: None })
        {
            prop_assert!(!faults.is_empty() && faults.iter().all(|fault| !fault.message.is_empty()));
        }
    }
}
