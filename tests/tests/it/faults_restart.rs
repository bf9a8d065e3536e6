//! Everything is started anew, one program after the other, while clients submit.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tasklane_tests::api::Api;
use tasklane_tests::on_both_ledgers;
use tasklane_tests::proxy::Proxy;
use tasklane_tests::stack::{Producer, Stack};

use crate::faults_load::PatientLoad;
use crate::load::{check_completed, nothing_left};

const LIMIT: Duration = Duration::from_secs(60);

/// How many times all programs are replaced.
const ROUNDS: usize = 3;

on_both_ledgers! {
    async fn a_rolling_restart_of_all_workers_and_producers_under_load_loses_and_repeats_nothing(ledger) {
        let stack = Stack::new(ledger).await?;
        let log = stack.operation_log()?;
        let mut producer = stack.producer().start().await?;
        let mut workers = vec![stack.test_worker(&log).start().await?, stack.test_worker(&log).start().await?];
        // The clients know one address; a balancer leads it to the producer that is up.
        let balancer = Proxy::to(address(&producer)?).await?;
        let load = PatientLoad::of(&Api::new(balancer.addr())?, json!({"kind": "test.work", "args": {"work_ms": 200}}));
        let mut seen = 0;
        for _ in 0..ROUNDS {
            log.started(seen + 30, LIMIT).await?;
            let next = stack.producer().start().await?;
            balancer.lead_to(address(&next)?);
            producer.process.terminate()?;
            let status = producer.process.exited(LIMIT).await?;
            assert!(status.success(), "{status}");
            producer = next;
            for _ in 0..workers.len() {
                workers.push(stack.test_worker(&log).start().await?);
                let mut oldest = workers.remove(0);
                oldest.process.terminate()?;
                let status = oldest.process.exited(LIMIT).await?;
                assert!(status.success(), "{status}");
            }
            seen = log.starts()?.len();
        }
        log.started(seen + 30, LIMIT).await?;
        let done = load.stop().await?;
        println!("{} submitted; {} times not answered, {} times refused", done.accepted.len(), done.unanswered, done.refused);
        let ended = producer.api.all_ended(done.accepted.len(), LIMIT).await?;
        check_completed(&ended, &done.accepted)?;
        assert_eq!(ended.len(), done.accepted.len(), "repetitions under the same key have made other tasks");
        assert!(ended.iter().all(|task| task.attempt == 1 && task.errors.is_empty()), "a stop has cost an attempt");
        log.check_each_started_once(done.accepted.iter().map(String::as_str))?;
        let pids: BTreeSet<_> = log.starts()?.iter().map(|start| start.pid).collect();
        assert!(pids.len() > 2 * ROUNDS, "only {} workers have had a share", pids.len());
        nothing_left(&stack.vhost).await
    }
}

fn address(producer: &Producer) -> Result<std::net::SocketAddr> {
    let url: url::Url = producer.api.url("/").parse()?;
    let addrs = url.socket_addrs(|| None)?;
    addrs.first().copied().ok_or_else(|| anyhow::anyhow!("{url} leads nowhere"))
}
