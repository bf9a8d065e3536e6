//! The two workers of the demo: this program again, as `demo worker`, with one handler.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tasklane_worker::{Handler, HandlerError, Outcome, TaskContext};

/// The queue of the demo.
pub(crate) const QUEUE: &str = "demo";
/// The file, in the worker's folder, into which each start of a handler is written.
pub(crate) const STARTS: &str = "starts.log";

/// Runs the worker; the flags are those of `tasklane-worker`.
pub(crate) fn main(program: OsString, args: impl Iterator<Item = OsString>) -> ExitCode {
    let starts = match OpenOptions::new().append(true).create(true).open(STARTS) {
        Ok(starts) => starts,
        Err(error) => {
            eprintln!("demo worker: cannot open {STARTS}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let args = std::iter::once(program).chain(args);
    tasklane_worker::program::main_from(args, |handlers| handlers.handler(DigestFile { starts }))
}

/// Reads a file, and tells its SHA-256, bytes and lines.
pub(crate) struct DigestFile {
    starts: File,
}

/// What to read.
#[derive(Deserialize)]
pub(crate) struct Args {
    path: PathBuf,
}

/// What was read.
#[derive(Serialize, Deserialize)]
pub(crate) struct Digested {
    /// In hexadecimal digits.
    pub(crate) sha256: String,
    bytes: usize,
    lines: usize,
}

impl Handler for DigestFile {
    const KIND: &'static str = "demo.digest";
    type Args = Args;

    async fn handle(&self, args: Args, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        // Before anything else, and in one write: lines of several processes never mix, and none is lost with one.
        let line = format!("{} {} {}\n", cx.id, cx.fence, std::process::id());
        (&self.starts).write_all(line.as_bytes())?;
        let content = tokio::fs::read(&args.path).await?;
        let sha256 = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        let lines = content.iter().filter(|byte| **byte == b'\n').count();
        Outcome::complete(Digested { sha256, bytes: content.len(), lines })
    }
}
