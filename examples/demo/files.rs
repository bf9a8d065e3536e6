//! The work: source files that are on this machine anyway.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

/// Files to work on.
pub(crate) struct Files {
    /// Where they are.
    pub(crate) root: PathBuf,
    /// They themselves, by absolute and distinct paths.
    pub(crate) paths: Vec<PathBuf>,
}

/// The `.rs` files of the first place that has any, at most so many.
pub(crate) fn find(max: usize) -> Result<Files> {
    for root in places() {
        let paths = below(&root, max);
        if !paths.is_empty() {
            return Ok(Files { root, paths });
        }
    }
    bail!("there is no .rs file below any of {:?}", places())
}

/// Cargo's registry, else the toolchain, else this repository.
fn places() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(home?.join(".cargo")));
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().ok();
    let sysroot = sysroot.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned);
    let places =
        [cargo.map(|home| home.join("registry/src")), sysroot.map(|root| root.join("lib/rustlib/src")), repository];
    places.into_iter().flatten().filter_map(|place| place.canonicalize().ok()).collect()
}

/// Breadth first and in order, so that a second run finds the same files; links are not followed.
fn below(root: &Path, max: usize) -> Vec<PathBuf> {
    let mut folders = VecDeque::from([root.to_owned()]);
    let mut found = Vec::new();
    while let Some(folder) = folders.pop_front() {
        // A folder that cannot be read has no files for us.
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut entries: Vec<_> = entries.filter_map(|entry| Some((entry.path(), entry.file_type().ok()?))).collect();
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        for (path, kind) in entries {
            if kind.is_dir() && path.file_name().is_none_or(|name| name != "target" && name != ".git") {
                folders.push_back(path);
            } else if kind.is_file() && path.extension().is_some_and(|ext| ext == "rs") && path.to_str().is_some() {
                found.push(path);
                if found.len() == max {
                    return found;
                }
            }
        }
    }
    found
}
