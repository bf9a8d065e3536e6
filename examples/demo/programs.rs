//! The producer and the two workers: started as they would be anywhere, watched, and ended by their process ids.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tasklane_examples::client::Client;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::free_port;
use crate::worker::QUEUE;

const WORKERS: usize = 2;
/// The pause between two looks at something that cannot call.
const LOOK: Duration = Duration::from_millis(50);
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long a program gets after SIGTERM.
const END_LIMIT: Duration = Duration::from_secs(15);
/// How much of a failed program's log is shown.
const LOG_LINES: usize = 15;

/// What the demo has started. Whatever is left when it is dropped is killed.
pub(crate) struct Programs {
    place: PathBuf,
    ledger: PathBuf,
    producer: PathBuf,
    running: Vec<Program>,
    started: bool,
}

struct Program {
    name: String,
    log: PathBuf,
    child: Child,
    pid: u32,
}

impl Programs {
    /// Nothing yet; logs and ledger will be in `place`.
    pub(crate) fn new(place: &Path) -> Result<Self> {
        // target/release/examples/demo has its programs in target/release.
        let me = std::env::current_exe()?;
        let beside = me.parent().and_then(Path::parent).context("the demo lies in a folder")?;
        let producer = beside.join("tasklane-producer");
        if !producer.exists() {
            bail!("{} is missing: `make demo` builds it", producer.display());
        }
        Ok(Self {
            place: place.to_owned(),
            ledger: place.join("tasklane.db"),
            producer,
            running: Vec::new(),
            started: false,
        })
    }

    pub(crate) fn ledger(&self) -> &Path {
        &self.ledger
    }

    pub(crate) fn producer_pid(&self) -> u32 {
        self.running.first().map_or(0, |producer| producer.pid)
    }

    pub(crate) fn worker_pids(&self) -> impl Iterator<Item = u32> {
        self.running.iter().skip(1).map(|worker| worker.pid)
    }

    /// Starts all, and waits until they are ready.
    pub(crate) async fn start(&mut self, client: &Client, amqp_url: &str, port: u16) -> Result<()> {
        let mut producer = Command::new(&self.producer);
        producer.env("TASKLANE_HTTP_ADDR", format!("127.0.0.1:{port}"));
        self.spawn("producer", producer, amqp_url)?;
        let mut probes = vec![format!("{}/readyz", client.url())];
        for number in 1..=WORKERS {
            let port = free_port(0)?;
            let mut worker = Command::new(std::env::current_exe()?);
            worker.args(["worker", "--queues", QUEUE, "--metrics-addr", &format!("127.0.0.1:{port}")]);
            self.spawn(&format!("worker-{number}"), worker, amqp_url)?;
            probes.push(format!("http://127.0.0.1:{port}/readyz"));
        }
        let ready = async {
            for probe in &probes {
                while !client.probe(probe).await.is_ok_and(|(status, _)| status.is_success()) {
                    sleep(LOOK).await;
                }
            }
        };
        tokio::select! {
            ready = timeout(READY_LIMIT, ready) => ready.with_context(|| format!("not ready within {READY_LIMIT:?}")),
            failed = self.one_has_ended() => bail!("{failed}"),
        }
    }

    /// Resolves when a program has ended that should not, with the end of its log.
    pub(crate) async fn one_has_ended(&mut self) -> String {
        loop {
            for (index, program) in self.running.iter_mut().enumerate() {
                if let Ok(Some(status)) = program.child.try_wait() {
                    return self.running.swap_remove(index).story(status);
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Tells of programs that somebody else has ended, to see what happens; resolves when none is left.
    pub(crate) async fn tell_of_ended(&mut self) {
        while !self.running.is_empty() {
            println!("{}", self.one_has_ended().await);
        }
    }

    /// Asks all to end, and kills what does not; whether there were any.
    pub(crate) async fn end(&mut self) -> bool {
        for program in &self.running {
            if let Some(pid) = program.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
                // Fails only for what has ended already.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        let deadline = Instant::now() + END_LIMIT;
        for mut program in self.running.drain(..) {
            let left = deadline.saturating_duration_since(Instant::now());
            if timeout(left, program.child.wait()).await.is_err() {
                eprintln!("demo: {} (pid {}) does not end: killed", program.name, program.pid);
                let _ = program.child.kill().await;
            }
        }
        std::mem::take(&mut self.started)
    }

    /// In a process group of its own: Ctrl-C in this terminal is for the demo, which ends them in its order.
    fn spawn(&mut self, name: &str, mut command: Command, amqp_url: &str) -> Result<()> {
        let log = self.place.join(format!("{name}.log"));
        let output = File::create(&log)?;
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("TASKLANE_")) {
            command.env_remove(key);
        }
        command
            .env("TASKLANE_AMQP_URL", amqp_url)
            .env("TASKLANE_LEDGER_URL", format!("sqlite://{}", self.ledger.display()))
            .current_dir(&self.place)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("starting the {name}"))?;
        let pid = child.id().context("a child just started has an id")?;
        self.started = true;
        self.running.push(Program { name: name.to_owned(), log, child, pid });
        Ok(())
    }
}

impl Program {
    fn story(&self, status: ExitStatus) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        format!("{} (pid {}) has ended: {status}\n{end}", self.name, self.pid)
    }
}
