//! The handler's input: passed through as text, but only text that every handler can read. Better told to the submitter
//! than to a retry.

pub(crate) use tasklane_common::task::check_readable as check;

/// The largest `args`, as JSON.
pub(crate) const ARGS_BYTES_MAX: usize = 1024 * 1024;
