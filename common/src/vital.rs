//! What a process cannot do without: a loop or a thread that ends by a panic ends its process, so that whoever watches over it
//! starts another one. Without that it would look alive and leave some of its work undone for ever.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use futures::FutureExt;
use tokio::task::JoinHandle;

/// The exit code of a process that could not go on: `EX_SOFTWARE`.
pub const EXIT_PANICKED: i32 = 70;

/// In programs with debug assertions: the loop that is to panic, for the tests of what follows.
const PLANTED: &str = "TASKLANE_TEST_PANIC";

/// Starts a loop as a task of its own; `role` is what it is called in the message.
pub fn spawn<F>(role: &'static str, work: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    tokio::spawn(run(role, work))
}

/// Runs a loop in the present task.
pub async fn run<T>(role: &'static str, work: impl Future<Output = T>) -> T {
    let work = async {
        plant(role);
        work.await
    };
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(answer) => answer,
        Err(panic) => end(role, panic.as_ref()),
    }
}

/// Runs a loop in the present thread.
pub fn run_thread<T>(role: &'static str, work: impl FnOnce() -> T) -> T {
    let work = || {
        plant(role);
        work()
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| end(role, panic.as_ref()))
}

#[expect(clippy::panic, reason = "it is what is asked for")]
fn plant(role: &str) {
    if cfg!(debug_assertions) && std::env::var_os(PLANTED).is_some_and(|planted| planted == role) {
        panic!("planted");
    }
}

fn end(role: &str, panic: &(dyn Any + Send)) -> ! {
    let told = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let panic = told.unwrap_or("no message");
    tracing::error!(role, panic, "a part of this process has panicked that it cannot do without: the process ends");
    std::process::exit(EXIT_PANICKED)
}
