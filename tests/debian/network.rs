//! The network of a machine that has only a loopback interface.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Mutex;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub(crate) struct Network {
    namespace: File,
    relays: Mutex<Vec<TcpListener>>,
}

impl Network {
    /// The network namespace of a process.
    pub(crate) fn of(process: u32) -> Self {
        let namespace = File::open(format!("/proc/{process}/ns/net")).expect("the process has a network namespace");
        Self { namespace, relays: Mutex::default() }
    }

    /// Runs a function in it. Sockets stay in the namespace in which they were created, and can be used from others.
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

    /// Forwards a loopback port of the namespace to the same port of this machine.
    pub(crate) fn reach(&self, port: u16) {
        let listener = self.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port))).expect("the port is free in there");
        let accepting = listener.try_clone().expect("a descriptor can be duplicated");
        self.relays.lock().expect("nobody panics with it").push(listener);
        thread::spawn(move || {
            for inner in accepting.incoming() {
                let Ok(inner) = inner else { break };
                // Closed at once if nothing listens on this machine's port.
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
            // Stops the thread that accepts; nothing else needs to be freed.
            let _ = rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both);
        }
    }
}

/// Copies bytes in both directions until both are closed.
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
