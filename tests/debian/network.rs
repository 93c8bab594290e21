//! The network of a machine that has nothing but a loopback interface of its own.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Mutex;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace.
pub(crate) struct Network {
    namespace: File,
    relays: Mutex<Vec<TcpListener>>,
}

impl Network {
    /// That of a process.
    pub(crate) fn of(process: u32) -> Self {
        let namespace = File::open(format!("/proc/{process}/ns/net")).expect("the process has a network namespace");
        Self { namespace, relays: Mutex::default() }
    }

    /// Runs something in it: a socket belongs to where it was made, and goes on working elsewhere.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may move a thread");
                work()
            });
            thread.join().expect("the thread does not panic")
        })
    }

    /// The ports that [`Network::reach`] was called for.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let relays = self.relays.lock().expect("nobody panics with it");
        relays.iter().filter_map(|listener| listener.local_addr().ok()).map(|address| address.port()).collect()
    }

    /// Has a port of loopback in there lead to the one of the same number out here.
    pub(crate) fn reach(&self, port: u16) {
        let listener = self.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port))).expect("the port is free in there");
        let accepting = listener.try_clone().expect("a descriptor can be duplicated");
        self.relays.lock().expect("nobody panics with it").push(listener);
        thread::spawn(move || {
            for inner in accepting.incoming() {
                let Ok(inner) = inner else { break };
                // Whoever finds nobody out here is hung up on.
                if let Ok(outer) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                    join(inner, outer);
                }
            }
        });
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for listener in self.relays.get_mut().into_iter().flatten() {
            // Ends the thread that accepts; there is nothing else to free.
            let _ = rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both);
        }
    }
}

/// Copies what comes from either to the other, until both have ended.
fn join(inner: TcpStream, outer: TcpStream) {
    let copy = |from: &TcpStream, to: &TcpStream| {
        let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
        to.set_nodelay(true)?;
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
        io::Result::Ok(())
    };
    copy(&inner, &outer).and_then(|()| copy(&outer, &inner)).expect("a descriptor can be duplicated");
}
