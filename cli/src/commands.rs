//! One command, one file.

mod spec;
mod submit;
mod batch;
mod get;
mod wait;
mod watch;
mod tail;
mod list;
mod group;
mod edit;
mod cancel;
mod retry;
mod purge;
mod queues;
mod pause;
mod move_tasks;
mod schedules;
mod limits;
mod workers;
mod doctor;

use crate::cli::{Cli, Command};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::input::{self, IdArg};
use crate::output::Output;
use clap::CommandFactory;

/// What every command works with.
pub(crate) struct Context<'o> {
    client: Client,
    output: &'o Output,
}

/// Does what the command line asks for.
///
/// # Errors
/// Why it was not done.
pub(crate) async fn run(cli: Cli, output: &Output) -> Result<Exit, Failure> {
    let by = cli.global.by.or_else(input::user).filter(|by| !by.is_empty());
    let cx = &Context { client: Client::new(&cli.global.url, by)?, output };
    match cli.command {
        Command::Submit(submit) => submit::run(cx, submit).await,
        Command::Batch(batch) => batch::run(cx, batch).await,
        Command::Get(ids) => get::run(cx, &ids.ids).await,
        Command::Wait(wait) => wait::run(cx, &wait).await,
        Command::Watch(watch) => watch::run(cx, &watch).await,
        Command::Tail(tail) => tail::run(cx, &tail).await,
        Command::List(list) => list::run(cx, &list).await,
        Command::Group(group) => group::run(cx, group.id).await,
        Command::Edit(edit) => edit::run(cx, &edit).await,
        Command::Cancel(cancel) => cancel::run(cx, &cancel).await,
        Command::Retry(retry) => retry::run(cx, &retry).await,
        Command::Queues(queues) => queues::run(cx, queues.name.as_deref()).await,
        Command::Purge(purge) => purge::run(cx, &purge).await,
        Command::Move(moving) => move_tasks::run(cx, &moving).await,
        Command::Pause(pause) => pause::run(cx, &pause.queue, "pause").await,
        Command::Resume(pause) => pause::run(cx, &pause.queue, "resume").await,
        Command::Schedules(schedules) => schedules::run(cx, schedules.action).await,
        Command::Limits(limits) => limits::run(cx, limits.action).await,
        Command::Workers => workers::run(cx).await,
        Command::Doctor => doctor::run(cx).await,
        Command::Completions(completions) => {
            let mut script = Vec::new();
            clap_complete::generate(completions.shell, &mut Cli::command(), "tasklane", &mut script);
            output.text(&String::from_utf8_lossy(&script)).map(|()| Exit::Done)
        }
    }
}

impl Context<'_> {
    /// Does something with each task; what fails for one does not keep the others from it. The greatest code counts.
    async fn each(
        &self,
        ids: &[IdArg],
        mut act: impl AsyncFnMut(&str) -> Result<Exit, Failure>,
    ) -> Result<Exit, Failure> {
        let mut worst = Exit::Done;
        for id in input::ids(ids)? {
            worst = worst.max(self.one_of_many(act(&id.to_string()).await)?);
        }
        Ok(worst)
    }

    /// Says why it failed for one of many.
    ///
    /// # Errors
    /// When it will fail for all others, too.
    fn one_of_many(&self, outcome: Result<Exit, Failure>) -> Result<Exit, Failure> {
        match outcome {
            Err(failure) if matches!(failure.exit, Exit::NotFound | Exit::Refused) => Ok(self.output.failure(&failure)),
            other => other,
        }
    }
}
