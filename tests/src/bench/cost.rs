//! The row about the processors' time: how much of it a task takes in each program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};

use super::raw::Raw;
use super::world::{WARM, WORKERS, World, args};
use super::{Plan, Row};
use crate::ledger::LedgerKind;
use crate::stack::Stack;

/// Programs that take less of a task's time, in µs, are left out.
const LEAST: f64 = 0.5;

/// The broker alone: the µs of processor time that one message takes in each program, published and consumed.
pub async fn raw_cost(plan: Plan) -> Result<Vec<Row>> {
    let stack = Stack::new(LedgerKind::Sqlite).await?;
    let raw = Raw::on(&stack.vhost).await?;
    let body = serde_json::to_vec(&args())?;
    raw.both(WARM, &body).await?;
    measure(plan, None, || raw.both(plan.tasks, &body)).await
}

/// End to end by batch: the µs of processor time that one task takes in each program.
pub async fn cost(plan: Plan, ledger: LedgerKind, name: &str) -> Result<Vec<Row>> {
    let world = World::new(ledger, WORKERS).await?;
    world.end_to_end(WARM, false).await?;
    measure(plan, Some(name), || world.end_to_end(plan.tasks, false)).await
}

/// A row for all programs together, and one for each of them.
async fn measure(plan: Plan, ledger: Option<&str>, work: impl AsyncFn() -> Result<f64>) -> Result<Vec<Row>> {
    let mut measured: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..plan.repeats {
        let before = used()?;
        work().await?;
        let mut all = 0.0;
        for (program, after) in used()? {
            let taken = (after - before.get(&program).unwrap_or(&0.0)) * 1e6 / plan.tasks as f64;
            all += taken;
            measured.entry(format!("- {program}")).or_default().push(taken);
        }
        measured.entry("processors".to_owned()).or_default().push(all);
    }
    let rows = measured.into_iter().rev().map(|(program, measured)| Row::of(&program, ledger, "µs/task", measured));
    Ok(rows.filter(|row| row.median >= LEAST).collect())
}

/// The seconds of processor time that was taken so far by each program that was started together with this one: by all
/// that descend from this process's parent.
fn used() -> Result<BTreeMap<String, f64>> {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let mut processes = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("listing the processes")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One may have ended since it was listed.
        if let Some(process) = fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|stat| parse(&stat)) {
            processes.insert(pid, process);
        }
    }
    let mut family = BTreeSet::from([std::os::unix::process::parent_id()]);
    let mut used = BTreeMap::new();
    loop {
        let (of, rest): (Vec<_>, Vec<_>) =
            processes.into_iter().partition(|(_, process)| family.contains(&process.parent));
        if of.is_empty() {
            return Ok(used);
        }
        for (pid, Process { program, ticks: taken, .. }) in of {
            family.insert(pid);
            *used.entry(program).or_default() += taken as f64 / ticks;
        }
        processes = rest.into_iter().collect();
    }
}

/// What `/proc/<pid>/stat` tells of a process.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    program: String,
    parent: u32,
    /// In user and in kernel mode, of all its threads.
    ticks: u64,
}

/// The program's name is in parentheses and may have some itself.
fn parse(stat: &str) -> Option<Process> {
    let (begin, rest) = stat.rsplit_once(") ")?;
    let (_, program) = begin.split_once('(')?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let ticks = number(11)? + number(12)?;
    Some(Process { program: program.to_owned(), parent: u32::try_from(number(1)?).ok()?, ticks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_process_is_read() {
        let stat = "7 (a (b) c) S 3 7 7 0 -1 4194560 1 0 0 0 25 17 9 9 20 0 1 0 5 6 7";
        assert_eq!(parse(stat), Some(Process { program: "a (b) c".to_owned(), parent: 3, ticks: 42 }));
    }

    #[test]
    fn this_process_is_among_them() {
        let name = fs::read_to_string("/proc/self/comm").unwrap();
        assert!(used().unwrap().contains_key(name.trim()));
    }
}
