//! Where everything is written: tables and words for people, JSON for programs.

use std::io::{IsTerminal, Write};

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};

use crate::cli::{Global, When};
use crate::failure::{Exit, Failure};
use crate::table::{Table, paint};
use crate::text::{json_line, visible};

/// The more lines a failure has, the fewer are read.
const DETAILS_MAX: usize = 100;

/// How this run talks.
#[derive(Debug)]
pub(crate) struct Output {
    /// Whether JSON is asked for.
    pub(crate) json: bool,
    /// Whether standard output has colours.
    pub(crate) color: bool,
    /// Whether a person sees standard output.
    pub(crate) terminal: bool,
    /// How many columns that person's terminal has.
    pub(crate) width: Option<usize>,
    errors_in_color: bool,
}

impl Output {
    /// As the flags, `NO_COLOR`, `CLICOLOR_FORCE` and the terminal say.
    pub(crate) fn new(global: &Global) -> Self {
        let colored = |automatic: ColorChoice| match global.color {
            When::Always => true,
            When::Never => false,
            When::Auto => automatic != ColorChoice::Never,
        };
        let terminal = std::io::stdout().is_terminal();
        Self {
            json: global.json,
            color: colored(AutoStream::choice(&std::io::stdout())),
            terminal,
            width: terminal_size::terminal_size_of(std::io::stdout())
                .map(|(width, _)| width.0.into())
                .filter(|_| terminal),
            errors_in_color: colored(AutoStream::choice(&std::io::stderr())),
        }
    }

    /// Writes text that is made of safe parts.
    ///
    /// # Errors
    /// When nobody reads it any more, or it cannot be written.
    pub(crate) fn text(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// Writes one line of text of any origin.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub(crate) fn line(&self, line: &str) -> Result<(), Failure> {
        self.text(&format!("{}\n", visible(line)))
    }

    /// Writes JSON of the API as one line.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub(crate) fn json(&self, json: &str) -> Result<(), Failure> {
        self.text(&format!("{}\n", json_line(json)))
    }

    /// Writes what a table has collected.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub(crate) fn table(&self, table: &mut Table) -> Result<(), Failure> {
        self.text(&table.take(self.color, self.width))
    }

    /// The text in a style, where standard output has colours.
    pub(crate) fn paint(&self, text: &str, style: Style) -> String {
        paint(&visible(text), style, self.color)
    }

    /// Says what failed, and answers how the program ends for it. A reader that has gone needs no words.
    pub(crate) fn failure(&self, failure: &Failure) -> Exit {
        if failure.exit == Exit::BrokenPipe {
            return failure.exit;
        }
        let error = paint("error:", AnsiColor::Red.on_default().bold(), self.errors_in_color);
        let mut text = format!("{error} {}\n", visible(&failure.message));
        for line in failure.details.iter().take(DETAILS_MAX) {
            text.push_str(&format!("  {}\n", visible(line)));
        }
        if failure.details.len() > DETAILS_MAX {
            text.push_str(&format!("  … and {} more\n", failure.details.len() - DETAILS_MAX));
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
        failure.exit
    }
}

/// Says something beside the output. Whether anybody hears it does not matter.
pub(crate) fn note(note: &str) {
    let _ = writeln!(std::io::stderr(), "{}", visible(note));
}

/// The colour of a state.
pub(crate) fn state_style(state: &str) -> Style {
    match state {
        "completed" => AnsiColor::Green.on_default(),
        "running" => AnsiColor::Cyan.on_default(),
        "retryable" | "cancelled" => AnsiColor::Yellow.on_default(),
        "discarded" => AnsiColor::Red.on_default(),
        _ => Style::new(),
    }
}
