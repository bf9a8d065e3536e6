//! The `tasklane-worker` program: a worker whose handlers all come from the settings file.

use std::process::ExitCode;

fn main() -> ExitCode {
    tasklane_worker::program::main(|handlers| handlers)
}
