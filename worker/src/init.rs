//! A worker that is process 1, as in a container, has an init of its own.
//!
//! What commands leave behind goes to process 1, and stays a zombie until that collects it. The worker cannot: it cannot tell
//! such a process from one that a handler has started and waits for itself. So process 1 starts this program once more, hands
//! signals on to it, collects whatever ends, and ends as it does.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use futures::future::select_all;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use tokio::signal::unix::{SignalKind, signal};

/// What a shell adds to the number of the signal that ended a program.
const SIGNALLED: i32 = 128;

/// The signals that are handed on.
const SIGNALS: [(Signal, fn() -> SignalKind); 6] = [
    (Signal::TERM, SignalKind::terminate),
    (Signal::INT, SignalKind::interrupt),
    (Signal::HUP, SignalKind::hangup),
    (Signal::QUIT, SignalKind::quit),
    (Signal::USR1, SignalKind::user_defined1),
    (Signal::USR2, SignalKind::user_defined2),
];

/// Whether this process is an init.
pub(crate) fn is_needed() -> bool {
    std::process::id() == 1
}

/// Runs this program once more, and ends as it ends.
pub(crate) fn run() -> io::Result<ExitCode> {
    let mut args = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    attend(command.args(args))
}

/// Runs a program and collects what ends, until the program does.
pub(crate) fn attend(command: &mut Command) -> io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut child_ended = signal(SignalKind::child())?;
        let mut ears =
            SIGNALS.into_iter().map(|(sent, kind)| Ok((sent, signal(kind())?))).collect::<io::Result<Vec<_>>>()?;
        // A terminal signals the group of process 1, and what is handed on must not come twice.
        let child = command.process_group(0).spawn()?;
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        loop {
            if let Some(status) = collect(id)? {
                return Ok(code(status));
            }
            let heard = select_all(ears.iter_mut().map(|(sent, ear)| {
                Box::pin(async move {
                    ear.recv().await;
                    *sent
                })
            }));
            tokio::select! {
                (sent, ..) = heard => drop(kill_process(id, sent)),
                _ = child_ended.recv() => {}
            }
        }
    })
}

/// Collects all that has ended; how the program has, if it is among them.
fn collect(program: Pid) -> io::Result<Option<WaitStatus>> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((id, status))) if id == program => return Ok(Some(status)),
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

fn code(status: WaitStatus) -> ExitCode {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| SIGNALLED + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use rustix::process::set_child_subreaper;

    use super::*;

    /// Tells the runner of the tests to be an init.
    const INIT: &str = "TASKLANE_TEST_INIT";

    /// The init of the test below: orphans come to it as they come to process 1.
    #[test]
    fn init_process() {
        let Ok(script) = std::env::var(INIT) else { return };
        set_child_subreaper(Pid::from_raw(1)).unwrap();
        let code = attend(Command::new("/bin/sh").args(["-c", &script])).unwrap();
        println!("{code:?}");
        std::process::exit(i32::from(code != ExitCode::from(7)));
    }

    /// The program leaves orphans behind and goes on until none of them is a zombie of its init.
    #[test]
    fn what_is_left_behind_is_collected() {
        let script = r#"
            for n in 1 2 3 4 5; do (sh -c 'exit 0' &); done
            while grep -sq "^State:[[:space:]]Z" /proc/[0-9]*/status && zombies; do sleep 0.1; done
            exit 7
        "#;
        let zombies = r#"zombies() {
            for status in /proc/[0-9]*/status; do
                if grep -sq "^State:[[:space:]]Z" "$status" && grep -sq "^PPid:[[:space:]]$PPID$" "$status"; then return 0; fi
            done
            return 1
        }"#;
        ends_well(&format!("{zombies}\n{script}"));
    }

    #[test]
    fn signals_are_handed_on() {
        ends_well("trap 'exit 7' TERM; kill -TERM $PPID; while :; do sleep 0.1; done");
    }

    fn ends_well(script: &str) {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "init::tests::init_process", "--nocapture"])
            .env(INIT, script)
            .stdin(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
    }
}
