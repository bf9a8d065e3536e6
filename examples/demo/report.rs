//! What the demo prints when the work is done.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tasklane_common::task::Task;
use tasklane_examples::client::{Client, result_of};
use tokio::process::Command;
use tokio::time::timeout;

use crate::broker::Broker;
use crate::evidence::Evidence;
use crate::programs::Programs;
use crate::worker::Digested;

const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// The table.
pub(crate) fn print(evidence: &Evidence) {
    let (fewest, most) = evidence.starts_per_task();
    let (lowest, highest) = min_max(evidence.tasks.iter().map(|task| i64::from(task.attempt)));
    let total = evidence.starts_total();
    println!();
    println!("  submitted        {}", evidence.submitted.len());
    println!("  completed        {}", evidence.completed());
    println!("  runs per task    min {fewest}, max {most}   ({total} starts, written down by the handlers themselves)");
    println!("  attempts         min {lowest}, max {highest}   (as the API says)");
    for (pid, count) in evidence.shares() {
        println!("  worker {pid:<9} {count}   ({:.1} %)", 100.0 * count as f64 / total.max(1) as f64);
    }
    let seconds = seconds(&evidence.tasks);
    println!(
        "  throughput       {:.0} tasks/s   ({seconds:.2} s from the first record to the last result)",
        evidence.completed() as f64 / seconds
    );
    let wait = percentiles(&evidence.tasks, |task| Some((task.run_at, task.started_at?)));
    println!(
        "  wait             p50 {} ms, p99 {} ms   (from due to claimed; all were submitted at once)",
        wait.0, wait.1
    );
    let run = percentiles(&evidence.tasks, |task| Some((task.started_at?, task.finished_at?)));
    println!("  run              p50 {} ms, p99 {} ms   (from claimed to the result on disk)", run.0, run.1);
    println!("  left in broker   {} messages, {} new dead letters", evidence.left.ready, evidence.left.dead);
}

/// Compares a sample of the results with what the system's own program says.
pub(crate) async fn check_digests(tasks: &[Task], sample: usize) -> Result<String> {
    let step = (tasks.len() / sample).max(1);
    let tasks: Vec<_> = tasks.iter().step_by(step).take(sample).collect();
    let paths = tasks.iter().map(|task| path_of(task)).collect::<Result<Vec<_>>>()?;
    let (program, output) = sums(&paths).await?;
    // A path with odd characters makes its line begin with a backslash.
    let sums: Vec<_> = output.lines().map(|line| line.trim_start_matches('\\')).collect();
    ensure!(sums.len() == tasks.len(), "{program} answered {} lines for {} files", sums.len(), tasks.len());
    for ((task, path), sum) in tasks.iter().zip(&paths).zip(sums) {
        let ours = result_of::<Digested>(task)?.sha256;
        ensure!(sum.starts_with(&ours), "{path}: the task answered {ours}, {program} says {sum:.64}");
    }
    Ok(format!("{} of {} sampled agree with {program}", tasks.len(), tasks.len()))
}

fn path_of(task: &Task) -> Result<String> {
    let args: Value = serde_json::from_str(task.args.as_str())?;
    Ok(args["path"].as_str().context("a task without a path")?.to_owned())
}

async fn sums(paths: &[String]) -> Result<(&'static str, String)> {
    for (program, args) in [("sha256sum", &[][..]), ("shasum", &["-a", "256"][..])] {
        let output = Command::new(program).args(args).arg("--").args(paths).kill_on_drop(true).output();
        match timeout(CHECK_LIMIT, output).await.with_context(|| format!("{program} does not end"))? {
            Ok(output) => {
                ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
                return Ok((program, String::from_utf8(output.stdout)?));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    bail!("neither sha256sum nor shasum is there to compare with")
}

/// Where to look.
pub(crate) async fn print_places(client: &Client, broker: &Broker) {
    let ui = match broker.management_ui(client).await {
        Some(ui) => format!("{ui}   (queue tasklane.q.demo)"),
        None => "not reached; rabbitmq-plugins enable rabbitmq_management turns it on".to_owned(),
    };
    println!("\nLook:");
    println!("  RabbitMQ UI      {ui}");
    println!("  the API          {}/docs, for programs /openapi.json", client.url());
}

/// What to type, as long as everything is up.
pub(crate) fn print_what_next(client: &Client, programs: &Programs) {
    let url = client.url();
    println!("\nGo on:");
    println!(
        "  curl '{url}/v1/tasks?wait_ms=5000' --json '{{\"kind\": \"demo.digest\", \"queue\": \"demo\", \"args\": {{\"path\": \"/etc/hosts\"}}}}'"
    );
    println!("  curl '{url}/v1/tasks?kind=demo.digest&limit=3'");
    println!("  curl {url}/v1/queues/demo");
    println!("  curl {url}/v1/workers");
    if let Some(pid) = programs.worker_pids().next() {
        println!("  kill -9 {pid}   # the other worker takes over");
    }
    println!("\nThe other examples can use this producer:");
    println!("  export TASKLANE_URL={url} TASKLANE_LEDGER_URL=sqlite://{}", programs.ledger().display());
    println!("  cargo run --release --example fan_in");
    println!("\nEverything stays up until Ctrl-C.");
}

fn seconds(tasks: &[Task]) -> f64 {
    let first = tasks.iter().map(|task| task.created_at).min();
    let last = tasks.iter().filter_map(|task| task.finished_at).max();
    first.zip(last).map_or(f64::NAN, |(first, last)| last.duration_since(first).as_secs_f64().max(0.001))
}

fn min_max(numbers: impl Iterator<Item = i64> + Clone) -> (i64, i64) {
    (numbers.clone().min().unwrap_or(0), numbers.max().unwrap_or(0))
}

/// The median and the 99th percentile of a time span, in milliseconds.
fn percentiles(tasks: &[Task], span: impl Fn(&Task) -> Option<(jiff::Timestamp, jiff::Timestamp)>) -> (i64, i64) {
    let millis = |task| span(task).map(|(from, to)| to.as_millisecond() - from.as_millisecond());
    let mut spans: Vec<_> = tasks.iter().filter_map(millis).collect();
    spans.sort_unstable();
    let at = |percent: usize| spans.get(spans.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0);
    (at(50), at(99))
}
