//! `watch`: a task until it ends, or the queues, again and again.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::wait::{POLL_MAX, exit_of};
use super::{Context, get, queues};
use crate::api::{QueueList, Task};
use crate::cli::Watch;
use crate::client::Call;
use crate::failure::{Exit, Failure};
use crate::text::brief;

/// The shortest time between two looks.
const EVERY_MIN: Duration = Duration::from_millis(100);
/// How many lines are seen when the terminal does not say how many it has.
const LINES_DEFAULT: usize = 24;

pub(super) async fn run(cx: &Context<'_>, watch: &Watch) -> Result<Exit, Failure> {
    let every = watch.every.max(EVERY_MIN);
    let until = watch.timeout.map(|time| Instant::now() + time);
    let screen = Screen { cx, redraws: cx.output.terminal && !cx.output.json };
    match watch.id {
        Some(id) => task(&screen, &id.to_string(), every, until).await,
        None => all_queues(&screen, every, until).await,
    }
}

/// Looks at once, then waits for the end as long as a look lasts, so that the end is seen when it comes.
async fn task(screen: &Screen<'_>, id: &str, every: Duration, until: Option<Instant>) -> Result<Exit, Failure> {
    let client = &screen.cx.client;
    let mut wait = Duration::ZERO;
    let mut seen = String::new();
    loop {
        let asked_at = Instant::now();
        let call = Call::get(["v1", "tasks", id]).query("wait_ms", wait.as_millis()).waiting(wait);
        let answer = client.call(call).await?;
        let task: Task = answer.read()?;
        let changed = answer.text != seen;
        if screen.redraws {
            screen.draw(&get::view(&task, screen.cx.output, Timestamp::now()))?;
        } else if changed && screen.cx.output.json {
            screen.cx.output.json(&answer.text)?;
        } else if changed {
            let now = Timestamp::now();
            screen.cx.output.line(&format!("{now:.3}  {}  attempt {}", task.state, task.attempt))?;
        }
        if task.has_ended() || over(until) {
            return Ok(exit_of(&task));
        }
        seen = answer.text;
        // An answer that came sooner than it was asked for is a producer's that stops.
        sleep(wait.min(EVERY_MIN).saturating_sub(asked_at.elapsed())).await;
        wait = left(until, every.min(POLL_MAX));
    }
}

async fn all_queues(screen: &Screen<'_>, every: Duration, until: Option<Instant>) -> Result<Exit, Failure> {
    let output = screen.cx.output;
    loop {
        let answer = screen.cx.client.call(Call::get(["v1", "queues"])).await?;
        if output.json {
            output.json(&answer.text)?;
        } else {
            let table = queues::table(&answer.read::<QueueList>()?.queues).take(output.color, output.width);
            let title = format!("{}  {:.0}  every {}", screen.cx.client.address(), Timestamp::now(), brief(every));
            screen.draw(&format!("{}\n\n{table}", crate::text::visible(&title)))?;
        }
        if over(until) {
            return Ok(Exit::Done);
        }
        sleep(left(until, every)).await;
    }
}

fn over(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() >= until)
}

fn left(until: Option<Instant>, at_most: Duration) -> Duration {
    until.map_or(at_most, |until| until.saturating_duration_since(Instant::now()).min(at_most))
}

/// A terminal that shows the newest picture only, or a file that gets one below the other.
struct Screen<'s> {
    cx: &'s Context<'s>,
    redraws: bool,
}

impl Screen<'_> {
    /// Shows text that is made of safe parts.
    fn draw(&self, text: &str) -> Result<(), Failure> {
        if !self.redraws {
            return self.cx.output.text(&format!("{text}\n"));
        }
        let lines_max = terminal_size::terminal_size().map_or(LINES_DEFAULT, |(_, height)| height.0.into());
        self.cx.output.text(&picture(text, lines_max))
    }
}

/// From the top left corner, each line to its end without wrapping, and nothing of the last picture left below.
fn picture(text: &str, lines_max: usize) -> String {
    let mut picture = "\u{1b}[H\u{1b}[?7l".to_owned();
    for line in text.lines().take(lines_max.saturating_sub(1)) {
        picture.push_str(line);
        picture.push_str("\u{1b}[K\n");
    }
    picture.push_str("\u{1b}[J\u{1b}[?7h");
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_fits_its_terminal() {
        let picture = picture("a\nb\nc\n", 3);
        assert_eq!(picture, "\u{1b}[H\u{1b}[?7la\u{1b}[K\nb\u{1b}[K\n\u{1b}[J\u{1b}[?7h");
    }
}
