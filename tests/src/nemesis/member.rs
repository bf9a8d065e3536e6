//! One process of the world: started, watched, and started again when it ends, as a service manager does.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::api::Api;
use crate::history::{Op, Writer};
use crate::process::Process;
use crate::proxy::Proxy;

/// How long a service manager waits before it starts a program again.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// How long a program told to stop may take: its grace, its interruptions, and some.
const STOP_LIMIT: Duration = Duration::from_secs(40);

/// How long a process may take to stand still.
const FREEZE_LIMIT: Duration = Duration::from_millis(500);

/// Exit codes that are told in the README as a reason to start again: the ledger is away, the lease was lost.
const EXPECTED_CODES: [i32; 2] = [69, 75];

/// A producer or a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It takes submissions.
    Producer,
    /// It runs handlers.
    Worker,
}

/// A process with a name, and the wires that lead from and to it.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Its wire to the broker.
    pub amqp: Proxy,
    /// Its wire to the ledger, if that is a server.
    pub ledger: Option<Proxy>,
    /// Its clients' wire to it, if it has clients.
    pub http: Option<Proxy>,
    /// Its metrics, and if it has clients, its API, past all wires.
    pub probe: Api,
    process: watch::Receiver<Option<i32>>,
    orders: mpsc::Sender<Order>,
    keeper: JoinHandle<Result<()>>,
}

/// The wires of a member.
#[derive(Debug)]
pub struct Wires {
    /// To the broker.
    pub amqp: Proxy,
    /// To the ledger.
    pub ledger: Option<Proxy>,
    /// From its clients.
    pub http: Option<Proxy>,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Send(Signal),
    /// To all that it has started, too.
    SendAll(Signal),
    Stop,
}

impl Member {
    /// Starts a process and keeps it alive from now on.
    pub fn keep(
        (name, role): (String, Role),
        wires: Wires,
        probe: Api,
        history: &Arc<Writer>,
        launch: impl Fn() -> Result<Process> + Send + 'static,
    ) -> Self {
        let (orders, received) = mpsc::channel(16);
        let (told, process) = watch::channel(None);
        let keeper = Keeper { name: name.clone(), history: Arc::clone(history), orders: received, told };
        let keeper = tokio::spawn(keeper.run(launch));
        let Wires { amqp, ledger, http } = wires;
        Self { name, role, amqp, ledger, http, probe, process, orders, keeper }
    }

    /// The process at this moment, if it is up.
    pub fn process(&self) -> Option<i32> {
        *self.process.borrow()
    }

    /// Sends a signal to the process, if it is up.
    pub async fn signal(&self, signal: Signal) -> Result<()> {
        self.orders.send(Order::Send(signal)).await.with_context(|| format!("{} is kept by nobody", self.name))
    }

    /// Sends a signal to the process and all its descendants, as if it befell their whole machine.
    pub async fn signal_all(&self, signal: Signal) -> Result<()> {
        self.orders.send(Order::SendAll(signal)).await.with_context(|| format!("{} is kept by nobody", self.name))
    }

    /// Waits until another process than `before` is up.
    pub async fn started_again(&self, before: Option<i32>) -> Result<()> {
        let mut process = self.process.clone();
        let another = process.wait_for(|now| now.is_some() && *now != before);
        timeout(STOP_LIMIT, another).await.with_context(|| format!("{} was not started again", self.name))??;
        Ok(())
    }

    /// Lets the process end for good.
    pub async fn stop(&mut self) -> Result<()> {
        // The keeper may have failed already; then that is the error to tell.
        let _ = self.orders.send(Order::Stop).await;
        (&mut self.keeper).await.with_context(|| format!("the keeper of {}", self.name))?
    }

    /// All wires, whole again.
    pub async fn mend(&self) -> Result<()> {
        for wire in [Some(&self.amqp), self.ledger.as_ref(), self.http.as_ref()].into_iter().flatten() {
            wire.resume().await?;
        }
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// What stands for the service manager.
struct Keeper {
    name: String,
    history: Arc<Writer>,
    orders: mpsc::Receiver<Order>,
    told: watch::Sender<Option<i32>>,
}

/// What the process was told to do, and so may do.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    kill: bool,
    terminate: bool,
    stop: bool,
}

impl Asked {
    fn explains(self, status: ExitStatus) -> bool {
        match status.code() {
            Some(0) => self.terminate,
            Some(code) => EXPECTED_CODES.contains(&code),
            // Who is told to stop before it listens, while it still waits for its ledger, ends at once.
            None => self.kill || (self.terminate && status.signal() == Some(Signal::TERM.as_raw())),
        }
    }
}

impl Keeper {
    async fn run(mut self, launch: impl Fn() -> Result<Process> + Send) -> Result<()> {
        loop {
            let mut process = launch()?;
            let pid = process.pid();
            self.history.append(Op::Spawned { who: self.name.clone(), process: pid })?;
            self.told.send_replace(Some(pid));
            let (asked, status) = self.attend(&mut process).await?;
            self.told.send_replace(None);
            let expected = asked.explains(status);
            let how = status.to_string();
            self.history.append(Op::Gone { who: self.name.clone(), process: pid, how, expected })?;
            if asked.stop || self.is_stopped_meanwhile().await {
                return Ok(());
            }
        }
    }

    /// Obeys orders until the process has ended.
    async fn attend(&mut self, process: &mut Process) -> Result<(Asked, ExitStatus)> {
        let mut asked = Asked::default();
        let limit = |asked: Asked| if asked.stop { STOP_LIMIT } else { Duration::from_secs(86_400) };
        loop {
            let order = tokio::select! {
                status = process.exited(limit(asked)) => return Ok((asked, status?)),
                order = self.orders.recv(), if !asked.stop => order.unwrap_or(Order::Stop),
            };
            let signal = match order {
                Order::Send(signal) | Order::SendAll(signal) => signal,
                Order::Stop => Signal::TERM,
            };
            asked.stop = matches!(order, Order::Stop);
            asked.kill |= signal == Signal::KILL;
            asked.terminate |= signal == Signal::TERM;
            self.send(signal, process, matches!(order, Order::SendAll(_))).await?;
        }
    }

    /// Sends a signal, and notes the moments between which the process surely stands still.
    async fn send(&self, signal: Signal, process: &Process, to_all: bool) -> Result<()> {
        let id = process.pid();
        if signal == Signal::CONT {
            self.history.append(Op::Thawed { process: id })?;
        }
        if to_all {
            process.signal_all(signal);
        } else {
            // It fails only for a process that has just ended.
            let _ = process.signal(signal);
        }
        if signal == Signal::STOP {
            stopped(id).await;
            self.history.append(Op::Frozen { process: id })?;
        }
        Ok(())
    }

    /// Waits before the next start; orders meanwhile are for nobody.
    async fn is_stopped_meanwhile(&mut self) -> bool {
        let stopped = async {
            while let Some(order) = self.orders.recv().await {
                if matches!(order, Order::Stop) {
                    return;
                }
            }
        };
        tokio::select! {
            () = stopped => true,
            () = sleep(RESTART_PAUSE) => false,
        }
    }
}

/// Waits until a process that was sent SIGSTOP stands still: its threads go on until each has heard of the signal.
///
/// A process that stood still before, or has ended, is not told of again.
async fn stopped(id: i32) {
    let stopped = async {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
        while let Some(pid) = Pid::from_raw(id)
            && matches!(waitid(WaitId::Pid(pid), options), Ok(None))
        {
            sleep(Duration::from_millis(1)).await;
        }
    };
    let _ = timeout(FREEZE_LIMIT, stopped).await;
}
