//! Health and metrics, served by a thread of their own: handlers that block every thread of the worker do not make it look dead.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use axum::Router;
use tasklane_common::vital;
use tasklane_common::web::{files, listener};
use tokio_util::sync::CancellationToken;

/// How many connections there may be: those who look are few, and files are for tasks.
const CONNECTIONS_MAX: usize = 64;

/// Listens from now on, until the process ends.
///
/// # Errors
/// When the address cannot be had, or there is no thread for it.
pub(crate) fn serve(addr: SocketAddr, router: Router) -> io::Result<()> {
    let listener = TcpListener::bind(addr)?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _entered = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    let connections = files::clients_here(files::RESERVE, CONNECTIONS_MAX);
    thread::Builder::new().name("health".to_owned()).spawn(move || {
        let never = CancellationToken::new();
        let serve = listener::serve(listener, router, connections, &never, Duration::ZERO);
        vital::run_thread("health", || runtime.block_on(serve))
    })?;
    Ok(())
}
