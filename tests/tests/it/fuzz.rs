//! Whatever comes from outside, no parser breaks: the corpus of `make fuzz` and mutations of it, in seconds.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tasklane_tests::fuzz::{TARGETS, Target, hammer};

/// How many mutations each target is given.
const MUTATIONS: usize = 20_000;

/// The same in every run; a new one would find other inputs, at a time when nobody looks for them.
const SEED: u64 = 1;

fn survives(name: &str) -> Result<()> {
    let target: Target = *TARGETS.iter().find(|target| target.name == name).context("no such target")?;
    let summary = hammer::hammer(target, MUTATIONS, SEED)?;
    println!("{name}: {summary:?}");
    Ok(())
}

#[test]
fn any_list_query_is_survived() -> Result<()> {
    survives("cursor")
}

#[test]
fn any_message_is_survived() -> Result<()> {
    survives("envelope")
}

#[test]
fn any_body_of_a_submission_is_survived() -> Result<()> {
    survives("http_body")
}

#[test]
fn any_settings_file_is_survived() -> Result<()> {
    survives("settings")
}

#[test]
fn every_target_has_a_program_and_a_corpus() -> Result<()> {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let names: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    for folder in ["fuzz_targets", "corpus"] {
        let entries = fs::read_dir(fuzz.join(folder))?;
        let found = entries.map(|entry| {
            let path = entry?.path();
            Ok(path.file_stem().context("a name")?.to_string_lossy().into_owned())
        });
        assert_eq!(found.collect::<Result<BTreeSet<_>>>()?, names, "{folder}");
    }
    Ok(())
}
