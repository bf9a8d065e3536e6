use proptest::prelude::*;

use super::*;
use crate::routing::Routes;

fn batch() -> Batch {
    let rules = Rules { max_attempts: 20, routes: Routes::default() };
    let now = tasklane_common::clock::timestamp(1_900_000_000_000);
    Batch::new(&rules, Circumstances { now, traceparent: None }, true)
}

fn document(text: &str) -> Result<Collected, ApiError> {
    let mut batch = batch();
    batch.add_document(text.as_bytes())?;
    batch.finish()
}

fn lines(parts: &[&[u8]]) -> Result<Collected, ApiError> {
    let (mut batch, mut lines) = (batch(), Lines::default());
    if parts.iter().any(|part| lines.feed(part, &mut batch).is_break()) {
        return batch.finish();
    }
    lines.finish(&mut batch);
    batch.finish()
}

fn paths(outcome: Result<Collected, ApiError>) -> Vec<String> {
    match outcome {
        Err(ApiError::InvalidTask(faults)) => faults.into_iter().map(|fault| fault.path).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_bad_task_of_a_document_is_named() {
    let text = r#"{"tasks":[{"kind":"a"},{"kind":"no kind"},7,{"kind":"a","timeout":1},{"kind":"a","tags":{"k":1}}]}"#;
    assert_eq!(paths(document(text)), ["tasks[1].kind", "tasks[2]", "tasks[3].timeout", "tasks[4].tags.k"]);
}

#[test]
fn what_is_no_batch_is_told() {
    assert!(matches!(document(r#"{"tasks":["#), Err(ApiError::InvalidJson(_))));
    assert_eq!(paths(document(r#"{"tasks":[]}"#)), ["tasks"]);
    assert_eq!(paths(document(r#"{"tasks":{}}"#)), ["tasks"]);
    assert_eq!(paths(document(r#"{"jobs":[]}"#)), ["jobs"]);
    assert_eq!(paths(lines(&[b"\n \n"])), ["tasks"]);
}

#[test]
fn there_is_an_end_to_a_batch() {
    let of = |count: usize| format!(r#"{{"tasks":[{}]}}"#, vec![r#"{"kind":"a"}"#; count].join(","));
    assert_eq!(document(&of(TASKS_MAX)).unwrap().tasks.len(), TASKS_MAX);
    assert_eq!(paths(document(&of(TASKS_MAX + 1))), ["tasks"]);
    let line = b"{\"kind\":\"a\"}\n";
    assert_eq!(lines(&[&line.repeat(TASKS_MAX)]).unwrap().tasks.len(), TASKS_MAX);
    assert_eq!(paths(lines(&[&line.repeat(TASKS_MAX + 9)])), ["line 10001"]);
}

/// The parser takes a hundred bytes of memory for each of five.
#[test]
fn a_task_of_a_document_is_bounded_as_a_line_is_and_its_tags_are_not_all_read() {
    let tags = |count: usize| (0..count).map(|i| format!("\"{i}\":\"\"")).collect::<Vec<_>>().join(",");
    let task = |tags: String| format!(r#"{{"kind":"a","tags":{{{tags}}}}}"#);
    let with = |then: &str| format!(r#"{{"tasks":[{{"kind":"a"}},{}],"then":{then}}}"#, task(tags(200_000)));
    let told = |text: &str| match document(text) {
        Err(ApiError::InvalidTask(faults)) => {
            faults.into_iter().map(|fault| (fault.path, fault.message)).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let long = format!("is longer than {LINE_BYTES_MAX} bytes");
    let both = [("then".to_owned(), long.clone()), ("tasks[1]".to_owned(), long)];
    assert_eq!(told(&with(&task(tags(200_000)))), both);
    // Reading on would come to a tag that is no text.
    let stops = format!(r#"{{"tasks":[{{"kind":"a","tags":{{{},"k":1}}}}]}}"#, tags(33));
    assert_eq!(told(&stops), [("tasks[0].tags".to_owned(), "must be at most 32".to_owned())]);
    assert_eq!(paths(document(r#"{"tasks":[{"kind":"a"}],"then":{"kind":"a","tags":{"k":1}}}"#)), ["then.tags.k"]);
    assert_eq!(paths(document(r#"{"tasks":[{"kind":"a"}],"then":7}"#)), ["then"]);
}

#[test]
fn a_bad_line_is_named_by_its_number() {
    let mut text = "{\"kind\":\"a\"}\n".repeat(4320);
    text.push_str("{\"kind\":\"a\"\n\n{\"kind\":\"?\"}");
    assert_eq!(paths(lines(&[text.as_bytes()])), ["line 4321", "line 4323: kind"]);
}

#[test]
fn only_the_first_faults_are_named() {
    assert_eq!(paths(lines(&[&b"x\n".repeat(5000)])).len(), ERRORS_MAX);
}

#[test]
fn a_line_without_end_is_refused() {
    let (mut batch, mut cut) = (batch(), Lines::default());
    assert!(cut.feed(&vec![b'x'; LINE_BYTES_MAX], &mut batch).is_continue());
    assert!(cut.feed(b"x", &mut batch).is_break());
    assert_eq!(paths(batch.finish()), ["line 1"]);
    let spaces = [vec![b' '; LINE_BYTES_MAX + 1], b"\n{\"kind\":\"a\"}".to_vec()].concat();
    for cut in [0, 1, LINE_BYTES_MAX + 1] {
        let (first, second) = spaces.split_at(cut);
        assert_eq!(paths(lines(&[first, second])), ["line 1"], "cut at {cut}");
    }
}

#[test]
fn both_forms_have_the_same_fingerprint() {
    let digest = |collected: Collected| collected.fingerprint.unwrap().under(String::new()).fingerprint;
    let document = document(r#"{"tasks":[{"kind":"a"},{"kind":"b","args":1}]}"#).unwrap();
    let lines = lines(&[b"{\"kind\":\"a\"}\r\n\n{\"args\":1,\"kind\":\"b\"}"]).unwrap();
    assert_eq!(digest(document), digest(lines));
}

proptest! {
    /// Wherever the network cuts the stream, the lines are the same.
    #[test]
    fn cuts_do_not_matter(cuts in proptest::collection::vec(0usize..90, 0..6)) {
        let text = b"{\"kind\":\"a\"}\n\n{\"kind\":\"b\"}\r\n{\"kind\":\"c\",\"args\":\"\\n\"}\n{\"kind\":\"d\"}";
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let parts: Vec<_> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
        let kinds: Vec<_> = lines(&parts).unwrap().tasks.iter().map(|task| task.kind.to_string()).collect();
        prop_assert_eq!(kinds, ["a", "b", "c", "d"]);
    }
}
