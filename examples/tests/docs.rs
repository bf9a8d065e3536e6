//! Holds README and docs to the code: what they list is what there is.

#![expect(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "helpers of tests are no tests to clippy")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use tasklane_common::config::{File, environment};
use tasklane_common::telemetry::METRICS;
use tasklane_producer::ProducerArgs;
use tasklane_worker::config::WorkerArgs;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The text between `<!-- begin NAME…-->` and `<!-- end NAME -->`.
fn between(text: &str, name: &str) -> String {
    let (_, rest) = text.split_once(&format!("<!-- begin {name}")).unwrap_or_else(|| panic!("no begin of {name}"));
    let (_, rest) = rest.split_once("-->\n").expect("the comment ends");
    let (inside, _) = rest.split_once(&format!("<!-- end {name} -->")).unwrap_or_else(|| panic!("no end of {name}"));
    inside.to_owned()
}

/// The cells of a Markdown table's body, without backticks.
fn rows(table: &str) -> Vec<Vec<String>> {
    let lines = table.lines().filter(|line| line.starts_with('|')).skip(2);
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect();
    lines.map(cells).collect()
}

/// Variable → flag and default, of every setting that a program has.
fn settings_of(program: &Command) -> BTreeMap<String, (String, String)> {
    let of = |arg: &clap::Arg| {
        let variable = arg.get_env()?.to_str()?.to_owned();
        let help = arg.get_help()?.to_string();
        let (_, default) = help.split_once("[default: ").unwrap_or_else(|| panic!("{variable} tells no default"));
        Some((variable, (format!("--{}", arg.get_long()?), default.trim_end_matches(']').to_owned())))
    };
    program.get_arguments().filter_map(of).collect()
}

/// Every key that the settings file may have at its top level.
fn file_keys() -> BTreeSet<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, "no_such_key = 1").unwrap();
    let error = File::read(file.path()).unwrap_err().to_string();
    let (_, keys) = error.split_once("expected one of ").expect("the error lists the keys");
    keys.split('`').skip(1).step_by(2).map(str::to_owned).filter(|key| key != "no_such_key").collect()
}

#[test]
fn every_setting_is_listed_as_it_is() {
    let document = read("docs/SETTINGS.md");
    let (producer, worker) = (settings_of(&ProducerArgs::command()), settings_of(&WorkerArgs::command()));
    let mut expected = BTreeSet::new();
    for (variable, (flag, default)) in producer.iter().chain(&worker) {
        let program = match (producer.contains_key(variable), worker.contains_key(variable)) {
            (true, true) => "both",
            (true, false) => "producer",
            _ => "worker",
        };
        let key = flag.trim_start_matches("--").replace('-', "_");
        let key = if key == "config" { "–".to_owned() } else { key };
        expected.insert([variable.clone(), flag.clone(), key, default.clone(), program.to_owned()].to_vec());
    }
    let listed: BTreeSet<_> = rows(&between(&document, "settings")).into_iter().collect();
    assert_eq!(listed, expected);

    let variables: BTreeSet<_> = expected.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(variables, environment::SETTINGS.into());

    let in_table: BTreeSet<_> = expected.iter().map(|row| row[2].clone()).collect();
    let keys = file_keys();
    assert!(keys.len() > 15, "{keys:?}");
    let stray: Vec<_> = in_table.iter().filter(|key| *key != "–" && !keys.contains(*key)).collect();
    assert!(stray.is_empty(), "the file has no such keys: {stray:?}");
    for key in keys.difference(&in_table) {
        let named = [format!("`[[{key}]]`"), format!("`{key} = ")].iter().any(|form| document.contains(form));
        assert!(named, "docs/SETTINGS.md does not name the key {key} of the settings file");
    }
}

#[test]
fn the_readme_shows_the_hello_example() {
    let source = read("examples/hello.rs");
    let code = source.split_once("\n\n").map(|(_, code)| code.trim()).expect("a header, then the code");
    let shown = between(&read("README.md"), "examples/hello.rs");
    assert_eq!(shown.trim().trim_start_matches("```rust\n").trim_end_matches("\n```"), code);
}

#[test]
fn the_state_machine_is_the_codes() {
    let shown = between(&read("docs/STATE_MACHINE.md"), "transitions");
    assert_eq!(shown.trim(), tasklane_common::state::transition_table().trim());
}

#[test]
fn the_metrics_listed_are_those_there_are() {
    let mut there = BTreeSet::new();
    for folder in ["common/src", "producer/src", "worker/src"] {
        for file in files(&root().join(folder), "rs") {
            let source = fs::read_to_string(&file).unwrap();
            for name in ["counter!(", "gauge!(", "histogram!("].iter().flat_map(|form| source.split(form).skip(1)) {
                let name = name.trim_start().trim_start_matches('"').split('"').next().unwrap_or_default();
                if name.starts_with("tasklane_") {
                    there.insert(name.to_owned());
                }
            }
        }
    }
    let operations = read("docs/OPERATIONS.md");
    let name_of = |row: Vec<String>| row[0].split('{').next().unwrap_or_default().to_owned();
    let listed: BTreeSet<_> = rows(&between(&operations, "metrics")).into_iter().map(name_of).collect();
    assert_eq!(listed, there);
    let described: BTreeSet<_> = METRICS.iter().map(|metric| metric.name.to_owned()).collect();
    assert_eq!(described, there, "the catalogue has those that the code has");
    for row in rows(&between(&operations, "metrics")) {
        let (name, labels) = row[0].trim_end_matches('}').split_once('{').unwrap_or((&row[0], ""));
        let metric = METRICS.iter().find(|metric| metric.name == name).unwrap();
        assert_eq!(row[1], format!("{:?}", metric.shape).to_lowercase(), "{name}");
        let known: Vec<_> = metric.labels.iter().map(|(label, _)| *label).collect();
        assert_eq!(labels, known.join(","), "{name}");
    }

    let crates = ["tasklane_common", "tasklane_producer", "tasklane_worker"];
    let words = operations.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for word in words.filter(|word| word.starts_with("tasklane_") && !crates.contains(word)) {
        let metric = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
        assert!(there.contains(metric), "there is no metric {word}");
    }
}

#[test]
fn links_lead_somewhere() {
    let mut documents = files(&root().join("docs"), "md");
    let top = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "rabbitmq/README.md"];
    documents.extend(top.iter().map(|path| root().join(path)));
    for document in documents {
        let text = fs::read_to_string(&document).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { document.clone() } else { document.with_file_name("").join(path) };
            assert!(target.exists(), "{} links to {link}", document.display());
            let found = anchor.is_empty() || headings(&target).contains(anchor);
            assert!(found, "{} links to {link}, which has no such heading", document.display());
        }
    }
}

/// The anchors of a document's headings, as GitHub makes them.
fn headings(document: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(document).unwrap();
    let slug = |line: &str| {
        let kept = line.trim_start_matches('#').trim().to_lowercase();
        kept.chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .collect::<String>()
            .replace(' ', "-")
    };
    text.lines().filter(|line| line.starts_with('#')).map(slug).collect()
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())).flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found
}
