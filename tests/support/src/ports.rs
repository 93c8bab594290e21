//! Reserves ports on 127.0.0.1, even while nothing listens on them.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the kernel's range of ephemeral ports (32768 and up), so that no outgoing connection takes a port before its
/// server binds it, or while it restarts.
const RANGE: Range<u16> = 12_000..32_000;

/// Consecutive ports on 127.0.0.1 that no other test process can reserve until they are dropped.
///
/// The reservation of a port is an abstract unix socket, which the kernel closes with the process and which leaves no
/// file.
#[derive(Debug)]
pub struct ReservedPorts {
    first: u16,
    reservations: Vec<UnixListener>,
}

impl ReservedPorts {
    /// Reserves `count` consecutive ports (swtpm needs its control channel right after its data port).
    #[must_use]
    pub fn neighbouring(count: u16) -> Self {
        // Processes start at different ports, and continue after the port that they reserved last.
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let span = RANGE.end - RANGE.start - count;
        let origin = (std::process::id().wrapping_mul(7919) % u32::from(span)) as u16;
        for _ in 0..span {
            let offset = u32::from(origin) + u32::from(NEXT.fetch_add(count, Ordering::Relaxed));
            let first = RANGE.start + (offset % u32::from(span)) as u16;
            let reservations: Vec<_> = (first..first + count).map_while(reserve).collect();
            if reservations.len() == usize::from(count) {
                return Self { first, reservations };
            }
        }
        panic!("no {count} neighbouring ports of 127.0.0.1 are free");
    }

    /// Reserves one port.
    #[must_use]
    pub fn one() -> Self {
        Self::neighbouring(1)
    }

    /// The port at `index`, counted from 0.
    #[must_use]
    pub fn port(&self, index: u16) -> u16 {
        assert!(usize::from(index) < self.reservations.len(), "only {} ports are reserved", self.reservations.len());
        self.first + index
    }
}

fn reserve(port: u16) -> Option<UnixListener> {
    let name = SocketAddr::from_abstract_name(format!("pintle-test-port-{port}")).ok()?;
    let reservation = UnixListener::bind_addr(&name).ok()?;
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()?;
    Some(reservation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_is_not_reserved_twice_and_can_be_bound() {
        let pair = ReservedPorts::neighbouring(2);
        assert_eq!(pair.port(0) + 1, pair.port(1));
        assert!(reserve(pair.port(0)).is_none());
        TcpListener::bind((Ipv4Addr::LOCALHOST, pair.port(1))).expect("a reserved port is free");
    }
}
