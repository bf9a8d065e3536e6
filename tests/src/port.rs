//! Free TCP ports for programs that must be told theirs.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Result, bail};
use rand::Rng;

/// Below the range from which Linux takes the local ports of outgoing connections, so that no connection of some
/// other test can take the port between this look and the program's own bind.
const CANDIDATES: std::ops::Range<u16> = 15_000..32_000;

/// A port of 127.0.0.1 on which nobody listens.
pub(crate) fn free_port() -> Result<u16> {
    let mut rng = rand::rng();
    for _ in 0..1_000 {
        let port = rng.random_range(CANDIDATES);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free TCP port found on 127.0.0.1")
}
