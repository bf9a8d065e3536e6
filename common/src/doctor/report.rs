//! What is printed, and the exit code.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;

use super::{Finding, Subject, Verdict, examine};

/// Something must be mended before the program can do its work.
pub const EXIT_FAIL: u8 = 1;
/// Settings or handlers make no sense, as when the program itself is started with them.
pub const EXIT_SETTINGS: u8 = 2;

#[derive(Debug, Serialize)]
struct Report<'a> {
    program: &'a str,
    version: &'a str,
    verdict: Verdict,
    findings: &'a [Finding],
}

/// A whole `doctor` run: looks, prints a table or JSON to standard output, and answers the exit code.
///
/// `subject` is the program to look for, or why its settings make no sense.
#[must_use]
pub fn visit(program: &str, json: bool, subject: Result<Subject, String>) -> ExitCode {
    let (findings, refused) = match subject {
        Err(error) => (vec![Finding::fail("settings", error, "the program does not start like this")], EXIT_SETTINGS),
        Ok(subject) => match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
            Ok(runtime) => {
                let findings = runtime.block_on(examine(&subject));
                // A look that hangs, on a dead file system say, must not keep the process.
                runtime.shutdown_background();
                (findings, EXIT_FAIL)
            }
            Err(error) => (vec![Finding::fail("host", error.to_string(), "ulimit -u, memory")], EXIT_FAIL),
        },
    };
    let verdict = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    let report = Report { program, version: env!("CARGO_PKG_VERSION"), verdict, findings: &findings };
    let text = if json { serde_json::to_string_pretty(&report).unwrap_or_default() } else { table(&report) };
    // A reader that has gone away does not change the verdict.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    if verdict == Verdict::Fail { ExitCode::from(refused) } else { ExitCode::SUCCESS }
}

fn table(report: &Report<'_>) -> String {
    let width = report.findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    let mut counts = [0; 3];
    for Finding { check, verdict, message, advice } in report.findings {
        let word = match verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        counts[*verdict as usize] += 1;
        // Writing into a String does not fail.
        let _ = writeln!(text, "{word}  {check:width$}  {message}");
        if let Some(advice) = advice {
            let _ = writeln!(text, "      {:width$}  → {advice}", "");
        }
    }
    let [ok, warn, fail] = counts;
    let _ = write!(text, "{} {}: {ok} ok, {warn} to look at, {fail} to mend", report.program, report.version);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_advice_stands_below() {
        let findings =
            [Finding::ok("a", "fine"), Finding::warn("longer", "odd", "look"), Finding::fail("b", "bad", "mend")];
        let report = Report { program: "p", version: "1", verdict: Verdict::Fail, findings: &findings };
        let expected = "ok    a       fine\nwarn  longer  odd\n              → look\nFAIL  b       bad\n              → mend\np 1: 1 ok, 1 to look at, 1 to mend";
        assert_eq!(table(&report), expected);
    }

    #[test]
    fn the_worst_verdict_is_the_greatest() {
        assert!(Verdict::Ok < Verdict::Warn && Verdict::Warn < Verdict::Fail);
    }
}
