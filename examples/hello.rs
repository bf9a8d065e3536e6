//! The smallest worker: one handler, one line of `main`.
//!
//! ```sh
//! target/release/tasklane-producer &
//! cargo run --release --example hello &
//! curl 'http://127.0.0.1:8080/v1/tasks?wait_ms=5000' --json '{"kind": "hello", "args": {"name": "Ada"}}'
//! ```
//!
//! It takes the flags, variables and settings file of `tasklane-worker` (`--help` lists them), and its exit codes.

use std::process::ExitCode;

use serde::Deserialize;
use tasklane_worker::{Handler, HandlerError, Outcome, TaskContext};

struct Hello;

#[derive(Deserialize)]
struct Person {
    name: String,
}

impl Handler for Hello {
    const KIND: &'static str = "hello";
    type Args = Person;

    async fn handle(&self, person: Person, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        Outcome::complete(format!("Hello, {}! This is attempt {}.", person.name, cx.attempt))
    }
}

fn main() -> ExitCode {
    tasklane_worker::program::main(|handlers| handlers.handler(Hello))
}
