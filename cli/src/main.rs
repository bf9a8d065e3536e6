//! The program `tasklane`: the operator's command for the producer's HTTP API.
//!
//! The [`cli`] says what may be asked for, [`input`] and [`chunks`] read it, one module of [`commands`] does it: through
//! the [`client`], which knows the [`api`] and reads its [`sse`], and onto the [`output`], whose [`table`]s and [`text`] never carry control
//! characters of the server to a terminal. Whatever fails becomes a [`failure`] with its exit code.

mod cli;
mod input;
mod chunks;
mod commands;
mod client;
mod api;
mod sse;
mod output;
mod table;
mod text;
mod failure;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;
use crate::failure::{Exit, Failure};
use crate::output::Output;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output::new(&cli.global);
    let exit = start(cli, &output).unwrap_or_else(|failure| output.failure(&failure));
    ExitCode::from(exit.code())
}

fn start(cli: Cli, output: &Output) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Output, format!("the program cannot start: {error}")))?;
    let outcome = runtime.block_on(commands::run(cli, output));
    // A read of standard input that never ends must not keep the process.
    runtime.shutdown_background();
    outcome
}
