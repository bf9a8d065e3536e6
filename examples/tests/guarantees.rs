//! Holds `docs/GUARANTEES.md` to the tests: every test that it names as a proof is there.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn collect_functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.split("fn ").skip(1).map(|rest| rest.split(['(', '<']).next().unwrap_or_default());
            found.extend(names.map(str::to_owned));
        }
    }
}

#[test]
fn every_promise_names_tests_that_exist() {
    let mut functions = BTreeSet::new();
    for package in ["common", "producer", "worker", "tests", "examples"] {
        collect_functions(&root().join(package), &mut functions);
    }
    let document = fs::read_to_string(root().join("docs/GUARANTEES.md")).unwrap();
    let promises = document.lines().filter(|line| line.starts_with("| ") && line.contains(" | "));
    let mut proofs = 0;
    for promise in promises.filter(|line| !line.starts_with("| promise") && !line.starts_with("| ---")) {
        let proof = promise.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap();
        let names: Vec<_> = proof.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "a promise without a test: {promise}");
        for name in names {
            assert!(functions.contains(name), "{name} is named in GUARANTEES.md and is no test");
            proofs += 1;
        }
    }
    assert!(proofs > 20, "the tables of GUARANTEES.md were not found");
}
