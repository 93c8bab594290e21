//! What the nodes share, and the ports through which each of them sees it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use pintle_agent_core::rotation::{ApiFailure, SubmittedRequest};
use pintle_agent_core::{Template, UnixTime};
use pintle_plugins_api::PublicKey;
use rustix::io::Errno;

use super::control_plane::{ControlPlane, Server};
use super::device::{Condition, Device, NodeDevice};
use super::disk::{Disk, DiskCall};
use super::random::Random;
use super::time::{Timers, crash};
use crate::keys::{BackendThread, Keyring, Opener};
use crate::kubernetes::certificate_signing_requests::{Outcome, Standing, Watched};
use crate::kubernetes::port::{ApiClient, ApiServer, Caller};
use crate::world::Clock;

/// When simulations begin, in milliseconds since 1970.
const BEGINNING: i64 = 1_800_000_000_000;
/// One call in so many is the last before the process is killed, or the power goes.
const CALLS_TO_A_CRASH: u64 = 3000;

/// The names of the backends of each node; the second one is a token that all nodes share.
pub(super) const BACKENDS: [&str; 2] = ["file", "token"];

/// What goes wrong with a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum DiskTrouble {
    #[default]
    None,
    Full,
    Broken,
    ReadOnly,
}

/// Everything outside the processes.
pub(super) struct World {
    pub(super) timers: Arc<Timers>,
    inner: Mutex<Inner>,
}

pub(super) struct Inner {
    pub(super) random: Random,
    pub(super) control_plane: ControlPlane,
    pub(super) nodes: Vec<Surroundings>,
    /// Whether anything goes wrong at all.
    pub(super) hostile: bool,
    /// Until when every node looks around every ten seconds, as it does in fact.
    lively_until: u64,
    /// How often everything was seen.
    pub(super) visited: BTreeMap<String, u64>,
    /// A promise that was broken.
    pub(super) broken: Option<String>,
}

/// What surrounds one node.
pub(super) struct Surroundings {
    /// How far the wall clock is off, in milliseconds.
    pub(super) clock_off: Arc<AtomicI64>,
    pub(super) disk: Disk,
    pub(super) disk_trouble: DiskTrouble,
    pub(super) devices: [NodeDevice; 2],
}

impl World {
    pub(super) fn new(seed: u64, nodes: usize, life: Duration) -> Arc<Self> {
        let world = Arc::new(Self {
            timers: Arc::default(),
            inner: Mutex::new(Inner {
                random: Random::new(seed),
                control_plane: ControlPlane::new(life),
                nodes: Vec::new(),
                hostile: false,
                lively_until: 0,
                visited: BTreeMap::new(),
                broken: None,
            }),
        });
        let token = Arc::new(Mutex::new(Device::new(0, false)));
        for node in 0..nodes {
            let own = Arc::new(Mutex::new(Device::new(node as u64 + 1, true)));
            let for_faults = Arc::downgrade(&world);
            // Without the world, which may be locked by whoever writes.
            let clock_off = Arc::new(AtomicI64::new(0));
            let (timers, off) = (Arc::clone(&world.timers), Arc::clone(&clock_off));
            let faults = move |call: DiskCall, _: &std::path::Path| match for_faults.upgrade() {
                Some(world) => world.disk_call(node, call),
                None => Ok(()),
            };
            let disk = Disk::new(&["/state", "/pki", "/etc"], Arc::new(faults), move || {
                BEGINNING + i64::try_from(timers.now()).unwrap_or(i64::MAX) + off.load(Ordering::Relaxed)
            });
            let devices = [NodeDevice { device: own, node }, NodeDevice { device: Arc::clone(&token), node }];
            let surroundings = Surroundings { clock_off, disk, disk_trouble: DiskTrouble::None, devices };
            world.lock().nodes.push(surroundings);
        }
        world
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The true time, by which the control plane goes.
    pub(super) fn true_time(&self) -> UnixTime {
        UnixTime::from_milliseconds(BEGINNING + i64::try_from(self.timers.now()).unwrap_or(i64::MAX))
    }

    /// The time by a node's clock.
    pub(super) fn wall(&self, node: usize) -> UnixTime {
        let off = self.lock().nodes.get(node).map_or(0, |node| node.clock_off.load(Ordering::Relaxed));
        UnixTime::from_milliseconds(self.true_time().as_milliseconds() + off)
    }

    /// Something has changed: for a while everybody looks around as often as ever.
    pub(super) fn stir(&self) {
        self.lock().lively_until = self.timers.now() + 900_000;
        self.timers.wake_all();
    }

    /// A call of a node's process to the outside, which may be its last.
    fn port_call(&self, name: &str) {
        let last = {
            let mut inner = self.lock();
            let hostile = inner.hostile;
            let last = hostile && inner.random.one_in(CALLS_TO_A_CRASH);
            inner.visit(if last { format!("crash at {name}") } else { format!("call {name}") });
            last
        };
        if last {
            crash();
        }
    }

    fn disk_call(&self, node: usize, call: DiskCall) -> io::Result<()> {
        self.port_call(&format!("{call:?}"));
        let mut inner = self.lock();
        // While the world is being made there is no node yet.
        let trouble = inner.nodes.get(node).map_or(DiskTrouble::None, |node| node.disk_trouble);
        let errno = match trouble {
            DiskTrouble::Full if matches!(call, DiskCall::Create | DiskCall::Write | DiskCall::CreateDirectory) => {
                Errno::NOSPC
            }
            DiskTrouble::Broken if inner.random.one_in(3) => Errno::IO,
            DiskTrouble::ReadOnly if call.changes() => Errno::ROFS,
            _ => return Ok(()),
        };
        inner.visit(format!("disk {errno:?}"));
        Err(io::Error::from_raw_os_error(errno.raw_os_error()))
    }

    pub(super) fn visit(&self, what: impl Into<String>) {
        self.lock().visit(what);
    }
}

impl Inner {
    pub(super) fn visit(&mut self, what: impl Into<String>) {
        *self.visited.entry(what.into()).or_default() += 1;
    }

    pub(super) fn break_promise(&mut self, promise: &str, detail: impl std::fmt::Display) {
        self.broken.get_or_insert_with(|| format!("{promise}: {detail}"));
    }
}

/// A node's clocks.
pub(super) struct NodeClock {
    pub(super) world: Arc<World>,
    pub(super) node: usize,
}

impl Clock for NodeClock {
    fn now(&self) -> UnixTime {
        self.world.wall(self.node)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.world.timers.now())
    }

    fn sleep_until(&self, until: Option<UnixTime>) -> BoxFuture<'_, ()> {
        let longest = {
            let mut inner = self.world.lock();
            let lively = self.world.timers.now() < inner.lively_until;
            // In an idle world nothing would be seen more often.
            if lively { Duration::from_secs(10) } else { Duration::from_secs(600) + inner.random.within(HOUR * 12) }
        };
        let wait = until.map_or(longest, |until| longest.min(until.since(self.now())));
        let sleep = self.world.timers.sleep(wait.max(Duration::from_millis(1)));
        Box::pin(async move {
            let mut sleep = std::pin::pin!(sleep);
            let mut polled = false;
            // Whatever wakes it ends it.
            std::future::poll_fn(|context| match sleep.as_mut().poll(context) {
                std::task::Poll::Pending if !std::mem::replace(&mut polled, true) => std::task::Poll::Pending,
                _ => std::task::Poll::Ready(()),
            })
            .await;
        })
    }
}

pub(super) const HOUR: Duration = Duration::from_secs(3600);

/// The backends of a node, without threads.
pub(super) fn keyring(world: &Arc<World>, node: usize) -> Keyring {
    let devices = world.lock().nodes[node].devices.clone();
    Keyring::simulated(BACKENDS.into_iter().zip(devices).map(|(name, device)| {
        let (for_pace, of_pace) = (Arc::clone(world), device.clone());
        let pace = Box::new(move |deadline: Duration| {
            let (world, condition) = (Arc::clone(&for_pace), of_pace.condition());
            Box::pin(async move {
                world.port_call("backend");
                let takes = match condition {
                    Condition::Hangs => return never_within(&world, deadline).await,
                    Condition::Slow(takes) => takes,
                    _ => Duration::from_millis(5),
                };
                world.timers.sleep(takes.min(deadline)).await;
                takes <= deadline
            }) as BoxFuture<'static, bool>
        });
        let opener = Opener::new(move || Ok(Box::new(device.clone())));
        (name.to_owned(), BackendThread::simulated(name, opener, pace))
    }))
}

async fn never_within(world: &World, deadline: Duration) -> bool {
    world.visit("a backend hung");
    world.timers.sleep(deadline).await;
    false
}

/// The way to the API server from one node.
pub(super) struct Route {
    pub(super) world: Arc<World>,
    pub(super) node: usize,
    pub(super) keyring: Keyring,
}

impl ApiServer for Route {
    fn connect<'a>(&'a self, caller: &'a Caller) -> BoxFuture<'a, Result<Arc<dyn ApiClient>, ApiFailure>> {
        Box::pin(async move {
            self.world.port_call("connect");
            if let Caller::Certificate(credential) = caller {
                // The handshake signs; what fails in it looks like a server that cannot be reached.
                let signed = self.keyring.try_key(credential.key()).await;
                signed.map_err(|error| ApiFailure::Unreachable(format!("the handshake failed: {error}")))?;
            }
            let client = Client { world: Arc::clone(&self.world), node: self.node, caller: caller.clone() };
            Ok(Arc::new(client) as Arc<dyn ApiClient>)
        })
    }

    fn forget(&self, _: &Caller) {}

    fn bootstrap_changed(&self) -> bool {
        self.world.lock().random.one_in(50)
    }

    fn keep_only(&self, _: &Caller) {}
}

struct Client {
    world: Arc<World>,
    node: usize,
    caller: Caller,
}

impl Client {
    /// Any request: it takes a moment, and may not be answered as it should.
    async fn ask<T>(
        &self,
        name: &str,
        about_requests: bool,
        answer: impl FnOnce(&mut ControlPlane, UnixTime) -> T,
    ) -> Result<T, ApiFailure> {
        self.world.port_call(name);
        let server = self.world.lock().control_plane.server;
        let takes = if server == Server::Silent { Duration::from_secs(30) } else { Duration::from_millis(20) };
        self.world.timers.sleep(takes).await;
        let now = self.world.true_time();
        let mut inner = self.world.lock();
        let inner = &mut *inner;
        let condition = inner.control_plane.condition(about_requests);
        if condition.is_err() {
            inner.visit(format!("API server {:?}", inner.control_plane.server));
        }
        condition?;
        let accepted = match &self.caller {
            Caller::Bootstrap => inner.control_plane.bootstrap_accepted,
            Caller::Certificate(credential) => inner.control_plane.accepts(credential, now),
        };
        if !accepted {
            inner.visit("API server refused the caller");
            return Err(ApiFailure::Unauthorized("401 Unauthorized".to_owned()));
        }
        inner.control_plane.settle(now, &mut inner.random);
        Ok(answer(&mut inner.control_plane, now))
    }

    fn is_stale(&self) -> bool {
        let mut inner = self.world.lock();
        inner.control_plane.server == Server::Stale && inner.random.one_in(2)
    }
}

impl ApiClient for Client {
    fn server_minor(&self) -> BoxFuture<'_, Result<Option<u32>, ApiFailure>> {
        Box::pin(self.ask("server_minor", false, |_, _| Some(30)))
    }

    fn submit<'a>(
        &'a self,
        name: &'a str,
        certification_request: &'a str,
        template: &'a Template,
        _: &'a [&'a str],
    ) -> BoxFuture<'a, Result<Option<SubmittedRequest>, ApiFailure>> {
        Box::pin(async move {
            let public_key = public_key_of(certification_request);
            self.ask("submit", true, |control_plane, now| control_plane.submit(name, &public_key, template, now)).await
        })
    }

    fn find<'a>(
        &'a self,
        name: &'a str,
        public_key: &'a PublicKey,
        signer_name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Standing>, ApiFailure>> {
        Box::pin(async move {
            let found = self.ask("find", true, |control_plane, _| control_plane.find(name, public_key, signer_name));
            Ok(found.await?.filter(|_| !self.is_stale()))
        })
    }

    fn outcome<'a>(&'a self, request: &'a SubmittedRequest) -> BoxFuture<'a, Result<Outcome, ApiFailure>> {
        Box::pin(self.ask("outcome", true, |control_plane, _| control_plane.outcome(request)))
    }

    fn watch<'a>(
        &'a self,
        request: &'a SubmittedRequest,
        approved: bool,
        _: &'a str,
    ) -> BoxFuture<'a, Result<Watched, ApiFailure>> {
        Box::pin(async move {
            let server = self.world.lock().control_plane.server;
            if server == Server::DropsWatches {
                self.world.timers.sleep(Duration::from_millis(20)).await;
                return Err(ApiFailure::Server("it ends a watch at once, and without an event".to_owned()));
            }
            let begun = self.world.timers.now();
            while self.world.timers.now() - begun < 240_000 {
                let outcome = self.ask("watch", true, |control_plane, _| control_plane.outcome(request)).await?;
                if !matches!(&outcome, Outcome::Pending { approved: now, .. } if *now == approved) {
                    return Ok(Watched::Outcome(outcome));
                }
                self.world.timers.sleep(Duration::from_secs(60)).await;
            }
            Ok(Watched::Nothing)
        })
    }

    fn who_am_i(&self) -> BoxFuture<'_, Result<Option<String>, ApiFailure>> {
        Box::pin(self.ask("who_am_i", false, |_, _| None))
    }

    fn clock_ahead(&self) -> Option<i64> {
        let ahead = self.world.true_time().as_seconds() - self.world.wall(self.node).as_seconds();
        Some(ahead)
    }
}

fn public_key_of(certification_request: &str) -> PublicKey {
    use x509_parser::prelude::FromDer as _;
    let block = pem::parse(certification_request).expect("PEM");
    let (_, request) = x509_parser::certification_request::X509CertificationRequest::from_der(block.contents())
        .expect("a certification request");
    PublicKey::from_der(request.certification_request_info.subject_pki.raw).expect("a public key")
}
