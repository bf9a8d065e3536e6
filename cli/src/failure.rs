//! How the program ends: its exit codes, and what it says when something fails.

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Exit {
    /// Everything was done.
    Done,
    /// A task that was waited for failed, or the doctor found something.
    Failed,
    /// Flags, arguments or files make no sense.
    Usage,
    /// What was asked for is not there.
    NotFound,
    /// The API refused the request.
    Refused,
    /// No producer answers, or none that can serve.
    Unreachable,
    /// The output cannot be written.
    Output,
    /// The time given for waiting is over.
    TimedOut,
    /// Somebody pressed Ctrl-C.
    Interrupted,
    /// The reader of the output has gone.
    BrokenPipe,
}

impl Exit {
    /// All of them, in the order of their codes.
    pub(crate) const ALL: [Self; 10] = [
        Self::Done,
        Self::Failed,
        Self::Usage,
        Self::NotFound,
        Self::Refused,
        Self::Unreachable,
        Self::Output,
        Self::TimedOut,
        Self::Interrupted,
        Self::BrokenPipe,
    ];

    /// The process's exit code.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Refused => 4,
            Self::Unreachable => 5,
            Self::Output => 6,
            Self::TimedOut => 124,
            Self::Interrupted => 130,
            Self::BrokenPipe => 141,
        }
    }

    /// What the code means, as the help and `docs/CLI.md` say it.
    pub(crate) const fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done; of wait, watch and submit --wait: every task has completed",
            Self::Failed => "a task that was waited for was discarded or cancelled; doctor found something to mend",
            Self::Usage => "flags, arguments or an input file make no sense",
            Self::NotFound => "no such task, queue, schedule or limit",
            Self::Refused => "the API refused the request",
            Self::Unreachable => "no producer answers, or it cannot serve (429, 5xx) even after repetitions",
            Self::Output => "the output cannot be written",
            Self::TimedOut => "the time given for waiting is over, and a task has not ended",
            Self::Interrupted => "interrupted by Ctrl-C",
            Self::BrokenPipe => "the reader of the output has gone, as head does",
        }
    }
}

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub(crate) struct Failure {
    /// How the program ends for it.
    pub(crate) exit: Exit,
    /// What happened.
    pub(crate) message: String,
    /// Where it happened and what would be right, one line each.
    pub(crate) details: Vec<String>,
    /// Whether the request may have taken effect all the same.
    pub(crate) outcome_unknown: bool,
}

impl Failure {
    /// A failure that says this.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), details: Vec::new(), outcome_unknown: false }
    }

    /// Something that the user wrote makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Adds a line about where, or what to do.
    pub(crate) fn hint(mut self, line: impl Into<String>) -> Self {
        self.details.push(line.into());
        self
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::new(Exit::BrokenPipe, "the reader of the output has gone"),
            _ => Self::new(Exit::Output, format!("the output cannot be written: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_rise() {
        assert!(Exit::ALL.windows(2).all(|pair| pair[0].code() < pair[1].code()));
    }

    #[test]
    fn the_documentation_has_every_code() {
        let page = include_str!("../../docs/CLI.md");
        for exit in Exit::ALL {
            let row = format!("| {} | {} |", exit.code(), exit.meaning());
            assert!(page.contains(&row), "docs/CLI.md lacks {row}");
        }
    }
}
