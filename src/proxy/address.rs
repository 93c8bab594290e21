//! A host and port: name resolution, and racing connection attempts.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::net::TcpStream;

/// Delay before the next candidate is tried in parallel (the Connection Attempt Delay of RFC 8305, section 5).
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(300);
/// Interval between retries while the process has no free file descriptor.
const DESCRIPTOR_WAIT: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    host: String,
    port: u16,
}

impl Address {
    pub(super) fn of(uri: &http::Uri, default_port: u16) -> Option<Self> {
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').to_owned();
        Some(Self { host, port: uri.port_u16().unwrap_or(default_port) })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// `HOST:PORT`, with an IPv6 address in brackets (RFC 3986, section 3.2.2).
    pub(super) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Connects to whichever address of the host answers first.
    pub(super) async fn connect(&self, preference: &Preference) -> io::Result<TcpStream> {
        let addresses = tokio::net::lookup_host((self.host.as_str(), self.port)).await?.collect();
        connect_to_any(addresses, preference).await
    }
}

async fn connect_to_any(mut addresses: Vec<SocketAddr>, preference: &Preference) -> io::Result<TcpStream> {
    preference.order(&mut addresses);
    let connected = race(addresses, |address| async move { Ok((connect(address).await?, address)) }).await;
    let (stream, address) = connected.map_err(|mut failures: Vec<io::Error>| {
        failures.pop().unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
    })?;
    preference.answered(address);
    Ok(stream)
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    loop {
        match TcpStream::connect(address).await {
            // Not the server's fault. A descriptor becomes available when another connection closes.
            Err(error) if lacks_descriptors(&error) => tokio::time::sleep(DESCRIPTOR_WAIT).await,
            connected => return connected,
        }
    }
}

fn lacks_descriptors(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Which address of a host to try first: the last one that answered, or the one after it if that has failed since.
#[derive(Default)]
pub(super) struct Preference(Mutex<Option<Answered>>);

#[derive(Clone, Copy)]
struct Answered {
    address: SocketAddr,
    failed: bool,
}

impl Preference {
    fn order(&self, addresses: &mut [SocketAddr]) {
        let Some(last) = *self.0.lock().unwrap_or_else(PoisonError::into_inner) else { return };
        if let Some(place) = addresses.iter().position(|address| *address == last.address) {
            addresses.rotate_left(place + usize::from(last.failed));
        }
    }

    fn answered(&self, address: SocketAddr) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Answered { address, failed: false });
    }

    /// Reports that a connection to this address failed after it was established.
    pub(super) fn failed(&self, at: Option<SocketAddr>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_mut().filter(|last| Some(last.address) == at) {
            last.failed = true;
        }
    }
}

/// Starts the next candidate when the previous one fails or [`CONNECTION_ATTEMPT_DELAY`] has passed, until one
/// succeeds. Dropping the remaining attempts closes their connections.
pub(super) async fn race<C, T, E, F: Future<Output = Result<T, E>>>(
    candidates: Vec<C>,
    attempt: impl Fn(C) -> F,
) -> Result<T, Vec<E>> {
    let mut waiting = candidates.into_iter();
    let (mut attempts, mut failures) = (FuturesUnordered::new(), Vec::new());
    loop {
        if attempts.is_empty() {
            match waiting.next() {
                Some(candidate) => attempts.push(attempt(candidate)),
                None => return Err(failures),
            }
        }
        tokio::select! {
            Some(result) = attempts.next() => match result {
                Ok(won) => return Ok(won),
                Err(error) => {
                    failures.push(error);
                    attempts.extend(waiting.next().map(&attempt));
                }
            },
            () = tokio::time::sleep(CONNECTION_ATTEMPT_DELAY), if waiting.len() > 0 => {
                attempts.extend(waiting.next().map(&attempt));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpSocket};

    /// A listener with a full backlog: the kernel drops further SYNs.
    async fn black_hole() -> (TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(([127, 0, 0, 2], 0).into()).expect("bound");
        let listener = socket.listen(1).expect("listening");
        let (address, mut full) = (listener.local_addr().expect("an address"), Vec::new());
        while let Ok(connected) = tokio::time::timeout(CONNECTION_ATTEMPT_DELAY, TcpStream::connect(address)).await {
            full.push(connected.expect("connected"));
        }
        (listener, full)
    }

    /// Whether this network namespace has an unanswered connection attempt (SYN_SENT) to this address.
    fn is_connecting(to: SocketAddr) -> bool {
        let SocketAddr::V4(to) = to else { return false };
        let wanted = format!("{:08X}:{:04X} 02 ", u32::from_le_bytes(to.ip().octets()), to.port());
        std::fs::read_to_string("/proc/self/net/tcp").expect("read").contains(&wanted)
    }

    #[tokio::test]
    async fn an_address_that_drops_packets_costs_one_attempt_delay_once() {
        let (hole, _full) = black_hole().await;
        let answers = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let (hole, good) = (hole.local_addr().expect("an address"), answers.local_addr().expect("an address"));
        let preference = Preference::default();
        let connect = || tokio::time::timeout(Duration::from_secs(2), connect_to_any(vec![hole, good], &preference));
        let racing = connect();
        tokio::pin!(racing);
        assert!(tokio::time::timeout(CONNECTION_ATTEMPT_DELAY / 2, &mut racing).await.is_err());
        assert!(is_connecting(hole), "the first address is tried alone at first");
        let stream = racing.await.expect("in time").expect("connected");
        assert_eq!(stream.peer_addr().expect("connected"), good);
        assert!(!is_connecting(hole), "the losing attempt has been dropped");
        let again = tokio::time::timeout(CONNECTION_ATTEMPT_DELAY / 2, connect()).await;
        assert!(again.is_ok(), "the address that answered is tried first");
    }

    #[test]
    fn a_failed_address_is_tried_last() {
        let [one, two, three] = [1, 2, 3].map(|last| SocketAddr::from(([192, 0, 2, last], 6443)));
        let (preference, ordered) = (Preference::default(), |preference: &Preference| {
            let mut addresses = vec![one, two, three];
            preference.order(&mut addresses);
            addresses
        });
        assert_eq!(ordered(&preference), [one, two, three]);
        preference.answered(two);
        assert_eq!(ordered(&preference), [two, three, one]);
        preference.failed(Some(one));
        assert_eq!(ordered(&preference), [two, three, one]);
        preference.failed(Some(two));
        assert_eq!(ordered(&preference), [three, one, two]);
        preference.answered(three);
        preference.failed(Some(three));
        assert_eq!(ordered(&preference), [one, two, three]);
    }
}
