//! With real programs.

use std::time::Instant;

use clap::CommandFactory;
use rustix::io::Errno;
use serde_json::json;

use super::super::tests::context;
use super::*;
use crate::config::WorkerArgs;
use crate::process_group::tests::Witness;

/// In a script: holds the witness, which is its first argument, and says so.
const HOLD: &str = r#"exec 3>"$1"; echo up >&3; "#;
/// Far longer than anything here may take.
const LIMIT: Duration = Duration::from_secs(30);

fn program(argv: &[&str]) -> CommandHandler {
    let table = serde_json::from_value(json!({ "kind": "test.kind", "argv": argv })).unwrap();
    CommandHandler::new(&table, ProcessGroups::new()).unwrap()
}

async fn run(handler: &CommandHandler, args: &str) -> Result<Outcome, HandlerError> {
    let args = Json::parse(args.to_owned()).unwrap();
    let answer = timeout(LIMIT, handler.handle_json(args, &context())).await.expect("the run hangs");
    assert_eq!(handler.groups.count(), 0, "a run leaves no group behind");
    answer
}

async fn sh(script: &str) -> Result<Outcome, HandlerError> {
    run(&program(&["sh", "-c", script]), r#"{"n": 1}"#).await
}

fn completed(json: &str) -> Result<Outcome, HandlerError> {
    Ok(Outcome::Complete(Json::parse(json.to_owned()).unwrap()))
}

/// A script that holds a witness, already running; what it answers, and how it is stopped.
struct Running {
    witness: Witness,
    cancellation: CancellationToken,
    answer: tokio::task::JoinHandle<Result<Outcome, HandlerError>>,
}

async fn running(script: &str) -> Running {
    let mut witness = Witness::new();
    let handler = program(&["sh", "-c", &format!("{HOLD}{script}"), "sh", witness.path().to_str().unwrap()]);
    let cx = context();
    let cancellation = cx.cancellation.clone();
    let answer = tokio::spawn(async move { handler.handle_json(Json::null(), &cx).await });
    assert_eq!(witness.line().await, "up");
    Running { witness, cancellation, answer }
}

impl Running {
    async fn answer(&mut self) -> Result<Outcome, HandlerError> {
        timeout(LIMIT, &mut self.answer).await.expect("the run hangs").unwrap()
    }
}

#[tokio::test]
async fn the_args_come_in_and_the_result_goes_out() {
    assert_eq!(sh("cat").await, completed(r#"{"n": 1}"#));
    assert_eq!(sh("echo no JSON").await, completed(r#""no JSON\n""#));
    assert_eq!(sh("echo noise >&2").await, completed("null"));
}

#[tokio::test]
async fn a_megabyte_passes_through() {
    let args = format!("\"{}\"", "x".repeat(1024 * 1024 - 2));
    assert_eq!(run(&program(&["cat"]), &args).await, completed(&args));
}

#[tokio::test]
async fn a_program_need_not_read_its_args() {
    let args = format!("\"{}\"", "x".repeat(1024 * 1024 - 2));
    assert_eq!(run(&program(&["true"]), &args).await, completed("null"));
    assert_eq!(run(&program(&["sh", "-c", "exec <&-; echo 1"]), &args).await, completed("1"));
}

#[tokio::test]
async fn the_program_knows_its_task() {
    let handler =
        program(&["sh", "-c", "echo $TASKLANE_TASK_ID $TASKLANE_KIND $TASKLANE_ATTEMPT $TASKLANE_FENCE $TRACEPARENT"]);
    let cx = context();
    let answer = handler.handle_json(Json::null(), &cx).await;
    let trace = cx.traceparent.unwrap();
    assert_eq!(answer, completed(&format!(r#""{} test.kind 2 7 {trace}\n""#, cx.id)));
}

#[test]
fn the_program_does_not_get_the_workers_passwords() {
    let command = program(&["true"]).command(&context());
    for secret in SECRETS {
        assert!(command.as_std().get_envs().any(|(name, value)| name == secret && value.is_none()));
    }
    // What the help does not show holds a password, and every address may.
    for arg in WorkerArgs::command().get_arguments() {
        let Some(name) = arg.get_env().and_then(|name| name.to_str()) else { continue };
        if arg.is_hide_env_values_set() || name.ends_with("_URL") {
            assert!(SECRETS.contains(&name), "{name}");
        }
    }
}

#[tokio::test]
async fn the_exit_status_decides_and_stderr_explains() {
    assert_eq!(sh("echo broken >&2; exit 65").await, Err(HandlerError::discard("broken")));
    assert_eq!(sh("echo busy >&2; exit 1").await, Err(HandlerError::retry("busy")));
    assert_eq!(sh("exit 9").await, Err(HandlerError::retry("the program sh exited with status 9")));
    assert_eq!(sh("kill -9 $$").await, Err(HandlerError::unknown("the program sh was killed by signal 9")));
}

#[tokio::test]
async fn a_program_that_has_vanished_is_tried_again() {
    let mut handler = program(&["true"]);
    handler.program = "/no/such/program".to_owned();
    let error = run(&handler, "1").await.unwrap_err();
    assert!(error.to_string().starts_with("the program /no/such/program cannot be started: No such file"), "{error}");
}

#[test]
fn what_could_not_start_for_want_of_processes_files_or_memory_is_not_the_tasks_fault() {
    let told = |errno: Errno| not_started("p", &errno.into());
    for scarce in [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE] {
        let error = told(scarce);
        assert_eq!(error, HandlerError::not_started(error.to_string()));
    }
    let missing = told(Errno::NOENT);
    assert_eq!(missing, HandlerError::retry(missing.to_string()));
    let killed = told(Errno::PIPE);
    assert_eq!(killed, HandlerError::unknown(killed.to_string()));
}

#[tokio::test]
async fn of_much_stderr_the_end_is_kept() {
    let error = sh("head -c 3000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 1").await.unwrap_err();
    let message = error.to_string();
    assert!(message.len() <= ERROR_BYTES_MAX && message.ends_with("xxxthe end"), "{} bytes", message.len());
}

#[tokio::test]
async fn too_much_output_ends_the_run_for_good() {
    let mut running = running("exec yes").await;
    let error = running.answer().await.unwrap_err();
    assert_eq!(error, HandlerError::discard(error.to_string()));
    assert!(error.to_string().starts_with("the program sh answered more than the 1048576 bytes"), "{error}");
    running.witness.gone().await;
}

#[tokio::test]
async fn a_child_left_behind_with_the_pipes_neither_holds_the_run_nor_outlives_it() {
    let began = Instant::now();
    let mut running = running("sleep 600 & echo 5").await;
    assert_eq!(running.answer().await, completed("5"));
    assert!(began.elapsed() >= LINGER, "its output was waited for");
    running.witness.gone().await;
}

#[tokio::test]
async fn a_child_left_behind_without_the_pipes_costs_no_time() {
    let mut running = running("sleep 600 >/dev/null 2>&1 </dev/null & echo 5").await;
    assert_eq!(running.answer().await, completed("5"));
    running.witness.gone().await;
}

#[tokio::test]
async fn a_stopped_program_may_clean_up_but_completes_nothing() {
    let began = Instant::now();
    let script = "trap 'echo cleaned >&3; echo 5; exit 0' TERM; sleep 600 >/dev/null 2>&1 & echo ready >&3; wait";
    let mut running = running(script).await;
    assert_eq!(running.witness.line().await, "ready");
    running.cancellation.cancel();
    assert_eq!(running.answer().await, Err(HandlerError::unknown("the program sh was stopped")));
    assert_eq!(running.witness.line().await, "cleaned");
    running.witness.gone().await;
    assert!(began.elapsed() < TERM_GRACE, "nobody waits for a program that has ended");
}

#[tokio::test]
async fn a_program_that_ignores_sigterm_is_killed_with_its_children() {
    let mut running = running("trap '' TERM; echo ready >&3; sleep 600; sleep 600").await;
    assert_eq!(running.witness.line().await, "ready");
    let began = Instant::now();
    running.cancellation.cancel();
    assert_eq!(running.answer().await, Err(HandlerError::unknown("the program sh was stopped")));
    let took = began.elapsed();
    assert!((TERM_GRACE..2 * TERM_GRACE).contains(&took), "took {took:?}");
    running.witness.gone().await;
}

#[tokio::test]
async fn a_dropped_run_is_killed_at_once() {
    let mut running = running("trap '' TERM; sleep 600 & wait; sleep 600").await;
    let began = Instant::now();
    running.answer.abort();
    running.witness.gone().await;
    assert!(began.elapsed() < TERM_GRACE);
}

#[tokio::test]
async fn the_operator_says_which_exit_codes_are_final_besides() {
    let table = json!({ "kind": "test.kind", "argv": ["sh", "-c", "exit $(cat)"], "discard_exit_codes": [3, 4] });
    let handler = CommandHandler::new(&serde_json::from_value(table).unwrap(), ProcessGroups::new()).unwrap();
    for (code, is_final) in [("3", true), ("4", true), ("65", true), ("1", false)] {
        let error = run(&handler, code).await.unwrap_err();
        let message = format!("the program sh exited with status {code}");
        let expected = if is_final { HandlerError::discard(message) } else { HandlerError::retry(message) };
        assert_eq!(error, expected);
    }
}
