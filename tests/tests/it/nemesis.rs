//! The short form of `make prove`: faults at random, on both ledgers at once, and a checker of all that happened.

use std::time::Duration;

use anyhow::{Result, ensure};
use tasklane_tests::nemesis::run::{Plan, run};
use tasklane_tests::within;

/// A fixed one plays the same faults each time. This one kills and freezes workers, pauses and moves, before it comes to
/// the broker, whose start takes most of the time where the processors are busy.
const SEED: u64 = 6860;

/// How long faults are injected; building the world before and settling it afterwards takes about as long again.
const FAULTY: Duration = Duration::from_secs(35);

/// Less than the test runner's limit for this test, so that it fails with a message of its own.
const RUN_LIMIT: Duration = Duration::from_secs(330);

#[tokio::test(flavor = "multi_thread")]
async fn random_faults_under_load_break_no_promise() -> Result<()> {
    let place = tempfile::tempdir()?;
    let plan = Plan { seed: SEED, faulty: FAULTY, nodes: 1, place: place.path().to_owned() };
    let report = within(RUN_LIMIT, "the whole run", run(plan)).await??;
    if !report.holds() {
        println!("histories and logs are in {}", place.keep().display());
    }
    println!("{report}");
    ensure!(report.holds(), "{}", report.broken().join("\n"));
    Ok(())
}
