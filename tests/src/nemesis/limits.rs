//! The limits of a lane: some that producers set anew from their file at each start, some that were set over the API.

use std::time::Duration;

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::history::check::limits::{Bound, Limit, Scope};
use crate::nemesis::world::{Lane, QUEUES};

/// The kind of which only so many run at once.
pub const FEW: &str = "test.few";
const FEW_RUNNING: usize = 4;

/// The kind of which only so many start in a second.
pub const PACED: &str = "test.paced";
const PACED_TASKS: u32 = 5;
const PACED_PER: Duration = Duration::from_secs(1);
const PACED_BURST: u32 = 5;

/// How the keys begin of whose tasks only so many run at once, and how many such keys there are.
const TENANT: &str = "tenant:";
const TENANT_RUNNING: usize = 2;
const TENANTS: u32 = 3;

/// The queue of which only so many run at once: tasks are edited and moved into it and out of it. More than come in, with
/// their usual times, and less than an outage piles up.
const NARROW: &str = QUEUES[1];
const NARROW_RUNNING: usize = 40;

/// How many submissions have a key: so few that what an outage has piled up is done in time afterwards.
const KEYED: f64 = 0.05;

/// All of them.
pub fn all() -> Vec<Limit> {
    let rate = Bound::Rate { tasks: PACED_TASKS, per: PACED_PER, burst: PACED_BURST };
    vec![
        Limit { scope: Scope::Kind(FEW.to_owned()), bound: Bound::Running(FEW_RUNNING) },
        Limit { scope: Scope::Kind(PACED.to_owned()), bound: rate },
        Limit { scope: Scope::Keys(TENANT.to_owned()), bound: Bound::Running(TENANT_RUNNING) },
        Limit { scope: Scope::Queue(NARROW.to_owned()), bound: Bound::Running(NARROW_RUNNING) },
    ]
}

/// Those that are in the producers' file.
pub fn file() -> String {
    let per_ms = PACED_PER.as_millis();
    format!(
        "[[limit]]\nkind = {FEW:?}\nmax_running = {FEW_RUNNING}\n\n[[limit]]\nkind = {PACED:?}\n\
         rate = {{ tasks = {PACED_TASKS}, per_ms = {per_ms}, burst = {PACED_BURST} }}\n"
    )
}

/// Sets the others.
pub async fn set(lane: &Lane) -> Result<()> {
    let others = [(format!("key/{TENANT}*"), TENANT_RUNNING), (format!("queue/{NARROW}"), NARROW_RUNNING)];
    for (limit, running) in others {
        let bounds = json!({"max_running": running});
        lane.api()?.raw_put(&format!("/v1/limits/{limit}"), &bounds).await?.expect::<Value>(&[200, 201])?;
    }
    Ok(())
}

/// A key, for all tasks of some submissions: few keys, so that they are contended.
pub fn random_key(rng: &mut StdRng) -> Option<String> {
    rng.random_bool(KEYED).then(|| format!("{TENANT}{}", rng.random_range(0..TENANTS)))
}
