//! Asynchronous clean-up inside `Drop`, where nothing can be awaited.

use std::future::Future;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait::within;

/// How long one clean-up may take before it is given up.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs a clean-up to its end on a thread and runtime of its own. A failure is told, not raised: whatever the
/// test had to say is more important, and all of it ends with the private services anyway.
pub(crate) fn run(what: &str, cleanup: impl Future<Output = Result<()>> + Send + 'static) {
    let name = what.to_owned();
    let done = thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("building a runtime for the clean-up")?;
        runtime.block_on(within(LIMIT, &name, cleanup))?
    });
    match done.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("clean-up failed: {what}: {error:#}"),
        Err(_) => eprintln!("clean-up panicked: {what}"),
    }
}
