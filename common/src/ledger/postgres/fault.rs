//! What a statement's failure means for whoever waits for it.

use crate::ledger::LedgerError;

/// A failed statement. Unlike [`sqlx::Error`] it can be copied, for all the callers that shared the statement.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// The server is away, is going, or did not answer in time. Whether a write happened is unknown.
    Away(String),
    /// The server takes no more connections.
    Crowded(String),
    /// The server takes no writes for now: a standby after a failover, or an operator's doing.
    ReadOnly(String),
    /// The server gave the statement up for the sake of another one. It changed nothing; the same again may succeed.
    Collided(String),
    /// The server will not do this, and would not if asked again. It changed nothing.
    Refused(String),
    /// The answer cannot be read.
    Corrupt(String),
}

impl Fault {
    /// Nothing came back within the limit.
    pub(super) fn late(what: &str) -> Self {
        Self::Away(format!("no answer within the limit: {what}"))
    }

    /// What went wrong, without what it means.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Away(text)
            | Self::Crowded(text)
            | Self::ReadOnly(text)
            | Self::Collided(text)
            | Self::Refused(text)
            | Self::Corrupt(text) => text,
        }
    }

    /// A row holds what this build cannot read.
    pub(super) fn corrupt(error: impl std::fmt::Display) -> Self {
        Self::Corrupt(error.to_string())
    }
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error;
        match error {
            Error::Database(error) => Self::of_code(error.code().as_deref().unwrap_or(""), error.message()),
            Error::ColumnDecode { .. }
            | Error::Decode(_)
            | Error::ColumnNotFound(_)
            | Error::ColumnIndexOutOfBounds { .. }
            | Error::TypeNotFound { .. }
            | Error::RowNotFound => Self::Corrupt(error.to_string()),
            Error::Encode(_) | Error::InvalidArgument(_) => Self::Refused(error.to_string()),
            error => Self::Away(error.to_string()),
        }
    }
}

impl Fault {
    /// Sorts by SQLSTATE: the first two characters are the class.
    fn of_code(code: &str, message: &str) -> Self {
        let text = format!("{message} (SQLSTATE {code})");
        match code {
            // Serialization failure, deadlock.
            "40001" | "40P01" => Self::Collided(text),
            "53300" => Self::Crowded(text),
            "25006" => Self::ReadOnly(text),
            // A database that takes no connections for now.
            "55000" => Self::Away(text),
            // What a pooler says to a parameter of the address.
            "08P01" if message.contains("unsupported startup parameter") => Self::Refused(format!(
                "{text}: add it to ignore_startup_parameters in pgbouncer.ini, as in \
                 `ignore_startup_parameters = options`, or take it out of ledger_url"
            )),
            // Connections, resources, operator's intervention (shutdown, statement timeout), the server's system.
            _ if ["08", "53", "57", "58"].iter().any(|class| code.starts_with(class)) => Self::Away(text),
            _ => Self::Refused(text),
        }
    }
}

impl From<Fault> for LedgerError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Away(text) | Fault::Crowded(text) | Fault::ReadOnly(text) | Fault::Collided(text) => {
                Self::Unavailable(text)
            }
            Fault::Refused(text) => Self::Unsuitable(format!("the ledger's server refuses: {text}")),
            Fault::Corrupt(text) => Self::Corrupt(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_by_itself_is_retryable() {
        for passing in ["08006", "40001", "40P01", "53300", "57014", "57P01", "57P03", "25006"] {
            assert!(LedgerError::from(Fault::of_code(passing, "")).is_retryable(), "{passing}");
        }
        for lasting in ["22021", "23505", "28P01", "3D000", "42501", "42P01", ""] {
            assert!(!LedgerError::from(Fault::of_code(lasting, "")).is_retryable(), "{lasting}");
        }
        let pooler = Fault::of_code("08P01", "unsupported startup parameter: options");
        assert!(matches!(&pooler, Fault::Refused(text) if text.contains("ignore_startup_parameters")), "{pooler:?}");
    }
}
