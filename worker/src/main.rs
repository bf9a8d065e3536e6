//! The `tasklane-worker` program: a worker whose handlers all come from the settings file.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tasklane_worker::program::main(|handlers| handlers)
}
