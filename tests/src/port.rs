//! Free TCP ports for programs that must be told theirs.

use std::mem;
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use anyhow::{Result, bail};
use rand::Rng;

/// Below the range from which Linux takes the local ports of outgoing connections, so that no connection of some
/// other test can take the port between this look and the program's own bind.
const CANDIDATES: std::ops::Range<u16> = 15_000..32_000;

/// A port of 127.0.0.1 on which nobody listens, and which no other test is given while this process lives.
pub fn free_port() -> Result<u16> {
    let mut rng = rand::rng();
    for _ in 0..1_000 {
        let port = rng.random_range(CANDIDATES);
        let name = SocketAddr::from_abstract_name(format!("tasklane-test-port-{port}"))?;
        let Ok(claim) = UnixDatagram::bind_addr(&name) else { continue };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            // It ends with the process.
            mem::forget(claim);
            return Ok(port);
        }
    }
    bail!("no free TCP port found on 127.0.0.1")
}
