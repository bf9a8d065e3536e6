//! What must hold for any bytes from outside: the targets of `make fuzz`, and their replay by `make test`.
//!
//! A target is a function that takes any bytes and panics when a promise is broken. `tests/fuzz` gives each to
//! libFuzzer, which looks for inputs that take new ways through the code; [`hammer`] gives each the committed corpus
//! and mutations of it, without a nightly compiler and in seconds.

mod cursor;
mod envelope;
pub mod hammer;
mod http_body;
mod settings;

pub use self::cursor::cursor;
pub use self::envelope::envelope;
pub use self::http_body::http_body;
pub use self::settings::settings;

/// A function that any bytes can be given to.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, which is that of its program below `tests/fuzz/fuzz_targets` and of its folder below `tests/fuzz/corpus`.
    pub name: &'static str,
    /// Panics when a promise is broken.
    pub run: fn(&[u8]),
    /// Inputs too large for the corpus.
    pub large: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 4] = [
    Target { name: "cursor", run: cursor, large: cursor::large },
    Target { name: "envelope", run: envelope, large: envelope::large },
    Target { name: "http_body", run: http_body, large: http_body::large },
    Target { name: "settings", run: settings, large: settings::large },
];
